"""A real server in this process: uvicorn on a free port of loopback, on a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import anthropic
import httpx
import openai
import pytest

from m2lite import Model
from m2lite.serve.app import create_app
from m2lite.serve.connection import Listener
from m2lite.serve.server import ServeOptions, Server


@dataclass
class Served:
    """A server under test."""

    server: Server
    url: str
    stack: ExitStack  # of its clients

    @cached_property
    def openai(self) -> openai.OpenAI:
        return self.stack.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0))

    @cached_property
    def anthropic(self) -> anthropic.Anthropic:
        return self.stack.enter_context(anthropic.Anthropic(base_url=self.url, api_key="none", max_retries=0))

    @cached_property
    def http(self) -> httpx.Client:
        return self.stack.enter_context(httpx.Client(base_url=self.url, timeout=60))


@contextmanager
def serving(model: Model, send_buffer: int | None = None, **options: Any) -> Iterator[Served]:
    """`model` behind HTTP. It is not closed. `send_buffer`: bytes that the system takes before somebody reads them."""
    server = Server(model, ServeOptions(**options))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.listen()
        runner = Listener(create_app(server), server)
        thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            with ExitStack() as stack:
                yield Served(server, f"http://127.0.0.1:{listener.getsockname()[1]}", stack)
        finally:
            runner.should_exit = True
            thread.join()
            model.loop.scheduler.n_most = model.n_rows


Serve = Callable[..., Served]


@pytest.fixture
def serve(opened: Callable[[str], Model]) -> Iterator[Serve]:
    """Serve a model by its name in `opened`."""
    with ExitStack() as stack:
        yield lambda which, /, **options: stack.enter_context(serving(opened(which), **options))


@pytest.fixture(scope="session")
def tiny(bundled_model: Any) -> Iterator[Model]:
    with Model.open(bundled_model, sequences=4) as model:
        yield model


@pytest.fixture
def served(tiny: Model) -> Iterator[Served]:
    """m2-tiny behind HTTP."""
    tiny.loop.forget()
    with serving(tiny) as found:
        yield found
