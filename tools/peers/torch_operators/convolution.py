"""Convolutions, gated and not, and the scan of Mamba-2."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Values of an absent filter mean the identity; x is [B, N, C] in token order unless a comment says otherwise.


def halves(x: Tensor, reverse: int) -> list[tuple[slice, bool]]:
    """Slices of the channels: those in token order, and the last `reverse` ones, which run against it."""
    kept = x.shape[-1] - reverse
    return [part for part in ((slice(0, kept), False), (slice(kept, None), True)) if part[0] != slice(0, 0) and (reverse or not part[1])]


def taps(weight: Tensor, lead: int, backwards: bool) -> tuple[Tensor, int]:
    """Filter [C, K] and its lead, turned around for channels that run against token order."""
    return (weight.flip(-1), weight.shape[-1] - 1 - lead) if backwards else (weight, lead)


def by_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, lead: int) -> Tensor:
    """Depthwise along the tokens, channels first for the call."""
    k, n = weight.shape[-1], x.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=k - 1, groups=x.shape[2])
    # Output s of the padded call ends at token s: the one that starts `lead` before t is s = t + K - 1 - lead.
    return y[:, :, k - 1 - lead : k - 1 - lead + n].transpose(1, 2)


def by_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, lead: int) -> Tensor:
    """The same as an image of one column with the channels innermost, as the tokens lie in memory."""
    k, n = weight.shape[-1], x.shape[1]
    image = x.unsqueeze(1).permute(0, 3, 2, 1)
    y = F.conv2d(image, weight[:, None, :, None], bias, padding=(k - 1, 0), groups=x.shape[2])
    return y[:, :, k - 1 - lead : k - 1 - lead + n, 0].transpose(1, 2)


def by_shifts(x: Tensor, weight: Tensor, bias: Tensor | None, lead: int) -> Tensor:
    """A sum of shifted rows, one pass over memory for each tap."""
    k, n = weight.shape[-1], x.shape[1]
    wide = F.pad(x, (0, 0, lead, k - 1 - lead))
    y = wide[:, :n] * weight[:, 0]
    if bias is not None:
        y = y + bias
    for j in range(1, k):
        y = torch.addcmul(y, wide[:, j : j + n], weight[:, j])
    return y


SHORT = {"conv1d": by_conv1d, "conv2d channels_last": by_channels_last, "shifted sums": by_shifts}


def short(conv, x: Tensor, weight: Tensor | None, bias: Tensor | None, lead: int, reverse: int) -> Tensor:
    """conv(w, b, x) of the contracts, the last `reverse` channels against token order."""
    if weight is None:
        return x
    if not reverse:
        return conv(x, weight, bias, lead)
    parts = []
    for where, backwards in halves(x, reverse):
        w, start = taps(weight[where], lead, backwards)
        parts.append(conv(x[..., where], w, None if bias is None else bias[where], start))
    return torch.cat(parts, -1)


def projections(conv, c, lead: int, reverse: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v after their short filter, each [B, N, C]."""
    p, weight, bias = c.t["p"], c.t.get("short_weight"), c.t.get("short_bias")
    if weight is not None and not reverse:
        b, n, _, width = p.shape
        flat = None if bias is None else bias.reshape(-1)
        return conv(p.reshape(b, n, 3 * width), weight.reshape(3 * width, -1), flat, lead).chunk(3, -1)
    one = lambda t, i: None if t is None else t[i]
    return tuple(short(conv, p[:, :, i], one(weight, i), one(bias, i), lead, reverse) for i in range(3))


def gated_conv(c):
    lead, reverse = int(c.params["lead"]), int(c.params["reversed"])

    def way(conv):
        def run():
            q, k, v = projections(conv, c, lead, reverse)
            inner = short(conv, k * v, c.t.get("inner_weight"), c.t.get("inner_bias"), lead, reverse)
            return q * inner

        return run

    return {name: way(conv) for name, conv in SHORT.items()}


