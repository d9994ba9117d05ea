"""Peers of the convolutions: cuDNN with channels last, depthwise filters, Fourier transforms."""

from __future__ import annotations

from collections.abc import Callable

from .base import Context, F, eager_and_compiled, peer, torch, triton_twin
from .pointwise import group_norm_silu


def run_back(x, count: int):
    """x [B, C, N] with the tokens of its last `count` channels in reverse."""
    if not count:
        return x
    keep = x.shape[1] - count
    return torch.cat([x[:, :keep], x[:, keep:].flip(-1)], 1)


def short(x, weight, bias, lead: int):
    """A depthwise filter over tokens: x [B, C, N], weight [C, K]; the identity without one."""
    if weight is None:
        return x
    taps = weight.shape[-1]
    return F.conv1d(F.pad(x, (lead, taps - 1 - lead)), weight[:, None], bias, groups=x.shape[1])


def by_shifts(x, weight, bias, lead: int):
    """The same sum as products with shifted tokens, which a compiler makes one kernel of."""
    if weight is None:
        return x
    taps, n = weight.shape[-1], x.shape[-1]
    padded = F.pad(x, (lead, taps - 1 - lead))
    y = sum(padded[..., j : j + n] * weight[:, j, None] for j in range(taps))
    return y if bias is None else y + bias[:, None]


def streams(t: dict, case, conv: Callable) -> tuple:
    """q, k, v [B, C, N] of a packed projection [B, N, 3, C] after their short filters."""
    lead, back = int(case.params["lead"]), int(case.params["reversed"])
    weight, bias = t["short_weight"], t["short_bias"]
    parts = (run_back(x.transpose(1, 2), back) for x in t["p"].unbind(2))
    return tuple(
        conv(x, None if weight is None else weight[i], None if bias is None else bias[i], lead)
        for i, x in enumerate(parts)
    )


def gated(conv: Callable) -> Callable:
    """Hyena SE, X and Y by one way to convolve."""

    def function(t: dict, case):
        q, k, v = streams(t, case, conv)
        y = q * conv(k * v, t["inner_weight"], t["inner_bias"], int(case.params["lead"]))
        return run_back(y, int(case.params["reversed"])).transpose(1, 2)

    return function


def long(t: dict, case):
    """Gated convolution with a filter as long as the sequence, by Fourier transforms in f32."""
    q, k, v = streams(t, case, by_shifts)
    u, n, centre = k * v, case.dims["N"], int(case.params["centre"])
    size = 1 << (n + case.dims["L"] - 2).bit_length()
    spectrum = torch.fft.rfft(u.float(), size) * torch.fft.rfft(t["filter"].float(), size)
    y = torch.fft.irfft(spectrum, size)[..., centre : centre + n] + t["skip"][:, None] * u
    return run_back(q * y.to(q.dtype), int(case.params["reversed"])).transpose(1, 2)


def conv_silu(t: dict, case):
    """The short filter of Mamba-2 over some columns of a projection, and SiLU."""
    first, channels = int(case.params["offset"]), case.dims["C"]
    x = t["p"][..., first : first + channels].transpose(1, 2)
    back = channels if case.params["reverse"] else 0
    y = short(run_back(x, back), t["weight"], t["bias"], case.dims["K"] - 1)
    return F.silu(run_back(y, back)).transpose(1, 2)


def gated_2d(t: dict, case):
    """Gated convolution over a grid."""
    channels, taps = case.dims["C"], case.dims["K"]

    def conv(x, weight, bias):
        if weight is None:
            return x
        after = taps - 1 - taps // 2
        x = F.pad(x, (taps // 2, after, taps // 2, after))
        return F.conv2d(x, weight[:, None], bias, groups=channels)

    weight, bias = t["short_weight"], t["short_bias"]
    q, k, v = (
        conv(x.movedim(-1, 1), None if weight is None else weight[i], None if bias is None else bias[i])
        for i, x in enumerate(t["p"].unbind(3))
    )
    return (q * conv(k * v, t["inner_weight"], t["inner_bias"])).movedim(1, -1)


def filters(t: dict):
    """[F, Kh, Kw, C] as [F, C, Kh, Kw] with channels last: a view."""
    return t["filters"].movedim(-1, 1)


def conv2d(t: dict, case):
    """cuDNN on tensors with channels last."""
    d, p = case.dims, case.params
    stride, top, left = (int(p[name]) for name in ("stride", "pad_h", "pad_w"))
    # Below and right are as many zeros as the last output reads.
    bottom = max(0, (d["Oh"] - 1) * stride + d["Kh"] - d["H"] - top)
    right = max(0, (d["Ow"] - 1) * stride + d["Kw"] - d["W"] - left)
    x, pad = t["x"].movedim(-1, 1), (top, left)
    if (bottom, right) != pad:
        x, pad = F.pad(x, (left, right, top, bottom)), 0
    y = F.conv2d(x, filters(t), t["bias"], stride=stride, padding=pad)[:, :, : d["Oh"], : d["Ow"]]
    return (F.relu(y) if p["relu"] else y).movedim(1, -1)


def norm_silu_conv2d(t: dict, case):
    """GroupNorm, SiLU, convolution and residual of an autoencoder's block."""
    d, norm = case.dims, type(case)(case.op, case.name, case.dims, case.params | {"silu": True}, case.absent, case.contract)
    x = group_norm_silu(t | {"stats": None}, norm).movedim(-1, 1)
    y = F.conv2d(x, filters(t), t["bias"], padding=(d["Kh"] // 2, d["Kw"] // 2)).movedim(1, -1)
    return y if t["residual"] is None else y + t["residual"]


def kv_compress(t: dict, case):
    """Keys and values of squares of tokens, by a depthwise filter and LayerNorm."""
    first, taps = int(case.params["first"]), case.dims["K"]
    parts = []
    for x in t["x"].unbind(3)[first : first + 2]:
        c = F.conv2d(x.movedim(-1, 1), t["weight"][:, None], t["bias"], stride=taps, groups=case.dims["D"])
        parts.append(F.layer_norm(c.movedim(1, -1), (case.dims["D"],), t["gamma"], t["beta"], case.params["eps"]))
    return torch.stack(parts, 3)


@peer("gated_conv", "shifts, compile")
def shifts_compiled(t: dict, case, context: Context) -> Callable:
    """The way in which the compiler makes one kernel of it."""
    compiled = context.compile(lambda tensors: gated(by_shifts)(tensors, case))
    return lambda: compiled(t)


eager_and_compiled("gated_conv", gated(short))
triton_twin("gated_conv")
for op, function, what in [
    ("gated_conv_2d", gated_2d, ""),
    ("conv_silu", conv_silu, ""),
    ("long_conv", long, "FFT"),
    ("conv2d", conv2d, "cuDNN channels last,"),
    ("norm_silu_conv2d", norm_silu_conv2d, "cuDNN channels last,"),
    ("kv_compress", kv_compress, ""),
]:
    eager_and_compiled(op, function, what)
