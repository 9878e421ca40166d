"""The chat in a real pseudo-terminal: what is on the screen, what keys and signals do."""

from __future__ import annotations

import os
import re
import signal
import termios
import time
from pathlib import Path

import pytest

import tinymodel
from tests.chat.conftest import Start, StartRaw
from tests.chat.terminal import CTRL_C, CTRL_D, ENTER, NEWLINE
from tests.children import PATIENCE_S

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

Models = dict[str, Path]


def test_an_answer(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.ask("Hello")
    chat.wait_for(r"10 tok · [\d.]+ tok/s · first [\d.]+ s · prompt [\d,]+ tok/s \(\d+ tok\) · ctx 2 %")
    chat.wait_for_prompt()
    assert "\x1b[2mhm\x1b[0m" in chat.raw  # thinking is dimmed
    assert re.search(r"> Hello\n+hm\n+Fine é\n+10 tok · ", chat.screen), chat.screen
    chat.ask("Again")
    chat.wait_for("10 tok · ")
    chat.wait_for_prompt()
    chat.send(CTRL_D)
    assert chat.exit_code() == 0
    assert chat.screen.count("Fine é") == 2


def test_hidden_thinking(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], "--think", "hide")
    chat.ask("Hello")
    chat.wait_for("10 tok · ")
    assert "hm" not in chat.screen and "Fine é" in chat.screen


def test_no_colour(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], env={"NO_COLOR": "1"})
    chat.ask("Hello")
    chat.wait_for("10 tok · ")
    assert "\x1b[2m" not in chat.raw
    assert "thinking: hm" in chat.screen


