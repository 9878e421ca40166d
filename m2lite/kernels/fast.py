"""The compiled kernels under the names that model/forward.py calls. reference.py has the same names in plain NumPy."""

from m2lite.kernels import jit, layer, split
from m2lite.kernels.attention import attend, attend_address, attend_scratch_bytes
from m2lite.kernels.dot import tile_address, unpack_address
from m2lite.kernels.elementwise import add_rows, embed_rows, norm_rope, pack, pack_groups, rms_norm
from m2lite.kernels.matmul import matmul
from m2lite.kernels.pages import append_kv
from m2lite.kernels.router import combine, experts_down, experts_up, group_pairs, route
from m2lite.kernels.squares import add_squares

_for_kernels = {name: k.compiled if isinstance(k, split.Split) else k for name, k in globals().items()}
steps = layer.steps(_for_kernels, jit.kernel)
