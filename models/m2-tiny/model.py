"""MiniMax-M2 in small, for training on a CPU. Knows tensors and documents packed end to end, not text or files.

The computation is transformers' MiniMaxM2ForCausalLM; `export.py --check` compares the two. Shapes: N tokens, H hidden,
E experts, F expert ffn, V vocabulary. Documents lie packed in one flat row of N tokens and never see each other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LENGTH_CLASSES = (48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Config:
    """Dimensions; the names are those of the Hugging Face config."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    rotary_dim: int = 32
    rope_theta: float = 5e6
    num_local_experts: int = 64
    num_experts_per_tok: int = 8
    intermediate_size: int = 128
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1024
    num_mtp_modules: int = 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


SHAPES = {  # wide: rows of 256 and more everywhere, so that blocks of 256 weights fit; for measuring formats, without modules
    "tiny": Config(),
    "wide": Config(
        hidden_size=512, num_hidden_layers=3, num_local_experts=16, num_experts_per_tok=4, intermediate_size=256
    ),
}


class Packed:
    """Documents end to end: tokens [N], positions [N], and for attention the rows of each length class."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        lengths = np.array([len(d) for d in documents])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.tokens = torch.from_numpy(np.concatenate(documents).astype(np.int64))
        self.n = len(self.tokens)
        positions = np.concatenate([np.arange(n) for n in lengths])
        self.positions = torch.from_numpy(positions)
        self.not_first = torch.from_numpy((positions > 0).astype(np.float32))[:, None]
        self.groups: list[tuple[Tensor, int]] = []
        back = np.zeros(self.n, np.int64)
        offset = 0
        classes = np.searchsorted(LENGTH_CLASSES, lengths)
        for c in np.unique(classes):
            width = LENGTH_CLASSES[c]
            members = np.nonzero(classes == c)[0]
            rows = np.zeros((len(members), width), np.int64)
            for r, m in enumerate(members):
                n = lengths[m]
                rows[r, :n] = np.arange(starts[m], starts[m] + n)
                back[starts[m] : starts[m] + n] = offset + r * width + np.arange(n)
            self.groups.append((torch.from_numpy(rows.reshape(-1)), width))
            offset += len(members) * width
        self.back = torch.from_numpy(back)  # flat padded row of each token


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in f32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope_tables(config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, rotary_dim / 2]."""
    inverse = 1.0 / (
        config.rope_theta ** (torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim)
    )
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float32)[:, None] * inverse
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """NeoX rotation of the first rotary_dim dims; x [..., heads, head_dim], cos and sin [..., 1, rotary_dim / 2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out [B, heads, L, d] of q [B, heads, L, d], k and v [B, kv, L, d]; faster than SDPA's backward on short rows."""
    b, heads, n, d = q.shape
    kv = k.shape[1]
    q = (q * d**-0.5).reshape(b * kv, heads // kv * n, d)
    k, v = k.reshape(b * kv, n, d), v.reshape(b * kv, n, d)
    future = torch.full((n, n), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, n, n) + future
    out = torch.bmm(torch.softmax(scores, -1).view(b * kv, -1, n), v)
    return out.view(b, heads, n, d)


ROW_BLOCK = 128  # an expert's rows are padded to this, so that oneDNN compiles few shapes


class Experts(torch.autograd.Function):
    """y[n] = sum_k weight[n, k] * w2[e] @ (silu(w1[e] @ x[n]) * (w3[e] @ x[n])), e = index[n, k]; w13 stacks w1 over w3.

    Assignments are sorted by expert, each expert's run padded to ROW_BLOCK with rows of weight zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        n, k = index.shape
        dtype, n_experts = x.dtype, w13.shape[0]
        w13, w2 = w13.to(dtype), w2.to(dtype)
        flat = index.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=n_experts)
        padded = (counts + ROW_BLOCK - 1) // ROW_BLOCK * ROW_BLOCK
        starts = padded.cumsum(0) - padded
        place = torch.arange(n * k) + (starts - (counts.cumsum(0) - counts))[flat[order]]
        inverse = torch.empty_like(order)
        inverse[order] = place
        total = int(padded.sum())
        token = torch.zeros(total, dtype=torch.int64)
        token[place] = order // k
        sorted_weight = torch.zeros(total, 1, dtype=dtype)
        sorted_weight[place, 0] = weight.reshape(-1)[order].to(dtype)
        runs = [(e, a, a + p) for e, (a, p) in enumerate(zip(starts.tolist(), padded.tolist(), strict=True)) if p]
        xs = x.index_select(0, token)
        both = torch.empty(total, w13.shape[1], dtype=dtype)
        for e, a, b in runs:
            torch.mm(xs[a:b], w13[e].t(), out=both[a:b])
        gate, up = both.chunk(2, -1)
        act = F.silu(gate).mul_(up)
        weighted = act * sorted_weight
        ys = torch.empty(total, x.shape[1], dtype=dtype)
        for e, a, b in runs:
            torch.mm(weighted[a:b], w2[e].t(), out=ys[a:b])
        ctx.runs, ctx.k = runs, k
        ctx.save_for_backward(xs, both, act, weighted, sorted_weight, token, inverse, w13, w2)
        return ys.index_select(0, inverse).view(n, k, -1).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        xs, both, act, weighted, sorted_weight, token, inverse, w13, w2 = ctx.saved_tensors
        runs, k, dtype = ctx.runs, ctx.k, xs.dtype
        dy = grads[0].to(dtype).index_select(0, token)
        # The padding rows repeat token 0: their activations are weighted zero, and their d_both is too.
        d_weighted = torch.empty_like(weighted)
        d_w2, d_w13 = torch.zeros_like(w2), torch.zeros_like(w13)
        for e, a, b in runs:
            torch.mm(dy[a:b], w2[e], out=d_weighted[a:b])
            torch.mm(dy[a:b].t(), weighted[a:b], out=d_w2[e])
        d_weight = (d_weighted * act).sum(-1, dtype=torch.float32).index_select(0, inverse).view(-1, k)
        d_act = d_weighted.mul_(sorted_weight)
        gate, up = both.chunk(2, -1)
        sig = torch.sigmoid(gate)
        silu = gate * sig
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, -1)
        torch.mul(d_act, silu, out=d_up)
        torch.mul(sig.addcmul_(silu, 1 - sig), up, out=d_gate)
        d_gate.mul_(d_act)
        dxs = torch.empty_like(xs)
        for e, a, b in runs:
            torch.mm(d_both[a:b], w13[e], out=dxs[a:b])
            torch.mm(d_both[a:b].t(), xs[a:b], out=d_w13[e])
        dx = dxs.index_select(0, inverse).view(-1, k, xs.shape[1]).sum(1)
        return dx, None, d_weight, d_w13.float(), d_w2.float()


class HeadLoss(torch.autograd.Function):
    """sum_n weight[n] * cross_entropy(head @ h[n], target[n]), in chunks; the gradient is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        head16 = head.to(h.dtype)
        dh, d_head = torch.empty_like(h), torch.zeros_like(head)
        total = torch.zeros((), dtype=torch.float32)
        for a in range(0, len(h), 1024):
            part, goal, w = h[a : a + 1024], target[a : a + 1024, None], weight[a : a + 1024, None]
            logits = (part @ head16.t()).float()
            top = logits.amax(1, keepdim=True)
            logits.sub_(top)
            picked = logits.gather(1, goal)
            logits.exp_()
            norm = logits.sum(1, keepdim=True)
            total += ((norm.log() - picked) * w).sum()
            logits.mul_(w / norm)
            logits.scatter_add_(1, goal, -w)
            grad = logits.to(h.dtype)
            dh[a : a + 1024] = grad @ head16
            d_head += grad.t() @ part
        ctx.save_for_backward(dh, d_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dh, d_head = ctx.saved_tensors
        return dh * grads[0], d_head * grads[0], None, None


class Layer(nn.Module):
    """One M2 layer: attention with whole-vector QK norm and partial RoPE, then the mixture of experts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, h = config, config.hidden_size
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.config = config
        self.attn_norm = nn.Parameter(torch.ones(h))
        self.ffn_norm = nn.Parameter(torch.ones(h))
        self.q_norm = nn.Parameter(torch.ones(q_dim))
        self.k_norm = nn.Parameter(torch.ones(kv_dim))
        self.wq = nn.Parameter(torch.randn(q_dim, h) * h**-0.5)
        self.wk = nn.Parameter(torch.randn(kv_dim, h) * h**-0.5)
        self.wv = nn.Parameter(torch.randn(kv_dim, h) * h**-0.5)
        self.wo = nn.Parameter(torch.zeros(h, q_dim))
        self.gate = nn.Parameter(torch.randn(c.num_local_experts, h) * 0.02)
        self.w13 = nn.Parameter(torch.randn(c.num_local_experts, 2 * c.intermediate_size, h) * h**-0.5)
        self.w2 = nn.Parameter(torch.zeros(c.num_local_experts, h, c.intermediate_size))
        self.register_buffer("bias", torch.zeros(c.num_local_experts))
        self.load: Tensor | None = None  # tokens per expert since the last balancing step

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q [..., heads, d], k and v [..., kv_heads, d] of the normed input; cos and sin [..., rotary_dim / 2]."""
        c = self.config
        h = rms_norm(x, self.attn_norm, c.rms_norm_eps).to(dtype)
        lead = x.shape[:-1]
        q = rms_norm(F.linear(h, self.wq.to(dtype)), self.q_norm, c.rms_norm_eps).view(*lead, -1, c.head_dim)
        k = rms_norm(F.linear(h, self.wk.to(dtype)), self.k_norm, c.rms_norm_eps).view(*lead, -1, c.head_dim)
        v = F.linear(h, self.wv.to(dtype)).view(*lead, -1, c.head_dim)
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        return rotate(q, cos, sin).to(dtype), rotate(k, cos, sin).to(dtype), v

    def attend(self, x: Tensor, packed: Packed, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """Causal attention inside each document; x [N, H]."""
        c = self.config
        q, k, v = self.qkv(x, cos, sin, dtype)
        widths = [t.shape[1] for t in (q, k, v)]
        qkv = torch.cat([q, k, v], 1).view(packed.n, -1)
        outs = []
        for rows, width in packed.groups:
            part = qkv.index_select(0, rows).view(-1, width, sum(widths), c.head_dim).transpose(1, 2)
            pq, pk, pv = part.split(widths, 1)
            out = causal_attention(pq, pk, pv)
            outs.append(out.transpose(1, 2).reshape(-1, widths[0] * c.head_dim))
        return F.linear(torch.cat(outs).index_select(0, packed.back), self.wo.to(dtype))

    def experts(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The mixture of experts of x [N, H]: the bias selects, the sigmoid scores weigh."""
        c = self.config
        h = rms_norm(x, self.ffn_norm, c.rms_norm_eps)
        scores = torch.sigmoid(F.linear(h, self.gate))
        index = torch.topk(scores.detach() + self.bias, c.num_experts_per_tok, dim=-1, sorted=False).indices
        weight = scores.gather(1, index)
        weight = weight / weight.sum(-1, keepdim=True)
        if self.training:
            load = torch.bincount(index.reshape(-1), minlength=c.num_local_experts).float()
            self.load = load if self.load is None else self.load + load
        return Experts.apply(h.to(dtype), index, weight, self.w13, self.w2)

    def forward(self, x: Tensor, packed: Packed, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        x = x + self.attend(x, packed, cos, sin, dtype)
        return x + self.experts(x, dtype)

    @torch.no_grad()
    def balance(self, speed: float) -> float:
        """Nudge the routing bias by the sign of the load error; returns max load / mean load."""
        if self.load is None:
            return 1.0
        mean = self.load.mean()
        self.bias += speed * torch.sign(mean - self.load)
        worst = float(self.load.max() / mean)
        self.load = None
        return worst


class MtpModule(nn.Module):
    """One prediction module: eh_proj over [enorm(embedding), hnorm(hidden of the step before)], an M2 layer, a norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        h = config.hidden_size
        self.config = config
        self.enorm = nn.Parameter(torch.ones(h))
        self.hnorm = nn.Parameter(torch.ones(h))
        self.eh_proj = nn.Parameter(torch.randn(h, 2 * h) * (2 * h) ** -0.5)
        self.final_norm = nn.Parameter(torch.ones(h))
        self.layer = Layer(config)

    def forward(
        self, embedded: Tensor, previous: Tensor, packed: Packed, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """g_k[t] from the embedding of x_t and previous = g_{k-1}. At position 0 both inputs are zero vectors."""
        shifted = torch.cat([torch.zeros_like(previous[:1]), previous[:-1]]) * packed.not_first
        eps = self.config.rms_norm_eps
        joined = torch.cat(
            [rms_norm(embedded * packed.not_first, self.enorm, eps), rms_norm(shifted, self.hnorm, eps)], -1
        )
        x = F.linear(joined.to(dtype), self.eh_proj.to(dtype)).float()
        return self.layer(x, packed, cos, sin, dtype)


class Model(nn.Module):
    """The trunk and its prediction modules; embedding and head are shared by all."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.bfloat16, n_mtp: int = 1) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.embed = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.3)
        self.head = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size) * 0.02)
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.mtp = nn.ModuleList(MtpModule(config) for _ in range(n_mtp))
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def all_layers(self) -> list[Layer]:
        """Trunk layers, then those of the prediction modules."""
        return [*self.layers, *(m.layer for m in self.mtp)]  # type: ignore[list-item,union-attr]

    def trunk(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Embeddings [N, H] and g_0 [N, H], the hidden state before the final norm."""
        embedded = self.embed[packed.tokens]
        cos, sin = self.cos[packed.positions], self.sin[packed.positions]
        x = embedded
        for layer in self.layers:
            x = layer(x, packed, cos, sin, self.dtype)
        return embedded, x

    def modules_hidden(self, embedded: Tensor, g0: Tensor, packed: Packed) -> list[Tensor]:
        """[g_1, g_2, ...], each [N, H]."""
        cos, sin = self.cos[packed.positions], self.sin[packed.positions]
        hidden, out = g0, []
        for module in self.mtp:
            hidden = module(embedded, hidden, packed, cos, sin, self.dtype)
            out.append(hidden)
        return out

    def logits(self, hidden: Tensor, norm: Tensor) -> Tensor:
        """Head of the normed hidden state, f32 [..., V]."""
        h = rms_norm(hidden, norm, self.config.rms_norm_eps).to(self.dtype)
        return F.linear(h, self.head.to(self.dtype)).float()

    def step(self, tokens: Tensor, positions: Tensor, cache: list[Tensor]) -> Tensor:
        """g_0 [B, T, H] of tokens [B, T] at positions [B, T]; keys and values go to cache[layer] [2, B, L, kv, d].

        A row's unused tail may hold anything: a key is seen only at or before its query's position.
        """
        b, t = tokens.shape
        x = self.embed[tokens]
        cos, sin = self.cos[positions], self.sin[positions]
        rows = torch.arange(b)[:, None]
        size = cache[0].shape[2]
        mask = (torch.arange(size)[None, None, :] <= positions[:, :, None])[:, None]
        repeat = self.config.num_attention_heads // self.config.num_key_value_heads
        for layer, kv in zip(self.layers, cache, strict=True):
            q, k, v = layer.qkv(x, cos, sin, self.dtype)  # type: ignore[operator]
            kv[0][rows, positions], kv[1][rows, positions] = k, v
            keys = kv[0].transpose(1, 2).repeat_interleave(repeat, 1)
            values = kv[1].transpose(1, 2).repeat_interleave(repeat, 1)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
            x = x + F.linear(out.transpose(1, 2).reshape(b, t, -1), layer.wo.to(self.dtype))  # type: ignore[operator,union-attr]
            x = x + layer.experts(x.reshape(b * t, -1), self.dtype).view(b, t, -1)  # type: ignore[operator]
        return x

    def new_cache(self, batch: int, size: int) -> list[Tensor]:
        """Empty KV cache for `batch` rows of `size` positions."""
        c = self.config
        return [torch.zeros(2, batch, size, c.num_key_value_heads, c.head_dim, dtype=self.dtype) for _ in self.layers]
