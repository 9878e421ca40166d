"""What is turned away before anybody reads it, and what the other requests see of that: nothing."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from m2lite import Model
from m2lite.serve import connection, gate
from tests.serve.conftest import Serve, Served, serving

BODY: Any = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
CHAT = "/v1/chat/completions"


def test_hosts(serve: Serve) -> None:
    """A page of another name that resolves to this machine asks with its own name."""
    found = serve("reply", allowed_hosts=("box.local",))
    for host, status in (
        ("127.0.0.1", 200), ("localhost:99", 200), ("LOCALHOST", 200), ("[::1]:8080", 200), ("box.local:1", 200),
        ("evil.example", 403), ("evil.example:80", 403), ("localhost.evil.example", 403), ("", 403),
        ("127.0.0.1x", 403),
    ):  # fmt: skip
        assert found.http.get("/v1/models", headers={"host": host}).status_code == status, host


def test_origins(serve: Serve) -> None:
    found = serve("reply", allowed_origins=("https://chat.example",))
    for origin, status in (
        ("https://chat.example", 200), ("https://chat.example.evil", 403), ("http://chat.example", 403), ("null", 403),
        (found.url, 200), (found.url + "0", 403),
    ):  # fmt: skip
        assert found.http.post(CHAT, json=BODY, headers={"origin": origin}).status_code == status, origin
    answer = found.http.post(CHAT, json=BODY, headers={"origin": "https://chat.example"})
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    asks = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    allowed = found.http.options(CHAT, headers=asks)
    assert allowed.status_code == 204 and "POST" in allowed.headers["access-control-allow-methods"]
    assert found.http.options(CHAT, headers=asks | {"origin": "https://evil.example"}).status_code == 403


def test_keys(serve: Serve) -> None:
    found = serve("reply", api_keys=("one", "two"))
    for headers, status in (
        ({}, 401), ({"authorization": "Bearer one"}, 200), ({"authorization": "bearer two"}, 200),
        ({"authorization": "Bearer on"}, 401), ({"authorization": "one"}, 401), ({"x-api-key": "two"}, 200),
        ({"x-api-key": "ü".encode()}, 401),
    ):  # fmt: skip
        assert found.http.get("/v1/models", headers=headers).status_code == status, headers
    assert found.http.get("/health").status_code == 200
    assert found.http.post("/v1/messages", json={}).json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("text/plain", b"{}", 415, "unsupported_media_type"),
        ("", b"{}", 415, "unsupported_media_type"),
        ("application/json", b"", 400, "invalid_json"),
        ("application/json", b"{", 400, "invalid_json"),
        ("application/json", b"[]", 400, "invalid_json"),
        ("application/json", b"\xff", 400, "invalid_json"),
        ("application/json", b"[" * 100_000, 400, "invalid_json"),
        ("application/json", b'{"a": 1, "a": 2}', 400, "invalid_json"),
        ("application/json", b'{"a": NaN}', 400, "invalid_json"),
        ("application/json; charset=utf-8", b"{}", 400, "invalid_value"),
        ("application/json", b'{"x": "' + b"y" * 5000 + b'"}', 413, "request_too_large"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bodies(serve: Serve, kind: str, body: bytes, status: int, code: str) -> None:
    found = serve("reply", most_body_bytes=4096 if status == 413 else 1 << 20)
    answer = found.http.post(CHAT, content=body, headers={"content-type": kind} if kind else {})
    told = answer.json()["error"]
    assert (answer.status_code, told["code"]) == (status, code)
    assert told["request_id"] == answer.headers["x-request-id"]
    if status == 413:  # also where its length is not said before

        def chunks() -> Any:
            yield from (b'{"x": "', *[b"y" * 1000] * 5, b'"}')

        assert found.http.post(CHAT, content=chunks(), headers={"content-type": kind}).status_code == 413


def test_the_form_of_errors_follows_the_path(served: Served) -> None:
    for path, status in (("/v1/nothing", 404), ("/v1/messages/nothing", 404), (CHAT, 405)):
        answer = served.http.get(path)
        told = answer.json()
        assert answer.status_code == status
        assert (told.get("type") == "error") == path.startswith("/v1/messages")
        assert answer.headers["x-request-id"] in json.dumps(told)


def connect(found: Served) -> socket.socket:
    host, _, port = found.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)))


def read_all(stream: socket.socket) -> bytes:
    """Until the other side closes or cuts it off."""
    data = b""
    try:
        while chunk := stream.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass
    return data


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_slow_writers_are_cut_off(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head, and of a body. Others are answered meanwhile."""
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    monkeypatch.setattr(gate, "_SILENT_S", 0.2)
    with serving(tiny) as found, connect(found) as silent, connect(found) as half, connect(found) as slow:
        half.sendall(HEAD)
        slow.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert found.http.post(CHAT, json=BODY).status_code == 200
        assert read_all(silent) == read_all(half) == b""
        assert b" 408 " in read_all(slow).partition(b"\r\n")[0]


def test_a_slow_reader_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a stream and does not read it holds nothing for ever."""
    monkeypatch.setattr(connection, "SEND_S", 0.2)
    found = serve("endless", parallel=1, send_buffer=8192)
    body = json.dumps({**BODY, "stream": True, "max_tokens": 2000, "logprobs": True}).encode()
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        host, _, port = found.url.removeprefix("http://").partition(":")
        reader.connect((host, int(port)))
        reader.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        # One answer at a time: this one comes when the other has been cut off, or has ended unread.
        assert found.http.post(CHAT, json=BODY).status_code == 200
        while found.server.under_way:
            pass
        assert not read_all(reader).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_what_is_no_http(served: Served) -> None:
    with connect(served) as stream:
        stream.sendall(b"\x16\x03\x01 what is this\r\n\r\n")
        assert b" 400 " in read_all(stream)
    with connect(served) as stream:
        stream.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000)
        assert b" 400 " in read_all(stream)
    assert served.http.get("/health").status_code == 200
