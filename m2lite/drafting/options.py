"""How a model was asked to draft, and the file of its prediction modules. Computes nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from m2lite.errors import BadModelError, UsageError
from m2lite.model.config import ARCHITECTURE
from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from m2lite.storage.sidecar import check_trunk, sidecar_path

MODES = ("auto", "mtp", "ngram", "off")
MOST_DRAFTS = 7  # of a sequence in a call: with the token before them 8 rows, which go through a layer in one kernel


def check_draft(mode: str, n_tokens: int | None) -> None:
    """Raises UsageError for what cannot be meant."""
    if mode not in MODES:
        raise UsageError(f"Draft mode {mode!r} does not exist.", f"Use one of: {', '.join(MODES)}.")
    if n_tokens is not None and not 1 <= n_tokens <= MOST_DRAFTS:
        raise UsageError(f"{n_tokens} draft tokens were asked for.", f"Use 1 to {MOST_DRAFTS}.")


@dataclass
class DraftOptions:
    """What was asked for when the model was opened."""

    mode: str = "off"
    n_tokens: int | None = None  # at most, of a sequence in a call
    sidecar: GGUFFile | None = None
    warning: str | None = None  # why the file beside the model is not used

    @property
    def n_modules(self) -> int:
        """That are used; 0 for a file that says nothing sensible, which is refused when it is bound."""
        if self.sidecar is None:
            return 0
        n = self.sidecar.metadata.get(f"{ARCHITECTURE}.nextn_predict_layers")
        return min(n, self.n_tokens or n, MOST_DRAFTS) if isinstance(n, int) and n > 0 else 0

    def describe(self) -> str:
        """For the start line."""
        lookup = "prompt lookup" if self.mode in ("auto", "ngram") else ""
        modules = f"{self.n_modules} MTP modules" if self.n_modules else ""
        found = " and ".join(part for part in (lookup, modules) if part)
        return f"drafts {self.mode}: {found}" if found else f"drafts {self.mode}"

    def drop_modules(self, why: str) -> None:
        """They are not used after all."""
        if self.sidecar is not None:
            self.warning = f"{self.sidecar.path.name} is not used: {why}"
            self.close()
            self.sidecar = None

    def close(self) -> None:
        if self.sidecar is not None:
            self.sidecar.close()


def open_drafting(
    gguf: GGUFFile, mode: str, n_tokens: int | None, mtp: str | os.PathLike[str] | None = None
) -> DraftOptions:
    """With the modules in the file `mtp`, or in the one beside the model.

    A file beside the model that belongs to another, or is damaged, is an error only if modules were asked for.
    """
    check_draft(mode, n_tokens)
    options = DraftOptions(mode, n_tokens)
    if mode not in ("auto", "mtp"):
        if mtp is not None:
            raise UsageError(f"--mtp was given with --draft {mode}.", "Leave one of them out.")
        return options
    path, is_wanted = sidecar_path(gguf.path) if mtp is None else Path(mtp), mode == "mtp" or mtp is not None
    if not path.exists():
        if is_wanted:
            raise UsageError(
                f"{path} does not exist, so there are no prediction modules.", "Use --mtp or --draft auto."
            )
        return options
    try:
        options.sidecar = open_gguf(path)
        check_trunk(options.sidecar, gguf)
    except BadModelError as error:
        options.close()
        if is_wanted:
            raise
        return DraftOptions(mode, n_tokens, warning=f"{path.name} is not used: {error}")
    return options