def long_conv(c):
    lead, centre, reverse = (int(c.params[name]) for name in ("lead", "centre", "reversed"))
    n, length, width = c["N"], c["L"], c["C"]
    filters, skip = c.t["filter"], c.t["skip"]
    size = 1 << (n + length - 2).bit_length()

    def by_fft(u: Tensor) -> Tensor:
        """u [B, C, N]; the last channels go against token order."""
        kept = width - reverse
        if reverse:
            u = torch.cat([u[:, :kept], u[:, kept:].flip(-1)], 1)
        y = torch.fft.irfft(torch.fft.rfft(u, size) * torch.fft.rfft(filters, size), size)[..., centre : centre + n]
        return torch.cat([y[:, :kept], y[:, kept:].flip(-1)], 1) if reverse else y

    def way(conv):
        def run():
            q, k, v = projections(conv, c, lead, reverse)
            u = (k * v).transpose(1, 2)
            y = (by_fft(u) + skip[:, None] * u).transpose(1, 2)
            return q * y

        return run

    def direct():
        q, k, v = projections(by_conv1d, c, lead, reverse)
        u = k * v
        return q * (short(by_conv1d, u, filters.flip(-1), None, length - 1 - centre, reverse) + skip * u)

    ways = {f"rfft, short filter by {name}": way(conv) for name, conv in SHORT.items()}
    if length <= 64:
        ways["conv1d"] = direct
    return ways


def conv_silu(c):
    offset, reverse = int(c.params["offset"]), bool(c.params["reverse"])
    width, k = c["C"], c["K"]
    p, weight, bias = c.t["p"], c.t["weight"], c.t["bias"]

    def way(conv):
        def run():
            w, lead = taps(weight, k - 1, reverse)
            return F.silu(conv(p[..., offset : offset + width], w, bias, lead))

        return run

    return {name: way(conv) for name, conv in SHORT.items()}


def feature_gated_conv(c):
    b, n, f, k = (c[d] for d in ("B", "N", "F", "K"))
    p, weight, bias = c.t["p"].reshape(b, n, 3 * f), c.t["weight"], c.t["bias"]

    def conv1d():
        u = F.conv1d(F.pad(p, (k - 1, 0)), weight.unsqueeze(1), bias, groups=n)
        q, key, v = u.chunk(3, -1)
        return q * key * v

    def padded_conv1d():
        u = F.conv1d(p, weight.unsqueeze(1), bias, padding=k - 1, groups=n)[..., : 3 * f]
        q, key, v = u.chunk(3, -1)
        return q * key * v

    def shifts():
        wide = F.pad(p, (k - 1, 0))
        u = wide[..., : 3 * f] * weight[:, :1] + bias[:, None]
        for j in range(1, k):
            u = torch.addcmul(u, wide[..., j : j + 3 * f], weight[:, j : j + 1])
        q, key, v = u.chunk(3, -1)
        return q * key * v

    return {"conv1d": conv1d, "conv1d that pads": padded_conv1d, "shifted sums": shifts}


