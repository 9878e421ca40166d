"""The commands of the chat as one table. Knows the conversation, not the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from m2lite.decode.conversation import Conversation
from m2lite.decode.session import Stats
from m2lite.errors import UsageError


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Command:
    """`run` takes the conversation and the rest of the line, and returns what to tell the user."""

    run: Callable[[Conversation, str], str]
    arguments: str
    help: str


def run_command(conversation: Conversation, line: str) -> str:
    """Run a line that begins with a slash; an unknown command is an error and never reaches the model."""
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        raise UsageError(f"There is no command /{name}.", "/help lists them; a message that begins with / needs //.")
    return COMMANDS[name].run(conversation, rest.strip())


def _help(conversation: Conversation, rest: str) -> str:
    lines = [f"  /{name + ' ' + c.arguments:<16}{c.help}" for name, c in COMMANDS.items()]
    lines.append("  //...            a message that begins with /")
    lines.append("  Alt-Enter or Ctrl-J begins a new line, Ctrl-C stops an answer, Ctrl-D leaves")
    return "\n".join(lines)


def _clear(conversation: Conversation, rest: str) -> str:
    n_turns = conversation.n_turns
    conversation.clear()
    return f"forgot {n_turns} turns"


def _exit(conversation: Conversation, rest: str) -> str:
    raise Leave


def _system(conversation: Conversation, rest: str) -> str:
    if rest:
        conversation.set_system(rest)
        return "system message set"
    current = next((m["content"] for m in conversation.messages if m["role"] == "system"), None)
    return "the template's own system message is used" if current is None else str(current)


def _stats(conversation: Conversation, rest: str) -> str:
    session = conversation.session
    model = session.model
    lines = [
        f"model {model.path}",
        f"threads {model.n_threads} ({model.engine.layer})",
        f"context {len(session.tokens):,} of {model.ctx:,} tokens, KV {model.kv} {model.kv_bytes:,} bytes when full",
        model.engine.drafting.describe(),
        f"turns {conversation.n_turns}",
    ]
    if conversation.answer.tokens:
        lines.append("last answer: " + status_line(conversation))
    return "\n".join(lines)


def status_line(conversation: Conversation) -> str:
    """What the last answer cost: tokens and speeds that were measured, and how full the context is."""
    session = conversation.session
    stats: Stats = session.stats
    parts = [f"{stats.n_generated} tok"]
    if stats.tokens_per_s is not None:
        parts.append(f"{stats.tokens_per_s:.1f} tok/s")
    if stats.first_token_s is not None:
        parts.append(f"first {stats.first_token_s:.2f} s")
    if stats.prompt_tokens_per_s is not None:
        parts.append(f"prompt {stats.prompt_tokens_per_s:,.0f} tok/s ({stats.n_prompt - stats.n_reused} tok)")
    if stats.drafted is not None and stats.drafted.n_proposed:
        parts.append(_drafts(stats))
    if stats.traffic is not None and stats.traffic.hit_rate is not None:
        traffic = stats.traffic
        parts.append(f"experts {traffic.hit_rate:.0%} in memory, {traffic.read_bytes / 1e6:,.0f} MB read")
        parts.append(f"waited {traffic.stall_s:.1f} s for the disk")
    parts.append(f"ctx {100 * len(session.tokens) / session.model.ctx:.0f} %")
    return " · ".join(parts)


def _drafts(stats: Stats) -> str:
    """drafts 2.4 tok/step (91 % 84 % 80 % right), 1.2 s saved."""
    drafted = stats.drafted
    assert drafted is not None
    right = " ".join(f"{a:.0%}" for a in drafted.acceptance if a is not None)
    text = f"drafts {drafted.tokens_per_step:.1f} tok/step ({right} right)"
    return text if stats.saved_s is None or abs(stats.saved_s) < 0.05 else f"{text}, {stats.saved_s:.1f} s saved"


COMMANDS: dict[str, Command] = {
    "help": Command(_help, "", "this list"),
    "clear": Command(_clear, "", "forget the conversation; the system message stays"),
    "system": Command(_system, "[TEXT]", "show or replace the system message"),
    "stats": Command(_stats, "", "model, context use, speed of the last answer"),
    "exit": Command(_exit, "", "leave, as Ctrl-D does"),
}
