"""How many positions a context has, and how many rows a call. Knows sizes, allocates nothing."""

from __future__ import annotations

from typing import NamedTuple

from m2lite import machine
from m2lite.errors import ContextError, ResourceError, UsageError
from m2lite.model.cache import PAGE, kv_layer_bytes
from m2lite.model.config import Config
from m2lite.settings import ModelOptions
from m2lite.system.byte_units import format_bytes

DEFAULT_CTX = 32 * 1024
MAX_ROWS = 2048  # of one forward call
MAX_CALL_MACS = 50e9  # of all rows in one product: a stop is heard between them, well under half a second


class Allocation(NamedTuple):
    """Of what is allocated when a model is opened."""

    n_positions: int  # of a sequence: the context
    n_pool: int  # positions of all sequences together
    n_rows: int  # of a call


def choose_sizes(config: Config, options: ModelOptions, n_modules: int, sequences: int, pool: int | None) -> Allocation:
    """For `sequences` at once, prediction modules included. UsageError or ResourceError for what cannot be."""
    kv_bytes, ctx = kv_bytes_per_position(config, options["kv"], n_modules), options["ctx"]
    n_positions = default_ctx(config, kv_bytes) if ctx is None else check_ctx(config, ctx, kv_bytes)
    n_pool = pool_positions(n_positions, kv_bytes, sequences, pool)
    return Allocation(n_positions, n_pool, min(chunk_rows(config), n_pool))


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


def check_room(n_tokens: int, n_kept: int, limit: int, config: Config) -> None:
    """Raises ContextError unless `n_tokens` more fit behind the first `n_kept` of `limit` positions."""
    n_free = max(0, limit - n_kept)
    if n_tokens > n_free:
        most = config.n_ctx_train
        larger = f", or use a larger context (the model allows {most:,})" if limit < most else ""
        raise ContextError(
            f"The prompt needs {n_tokens:,} tokens; {n_free:,} are free of {limit:,}.",
            f"Shorten it{larger}.",
            needed=n_tokens,
            free=n_free,
            limit=limit,
        )


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
