"""The doors of the program, and what comes out of each for a case. All that the record knows of its classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2lite import Model, Sampling
from m2lite.batch.lines import line_stream
from m2lite.dialogue.conversation import Conversation, Turn
from m2lite.engine.answer import Completion
from m2lite.engine.batch import Batch
from m2lite.engine.request import Request
from m2lite.text.template import encode_chat
from tests.recorded.record import Case, Said, line_of, messages_of, said_in_line, text_of

Command = Callable[..., str]  # runs m2lite with these arguments, and gives its stdout
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty")
FLAGS = {
    "temperature": "--temp", "top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p", "seed": "--seed",
    "presence_penalty": "--presence-penalty", "frequency_penalty": "--frequency-penalty", "max_tokens": "-n",
    "think_tokens": "--think-budget", "logprobs": "--logprobs",
}  # fmt: skip


def run(case: Case, path: Path, folder: Path, command: Command) -> tuple[list[Said], set[str]]:
    """What the model in `path` says, answer by answer, and what happened on the way: "drafts right", "preemption".

    `folder` is an empty one for files of the command. What `auto` drafts does not count: it follows the clock.
    """
    if case["door"] == "generate":
        return _generate(case, path, folder, command)
    if case["door"] == "batch command":
        return _batch_command(case, path, folder, command), set()
    with Model.open(
        path, kv=case["kv"], ctx=case["ctx"], draft=case["draft"][0], draft_tokens=case["draft"][1],
        sequences=case.get("inflight", 1), pool=case.get("pool"),
    ) as model:  # fmt: skip
        return _chat(case, model) if case["door"] == "chat" else _batch(case, model)


def _happened(case: Case, n_right: int, n_again: int = 0) -> set[str]:
    is_drafted = case["draft"][0] in ("ngram", "mtp") and n_right > 0
    return {what for what, is_so in (("drafts right", is_drafted), ("preemption", n_again > 0)) if is_so}


def _options(given: Mapping[str, Any]) -> Any:
    rest = {name: value for name, value in given.items() if name not in SAMPLING}
    return {"sampling": Sampling(**{name: given[name] for name in SAMPLING if name in given}), **rest}


def _said(answer: Completion, n_most: int | None = None) -> Said:
    """Of an answer that was interrupted the first `n_most` ids: where exactly it stopped is no promise."""
    if n_most is not None and answer.finish_reason == "interrupted":
        return {"finish": "interrupted", "ids": answer.tokens[:n_most]}
    reply = answer.reply
    said = {"finish": answer.finish_reason, "ids": answer.tokens, "text": [reply.thinking, reply.content]}
    if answer.logprobs:
        noted = [each and (each.logprob, each.likeliest) for each in answer.logprobs]
        said["logprobs"] = [each and _noted(*each) for each in noted]
    return said


def _noted(logprob: float, likeliest: Sequence[Sequence[Any]]) -> list[Any]:
    return [round(logprob, 5), *(token for token, _ in likeliest)]


def _chat(case: Case, model: Model) -> tuple[list[Said], set[str]]:
    said, n_right = list[Said](), 0
    with model.session() as session:
        conversation = Conversation(session, case.get("system"), case.get("tools"))
        conversation.keep_thinking = case.get("keep_thinking", False)
        for step in case["steps"]:
            pieces = _step(conversation, step, _options(step.get("options", {})))
            if pieces is None:
                continue
            n_most = step.get("stop_after")
            for _ in pieces:
                if n_most is not None and len(conversation.answer.tokens) >= n_most:
                    pieces.close()
            said.append(_said(conversation.answer, n_most))
            drafted = conversation.answer.stats.drafted
            n_right += drafted.n_accepted if drafted else 0
    return said, _happened(case, n_right)


def _step(conversation: Conversation, step: Mapping[str, Any], options: Any) -> Any:
    """The pieces of an answer; None for what has none."""
    match step["do"]:
        case "undo":
            conversation.undo()
        case "restore":
            conversation.restore(step["messages"], Turn(finish_reason="stop"))
        case "ask":
            return conversation.ask(text_of(step["prompt"]), **options)
        case "results":
            return conversation.tell_results(step["results"], **options)
        case "resume" | "regenerate" as do:
            return getattr(conversation, do)(**options)
    return None


def _batch(case: Case, model: Model) -> tuple[list[Said], set[str]]:
    requests, tools = list[Request](), case.get("tools")
    for asked in case["requests"]:
        ids = encode_chat(model.tokenizer, model.template, messages_of(asked), tools)
        name, options = asked["id"], _options(asked["options"])
        if "schema" in asked["options"]:
            options["tool_choice"] = "none"  # the JSON was recorded when no call might come in its place
        requests.append(Request(key=name, prompt=ids, rng_stream=line_stream(name), tools=tools, **options))
    batch = Batch(model, case["inflight"])
    ends = {end.request.key: end for end in batch.run(requests)}
    assert all(end.completion for end in ends.values()), [end.error for end in ends.values()]
    said = [_said(ends[request.key].completion) for request in requests]  # type: ignore[arg-type]
    return said, _happened(case, batch.counts.n_accepted, batch.counts.n_preempted)


def _flags(case: Case) -> list[Any]:
    flags = ["--kv", case["kv"], "--ctx", case["ctx"], "--draft", case["draft"][0]]
    return flags + (["--draft-tokens", case["draft"][1]] if case["draft"][1] else [])


def _generate(case: Case, path: Path, folder: Path, command: Command) -> tuple[list[Said], set[str]]:
    (step,) = case["steps"]
    options = step["options"]
    flags = [part for name, flag in FLAGS.items() if name in options for part in (flag, options[name])]
    flags += [part for text in options.get("stop_texts", ()) for part in ("--stop", text)]
    if "schema" in options:
        (folder / "schema.json").write_text(json.dumps(options["schema"]))
        flags += ["--json-schema", folder / "schema.json"]
    flags += ["--no-template"] if case.get("no_template") else []
    found = json.loads(command("generate", path, "-p", text_of(step["prompt"]), "--json", *_flags(case), *flags))
    said = {"finish": found["finish_reason"], "ids": found["tokens"], "text": [found["thinking"], found["text"]]}
    if "logprobs" in found:
        said["logprobs"] = [each and _noted(each["logprob"], each["likeliest"]) for each in found["logprobs"]]
    return [said], _happened(case, (found["stats"]["draft"] or {"accepted": 0})["accepted"])


def _batch_command(case: Case, path: Path, folder: Path, command: Command) -> list[Said]:
    lines = [line_of(request) for request in case["requests"]]
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command("batch", source, "-o", out, "--model", path, "--inflight", case["inflight"], *_flags(case))
    found = {line["custom_id"]: line for line in map(json.loads, out.read_text().splitlines())}
    return [said_in_line(found[request["id"]]["response"]["body"]) for request in case["requests"]]
