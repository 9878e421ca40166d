"""The compiled kernels under the names that model/forward.py calls. reference.py has the same names in plain NumPy."""

from m2lite.kernels import layer
from m2lite.kernels.attention import attend, attend_address, attend_scratch_bytes
from m2lite.kernels.dot import tile_address, unpack_address
from m2lite.kernels.elementwise import add_rows, embed_rows, norm_rope, pack, pack_groups, rms_norm
from m2lite.kernels.matmul import matmul, matmul_three
from m2lite.kernels.pages import append_kv
from m2lite.kernels.router import combine, experts_down, experts_up, group_pairs, route
from m2lite.kernels.squares import add_squares
from m2lite.simd.jit import kernel

__all__ = [
    "add_rows",
    "add_squares",
    "append_kv",
    "attend",
    "attend_address",
    "attend_scratch_bytes",
    "combine",
    "embed_rows",
    "experts_down",
    "experts_up",
    "group_pairs",
    "matmul",
    "matmul_three",
    "norm_rope",
    "pack",
    "pack_groups",
    "rms_norm",
    "route",
    "steps",
    "tile_address",
    "unpack_address",
]

steps = layer.steps(globals(), kernel)
