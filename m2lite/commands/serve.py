"""`serve`: its options, and the process around the application."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from m2lite.commands.frame import DRAFT, MODEL, SAMPLING, THINKING, command, open_model
from m2lite.commands.options import answer_defaults
from m2lite.errors import M2liteError, UsageError
from m2lite.settings import Settings
from m2lite.system.paths import named_path
from m2lite.system.streams import note

if TYPE_CHECKING:
    from m2lite.serve.server import Server

_MOST_KEYS = 1 << 16  # bytes of the file of keys


@command(*MODEL, "kv_disk", *DRAFT, "template", *THINKING, *SAMPLING, has_result=False)
def serve(
    settings: Settings,
    *,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="0 takes a free one")] = 8080,
    api_key_file: Annotated[
        str | None, typer.Option("--api-key-file", metavar="FILE", help="Keys, one a line: requests must show one")
    ] = None,
    parallel: Annotated[int, typer.Option("--parallel", metavar="N", help="Answers at once")] = 4,
    queue: Annotated[int, typer.Option("--queue", metavar="N", help="Requests that may wait beyond those")] = 64,
    alias: Annotated[str | None, typer.Option("--alias", metavar="NAME", help="The model's name for clients")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option("--allowed-host", metavar="NAME", help="A name that this server is called by")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option("--allowed-origin", metavar="URL", help="A web page's origin that may ask")
    ] = None,
    strict_model: Annotated[bool, typer.Option("--strict-model", help="Refuse other models' names")] = False,
    warm: Annotated[
        str | None, typer.Option("--warm", metavar="FILE", help="Bodies of chat completions, one a line, to compute")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what is asked and answered")] = False,
    test_script: Annotated[str | None, typer.Option("--test-script", hidden=True)] = None,
) -> None:
    """Answer clients of OpenAI's interface over HTTP, until Ctrl-C."""
    from m2lite.serve.scripted import read_script
    from m2lite.serve.server import ServeOptions, Server
    from m2lite.serve.warm import read_bodies

    if parallel < 1 or queue < 0:
        raise UsageError(f"--parallel is {parallel} and --queue {queue}.", "Use 1 or more, and 0 or more.")
    keys = () if api_key_file is None else _read_keys(api_key_file)
    if not keys and host not in ("127.0.0.1", "localhost", "::1"):
        raise UsageError(
            f"--host {host} can be reached by other machines, and no key is asked for.", "Add --api-key-file."
        )
    defaults = answer_defaults(settings, None, None, default_seed=0)
    bodies = [] if warm is None else read_bodies(warm)
    listener = _listen(host, port)
    with listener, open_model(settings, sequences=parallel) as model:
        if settings.kv_disk != 0:
            model.use_disk(settings.kv_disk)
        options = ServeOptions(
            name=alias or "", parallel=parallel, queue=queue, is_strict=strict_model, api_keys=keys,
            allowed_hosts=(host, *(allowed_host or [])), allowed_origins=tuple(allowed_origin or []),
            logs_prompts=log_prompts, sampling=defaults.sampling, max_tokens=defaults.max_tokens,
            think_tokens=defaults.think_tokens, seed=settings.seed,
            script=None if test_script is None else read_script(test_script, model.tokenizer),
        )  # fmt: skip
        model.tune_when_idle()
        server = Server(model, options)
        for line in server.describe():
            note(line)
        _run(server, listener, bodies)


def _run(server: Server, listener: socket.socket, bodies: Sequence[dict[str, Any]]) -> None:
    from m2lite.serve.app import create_app
    from m2lite.serve.connection import BACKLOG, Listener
    from m2lite.signals import leave_afterwards

    process = Listener(create_app(server, bodies), server)
    listener.listen(BACKLOG)
    address, port = listener.getsockname()[:2]
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    note(f"a chat in the browser: {url}/")
    note(f"{url}/v1")
    with leave_afterwards(process.leave):
        process.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the address: before the model is opened, so that it is known whether it is free."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise M2liteError(
            f"{host}, port {port} cannot be listened at: {why}.", "Use another --host or --port."
        ) from None
    return listener


def _read_keys(name: str) -> tuple[str, ...]:
    try:
        with named_path(name).open("rb") as file:
            text = file.read(_MOST_KEYS + 1).decode("ascii")
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys or len(text) > _MOST_KEYS:
        raise UsageError(f"{name} holds {len(keys)} keys in {len(text):,} bytes.", "Write one key a line.")
    return keys
