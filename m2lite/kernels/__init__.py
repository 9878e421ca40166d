"""Loops over numbers. Importing the package compiles nothing and imports no Numba."""

import m2lite.system.numba_environment  # noqa: F401  # before Numba, whatever is imported first
