"""How kernels are written and compiled: vector types with operators, memory, LLVM, the disk cache, threads.

Kernels, formats and the encoders of quant build on it. Sees addresses and lanes, never a format or a model.
"""
