"""Loops over numbers. Importing the package compiles nothing and imports no Numba."""
