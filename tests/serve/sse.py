"""Server-sent events as they are on the wire."""

from __future__ import annotations

import json
from typing import Any

import httpx


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[tuple[str | None, Any]]:
    """Each event's name and its JSON; comments are left out."""
    with http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    found = list[tuple[str | None, Any]]()
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        name = next((line[7:] for line in lines if line.startswith("event: ")), None)
        found += [
            (name, json.loads(line[6:])) for line in lines if line.startswith("data: ") and line != "data: [DONE]"
        ]
    return found
