"""Public names, resolved on first use. Importing m2lite loads no NumPy and no Numba."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2lite.api import Model
    from m2lite.engine.batch import Batch
    from m2lite.engine.request import Request
    from m2lite.engine.session import Session
    from m2lite.errors import BadModelError, ContextError, M2liteError, ResourceError, UsageError
    from m2lite.sampling.draw import Sampling

__version__ = "0.1.0"

_HOME = {
    "Model": "m2lite.api",
    "Batch": "m2lite.engine.batch",
    "Request": "m2lite.engine.request",
    "Session": "m2lite.engine.session",
    "Sampling": "m2lite.sampling.draw",
    "M2liteError": "m2lite.errors",
    "UsageError": "m2lite.errors",
    "BadModelError": "m2lite.errors",
    "ResourceError": "m2lite.errors",
    "ContextError": "m2lite.errors",
}

__all__ = [
    "BadModelError",
    "Batch",
    "ContextError",
    "M2liteError",
    "Model",
    "Request",
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
