"""Public names, resolved on first use. Importing m2lite loads no NumPy and no Numba."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from m2lite.api import Model as Model
    from m2lite.engine.batch import Batch as Batch
    from m2lite.engine.request import Request as Request
    from m2lite.engine.session import Session as Session
    from m2lite.errors import BadModelError as BadModelError
    from m2lite.errors import ContextError as ContextError
    from m2lite.errors import M2liteError as M2liteError
    from m2lite.errors import ResourceError as ResourceError
    from m2lite.errors import UsageError as UsageError
    from m2lite.sampling.draw import Sampling as Sampling

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

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_HOME, "__version__"])
