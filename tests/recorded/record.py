"""Cases, and what was said, as plain values; the files that hold them. Knows no class of the program."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

RUNS, LOGITS = (Path(__file__).with_name(name) for name in ("runs.json", "logits.json"))

Case = dict[str, Any]
Said = dict[str, Any]  # one answer: how it ended, its ids (a batch's line: its usage), thinking and content, logprobs
FIELDS = {"think_tokens": "think_budget", "stop_texts": "stop"}  # of a batch's line, where the name is another


class Runs(TypedDict):
    models: dict[str, str]  # hash of the weights, by name
    runs: dict[str, dict[str, Any]]  # by name: the case, what was said, what happened


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is none yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_runs(record: Runs) -> None:
    """A run a line."""
    compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    lines = ",\n".join(f"{compact(name)}: {compact(run)}" for name, run in record["runs"].items())
    RUNS.write_text(f'{{\n"models": {json.dumps(record["models"], indent=1)},\n"runs": {{\n{lines}\n}}\n}}\n')


def write_logits(table: Mapping[str, Mapping[str, str]]) -> None:
    LOGITS.write_text(json.dumps(table, indent=1) + "\n")


def parts_of(case: Case) -> list[dict[str, Any]]:
    """The steps of a chat or the requests of a batch."""
    return case["steps"] if "steps" in case else case["requests"]  # type: ignore[no-any-return]


def options_of(case: Case) -> list[dict[str, Any]]:
    """Of all answers, in order."""
    return [part["options"] for part in parts_of(case) if "options" in part]


def text_of(prompt: Sequence[Sequence[Any]]) -> str:
    """Of its parts, each so many times."""
    return "".join(text * times for text, times in prompt)


def messages_of(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    return request.get("messages") or [{"role": "user", "content": text_of(request["prompt"])}]


def line_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as a line of a batch's input."""
    body = {FIELDS.get(name, name): value for name, value in request["options"].items()}
    if "schema" in body:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": body.pop("schema")}}
    if "logprobs" in body:
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    return {"custom_id": request["id"], "body": body | {"messages": messages_of(request)}}


def said_in_line(body: Mapping[str, Any]) -> Said:
    """What the response in a line of a batch's output says; it holds no ids."""
    choice, usage = body["choices"][0], body["usage"]
    said = {"finish": choice["finish_reason"], "usage": [usage["prompt_tokens"], usage["completion_tokens"]]}
    said["text"] = [choice["message"].get("reasoning_content", ""), choice["message"]["content"]]
    if choice["logprobs"]:
        said["logprobs"] = [[round(entry["logprob"], 5)] for entry in choice["logprobs"]["content"]]
    return said
