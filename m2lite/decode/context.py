"""How many positions a context has, and how many rows a call. Knows sizes, allocates nothing."""

from __future__ import annotations

from m2lite import machine
from m2lite.errors import ResourceError, UsageError
from m2lite.model.cache import PAGE, kv_layer_bytes
from m2lite.model.config import Config
from m2lite.system.byte_units import format_bytes

DEFAULT_CTX = 32 * 1024
MAX_ROWS = 2048  # of one forward call
MAX_CALL_MACS = 50e9  # of all rows in one product: a stop is heard between them, well under half a second


def kv_bytes_per_position(config: Config, kv: str, n_modules: int = 0) -> int:
    return (config.n_layers + n_modules) * kv_layer_bytes(config, kv)


def default_ctx(config: Config, kv_bytes: int) -> int:
    """The smaller of 32k, the model's limit and what a quarter of free memory holds, in whole pages.

    kv_bytes: of the KV cache for a position.
    """
    fits = machine.free_memory_bytes() // 4 // kv_bytes // PAGE * PAGE
    return min(DEFAULT_CTX, config.n_ctx_train, max(PAGE, fits))


def check_ctx(config: Config, ctx: int, kv_bytes: int) -> int:
    """`ctx`, if the model and this machine's memory allow it."""
    if not 1 <= ctx <= config.n_ctx_train:
        raise UsageError(
            f"A context of {ctx:,} was asked for; the model allows 1 to {config.n_ctx_train:,}.", "Change --ctx."
        )
    needed, free = ctx * kv_bytes, machine.free_memory_bytes()
    if needed > free:
        most = free // kv_bytes // PAGE * PAGE
        raise ResourceError(
            f"A context of {ctx:,} needs {format_bytes(needed)} of KV cache; {format_bytes(free)} of memory are free.",
            f"Use --ctx {most} or less.",
        )
    return ctx


def pool_positions(ctx: int, kv_bytes: int, sequences: int, pool: int | None = None) -> int:
    """KV positions of all sessions together, in whole pages: at least one session's.

    kv_bytes: of the KV cache for a position.
    """
    free = machine.free_memory_bytes()
    if pool is not None and pool * kv_bytes > free:
        raise ResourceError(
            f"{pool:,} positions need {format_bytes(pool * kv_bytes)} of KV cache; {format_bytes(free)} of memory are"
            " free.",
            f"Use {free // kv_bytes // PAGE * PAGE:,} or less.",
        )
    each = -(-ctx // PAGE) * PAGE if sequences > 1 else ctx
    fits = free // 4 // kv_bytes // PAGE * PAGE
    return pool or max(ctx, min(sequences * each, fits))


def chunk_rows(config: Config) -> int:
    """Rows of one forward call: bounded, so that a stop is heard soon."""
    return max(1, min(MAX_ROWS, int(MAX_CALL_MACS / (config.n_embd * config.n_q))))