def test_ctrl_c_stops_and_keeps(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"])
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefgabcdefg")
    chat.send(CTRL_C)
    chat.wait_for(r"— stopped \(kept (\d+) tokens\)")
    chat.wait_for_prompt()
    # the words so far are in the history, and the next turn goes on from there
    chat.ask("/stats")
    chat.wait_for("turns 1")
    chat.wait_for_prompt()
    chat.ask("More")
    chat.wait_for("abcdefgabcdefg")
    chat.send(CTRL_C)
    chat.wait_for(r"— stopped \(kept")
    chat.wait_for_prompt()
    chat.ask("/exit")
    assert chat.exit_code() == 0


def test_ctrl_c_while_thinking(start: Start, model_files: Models) -> None:
    chat = start(model_files["endless"])
    chat.ask("Hello")
    chat.wait_for("abcdefghabcdefgh")
    chat.send(CTRL_C)
    chat.wait_for(r"— stopped")
    assert "\x1b[0m" in chat.raw[chat.raw.rfind("\x1b[2ma") :]  # nothing stays dimmed
    chat.wait_for_prompt()


def test_ctrl_c_while_the_prompt_is_read(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"], "--max-tokens", "3")
    chat.send("\x1b[200~" + "many words " * 300 + "\x1b[201~" + ENTER)
    chat.send(CTRL_C)
    chat.wait_for(r"— stopped|Ctrl-D or /exit leaves")  # the latter if the three tokens were already out
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for(r"3 tok · ")


def test_second_ctrl_c_leaves(start: Start, model_files: Models, command_env: dict[str, str]) -> None:
    """Seen while the answer cannot be stopped in between: here, because both come at once."""
    chat = start(model_files["answer"])
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefg")
    chat.process.kill(signal.SIGINT)
    chat.process.kill(signal.SIGINT)
    chat.wait_for(r"— stopped|interrupted")
    if "interrupted" in chat.raw:
        assert chat.exit_code() == 130


def test_ctrl_c_at_the_prompt_hints(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.send(CTRL_C)
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.wait_for_prompt()
    chat.send("half a line" + CTRL_C)
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for("Fine é")


def test_commands(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    for line, answer in [
        ("/help", r"/clear +begin a new chat"),
        ("/frobnicate now", r"error: There is no command /frobnicate\."),
        ("/system", r"the template's own system message is used"),
        ("/system Be brief.", r"system message set"),
        ("/system", r"Be brief\."),
        ("//slash", r"Fine é"),
        ("q", r"Fine é"),
        ("/stats", r"turns 2"),
        ("/clear", r"forgot 2 turns; /load .* brings them back"),
        ("/stats", r"turns 0"),
    ]:
        chat.ask(line)
        chat.wait_for(answer)
        chat.wait_for_prompt()
    chat.ask("/exit")
    assert chat.exit_code() == 0


def test_several_lines(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.send("\x1b[200~one\ntwo\x1b[201~")
    chat.send(NEWLINE + "three")
    chat.send("\x1b\r" + "four" + ENTER)
    chat.wait_for("10 tok · ")
    chat.wait_for_prompt()
    chat.ask("/stats")
    chat.wait_for("turns 1")
    assert all(word in chat.screen for word in ("one", "two", "three", "four"))


def test_message_that_does_not_fit(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], "--ctx", "128")
    chat.ask("x" * 200)
    chat.wait_for(r"error: The prompt needs \d+ tokens; 128 are free of 128\.")
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for("Fine é")


def test_answer_that_reaches_the_limit(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"], "--ctx", "128")
    chat.ask("Hello")
    chat.wait_for("— cut off: the context of 128 tokens is full")
    chat.wait_for(r"ctx 10\d %")
    chat.wait_for_prompt()
    chat.ask("Hello")
    chat.wait_for(r"error: This message needs \d+ tokens; \d+ are free of 128\.")


def test_escapes_are_harmless(start: Start, tmp_path: Path) -> None:
    script = tinymodel.chain("\n", tinymodel.THOUGHT, b"a\x1b[2Jb\x07c\xc2\x9bd", tinymodel.END)
    chat = start(tinymodel.write_model(tmp_path / "escape.gguf", script))
    chat.ask("Hello")
    chat.wait_for("tok · ")
    assert "a␛[2Jb␇c\ufffdd" in chat.raw
    assert "> Hello" in chat.screen


def test_ctrl_c_is_not_written_into_the_answer(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"])
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefgabcdefg")
    chat.send(CTRL_C)
    chat.wait_for("— stopped")
    chat.wait_for_prompt()
    assert "^C" not in chat.raw and CTRL_C not in chat.raw


def test_ctrl_c_while_kernels_are_compiled(start_raw: StartRaw, model_files: Models, tmp_path: Path) -> None:
    """With a line that waits for them: the command ends at once, whatever the compiler does."""
    chat = start_raw(model_files["reply"], env={"M2LITE_CACHE_DIR": str(tmp_path)})
    chat.wait_for(r"compiling kernels for this processor, once: \d+ of \d+")
    chat.send(CTRL_C)
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.ask("Hello")
    chat.wait_for(r"compiling kernels for this processor, once: \d+ of \d+")
    chat.send(CTRL_C)
    chat.wait_for(r"m2lite: interrupted\.")
    assert chat.exit_code() == 130
    assert "Traceback" not in chat.raw and "loaded in" not in chat.raw


def test_the_prompt_is_there_while_kernels_are_compiled(
    start_raw: StartRaw, model_files: Models, tmp_path: Path
) -> None:
    """What is entered there is answered; who leaves meanwhile leaves at once."""
    env = {"M2LITE_CACHE_DIR": str(tmp_path)}
    for leave in (CTRL_D, "/exit" + ENTER):
        chat = start_raw(model_files["reply"], env=env)
        chat.wait_for("compiling kernels")
        chat.send("half a line" + "\b" * 11 + leave)
        assert chat.exit_code() == 0 and "loaded in" not in chat.raw
    chat = start_raw(model_files["reply"], env=env)
    chat.wait_for("compiling kernels")
    chat.ask("Hello")
    chat.wait_for("loaded in")
    chat.wait_for("10 tok · ")
    chat.wait_for_prompt()
    assert "compiling" not in chat.screen and re.search(r"hm\n+Fine é", chat.screen), chat.screen
    chat.ask("/stats")
    chat.wait_for("turns 1")
    chat.send(CTRL_D)
    assert chat.exit_code() == 0


def test_what_goes_wrong_behind_the_prompt_ends_it(start_raw: StartRaw, tmp_path: Path) -> None:
    """A file that breaks only once kernels are compiled: the prompt goes, and what is wrong is said."""
    broken = tinymodel.write_model(tmp_path / "broken.gguf", tinymodel.REPLY)
    chat = start_raw(broken, env={"M2LITE_CACHE_DIR": str(tmp_path)})
    chat.wait_for("compiling kernels")
    os.truncate(broken, broken.stat().st_size // 2)
    chat.wait_for("m2lite: .*broken.gguf")
    assert chat.exit_code() == 4
    assert "Traceback" not in chat.raw


CALLS = """
<invoke name="shell">
<parameter name="command">echo $((6 * 7)); printf '\\033[2Jx]~b]'</parameter>
</invoke>
"""


def test_tool_is_asked_for_runs_and_is_answered(start: Start, tmp_path: Path) -> None:
    """The model calls again and again: once it may, once it may not, and at the third the user stops."""
    script = tinymodel.chain("\n", tinymodel.THOUGHT, "I do", tinymodel.CALL, tinymodel.PHRASE, tinymodel.CALLED)
    script |= {tinymodel.CALLED: tinymodel.END}
    model = tinymodel.write_model(tmp_path / "calls.gguf", script, phrase=CALLS)
    chat = start(model, "--tools", "shell", "--tool-dir", str(tmp_path), "--no-save")
    chat.ask("What is it?")
    chat.wait_for("call: shell")
    chat.wait_for("run it\\? y: yes, a: yes, and shell from now on, n: no ")
    chat.send("y" + ENTER)
    chat.wait_for(r"42\r\n")
    assert "\033[2J" not in chat.raw and "␛[2Jx]~b]" in chat.screen  # what it printed is shown, not obeyed
    chat.wait_for("run it")
    chat.send("n" + ENTER)
    chat.wait_for("the user did not want this to run")
    chat.wait_for("run it")
    chat.send(CTRL_C)
    chat.wait_for("— the calls were left open")
    chat.wait_for_prompt()
    chat.ask("/context")
    chat.wait_for("turn 1: What is it")
    chat.wait_for_prompt()
    chat.ask("/exit")
    assert chat.exit_code() == 0


def test_compact(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    for text in ("one", "two", "three"):
        chat.ask(text)
        chat.wait_for("10 tok · ")
        chat.wait_for_prompt()
    for line, told in [
        ("/compact 9", r"error: There are 3 turns, and 9 of them stay"),
        ("/compact some", "error: /compact some: expected the number of turns"),
        ("/compact", r"10 tok · "),
        ("/context", r"turn 1: Summarise our conversation.*\s+.*turn 2: three"),
    ]:
        chat.ask(line)
        chat.wait_for(told)
        chat.wait_for_prompt()


def test_compact_that_is_stopped(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"], "-n", "20")
    for text in ("one", "two"):
        chat.ask(text)
        chat.wait_for("reached the limit")
        chat.wait_for_prompt()
    chat.ask("/set max-tokens 1000000")
    chat.wait_for_prompt()
    chat.ask("/compact")
    chat.wait_for("abcdefgabcdefg")
    chat.send(CTRL_C)
    chat.wait_for("— no summary came of it: the chat is as it was")
    chat.wait_for_prompt()
    chat.ask("/stats")
    chat.wait_for("turns 2")


def test_narrow_terminal_with_everything(start: Start, model_files: Models) -> None:
    """Folded thinking, Markdown, a stopped answer, lists of commands: in 20 columns nothing is lost or doubled."""
    chat = start(model_files["answer"], "--think", "hide", columns=20, rows=12)
    chat.ask("Hello")
    chat.wait_for("(abcdefg){12}".replace("(", "(?:"))
    chat.send(CTRL_C)
    chat.wait_for(r"— stopped \(kept")
    chat.wait_for_prompt()
    shown = chat.raw[chat.raw.index("abcdefg") : chat.raw.index("— stopped")]
    assert re.fullmatch(r"(abcdefg)+[a-g]*\r\n", shown)
    chat.ask("/help")
    chat.wait_for("leave, as Ctrl-D does")
    chat.wait_for_prompt()


def test_narrow_terminal(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"], columns=20, rows=10)
    chat.ask("a question that is longer than a line")
    chat.wait_for("Fine é")
    chat.wait_for_prompt()


@pytest.mark.parametrize("where", ["prompt", "answer"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_terminated(start: Start, model_files: Models, number: int, where: str) -> None:
    chat = start(model_files["answer"])
    if where == "answer":
        chat.ask("Hello")
        chat.wait_for("abcdefgabcdefg")
    chat.process.kill(number)
    assert chat.exit_code() == 143
    assert "Traceback" not in chat.raw, chat.raw[-3000:]


def test_terminated_while_the_history_is_read(start_raw: StartRaw, model_files: Models, tmp_path: Path) -> None:
    """At whatever moment the signal comes, no event loop tells it as an error."""
    history = tmp_path / "m2lite" / "history"
    history.parent.mkdir()
    history.write_text("\n# 2026-01-01 00:00:00.000000\n+a question\n" * 400_000)
    for wait in ("loaded in", r"\x1b\[\?2004h"):
        chat = start_raw(model_files["answer"], env={"XDG_STATE_HOME": str(tmp_path)})
        chat.wait_for(wait)
        chat.process.kill(signal.SIGTERM)
        assert chat.exit_code(30) == 143
        assert "Traceback" not in chat.raw and "Unhandled" not in chat.raw, chat.raw[-3000:]


def test_a_history_that_is_no_file(start: Start, model_files: Models, tmp_path: Path) -> None:
    (tmp_path / "m2lite").mkdir()
    os.mkfifo(tmp_path / "m2lite" / "history")
    chat = start(model_files["reply"], env={"XDG_STATE_HOME": str(tmp_path)})
    chat.ask("/exit")
    assert chat.exit_code() == 0


def test_keys_of_an_answers_time_wait_for_the_prompt(start: Start, model_files: Models) -> None:
    """Enter sends and Ctrl-D leaves, also when they were pressed before the prompt was there."""
    chat = start(model_files["answer"], "-n", "300")
    chat.send("Hello" + ENTER)
    chat.wait_for("abcdefgabcdefg")
    chat.send("/stats" + ENTER + "/set seed 7" + ENTER + CTRL_D)
    chat.wait_for("turns 1")
    chat.wait_for("seed 7")
    assert chat.exit_code() == 0


def test_ctrl_d_right_after_an_answer(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.ask("Hello")
    chat.wait_for("Fine é")
    chat.send(CTRL_D)
    chat.wait_for("10 tok · ")
    assert chat.exit_code() == 0
    assert re.search(r"Fine é\n10 tok · .*\n>", chat.screen)


def test_a_slip_ends_no_chat(start: Start, model_files: Models, tmp_path: Path) -> None:
    locked = tmp_path / "file"
    locked.write_text("")
    chat = start(model_files["reply"], "--session", "slips")
    for line, told in [
        ("/read ~nosuchuser/x", "there is no such home directory"),
        ("/read " + "x" * 300, "too long"),
        ("/read .", "cannot be read: Is a directory"),
        ("/export md ~nosuchuser/x", "there is no such home directory"),
        ("/export md " + "x" * 300, "too long"),
        (f"/export json {locked}/x", "error: "),
        ("/load ..", "cannot be the name of a chat"),
        ("/delete " + "x" * 300, "cannot be the name"),
        ("/save a/b", "cannot be the name"),
        ("/set temp nan", "expected a number from"),
        ("/set seed " + "9" * 5000, "expected a whole number"),
        ("/forget " + "9" * 5000, "error: "),
        ("/think " + "9" * 5000, "error: "),
        ("/compact ²", "error: "),
        ("/forget ²", "error: "),
        ("/think ²", "error: "),
        ("/help /help", "this list"),
        ("/", "There is no command /"),
    ]:
        chat.ask(line)
        chat.wait_for(told)
        chat.wait_for_prompt()
    assert "internal error" not in chat.raw
    chat.ask("Hello")
    chat.wait_for("Fine é")


def test_terminal_is_restored(start: Start, model_files: Models) -> None:
    chat = start(model_files["reply"])
    chat.process.kill(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE_S
    while termios.tcgetattr(chat.process.child_fd) != chat.modes:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_terminal_that_is_closed(start: Start, model_files: Models) -> None:
    chat = start(model_files["answer"])
    chat.ask("Hello")
    chat.wait_for("abcdefgabcdefg")
    chat.process.close(force=False)
    deadline = time.monotonic() + PATIENCE_S
    while chat.process.isalive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_history_is_private(start: Start, model_files: Models, tmp_path: Path) -> None:
    chat = start(model_files["reply"], env={"XDG_STATE_HOME": str(tmp_path)})
    chat.ask("my secret")
    chat.wait_for("Fine é")
    chat.wait_for_prompt()
    chat.send(CTRL_D)
    chat.exit_code()
    history = tmp_path / "m2lite" / "history"
    assert "my secret" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    assert history.parent.stat().st_mode & 0o777 == 0o700
