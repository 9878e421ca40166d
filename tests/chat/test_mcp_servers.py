"""Tools of MCP servers: real ones are started, asked and ended; the model's calls are given."""

from __future__ import annotations

import importlib.util
import json
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from m2lite import M2liteError, Model, Sampling, UsageError
from m2lite.chat import mcp_servers as module
from m2lite.chat.chat import Chat
from m2lite.chat.loop import _Talk
from m2lite.chat.mcp_servers import McpServer, mcp_servers, with_servers
from m2lite.chat.store import SavedChat, read_session
from m2lite.chat.tools import Limits, Tools, load_tools
from m2lite.dialogue.conversation import Conversation
from tests import tinymodel
from tests.chat.conftest import Start
from tests.chat.terminal import CTRL_C, ENTER
from tests.chat.test_tools import alive, call, scripted
from tests.children import PATIENCE_S
from tests.conftest import Run

FOLDER = Path(__file__).resolve().parent

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason="the package mcp is not installed"),
    pytest.mark.slow,  # each starts processes that import it
]


def program(file: str, *arguments: str | Path) -> str:
    return shlex.join([sys.executable, str(FOLDER / file), *map(str, arguments)])


@pytest.fixture
def limits(tmp_path: Path) -> Limits:
    return Limits(tmp_path, seconds=60, characters=200)


@pytest.fixture
def server(limits: Limits) -> Iterator[McpServer]:
    with mcp_servers([program("tool_server.py", "demo", limits.directory)], limits) as [found]:
        yield found


def never() -> bool:
    return False


def wait_for(mark: Path) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not mark.exists():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_what_tools_give_back(server: McpServer) -> None:
    assert server.name == "demo"
    assert server.call("add", {"a": 20, "b": 22}, never) == "42"
    failed = server.call("fail", {}, never)
    assert failed.startswith("error: ") and "nothing to be had" in failed
    assert server.call("add", {"a": "x"}, never).startswith("error: ")
    assert server.call("none", {}, never).startswith("error: ")
    assert server.call("picture", {}, never) == "see\n[image/gif, which this model cannot read]"
    assert server.call("repeat", {"text": "xy", "times": 5000}, never) == "xy" * 100 + "\n[cut after 200 characters]"
    assert server.call("repeat", {"text": "", "times": 1}, never) in ("", "[no output]")


def test_a_call_that_is_stopped_is_cancelled(server: McpServer, limits: Limits) -> None:
    waits, cancelled = limits.directory / "waits", limits.directory / "cancelled"
    assert server.call("wait", {}, waits.exists) == "error: wait was stopped by the user; it may still go on"
    wait_for(cancelled)  # the server has heard of it, and goes on
    assert server.call("add", {"a": 1, "b": 1}, never) == "2"


def test_time_is_bounded(limits: Limits) -> None:
    quick = Limits(limits.directory, seconds=0.5)
    with mcp_servers([program("tool_server.py", "demo", limits.directory)], quick) as [server]:
        assert server.call("wait", {}, never) == "error: wait was not done after 0.5 s; it may still go on"


def test_a_server_that_dies(server: McpServer) -> None:
    for _ in range(2):
        found = server.call("leave", {}, never)
        assert found.startswith('error: the server demo has ended. It said: "demo runs'), found
        assert "\033" not in found and found.endswith('no more".')


def test_no_process_is_left(limits: Limits) -> None:
    mark = f"m2lite-test-{secrets.token_hex(8)}"
    with mcp_servers([program("tool_server.py", "demo", limits.directory)], limits) as [server]:
        pid = int((limits.directory / "demo.pid").read_text())
        assert psutil.pid_exists(pid)
        assert server.call("child", {"mark": mark}, never) == "begun"
        assert alive(mark)
    assert not psutil.pid_exists(pid) and not alive(mark)


def test_ended_although_the_chat_fails(limits: Limits) -> None:
    with pytest.raises(KeyboardInterrupt), mcp_servers([program("tool_server.py", "demo", limits.directory)], limits):
        pid = int((limits.directory / "demo.pid").read_text())
        raise KeyboardInterrupt
    assert not psutil.pid_exists(pid)


