"""Loops over numbers. Importing the package compiles nothing and imports no Numba."""

# Block formats that are multiplied as integers; dot.py holds their kernels, and checks that it does.
FAST_FORMATS = frozenset({"Q4_0", "Q8_0"})
