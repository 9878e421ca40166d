"""Connections, and the process that listens: who sends or reads too slowly is cut off. Knows no requests."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from m2lite.serve.server import Server

HEAD_S = 20.0  # for the head of a request, from its first byte or the connection's begin
IDLE_S = 75.0  # between two requests
SEND_S = 60.0  # for which a client may take nothing of what is sent
GRACE_S = 5.0  # for which answers that are under way may go on once the server is to end
BACKLOG = 512
_MOST_CONNECTIONS = 1024
_MOST_AHEAD = 64 << 10  # bytes of a next request that came before the answer to this one


class Connection(H11Protocol):
    """A connection whose heads of requests come in time, and whose answers are read."""

    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_reading = self.cycle is None or self.cycle.response_complete
        if not is_reading:
            self._stop_head_timer()
        elif self._head_timer is None:  # bytes of a head come in: they do not prolong it
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _MOST_AHEAD:
            self.flow.resume_reading()  # else nobody would notice that a client leaves that asked for more already

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_send_timer()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # to close it would wait for whoever does not read
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_send_timer()
        super().connection_lost(exc)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None


class Listener(uvicorn.Server):
    """Serves an application until it is told to end: running answers then have a few seconds."""

    def __init__(self, app: Any, server: Server) -> None:
        self._server = server
        config = uvicorn.Config(
            app, http=Connection, ws="none", lifespan="on", loop="asyncio", log_config=None, access_log=False,
            server_header=False, timeout_keep_alive=int(IDLE_S), timeout_graceful_shutdown=int(GRACE_S) + 5,
            backlog=BACKLOG, limit_concurrency=_MOST_CONNECTIONS, h11_max_incomplete_event_size=64 << 10,
        )  # fmt: skip
        super().__init__(config)
        logger = logging.getLogger("uvicorn")  # the gate tells what there is to tell
        logger.propagate = False
        logger.handlers = [logging.NullHandler()]

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On a signal. A second one ends at once."""
        self._loop.call_soon_threadsafe(self._drain)
        super().handle_exit(sig, frame)

    def leave(self) -> None:
        """On the signal of a terminal that was closed."""
        if not self.should_exit:
            self.handle_exit(signal.SIGTERM, None)

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def _drain(self) -> None:
        self._server.drain()
        self._loop.call_later(GRACE_S, self._server.end_all)
