"""Budgets of memory that do not depend on what else the test process has compiled and keeps."""

from __future__ import annotations

from m2lite import machine
from m2lite.model.residency import Budget


def budget_beyond(n_bytes: int) -> Budget:
    """As a user would give it to a fresh process: n_bytes more than this one has taken already."""
    return Budget(machine.anonymous_bytes() + n_bytes)
