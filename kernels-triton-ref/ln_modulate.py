"""LayerNorm without parameters, then the scale and shift that the conditioning chose.  A program has a token."""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x, modulation, y, mean, rstd, N, C, D, shift, scale, eps, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, WIDTH)
    inside = lanes < D
    v = tl.load(x + row * D + lanes, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(v, 0) / D
    apart = tl.where(inside, v - mu, 0.0)
    r = 1.0 / tl.sqrt(tl.sum(apart * apart, 0) / D + eps)
    table = modulation + row // N * C * D + lanes
    gain = 1.0 + tl.load(table + scale * D, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(table + shift * D, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + lanes, (apart * r * gain + offset).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, mu)
    tl.store(rstd + row, r)


def run(t, dims, params):
    """y, mean and rstd by Triton."""
    b, n, c, d = (dims[k] for k in "BNCD")
    x = t["x"]
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(b, n, dtype=torch.float32, device=x.device) for _ in range(2))
    kernel[(b * n,)](x, t["modulation"], y, mean, rstd, n, c, d, int(params["shift"]), int(params["scale"]),
                     params["eps"], triton.next_power_of_2(d))
    return {"y": y, "mean": mean, "rstd": rstd}


def oracle(t, dims, params):
    """The same in NumPy."""
    x, table = t["x"], t["modulation"]
    mean = x.mean(-1)
    rstd = 1.0 / ((x - mean[..., None]).__pow__(2).mean(-1) + params["eps"]) ** 0.5
    n = (x - mean[..., None]) * rstd[..., None]
    y = n * (1.0 + table[:, None, int(params["scale"])]) + table[:, None, int(params["shift"])]
    return {"y": y, "mean": mean, "rstd": rstd}
