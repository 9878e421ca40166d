"""Tools: what the model is told, what runs and within which limits, and the loop of calls and results."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import secrets
import shutil
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from m2lite import Model, Sampling, UsageError
from m2lite.chat import bounded
from m2lite.chat.chat import Chat
from m2lite.chat.lines import ask_line
from m2lite.chat.loop import _Talk
from m2lite.chat.tools import NAMES, Limits, describe_call, load_tools, run_tool
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.handle import Handle
from m2lite.engine.request import Request
from m2lite.signals import SecondInterrupt
from m2lite.text.template import encode_chat

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture
def limits(tmp_path: Path) -> Limits:
    (tmp_path / "work").mkdir()
    return Limits(tmp_path / "work", seconds=10, characters=200)


def run(limits: Limits, name: str, **arguments: Any) -> str:
    return run_tool(call(name, **arguments), limits, lambda: False)


def test_what_runs(limits: Limits) -> None:
    assert run(limits, "shell", command="pwd; echo no >&2; exit 3") == f"{limits.directory}\nno\n[exit code 3]"
    assert run(limits, "python", code="print(6 * 7)") == "42\n"
    assert run(limits, "shell", command="true") == "[no output]"
    assert run(limits, "shell", command="cat") == "[no output]"  # there is no input
    assert run(limits, "write_file", path="a/b.txt", content="é\n") == "3 bytes written to a/b.txt"
    assert (limits.directory / "a" / "b.txt").read_text() == "é\n"
    assert run(limits, "read_file", path="a/b.txt") == "é\n"
    assert run(limits, "read_file", path="none") == "error: none: No such file or directory"
    assert run(limits, "write_file", path="a", content="") == "error: a: is a directory"


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "link", "a\0b"])
def test_files_lie_in_the_directory(limits: Limits, path: str) -> None:
    (limits.directory.parent / "x").write_text("outside")
    (limits.directory / "link").symlink_to(limits.directory.parent / "x")
    for found in (run(limits, "read_file", path=path), run(limits, "write_file", path=path, content="y")):
        assert found.startswith("error: ") and ("outside of" in found or "zero byte" in found), found
    assert (limits.directory.parent / "x").read_text() == "outside"


def test_output_is_bounded(limits: Limits) -> None:
    found = run(limits, "shell", command="yes | head -c 50000000")
    assert found.startswith("y\ny\n") and found.endswith("[cut after 200 characters]") and len(found) < 300
    (limits.directory / "long").write_text("x" * 5000)
    assert run(limits, "read_file", path="long") == "x" * 200 + "\n[cut after 200 characters]"
    (limits.directory / "bytes").write_bytes(b"a\xff")
    assert run(limits, "read_file", path="bytes") == "a\ufffd"


def test_time_is_bounded_and_children_go_too(limits: Limits) -> None:
    """Who waited for what sleeps would wait longer than a test may take."""
    quick = Limits(limits.directory, 0.5, 200)
    found = run_tool(call("shell", command="echo begun; (sleep 5000; touch late) & sleep 5000"), quick, lambda: False)
    assert found.removeprefix("begun\n") == "[stopped after 0.5 s]"  # a shell may take longer to begin
    begun = limits.directory / "begun"
    command = "touch begun; sleep 5000"
    assert run_tool(call("shell", command=command), limits, begun.exists) == "[stopped by the user]"
    # a child in the background does not hold the answer up, and does not outlive it
    assert run(limits, "shell", command="sleep 5000 & echo done $!").startswith("done ")


def alive(mark: str) -> list[psutil.Process]:
    """Processes whose command line holds the mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and any(mark in word for word in process.cmdline()):
                found.append(process)
    return found


SURVIVORS = {  # what goes on behind a command that has ended, or does not end
    "of another session": "setsid sh -c 'sleep 600; : {}' & echo begun",
    "of another session, with no output": "setsid sh -c 'sleep 600; : {}' >/dev/null 2>&1 & echo begun",
    "twice away": "(setsid sh -c 'setsid sh -c \"sleep 600; : {}\" & exit' &) ; sleep 0.2; echo begun",
    "that ignores signals": "(trap '' TERM HUP INT; sleep 600; : {}) & echo begun",
    "stopped": "sh -c 'kill -STOP $$; : {}' & echo begun",
    "that prints for ever": "setsid sh -c 'yes {}' & echo begun",
}


