"""Public names, resolved on first use. Importing m2lite loads no NumPy and no Numba."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2lite.decode.sampling import Sampling
    from m2lite.decode.session import Model, Session
    from m2lite.errors import BadModelError, ContextError, M2liteError, ResourceError, UsageError

__version__ = "0.1.0"

_HOME = {
    "Model": "m2lite.decode.session",
    "Session": "m2lite.decode.session",
    "Sampling": "m2lite.decode.sampling",
    "M2liteError": "m2lite.errors",
    "UsageError": "m2lite.errors",
    "BadModelError": "m2lite.errors",
    "ResourceError": "m2lite.errors",
    "ContextError": "m2lite.errors",
}

__all__ = [
    "BadModelError",
    "ContextError",
    "M2liteError",
    "Model",
    "ResourceError",
    "Sampling",
    "Session",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
