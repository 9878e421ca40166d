"""A server of the first years of MCP, written without the package: it knows `initialize` and no newer way to begin."""

from __future__ import annotations

import json
import sys

SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
BAD = {"type": "object", "properties": {"text": {"$ref": "https://example.com/schema.json"}}}
ANSWERS = {
    "initialize": {
        "protocolVersion": "2024-11-05", "capabilities": {"tools": {}}, "serverInfo": {"name": "old", "version": "1"},
    },
    "tools/list": {
        "tools": [
            {"name": "echo", "description": "The same", "inputSchema": SCHEMA},
            {"name": "elsewhere", "inputSchema": BAD},
        ]
    },
}  # fmt: skip

for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    answer = {"jsonrpc": "2.0", "id": message["id"]}
    method, asked = message["method"], message.get("params") or {}
    if method == "tools/call":
        answer["result"] = {"content": [{"type": "text", "text": asked["arguments"]["text"]}]}
    elif method in ANSWERS:
        answer["result"] = ANSWERS[method]
    else:
        answer["error"] = {"code": -32601, "message": f"no {method}"}
    print(json.dumps(answer), flush=True)
