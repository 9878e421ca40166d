"""The block formats of weights: one table of rows, and their definitions and kernels in a file per family."""
