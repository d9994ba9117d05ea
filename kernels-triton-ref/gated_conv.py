"""Hyena operators with short filters: y = q · conv(inner, k · v), where q, k and v have passed a short convolution.

A program has BLOCK tokens of CHANNELS channels; it computes k · v anew for every tap of the inner convolution.  The last
`reversed` channels run against token order.
"""

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def short(p, weight, bias, which, rows, channels, inside, way, N, C, lead, K: tl.constexpr, HAS: tl.constexpr):
    """q, k or v at tokens `rows` of one sample: a convolution, or the projection itself."""
    if not HAS:
        seen = inside & (rows >= 0) & (rows < N)
        return tl.load(p + rows * 3 * C + which * C + channels, mask=seen, other=0.0).to(tl.float32)
    sum = tl.load(bias + which * C + channels, mask=inside, other=0.0).to(tl.float32) + tl.zeros_like(rows).to(tl.float32)
    for tap in tl.static_range(K):
        at = rows + way * (tap - lead)
        seen = inside & (at >= 0) & (at < N)
        x = tl.load(p + at * 3 * C + which * C + channels, mask=seen, other=0.0).to(tl.float32)
        w = tl.load(weight + (which * C + channels) * K + tap, mask=inside, other=0.0).to(tl.float32)
        sum += w * x
    return sum


@triton.jit
def kernel(p, short_weight, short_bias, inner_weight, inner_bias, y, N, C, lead, reversed, K: tl.constexpr,
           SHORT: tl.constexpr, INNER: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK))[:, None] + tl.zeros([1, CHANNELS], tl.int32)
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (channels < C) & (rows < N)
    way = tl.where(channels >= C - reversed, -1, 1)
    p += sample * N * 3 * C
    q = short(p, short_weight, short_bias, 0, rows, channels, inside, way, N, C, lead, K, SHORT)
    if INNER:
        sum = tl.load(inner_bias + channels, mask=channels < C, other=0.0).to(tl.float32) + tl.zeros_like(q)
        for tap in tl.static_range(K):
            at = rows + way * (tap - lead)
            seen = inside & (at >= 0) & (at < N)
            k = short(p, short_weight, short_bias, 1, at, channels, seen, way, N, C, lead, K, SHORT)
            v = short(p, short_weight, short_bias, 2, at, channels, seen, way, N, C, lead, K, SHORT)
            w = tl.load(inner_weight + channels * K + tap, mask=channels < C, other=0.0).to(tl.float32)
            sum += tl.where(seen, w * k * v, 0.0)
    else:
        k = short(p, short_weight, short_bias, 1, rows, channels, inside, way, N, C, lead, K, SHORT)
        v = short(p, short_weight, short_bias, 2, rows, channels, inside, way, N, C, lead, K, SHORT)
        sum = k * v
    tl.store(y + sample * N * C + rows * C + channels, (q * sum).to(y.dtype.element_ty), mask=inside)


def run(t, dims, params):
    """y by Triton."""
    b, n, c, k = (dims[d] for d in "BNCK")
    p = t["p"]
    y = torch.empty(b, n, c, dtype=p.dtype, device=p.device)
    of = [t[name] if t[name] is not None else p for name in ("short_weight", "short_bias", "inner_weight", "inner_bias")]
    block, channels = 32, 64
    kernel[(b * triton.cdiv(n, block), triton.cdiv(c, channels))](
        p, *of, y, n, c, int(params["lead"]), int(params["reversed"]), k,
        t["short_weight"] is not None, t["inner_weight"] is not None, block, channels)
    return {"y": y}


def oracle(t, dims, params):
    """The same in NumPy."""
    n, c, k, lead = dims["N"], dims["C"], dims["K"], int(params["lead"])
    back = np.arange(c) >= c - int(params["reversed"])

    def conv(weight, bias, x):
        if weight is None:
            return x
        out = np.zeros_like(x) + bias
        for tap, token in ((tap, token) for tap in range(k) for token in range(n)):
            for against in (False, True):
                at = token - (tap - lead) if against else token + tap - lead
                if 0 <= at < n:
                    of = back == against
                    out[:, token, of] += weight[of, tap] * x[:, at, of]
        return out

    w, bias = t["short_weight"], t["short_bias"]
    q, key, v = (conv(None if w is None else w[i], None if w is None else bias[i], t["p"][:, :, i]) for i in range(3))
    return {"y": q * conv(t["inner_weight"], t["inner_bias"], key * v)}
