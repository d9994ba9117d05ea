"""What the operators compute, from the formulas of the contracts, in the type of the tensors that come in (f32, or f64).

Written apart from the peers, so that a wrong peer is seen.  Scores are made for one head at a time and made again in the
backward pass, so that the largest cases fit.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import F, torch


def segment(function: Callable, *tensors):
    """`function` with nothing kept for the backward pass but its inputs."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *tensors, use_reentrant=False)


def softmax_heads(q, k, v, scale: float, hidden: Callable):
    """[B, N, H, E] from [B, N, H, E] and [B, M, H, E]; `hidden(b, scores, h)` gives the scores with unseen keys at -inf."""

    def one(qh, kh, vh, b: int, h: int):
        scores = hidden(b, scale * qh @ kh.t(), h)
        return torch.softmax(scores, -1).nan_to_num(0.0) @ vh

    samples = []
    for b in range(q.shape[0]):
        heads = [segment(one, q[b, :, h], k[b, :, h], v[b, :, h], b, h) for h in range(q.shape[2])]
        samples.append(torch.stack(heads, 1))
    return torch.stack(samples)


def attention(t: dict, dims: dict, p: dict):
    q, k, v = t["qkv"].unbind(2)
    return softmax_heads(q, k, v, p["scale"], lambda b, s, h: s)


def beyond(counts, b: int, scores):
    """The scores without the keys that sample `b` does not have."""
    if counts is None:
        return scores
    keys = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill(keys >= counts[b], float("-inf"))


def cross_attention(t: dict, dims: dict, p: dict):
    k, v = t["kv"].unbind(2)
    return softmax_heads(t["q"][:, :, 0], k, v, p["scale"], lambda b, s, h: beyond(t["counts"], b, s))


def relative_attention(t: dict, dims: dict, p: dict):
    q, k, v = t["qkv"].unbind(2)
    n = dims["N"]
    at = torch.arange(n, device=q.device)
    place = at[None] - at[:, None] + n - 1
    return softmax_heads(q, k, v, p["scale"], lambda b, s, h: beyond(t["counts"], b, s + t["bias"][place, h]))


def window_attention(t: dict, dims: dict, p: dict):
    q, k, v = t["qkv"].unbind(2)
    at = torch.arange(dims["N"], device=q.device)
    unseen = (at[None] - at[:, None]).abs() > dims["W"]
    return softmax_heads(q, k, v, p["scale"], lambda b, s, h: s.masked_fill(unseen, float("-inf")))


def neighborhood_attention(t: dict, dims: dict, p: dict):
    rows, columns, taps = dims["Gh"], dims["Gw"], dims["K"]
    q, k, v = t["qkv"].flatten(1, 2).unbind(2)

    def near(count: int):
        at = torch.arange(count, device=q.device)
        start = (at - (taps - 1) // 2).clamp(0, count - taps)[:, None]
        return (at[None] >= start) & (at[None] < start + taps)

    seen = (near(rows)[:, None, :, None] & near(columns)[None, :, None, :]).reshape(rows * columns, -1)
    y = softmax_heads(q, k, v, p["scale"], lambda b, s, h: s.masked_fill(~seen, float("-inf")))
    return y.unflatten(1, (rows, columns))


def linear_attention(t: dict, dims: dict, p: dict):
    q, k, v = t["qkv"].unbind(2)
    phi = torch.relu if int(p["map"]) else (lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()))
    q, k = phi(q), phi(k)
    state, total = torch.einsum("bjhd,bjhe->bhde", k, v), k.sum(1)
    norm = torch.einsum("bihd,bhd->bih", q, total) + p["eps"]
    return torch.einsum("bihd,bhde->bihe", q, state) / norm[..., None]


