"""Measurements on a running model: perplexity, KL divergence, importance, acceptance of drafts. Print nothing."""

from m2lite.measure.chunks import cut_chunks, read_tokens
from m2lite.measure.drafts import Acceptance, draft_acceptance
from m2lite.measure.importance import Collected, collect_importance, format_importance
from m2lite.measure.quality import Divergence, Perplexity, format_perplexity, perplexity

__all__ = [
    "Acceptance",
    "Collected",
    "Divergence",
    "Perplexity",
    "collect_importance",
    "cut_chunks",
    "draft_acceptance",
    "format_importance",
    "format_perplexity",
    "perplexity",
    "read_tokens",
]
