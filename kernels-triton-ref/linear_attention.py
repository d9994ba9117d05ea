"""Attention with features phi in place of the softmax: y = phi(q) (sum_j phi(k_j) v_jᵀ) / (phi(q) · sum_j phi(k_j) + eps).

Two kernels: parts of the tokens of a head make parts of the sums, which are added; then every query is applied.
"""

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def phi(x, inside, RELU: tl.constexpr):
    """elu(x) + 1 or max(x, 0); zero where there is no element."""
    if RELU:
        features = tl.maximum(x, 0.0)
    else:
        features = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    return tl.where(inside, features, 0.0)


@triton.jit
def sums(qkv, state, total, N, H, E, PART, RELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, WIDTH)
    step = 3 * H * E
    start = qkv + pair // H * N * step + pair % H * E
    first = tl.program_id(0) * PART
    of = tl.zeros([WIDTH, WIDTH], tl.float32)
    features = tl.zeros([WIDTH], tl.float32)
    for token in range(first, tl.minimum(first + PART, N), BLOCK):
        rows = token + tl.arange(0, BLOCK)
        inside = (rows[:, None] < tl.minimum(first + PART, N)) & (lanes[None, :] < E)
        at = start + rows[:, None] * step + lanes[None, :]
        k = phi(tl.load(at + H * E, mask=inside, other=0.0).to(tl.float32), inside, RELU)
        v = tl.load(at + 2 * H * E, mask=inside, other=0.0).to(tl.float32)
        of += tl.dot(tl.trans(k), v, input_precision="ieee")
        features += tl.sum(k, 0)
    part = tl.program_id(0) * tl.num_programs(1) + pair
    square = (lanes[:, None] < E) & (lanes[None, :] < E)
    tl.store(state + part * E * E + lanes[:, None] * E + lanes[None, :], of, mask=square)
    tl.store(total + part * E + lanes, features, mask=lanes < E)


@triton.jit
def apply(qkv, state, total, y, norm, eps, N, H, E, RELU: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, WIDTH)
    inside = (rows[:, None] < N) & (lanes[None, :] < E)
    from_ = qkv + (pair // H * N + rows[:, None]) * 3 * H * E + pair % H * E + lanes[None, :]
    q = phi(tl.load(from_, mask=inside, other=0.0).to(tl.float32), inside, RELU)
    square = (lanes[:, None] < E) & (lanes[None, :] < E)
    of = tl.load(state + pair * E * E + lanes[:, None] * E + lanes[None, :], mask=square, other=0.0)
    features = tl.load(total + pair * E + lanes, mask=lanes < E, other=0.0)
    weight = tl.sum(q * features[None, :], 1) + eps
    result = tl.dot(q, of, input_precision="ieee") / weight[:, None]
    to = y + (pair // H * N + rows[:, None]) * H * E + pair % H * E + lanes[None, :]
    tl.store(to, result.to(y.dtype.element_ty), mask=inside)
    tl.store(norm + pair * N + rows, weight, mask=rows < N)


def run(t, dims, params):
    """y, norm, state and total by Triton."""
    b, n, h, e = (dims[d] for d in "BNHE")
    qkv, relu = t["qkv"], bool(params["map"])
    y = torch.empty(b, n, h, e, dtype=qkv.dtype, device=qkv.device)
    part, block = 512, 32
    parts, width = triton.cdiv(n, part), max(16, triton.next_power_of_2(e))
    f32 = {"dtype": torch.float32, "device": qkv.device}
    states, totals = torch.empty(parts, b, h, e, e, **f32), torch.empty(parts, b, h, e, **f32)
    norm = torch.empty(b, h, n, **f32)
    sums[(parts, b * h)](qkv, states, totals, n, h, e, part, relu, width, block)
    state, total = states.sum(0), totals.sum(0)
    apply[(triton.cdiv(n, block), b * h)](qkv, state, total, y, norm, params["eps"], n, h, e, relu, width, block)
    return {"y": y, "norm": norm, "state": state, "total": total}


def oracle(t, dims, params):
    """The same in NumPy."""
    q, k, v = (t["qkv"][:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    features = (lambda x: np.maximum(x, 0)) if params["map"] else (lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))))
    q, k = features(q), features(k)
    state, total = k.transpose(0, 1, 3, 2) @ v, k.sum(2)
    norm = (q * total[:, :, None]).sum(-1) + params["eps"]
    return {"y": (q @ state / norm[..., None]).transpose(0, 2, 1, 3), "norm": norm, "state": state, "total": total}
