"""The attention family."""

import torch
from torch import Tensor
from torch.nn.functional import elu, pad, relu, scaled_dot_product_attention as sdpa


def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 3, H, E] -> three views [B, H, N, E]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def merge(y: Tensor) -> Tensor:
    """[B, H, N, E] -> [B, N, H, E] in that order of memory, as the next layer reads it."""
    return y.transpose(1, 2).contiguous()


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Two products with a softmax between them."""
    scores = (q * scale) @ k.transpose(-1, -2)
    return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def attention(c):
    scale = c.params["scale"]
    qkv = c.t["qkv"]

    def fused():
        return merge(sdpa(*split(qkv), scale=scale))

    def fused_contiguous():
        return merge(sdpa(*(x.contiguous() for x in split(qkv)), scale=scale))

    ways = {"sdpa": fused, "sdpa of contiguous heads": fused_contiguous}
    if c["N"] <= 512:
        ways["matmul and softmax"] = lambda: merge(plain(*split(qkv), scale))
    return ways


def cross_attention(c):
    scale, q, kv = c.params["scale"], c.t["q"], c.t["kv"]
    counts = c.t.get("counts")

    def heads():
        k, v = kv.permute(2, 0, 3, 1, 4)
        return q[:, :, 0].transpose(1, 2), k, v

    if counts is None:
        return {
            "sdpa": lambda: merge(sdpa(*heads(), scale=scale)),
            "sdpa of contiguous heads": lambda: merge(sdpa(*(x.contiguous() for x in heads()), scale=scale)),
            "matmul and softmax": lambda: merge(plain(*heads(), scale)),
        }
    # A mask depends on the prompt alone, so a model makes it once.
    mask = (torch.arange(c["M"]) < counts[:, None])[:, None, None, :]
    lengths = counts.tolist()

    def samples():
        ys = []
        for qb, kb, vb, n in zip(*heads(), lengths):
            ys.append(sdpa(qb[None], kb[None, :, :n], vb[None, :, :n], scale=scale) if n else torch.zeros_like(qb[None]))
        return merge(torch.cat(ys))

    return {"sdpa with a mask": lambda: merge(sdpa(*heads(), attn_mask=mask, scale=scale)), "sdpa by samples": samples}


def relative_attention(c):
    scale, qkv, bias, n = c.params["scale"], c.t["qkv"], c.t["bias"], c["N"]
    counts = c.t.get("counts")
    distance = torch.arange(n)[None, :] - torch.arange(n)[:, None] + n - 1
    hidden = None
    if counts is not None:
        keys = torch.arange(n) < counts.clamp(min=1)[:, None]
        hidden = torch.zeros(keys.shape).masked_fill(~keys, -torch.inf)[:, None, None, :]

    def mask():
        table = bias.t()[:, distance].unsqueeze(0)
        return table if hidden is None else table + hidden

    ways = {
        "sdpa, bias by index": lambda: merge(sdpa(*split(qkv), attn_mask=mask(), scale=scale)),
        "matmul and softmax": lambda: merge(plain(*split(qkv), scale, mask())),
    }
    if not c.backward:
        # T5 expands the bias once for all its layers.
        once = mask().contiguous()
        ways["sdpa, bias expanded before"] = lambda: merge(sdpa(*split(qkv), attn_mask=once, scale=scale))
    return ways


def window_attention(c):
    scale, qkv = c.params["scale"], c.t["qkv"]
    b, n, h, e, w = (c[d] for d in ("B", "N", "H", "E", "W"))
    ways = {}
    if n <= 4096:
        near = (torch.arange(n)[:, None] - torch.arange(n)[None, :]).abs() <= w
        ways["sdpa with a mask"] = lambda: merge(sdpa(*split(qkv), attn_mask=near, scale=scale))

    def blocks(size: int):
        """Blocks of `size` queries, each with the keys that any of them may see."""
        count = -(-n // size)
        extra = count * size - n
        keys = size + 2 * w
        inside = torch.arange(count)[:, None] * size + torch.arange(keys) - w
        query = torch.arange(size)[:, None]
        mask = ((torch.arange(keys) - query >= 0) & (torch.arange(keys) - query <= 2 * w))[None]
        mask = mask & ((inside >= 0) & (inside < n))[:, None, :]
        # Queries beyond the last token would see nothing.
        mask[-1, size - extra :, w] |= True if extra else False

        def run():
            q, k, v = split(qkv)
            q = pad(q, (0, 0, 0, extra)).reshape(b * h, count, size, e)
            k, v = (pad(x, (0, 0, w, w + extra)).reshape(b * h, -1, e).unfold(1, keys, size).transpose(2, 3) for x in (k, v))
            y = sdpa(q, k, v, attn_mask=mask, scale=scale)
            return merge(y.reshape(b, h, count * size, e)[:, :, :n])

        return run

    for size in (16, 32, 64, 128):
        if size < n:
            ways[f"sdpa in blocks of {size}"] = blocks(size)
    return ways


def neighborhood_attention(c):
    scale, qkv = c.params["scale"], c.t["qkv"]
    b, rows, columns, h, e, k = (c[d] for d in ("B", "Gh", "Gw", "H", "E", "K"))
    n = rows * columns

    def start(size: int) -> Tensor:
        return (torch.arange(size) - (k - 1) // 2).clamp(0, size - k)

    column = torch.arange(columns)
    near_columns = (column[None, :] >= start(columns)[:, None]) & (column[None, :] < start(columns)[:, None] + k)
    flat = lambda: split(qkv.reshape(b, n, 3, h, e))
    grid = lambda y: merge(y).reshape(b, rows, columns, h, e)
    ways = {}
    if n <= 4096:
        row = torch.arange(rows)
        near_rows = (row[None, :] >= start(rows)[:, None]) & (row[None, :] < start(rows)[:, None] + k)
        near = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).reshape(n, n)
        ways["sdpa with a mask"] = lambda: grid(sdpa(*flat(), attn_mask=near, scale=scale))
    which = start(rows)[:, None] + torch.arange(k)
    mask = near_columns.repeat(1, k)[None, None]

    def by_rows():
        """The queries of a row of tokens, with the K rows of keys that they see."""
        q, keys, values = flat()
        q = q.reshape(b * h, rows, columns, e)
        keys, values = (
            x.reshape(b * h, rows, columns, e)[:, which].reshape(b * h, rows, k * columns, e) for x in (keys, values)
        )
        return grid(sdpa(q, keys, values, attn_mask=mask, scale=scale).reshape(b, h, n, e))

    ways["sdpa by rows of tokens"] = by_rows
    return ways


def linear_attention(c):
    qkv, eps = c.t["qkv"], c.params["eps"]
    phi = (lambda x: elu(x) + 1) if c.params["map"] == 0 else relu

    def matmul():
        q, k, v = split(qkv)
        q, k = phi(q), phi(k)
        state = k.transpose(-1, -2) @ v
        norm = q @ k.sum(-2).unsqueeze(-1) + eps
        return merge(q @ state / norm)

    def one_product():
        """The norm as one more column of the values."""
        q, k, v = split(qkv)
        q, k = phi(q), phi(k)
        y = q @ (k.transpose(-1, -2) @ pad(v, (0, 1), value=1.0))
        return merge(y[..., :-1] / (y[..., -1:] + eps))

    return {"matmul": matmul, "matmul, norm as a column": one_product}


ATTENTION = {
    "attention": attention,
    "cross_attention": cross_attention,
    "relative_attention": relative_attention,
    "window_attention": window_attention,
    "neighborhood_attention": neighborhood_attention,
    "linear_attention": linear_attention,
}
