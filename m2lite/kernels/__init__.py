"""Loops over numbers. Importing the package compiles nothing and imports no Numba."""

# Block formats that are multiplied as integers; tiles.py holds what reads them, and dot.py checks that it does.
FAST_FORMATS = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"})