@pytest.mark.skipif(shutil.which("setsid") is None, reason="needs setsid")
@pytest.mark.parametrize("case", SURVIVORS)
def test_no_process_is_left(limits: Limits, case: str) -> None:
    mark = f"m2lite-test-{secrets.token_hex(8)}"
    found = run(limits, "shell", command=SURVIVORS[case].format(mark))
    assert "begun" in found or "cut after" in found, found
    assert alive(mark) == []


def test_a_command_that_hangs_ends_in_time(limits: Limits) -> None:
    quick = Limits(limits.directory, 0.5, 200)
    for command in (
        "kill -STOP $$", "trap '' TERM HUP INT; echo a; sleep 600; sleep 600", "exec >&- 2>&-; sleep 600", "yes",
        "python3 -c 'import os, time; os.fork() or os.setsid(); time.sleep(600)'", "mkfifo f; cat f",
    ):  # fmt: skip
        found = run_tool(call("shell", command=command), quick, lambda: False)
        assert found.endswith("[stopped after 0.5 s]"), (command, found)
    found = run_tool(call("python", code="import os; os.close(1); os.close(2); os._exit(3)"), limits, lambda: False)
    assert found == "[exit code 3]"  # what closed its output is waited for


def test_files_that_are_none_are_refused(limits: Limits) -> None:
    folder = limits.directory
    os.mkfifo(folder / "fifo")
    (folder / "circle").symlink_to(folder / "circle")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
        for name in ("fifo", "socket"):
            assert run(limits, "read_file", path=name) == f"error: {name}: is no regular file"
            assert run(limits, "write_file", path=name, content="x") == f"error: {name}: is no regular file"
        assert stat.S_ISFIFO((folder / "fifo").stat().st_mode)
    for place in (Path("/dev"), Path("/proc")):
        outside = Limits(place, 5, 200)
        names = ("null", "zero", "tty") if place.name == "dev" else ("self",)
        for name in names:
            found = run_tool(call("read_file", path=name), outside, lambda: False)
            assert found.startswith(f"error: {name}: is "), found
    assert run(limits, "read_file", path="circle").startswith("error: ")
    assert run(limits, "read_file", path="a" * 5000).startswith("error: ")
    with (folder / "huge").open("wb") as file:
        file.truncate(1 << 40)
    assert run(limits, "read_file", path="huge").endswith("[cut after 200 characters]")