def gated_conv_2d(c):
    b, rows, columns, width, k = (c[d] for d in ("B", "Gh", "Gw", "C", "K"))
    t = c.t
    p = t["p"].reshape(b, rows, columns, 3 * width).permute(0, 3, 1, 2)

    def conv(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is None:
            return x
        return F.conv2d(x, weight.reshape(-1, 1, k, k), None if bias is None else bias.reshape(-1), padding=k // 2, groups=x.shape[1])

    def way(channels_first: bool):
        def run():
            x = p.contiguous() if channels_first else p
            q, key, v = conv(x, t.get("short_weight"), t.get("short_bias")).chunk(3, 1)
            y = q * conv(key * v, t.get("inner_weight"), t.get("inner_bias"))
            return y.permute(0, 2, 3, 1).contiguous()

        return run

    return {"conv2d channels_last": way(False), "conv2d": way(True)}


def image(x: Tensor) -> Tensor:
    """[B, H, W, C] as PyTorch's [B, C, H, W] in channels_last memory."""
    return x.permute(0, 3, 1, 2)


def conv2d(c):
    stride, ph, pw = (int(c.params[name]) for name in ("stride", "pad_h", "pad_w"))
    x, filters, bias = image(c.t["x"]), image(c.t["filters"]), c.t.get("bias")
    if c["Kh"] == 1 and c["Kw"] == 1:
        # Sizes of one leave the order of memory open; this says which.
        filters = filters.contiguous(memory_format=torch.channels_last)

    def way(x: Tensor, filters: Tensor, bias: Tensor | None):
        def run():
            y = F.conv2d(x, filters, bias, stride, (ph, pw))
            return torch.relu_(y) if c.params["relu"] else y

        return run

    narrow = lambda t: None if t is None else t.bfloat16()
    layouts = {"channels_last": (x, filters, bias), "channels first": (x.contiguous(), filters.contiguous(), bias)}
    ways = {name: way(*tensors) for name, tensors in layouts.items()}
    if c.bf16:
        ways["channels_last, bf16"] = way(*(narrow(t) for t in layouts["channels_last"]))
        ways["channels first, bf16"] = way(*(narrow(t) for t in layouts["channels first"]))
    return {name: lambda run=run: image_back(run()) for name, run in ways.items()}


def image_back(y: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H, W, C], a view: either order of memory serves the next convolution of its kind."""
    return y.permute(0, 2, 3, 1)


def norm_silu_conv2d(c):
    eps, groups = c.params["eps"], c["G"]
    kh, kw = c["Kh"], c["Kw"]
    names = ("x", "gamma", "beta", "filters", "bias", "residual")
    x, gamma, beta, filters, bias, residual = (c.t.get(name) for name in names)
    x, filters = image(x), image(filters)
    residual = None if residual is None else image(residual)

    def way(*tensors: Tensor | None):
        x, gamma, beta, filters, bias, residual = tensors

        def run():
            a = F.silu(F.group_norm(x, groups, gamma, beta, eps), inplace=not c.backward)
            y = F.conv2d(a, filters, bias, padding=(kh // 2, kw // 2))
            return image_back(y if residual is None else y.add_(residual))

        return run

    last = (x, gamma, beta, filters, bias, residual)
    first = tuple(None if t is None else t.contiguous() for t in last)
    narrow = lambda ts: tuple(None if t is None else t.bfloat16() for t in ts)
    ways = {"channels_last": way(*last), "channels first": way(*first)}
    if c.bf16:
        ways |= {"channels_last, bf16": way(*narrow(last)), "channels first, bf16": way(*narrow(first))}
    return ways


def group_norm_silu(c):
    eps, groups, silu = c.params["eps"], c["G"], bool(c.params["silu"])
    gamma, beta, stats = c.t["gamma"], c.t["beta"], c.t.get("stats")
    x = image(c.t["x"])
    act = (lambda y: F.silu(y, inplace=not c.backward)) if silu else (lambda y: y)

    def whole(x: Tensor):
        return lambda: image_back(act(F.group_norm(x, groups, gamma, beta, eps)))

    if stats is None:
        ways = {"channels_last": whole(x)}
        if not c.backward:
            ways["channels first"] = whole(x.contiguous())
        return ways

    def known():
        """With statistics of a larger image: one scale and one shift for each channel."""
        mean, rstd = (stats[:, i].repeat_interleave(c["C"] // groups, 1) for i in range(2))
        scale = rstd * gamma
        shift = beta - mean * scale
        return act(torch.addcmul(shift[:, None, None], c.t["x"], scale[:, None, None]))

    return {"scale and shift": known}


def upsample(c):
    x = image(c.t["x"])
    ways = {"channels_last": lambda: image_back(F.interpolate(x, scale_factor=2, mode="nearest"))}
    if not c.backward:
        first = x.contiguous()
        ways["channels first"] = lambda: image_back(F.interpolate(first, scale_factor=2, mode="nearest"))
    t = c.t["x"]
    b, h, w, ch = t.shape

    def expand():
        return t[:, :, None, :, None].expand(b, h, 2, w, 2, ch).reshape(b, 2 * h, 2 * w, ch)

    return ways | {"expand": expand}


def kv_compress(c):
    first, eps, k, d = int(c.params["first"]), c.params["eps"], c["K"], c["D"]
    b, rows, columns = c["B"], c["Gh"], c["Gw"]
    x, weight, bias, gamma, beta = (c.t[name] for name in ("x", "weight", "bias", "gamma", "beta"))
    filters = lambda: torch.cat([weight, weight]).unsqueeze(1)

    def conv2d():
        """Keys and values as one image of 2·D channels."""
        pair = x[:, :, :, first : first + 2].reshape(b, rows, columns, 2 * d).permute(0, 3, 1, 2)
        y = F.conv2d(pair, filters(), torch.cat([bias, bias]), stride=k, groups=2 * d)
        y = y.permute(0, 2, 3, 1).reshape(b, rows // k, columns // k, 2, d)
        return F.layer_norm(y, (d,), gamma, beta, eps)

    def sums():
        """A sum over the K·K pixels of a square."""
        whole = x[:, : rows // k * k, : columns // k * k, first : first + 2]
        squares = whole.reshape(b, rows // k, k, columns // k, k, 2, d)
        y = bias
        for i in range(k):
            for j in range(k):
                y = torch.addcmul(y, squares[:, :, i, :, j], weight[:, i, j])
        return F.layer_norm(y, (d,), gamma, beta, eps)

    return {"conv2d": conv2d, "sums": sums}


def mamba2(c):
    offset, reverse = int(c.params["dt_offset"]), bool(c.params["reverse"])
    b, n, h, e, k = (c[d] for d in ("B", "N", "H", "E", "K"))
    t = c.t

    def chunks(q: int):
        """The state-space dual form: products inside chunks of q tokens, a recurrence over chunks."""
        extra = -n % q
        count = (n + extra) // q

        def run():
            xbc, step = t["xbc"], t["p"][..., offset : offset + h]
            if reverse:
                xbc, step = xbc.flip(1), step.flip(1)
            step = F.softplus(step + t["dt_bias"])
            decay = -t["a_log"].exp() * step
            xbc, step, decay = (F.pad(v, (0, 0, 0, extra)) for v in (xbc, step, decay))
            x = xbc[..., : h * e].reshape(b, count, q, h, e)
            write = xbc[..., h * e : h * e + k].reshape(b, count, q, k)
            read = xbc[..., h * e + k :].reshape(b, count, q, k)
            xd = (x * step.reshape(b, count, q, h, 1)).permute(0, 1, 3, 2, 4)
            total = decay.reshape(b, count, q, h).permute(0, 1, 3, 2).cumsum(-1)
            # Inside a chunk: [B, count, H, q, q] weights that decay from token to token.
            gap = total[..., :, None] - total[..., None, :]
            lower = torch.ones(q, q, dtype=torch.bool).tril()
            weights = gap.masked_fill(~lower, -torch.inf).exp() * (read @ write.transpose(-1, -2)).unsqueeze(2)
            y = weights @ xd
            # What each chunk leaves behind, [B, count, H, K, E].
            left = write.transpose(-1, -2).unsqueeze(2) @ (xd * (total[..., -1:] - total).exp().unsqueeze(-1))
            state = torch.zeros_like(left[:, 0])
            before = []
            for i in range(count):
                before.append(state)
                state = state * total[:, i, :, -1, None, None].exp() + left[:, i]
            carried = read.unsqueeze(2) @ torch.stack(before, 1)
            y = y + carried * total.exp().unsqueeze(-1)
            y = y.permute(0, 1, 3, 2, 4) + t["skip"][:, None] * x
            y = y.reshape(b, n + extra, h * e)[:, :n]
            if reverse:
                y = y.flip(1)
            return y if t.get("residual") is None else y + t["residual"]

        return run

    return {f"chunks of {q}": chunks(q) for q in (16, 32, 64, 128) if q <= max(n, 16)}


CONVOLUTION = {
    "gated_conv": gated_conv,
    "long_conv": long_conv,
    "conv_silu": conv_silu,
    "feature_gated_conv": feature_gated_conv,
    "gated_conv_2d": gated_conv_2d,
    "conv2d": conv2d,
    "norm_silu_conv2d": norm_silu_conv2d,
    "group_norm_silu": group_norm_silu,
    "upsample": upsample,
    "kv_compress": kv_compress,
    "mamba2": mamba2,
}
