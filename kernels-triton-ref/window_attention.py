"""Softmax attention of every token over the 2W + 1 around it; the window ends where the tokens end.

A program has BLOCK queries of a head and walks the blocks of keys that any of them sees.
"""

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def kernel(qkv, y, lse, scale, N, H, E, W, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    sample, head = tl.program_id(1).to(tl.int64) // H, tl.program_id(1) % H
    row0 = tl.program_id(0) * BLOCK
    rows = row0 + tl.arange(0, BLOCK)
    lanes = tl.arange(0, WIDTH)
    step = 3 * H * E
    start = qkv + sample * N * step + head * E
    inside = lanes[None, :] < E
    q = tl.load(start + rows[:, None] * step + lanes[None, :], mask=(rows[:, None] < N) & inside, other=0.0)
    # A finite lowest score: a block of keys may hold none of a query's.
    best = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(tl.maximum(row0 - W, 0), tl.minimum(row0 + BLOCK + W, N), BLOCK):
        keys = first + tl.arange(0, BLOCK)
        at = start + keys[:, None] * step + lanes[None, :]
        seen = (keys[:, None] < N) & inside
        k = tl.load(at + H * E, mask=seen, other=0.0)
        v = tl.load(at + 2 * H * E, mask=seen, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        apart = rows[:, None] - keys[None, :]
        near = (apart <= W) & (apart >= -W) & (keys[None, :] < N)
        s = tl.where(near, s, -1e30)
        higher = tl.maximum(best, tl.max(s, 1))
        p = tl.where(near, tl.exp(s - higher[:, None]), 0.0)
        keep = tl.exp(best - higher)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = higher
    # Rows behind the last token have met no key.
    total = tl.where(rows < N, total, 1.0)
    to = y + (sample * N + rows[:, None]) * H * E + head * E + lanes[None, :]
    tl.store(to, (acc / total[:, None]).to(y.dtype.element_ty), mask=(rows[:, None] < N) & inside)
    tl.store(lse + tl.program_id(1).to(tl.int64) * N + rows, best + tl.log(total), mask=rows < N)


def run(t, dims, params):
    """y and lse by Triton."""
    b, n, h, e, w = (dims[d] for d in "BNHEW")
    qkv = t["qkv"]
    y = torch.empty(b, n, h, e, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=qkv.device)
    width, block = max(16, triton.next_power_of_2(e)), 64 if n > 64 else 16
    # A window that reaches over all tokens is as wide as they are.
    kernel[(triton.cdiv(n, block), b * h)](qkv, y, lse, params["scale"], n, h, e, min(w, n), width, block)
    return {"y": y, "lse": lse}


def oracle(t, dims, params):
    """The same in NumPy."""
    q, k, v = (t["qkv"][:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    s = params["scale"] * q @ k.transpose(0, 1, 3, 2)
    i = np.arange(dims["N"])
    s = np.where(abs(i[:, None] - i[None, :]) <= dims["W"], s, -np.inf)
    best = s.max(-1, keepdims=True)
    lse = best + np.log(np.exp(s - best).sum(-1, keepdims=True))
    return {"y": (np.exp(s - lse) @ v).transpose(0, 2, 1, 3), "lse": lse[..., 0]}
