"""What is said about an answer, and about the model that gave it."""

from __future__ import annotations

from m2lite.dialogue.conversation import Conversation
from m2lite.engine.stats import Stats
from m2lite.system.byte_units import format_bytes


def describe(conversation: Conversation) -> str:
    session = conversation.session
    model = session.model
    lines = [
        f"model {model.path}",
        f"threads {model.n_threads} ({model.runner.layer})",
        f"context {len(session.tokens):,} of {model.ctx:,} tokens, "
        f"KV {model.kv} {format_bytes(model.kv_bytes)} when full",
        model.runner.drafting.describe(),
        f"turns {conversation.n_turns}",
    ]
    disk = model.loop.prefix_cache.disk
    if disk is not None:
        lines.append(f"prompts on disk: {format_bytes(disk.n_written)} written, {format_bytes(disk.n_read)} read")
    drafted = conversation.answer.stats.drafted
    if drafted is not None and drafted.n_modules_off:
        lines.append(f"{drafted.n_modules_off} MTP modules do not draft: the prompt was cached without their K and V")
    if conversation.answer.tokens:
        lines.append("last answer: " + status_line(conversation))
    return "\n".join(lines)


def status_line(conversation: Conversation) -> str:
    """What the last answer cost: tokens and speeds that were measured, and how full the context is."""
    session, stats = conversation.session, conversation.answer.stats
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
        parts.append(f"experts {traffic.hit_rate:.0%} in memory, {format_bytes(traffic.read_bytes)} read")
        parts.append(f"waited {traffic.stall_s:.1f} s for the disk")
    if stats.major_faults:
        parts.append(f"{stats.major_faults:,} page faults")
    parts.append(f"ctx {100 * len(session.tokens) / session.model.ctx:.0f} %")
    return " · ".join(parts)


def _drafts(stats: Stats) -> str:
    """drafts 2.4 tok/step (91 % 84 % 80 % right), 1.2 s saved."""
    drafted = stats.drafted
    assert drafted is not None
    right = " ".join(f"{a:.0%}" for a in drafted.acceptance if a is not None)
    text = f"drafts {drafted.tokens_per_step:.1f} tok/step ({right} right)"
    return text if stats.saved_s is None or abs(stats.saved_s) < 0.05 else f"{text}, {stats.saved_s:.1f} s saved"
