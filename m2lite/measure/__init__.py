"""Measurements on a running model: perplexity, KL divergence, importance. Print nothing."""

from m2lite.measure.chunks import cut_chunks, read_tokens
from m2lite.measure.importance import Collected, collect_importance, format_importance
from m2lite.measure.quality import Divergence, Perplexity, format_perplexity, perplexity

__all__ = [
    "Collected",
    "Divergence",
    "Perplexity",
    "collect_importance",
    "cut_chunks",
    "format_importance",
    "format_perplexity",
    "perplexity",
    "read_tokens",
]