def normalised(x, eps: float):
    """Rows with mean 0 and variance 1."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred * centred).mean(-1, keepdim=True) + eps).sqrt()


def ln_modulate(t: dict, dims: dict, p: dict):
    shift, scale = t["modulation"][:, int(p["shift"])], t["modulation"][:, int(p["scale"])]
    return normalised(t["x"], p["eps"]) * (1 + scale[:, None]) + shift[:, None]


def gate_residual(t: dict, dims: dict, p: dict):
    return t["residual"] + torch.einsum("bd,bnd->bnd", t["modulation"][:, int(p["gate_row"])], t["branch"])


def rms_norm(t: dict, dims: dict, p: dict):
    u = t["x"]
    if t["gate"] is not None:
        gate = t["gate"][..., int(p["gate_offset"]) :][..., : dims["D"]]
        u = u * gate * torch.sigmoid(gate)
    return u / ((u * u).mean(-1, keepdim=True) + p["eps"]).sqrt() * t["weight"]


def qk_norm(t: dict, dims: dict, p: dict):
    q, k, v = t["x"].unbind(2)
    q = normalised(q, p["eps"]) * t["q_gamma"] + t["q_beta"]
    return torch.stack([q, normalised(k, p["eps"]) * t["k_gamma"] + t["k_beta"], v], 2)


def group_norm_silu(t: dict, dims: dict, p: dict, silu: bool | None = None):
    b, h, w, c = t["x"].shape
    groups = dims["G"]
    grouped = t["x"].reshape(b, h * w, groups, c // groups)
    if t.get("stats") is None:
        mean = grouped.mean((1, 3), keepdim=True)
        var = ((grouped - mean) ** 2).mean((1, 3), keepdim=True)
    else:
        mean, var = (s[:, None, :, None] for s in t["stats"].unbind(1))
    z = ((grouped - mean) / (var + p["eps"]).sqrt()).reshape(b, h, w, c) * t["gamma"] + t["beta"]
    return z * torch.sigmoid(z) if (p["silu"] if silu is None else silu) else z


def branch_deltas(t: dict, dims: dict, p: dict):
    return torch.stack([t["first"], t["second"]], 2) - t["x"][:, :, None]


def upsample(t: dict, dims: dict, p: dict):
    return t["x"].repeat_interleave(2, 1).repeat_interleave(2, 2)


def add_noise(t: dict, dims: dict, p: dict):
    return torch.einsum("b,bl->bl", t["coefs"][:, 0], t["x0"]) + torch.einsum("b,bl->bl", t["coefs"][:, 1], t["noise"])


def adamw(t: dict, dims: dict, p: dict):
    g = p["grad_scale"] * t["grad"]
    m = (1 - p["rate1"]) * t["m"] + p["rate1"] * g
    v = (1 - p["rate2"]) * t["v"] + p["rate2"] * g**2
    decayed = (1 - p["lr"] * p["weight_decay"]) * t["param"]
    return decayed - p["lr"] * (m / p["bias1"]) / ((v / p["bias2"]).sqrt() + p["eps"])


def axpy(t: dict, dims: dict, p: dict):
    return t["y"] + p["alpha"] * t["x"]


def shifted(x, weight, bias, lead: int):
    """bias + sum_j weight[c, j] x[t - lead + j]: x [B, N, C], zero outside the tokens."""
    if weight is None:
        return x
    n, y = x.shape[1], torch.zeros_like(x)
    for j in range(weight.shape[-1]):
        by = j - lead
        y = y + weight[:, j] * F.pad(x, (0, 0, max(-by, 0), max(by, 0)))[:, max(by, 0) :][:, :n]
    return y if bias is None else y + bias


def turned(x, count: int):
    """x [B, N, C] with its last `count` channels against the order of tokens."""
    keep = x.shape[-1] - count
    return torch.cat([x[..., :keep], x[..., keep:].flip(1)], -1)


def projections(t: dict, p: dict) -> list:
    weight, bias = t["short_weight"], t["short_bias"]
    pick = lambda v, i: None if v is None else v[i]
    back, lead = int(p["reversed"]), int(p["lead"])
    return [shifted(turned(x, back), pick(weight, i), pick(bias, i), lead) for i, x in enumerate(t["p"].unbind(2))]


def gated_conv(t: dict, dims: dict, p: dict):
    q, k, v = projections(t, p)
    y = q * shifted(k * v, t["inner_weight"], t["inner_bias"], int(p["lead"]))
    return turned(y, int(p["reversed"]))


def long_conv(t: dict, dims: dict, p: dict):
    q, k, v = projections(t, p)
    u, n, centre = k * v, dims["N"], int(p["centre"])
    # Twice as long as any index of the sum, in f64: no term wraps.
    size = 2 * (n + dims["L"])
    spectrum = torch.fft.rfft(u.double(), size, dim=1) * torch.fft.rfft(t["filter"].t().double(), size, dim=0)
    y = torch.fft.irfft(spectrum, size, dim=1)[:, centre : centre + n].to(u.dtype)
    return turned(q * (t["skip"] * u + y), int(p["reversed"]))


def conv_silu(t: dict, dims: dict, p: dict):
    first, back = int(p["offset"]), dims["C"] if p["reverse"] else 0
    x = turned(t["p"][..., first : first + dims["C"]], back)
    u = turned(shifted(x, t["weight"], t["bias"], dims["K"] - 1), back)
    return u * torch.sigmoid(u)


def window(x, down: int, across: int, rows: int, columns: int, stride: int = 1):
    """x [B, H, W, C] at (stride i + down, stride j + across), zero outside the image."""
    b, h, w, c = x.shape
    top, left = max(-down, 0), max(-across, 0)
    below, right = max((rows - 1) * stride + down + 1 - h, 0), max((columns - 1) * stride + across + 1 - w, 0)
    x = F.pad(x, (0, 0, left, right, top, below))
    return x[:, down + top :: stride, across + left :: stride][:, :rows, :columns]


def gated_conv_2d(t: dict, dims: dict, p: dict):
    rows, columns, taps = dims["Gh"], dims["Gw"], dims["K"]

    def conv(x, weight, bias):
        if weight is None:
            return x
        places = [(r, s) for r in range(taps) for s in range(taps)]
        y = sum(weight[:, r, s] * window(x, r - taps // 2, s - taps // 2, rows, columns) for r, s in places)
        return y if bias is None else y + bias

    pick = lambda v, i: None if v is None else v[i]
    q, k, v = (conv(x, pick(t["short_weight"], i), pick(t["short_bias"], i)) for i, x in enumerate(t["p"].unbind(3)))
    return q * conv(k * v, t["inner_weight"], t["inner_bias"])


def image_conv(x, filters, bias, rows: int, columns: int, top: int, left: int, stride: int = 1):
    """A sum over taps of products: x [B, H, W, C], filters [F, Kh, Kw, C]."""
    y = 0 if bias is None else bias
    for r in range(filters.shape[1]):
        for s in range(filters.shape[2]):
            y = y + window(x, r - top, s - left, rows, columns, stride) @ filters[:, r, s].t()
    return y


def conv2d(t: dict, dims: dict, p: dict):
    stride, top, left = (int(p[name]) for name in ("stride", "pad_h", "pad_w"))
    u = image_conv(t["x"], t["filters"], t["bias"], dims["Oh"], dims["Ow"], top, left, stride)
    return u.clamp(min=0) if p["relu"] else u


def norm_silu_conv2d(t: dict, dims: dict, p: dict):
    a = group_norm_silu(t, dims, p, silu=True)
    y = image_conv(a, t["filters"], t["bias"], dims["H"], dims["W"], dims["Kh"] // 2, dims["Kw"] // 2)
    return y if t["residual"] is None else y + t["residual"]


def kv_compress(t: dict, dims: dict, p: dict):
    taps, first, parts = dims["K"], int(p["first"]), []
    rows, columns = dims["Gh"] // taps, dims["Gw"] // taps
    for x in t["x"].unbind(3)[first : first + 2]:
        places = [(i, j) for i in range(taps) for j in range(taps)]
        c = t["bias"] + sum(t["weight"][:, i, j] * window(x, i, j, rows, columns, taps) for i, j in places)
        parts.append(normalised(c, p["eps"]) * t["gamma"] + t["beta"])
    return torch.stack(parts, 3)


def gemm(t: dict, dims: dict, p: dict, product: bool = False):
    x, w = t["x"], t["w"]
    if p.get("bf16"):
        x, w = x.bfloat16().to(x.dtype), w.bfloat16().to(w.dtype)
    u = torch.einsum("bnk,fk->bnf", x, w)
    if product:
        return u
    for name in ("bias", "pos"):
        u = u if t.get(name) is None else u + t[name]
    tanh_gelu = lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))
    u = [lambda v: v, tanh_gelu, lambda v: v * torch.sigmoid(v), torch.sin][int(p["act"])](u)
    if t["gate"] is not None:
        u = u * t["gate"][:, int(p["gate_row"])][:, None]
    return u if t["residual"] is None else t["residual"] + u


def mamba2(t: dict, dims: dict, p: dict):
    h, e, k, first = dims["H"], dims["E"], dims["K"], int(p["dt_offset"])
    x, into, out = t["xbc"].split([h * e, k, k], -1)
    steps = F.softplus(t["p"][..., first : first + h] + t["dt_bias"])
    if p["reverse"]:
        x, into, out, steps = (v.flip(1) for v in (x, into, out, steps))
    x = x.unflatten(-1, (h, e))
    decay = torch.exp(-t["a_log"].exp() * steps)

    def some(state, x, into, out, steps, decay):
        rows = []
        for i in range(x.shape[1]):
            wide = (steps[:, i, :, None] * x[:, i])[..., None] * into[:, i, None, None]
            state = decay[:, i, :, None, None] * state + wide
            rows.append(state @ out[:, i, None, :, None])
        return state, torch.stack(rows, 1)[..., 0]

    state, parts = torch.zeros(x.shape[0], h, e, k, dtype=x.dtype, device=x.device), []
    for at in range(0, x.shape[1], 128):
        cut = slice(at, at + 128)
        state, y = segment(some, state, x[:, cut], into[:, cut], out[:, cut], steps[:, cut], decay[:, cut])
        parts.append(y)
    y = (torch.cat(parts, 1) + t["skip"][:, None] * x).flatten(2)
    y = y.flip(1) if p["reverse"] else y
    return y if t["residual"] is None else y + t["residual"]


def of(op: str) -> Callable:
    """The reference of an operator."""
    # Rounded operands are what is measured, not what is exact: the wide formula is the same.
    same = {"attention_int8": "attention", "gemm_fp8": "gemm"}
    return globals()[same.get(op, op)]