def test_an_old_server(limits: Limits, capfd: pytest.CaptureFixture[str]) -> None:
    with mcp_servers([program("old_tool_server.py")], limits) as [server]:
        tools = with_servers(Tools([], {}), [server])
        assert [tool["function"]["name"] for tool in tools.schemas] == ["echo"]
        assert tools.here["echo"](call("echo", text="a\n"), never) == "a\n"
    told = capfd.readouterr().err
    assert "old: tools echo\n" in told and "warning: the tool elsewhere of old is left out" in told


def test_names_that_are_there_twice(limits: Limits) -> None:
    commands = [program("tool_server.py", name, limits.directory) for name in ("my demo", "other", "other")]
    with mcp_servers([*commands, program("old_tool_server.py")], limits) as servers:
        tools = with_servers(load_tools(["shell"], limits), servers)
        names = [tool["function"]["name"] for tool in tools.schemas]
        assert {"shell", "my_demo_add", "other2_add", "other3_add", "echo"} <= set(names)
        assert len(set(names)) == len(names) and set(names) == set(tools.here)
        assert tools.here["other3_add"](call("other3_add", a=1, b=2), never) == "3"


def test_servers_that_do_not_start(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(command: str) -> None:
        with mcp_servers([command], limits):
            pass

    for command, why in [
        ("/none/there", "/none/there: No such file"), ("'", "No closing quotation"), ("", "names no program"),
        (str(limits.directory), "Permission denied"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=why):
            start(command)
    broken = shlex.join([sys.executable, "-c", "import sys; sys.exit('this is no server')"])
    with pytest.raises(M2liteError, match=r"did not start: .*It said: \"this is no server\""):
        start(broken)
    monkeypatch.setattr(module, "START_S", 0.5)
    mark = f"m2lite-test-{secrets.token_hex(8)}"
    with pytest.raises(M2liteError, match=r"did not start: not ready after 0\.5 s"):
        start(f"sh -c 'cat >/dev/null; : {mark}'")
    assert alive(mark) == []
    with pytest.raises(UsageError, match="is no directory"):
        with mcp_servers([broken], Limits(limits.directory / "none")):
            pass


def test_without_the_package(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(UsageError, match=r"needs the package mcp. pip install 'm2lite\[mcp\]'"):
        with mcp_servers(["true"], limits):
            pass


@pytest.fixture(scope="module")
def tiny(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """With m2-tiny's tokenizer, and a context in which the tools leave room."""
    shape = tinymodel.Shape(n_heads=2, n_kv_heads=1, n_vocab=4096)
    path = tinymodel.write_model(tmp_path_factory.mktemp("models") / "m.gguf", shape=shape, tokenizer=bundled_model)
    with Model.open(path) as model:
        yield model


def saying(name: str, **arguments: Any) -> str:
    values = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments.items())
    return f'hm\n</think>\n\n<minimax:tool_call>\n<invoke name="{name}">\n{values}</invoke>\n</minimax:tool_call>'


@contextmanager
def chatting(model: Model, limits: Limits, approve: str, name: str = "demo") -> Iterator[Chat]:
    """With the tools of a server."""
    with mcp_servers([program("tool_server.py", name, limits.directory)], limits) as servers:
        tools = with_servers(load_tools([], limits), servers)
        conversation = Conversation(model.session(), None, tools.schemas)
        chat = Chat(conversation, {"sampling": Sampling(seed=1)}, tools=tools, approve=approve)
        with ExitStack() as stack:
            stack.callback(chat.close)
            yield chat


END = "so\n</think>\n\nWell."


def test_calls_and_results_are_saved(
    tiny: Model, limits: Limits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with chatting(tiny, limits, "all") as chat:
        chat.open(SavedChat("sums"))
        with scripted(tiny, saying("add", a=20, b=22), saying("fail"), END):
            assert _Talk(chat).handle("What is the sum?") == 0
        path = chat.saved.path  # type: ignore[union-attr]
        messages = chat.conversation.messages
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 20, "b": 22}}
    assert messages[2]["content"] == "42" and "nothing to be had" in messages[4]["content"]
    assert json.loads(json.dumps(read_session(path).messages)) == json.loads(json.dumps(messages))


def test_who_says_yes(tiny: Model, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Yes counts for one call, always for one tool, and where nobody can be asked nothing runs."""
    said = iter(["n", "y", "a", "", "n"])
    asked = list[str]()

    def ask(question: str, stop: Any) -> str:
        asked.append(question)
        return next(said)

    add, fail = saying("add", a=1, b=2), saying("fail")
    with chatting(tiny, limits, "ask") as chat:
        with scripted(tiny, add, END):
            _Talk(chat).handle("What is the sum?")
        assert chat.conversation.messages[2]["content"] == "error: the user did not want this to run"
        monkeypatch.setattr("m2lite.chat.loop.ask_line", ask)
        monkeypatch.setattr("m2lite.chat.loop.stdin_is_terminal", lambda: True)
        chat.conversation.undo()
        replies = [add, add, add, saying("add", a=3, b=4), saying("add", a=5, b=6), fail, END]
        with scripted(tiny, *replies):
            _Talk(chat).handle("What is the sum?")
        results = [message["content"] for message in chat.conversation.messages if message["role"] == "tool"]
    refused = "error: the user did not want this to run"
    assert results == [refused, "3", "3", "7", "11", refused]
    assert asked == [f"run it? y: yes, a: yes, and {name} from now on, n: no " for name in ["add"] * 3 + ["fail"]]


def calling_model(path: Path, call: str) -> Path:
    """It says this call to whatever it is asked."""
    script = tinymodel.chain("\n", tinymodel.THOUGHT, "I do", tinymodel.CALL, tinymodel.PHRASE, tinymodel.CALLED)
    return tinymodel.write_model(path, script | {tinymodel.CALLED: tinymodel.END}, phrase=call)


def test_in_a_pipe(run_m2lite: Run, tmp_path: Path) -> None:
    """Where nobody can be asked, a call runs only if all may."""
    call = '\n<invoke name="add">\n<parameter name="a">20</parameter>\n<parameter name="b">22</parameter>\n</invoke>\n'
    model = calling_model(tmp_path / "calls.gguf", call)
    command = ["chat", model, "--mcp", program("tool_server.py", "demo", tmp_path)]
    for more, result in (([], "the user did not want this to run"), (["--approve", "all"], "\n42\n")):
        done = run_m2lite(*command, *more, stdin="What is it?\n")
        assert done.returncode == 0 and result in done.stderr, done.stderr
        assert ("nobody can be asked here" in done.stderr) == (not more)
    done = run_m2lite("chat", model, "--mcp", "/none/there", stdin="What is it?\n")
    assert done.returncode == 2 and "/none/there: No such file or directory" in done.stderr


def test_in_a_terminal(start: Start, tmp_path: Path) -> None:
    """Ctrl-C stops a call and not the chat; when that is terminated, the server has ended."""
    model = calling_model(tmp_path / "calls.gguf", '\n<invoke name="wait">\n</invoke>\n')
    chat = start(model, "--mcp", program("tool_server.py", "demo", tmp_path), "--no-save")
    assert "demo: tools add, fail, wait, repeat, picture, child, leave" in chat.screen
    for _ in range(2):
        chat.ask("What is it?")
        chat.wait_for("call: wait")
        chat.wait_for("run it")
        chat.send("y" + ENTER)
        wait_for(tmp_path / "waits")
        (tmp_path / "waits").unlink()
        chat.send(CTRL_C)
        chat.wait_for("— the calls were left open")
        chat.wait_for_prompt()
    pid = int((tmp_path / "demo.pid").read_text())
    assert psutil.pid_exists(pid)
    chat.process.kill(signal.SIGTERM)
    assert chat.exit_code() == 143
    assert not psutil.pid_exists(pid) and "Traceback" not in chat.raw