def test_what_hangs_in_the_system_is_left(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file on a network that has gone: the thread waits, the chat goes on."""
    released, is_stopped = threading.Event(), threading.Event()
    monkeypatch.setattr(bounded, "_GRACE_S", 0.1)
    monkeypatch.setattr(Path, "lstat", lambda path: released.wait())
    quick = Limits(limits.directory, 0.1, 200)
    arguments = {"path": "a", "content": "b"}
    found = run_tool(call("write_file", **arguments), quick, lambda: False)
    assert found == "error: write_file was not done after 0.1 s; it may still go on"
    is_stopped.set()
    found = run_tool(call("write_file", **arguments), limits, is_stopped.is_set)
    assert found == "error: write_file was stopped by the user; it may still go on"
    released.set()


def test_ctrl_c_twice_ends_the_command(limits: Limits) -> None:
    mark = f"m2lite-test-{secrets.token_hex(8)}"

    def leave() -> bool:
        if threading.current_thread() is threading.main_thread() and alive(mark):
            raise SecondInterrupt
        return False

    with pytest.raises(SecondInterrupt):
        run_tool(call("shell", command=f"sleep 600; : {mark}"), limits, leave)
    assert alive(mark) == []


def test_wrong_arguments_are_told_to_the_model(limits: Limits) -> None:
    assert run(limits, "shell") == "error: shell takes the strings command; got nothing"
    assert run(limits, "shell", command=3) == "error: shell takes the strings command; got command"
    assert run(limits, "write_file", path="a", content="b", mode="x").startswith("error: write_file takes the strings")
    assert run(limits, "shell", command="a\0b") == "error: the command holds a zero byte"


def test_sources(tmp_path: Path, limits: Limits) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([WEATHER]))
    tools = load_tools(["shell,read_file", str(path)], limits)
    assert [tool["function"]["name"] for tool in tools.schemas] == ["shell", "read_file", "weather"]
    assert set(tools.here) == {"shell", "read_file"}
    path.write_text(json.dumps({"tools": [WEATHER]}))
    assert len(load_tools([str(path)], limits).schemas) == 1
    named = WEATHER["function"] | {"name": "shell"}  # type: ignore[operator]
    path.write_text(json.dumps([named]))
    assert not load_tools([str(path)], limits).here  # another's tool, whatever its name
    for text, why in (
        ("{", "no JSON"), ("3", "no list of tools"), ("[3]", "has no name"), ("[{}]", "has no name"),
        (json.dumps([WEATHER, WEATHER]), "two tools with the name 'weather'"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(UsageError, match=why):
            load_tools([str(path)], limits)
    with pytest.raises(UsageError, match="No such file"):
        load_tools(["shell,rm"], limits)
    with pytest.raises(UsageError, match="is no directory"):
        load_tools(["shell"], Limits(tmp_path / "none"))
    assert set(NAMES) == {"shell", "python", "read_file", "write_file"}


def test_calls_are_shown_whole() -> None:
    assert describe_call(call("weather", town="Bern", days=2)) == "weather\n  town: Bern\n  days: 2"
    assert describe_call(call("python", code="a\nb")) == "python\n  code: \n    a\n    b"


@pytest.fixture(scope="module")
def tiny(bundled_model: Path) -> Iterator[Model]:
    with Model.open(bundled_model) as model:
        yield model


@contextmanager
def scripted(model: Model, *replies: str) -> Iterator[None]:
    """The model computes every token of these replies, and says them."""
    submit, left, end = model.submit, list(replies), model.tokenizer.stop_ids

    def say(request: Request) -> Handle:
        return submit(replace(request, script=[*model.tokenizer.encode(left.pop(0), control=True), *end]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "submit", say)
        yield


TWO_CALLS = """first I look
</think>

I will look.
<minimax:tool_call>
<invoke name="shell">
<parameter name="command">echo one]~b]; printf '\\033[2J'</parameter>
</invoke>
<invoke name="read_file">
<parameter name="path">notes</parameter>
</invoke>
</minimax:tool_call>"""


def talk(model: Model, limits: Limits, approve: str, *replies: str, max_rounds: int = 3) -> Chat:
    tools = load_tools(["shell,read_file"], limits)
    chat = Chat(
        Conversation(model.session(), None, tools.schemas), {"sampling": Sampling(seed=1)}, tools=tools,
        approve=approve, max_rounds=max_rounds,
    )  # fmt: skip
    with scripted(model, *replies):
        assert _Talk(chat).handle("What is there?") == 0
    return chat


def test_think_call_result_think(tiny: Model, limits: Limits, capsys: pytest.CaptureFixture[str]) -> None:
    (limits.directory / "notes").write_text("two")
    chat = talk(tiny, limits, "all", TWO_CALLS, "now I know\n</think>\n\nThere are one and two.")
    messages = chat.conversation.messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [c["function"]["name"] for c in messages[1]["tool_calls"]] == ["shell", "read_file"]
    assert messages[1]["reasoning_content"] == "first I look" and messages[1]["content"] == "I will look."
    assert [m["content"] for m in messages[2:4]] == ["one]~b]\n\033[2J", "two"]
    assert messages[4] == {
        "role": "assistant", "content": "There are one and two.", "reasoning_content": "now I know",
    }  # fmt: skip
    # the row is the template's, with the thinking of the tool loop, and what a tool says is inert
    row = encode_chat(tiny.tokenizer, tiny.template, messages[:4], chat.conversation.tools)
    assert chat.conversation.session.tokens[: len(row)] == row
    assert tiny.tokenizer.decode(row).count("first I look") == 1
    controls = [i for i in row if i in tiny.tokenizer.control_strings.values()]
    calm = [{**m, "content": "calm"} if m["role"] == "tool" else m for m in messages[:4]]
    again = encode_chat(tiny.tokenizer, tiny.template, calm, chat.conversation.tools)
    assert controls == [i for i in again if i in tiny.tokenizer.control_strings.values()]
    assert "call: shell" in capsys.readouterr().err


def test_calls_that_do_not_run(tiny: Model, limits: Limits) -> None:
    (limits.directory / "notes").write_text("two")
    for approve, told in (("never", "the user did not want"), ("ask", "the user did not want")):
        chat = talk(tiny, limits, approve, TWO_CALLS, "well\n</think>\n\nAll right.")
        results = [m["content"] for m in chat.conversation.messages if m["role"] == "tool"]
        assert len(results) == 2 and all(told in result for result in results)
    other = TWO_CALLS.replace('"shell"', '"python"').replace("command", "code")
    chat = talk(tiny, limits, "all", other, "well\n</think>\n\nAll right.")
    assert chat.conversation.messages[2]["content"] == "error: there is no tool python"


def reading(content: str = "", path: str = "notes") -> str:
    call = f'<invoke name="read_file">\n<parameter name="path">{path}</parameter>\n</invoke>\n'
    return f"hm\n</think>\n\n{content}\n<minimax:tool_call>\n{call}</minimax:tool_call>"


def test_the_same_call_again_and_again(tiny: Model, limits: Limits, capsys: pytest.CaptureFixture[str]) -> None:
    (limits.directory / "notes").write_text("two")
    (limits.directory / "other").write_text("two")
    end = "so\n</think>\n\nEnough."

    def n_rounds(*replies: str, **options: int) -> int:
        chat = talk(tiny, limits, "all", *replies, end, **options)
        told = "the same call gave the same result" in capsys.readouterr().err
        messages = chat.conversation.messages
        assert messages[-1]["role"] == ("tool" if told else "assistant")
        return sum(m["role"] == "tool" for m in messages) * (-1 if told else 1)

    same = reading()
    assert n_rounds(*[same] * 5) == -3
    assert n_rounds(*[same] * 5, max_rounds=1) == -1
    assert n_rounds(*[same] * 5, max_rounds=0) == 5
    assert n_rounds(same, same) == 2
    assert n_rounds(*[reading("I look.")] * 4) == 4  # it says something
    assert n_rounds(same, same, reading(path="other"), same, same) == 5


def test_a_stopped_round_goes_on(tiny: Model, limits: Limits) -> None:
    (limits.directory / "notes").write_text("two")
    tools = load_tools(["read_file"], limits)
    chat = Chat(
        Conversation(tiny.session(), None, tools.schemas), {"sampling": Sampling(seed=1)}, tools=tools, approve="all"
    )
    with scripted(tiny, *[reading()] * 3, "so\n</think>\n\nTwo."):
        talking = _Talk(chat)
        assert talking.handle("What is there?") == 0
        assert chat.conversation.messages[-1] == {"role": "tool", "content": "two"}
        assert talking.handle("/continue") == 0
    assert chat.conversation.messages[-1]["content"] == "Two."


def test_a_call_in_the_thinking_runs(tiny: Model, limits: Limits, capsys: pytest.CaptureFixture[str]) -> None:
    (limits.directory / "notes").write_text("two")
    inside = reading().replace("</think>\n\n", "")
    chat = talk(tiny, limits, "all", inside, "so\n</think>\n\nTwo.")
    roles = [message["role"] for message in chat.conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert chat.conversation.messages[1]["reasoning_content"].strip() == "hm"
    assert "called a tool inside its thinking" in capsys.readouterr().err


def test_asking(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, closefd=True) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        os.write(controller, b"no\n")  # before the question: no answer to it

        def answer() -> bool:
            os.write(controller, b"yes\n")
            return False

        assert ask_line("run it? ", answer) == "yes"
        stops = iter([False, True])
        assert ask_line("run it? ", lambda: next(stops)) == ""
    os.close(controller)
    assert "run it? " in capfd.readouterr().err
