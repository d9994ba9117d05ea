"""Peers of the state space scan: its chunked form in plain PyTorch, and the mamba_ssm package."""

from __future__ import annotations

from collections.abc import Callable

from .base import CannotRun, Context, F, eager_and_compiled, module, peer, torch

# Tokens of a chunk: products inside it, a state between two.
CHUNK = 64


def parts(t: dict, case) -> tuple:
    """x [B, N, H, E], in and out [B, N, K], steps [B, N, H] f32 and rates [H] f32, tokens in the order of the scan."""
    d, first = case.dims, int(case.params["dt_offset"])
    wide = d["H"] * d["E"]
    x, into, out = t["xbc"].split([wide, d["K"], d["K"]], -1)
    steps = F.softplus(t["p"][..., first : first + d["H"]].float() + t["dt_bias"].float())
    if case.params["reverse"]:
        x, into, out, steps = (v.flip(1) for v in (x, into, out, steps))
    return x.unflatten(-1, (d["H"], d["E"])), into, out, steps, -t["a_log"].float().exp()


def mamba2(t: dict, case):
    """Chunks of tokens: inside by products with decays, between them by a loop over states."""
    x, into, out, steps, rates = parts(t, case)
    b, n, h, e = x.shape
    pad = -n % CHUNK
    if pad:
        # Steps of zero change nothing.
        x, into, out, steps = (F.pad(v, (0, 0) * (v.dim() - 2) + (0, pad)) for v in (x, into, out, steps))
    chunks = lambda v: v.unflatten(1, (-1, CHUNK))
    xc, bc, cc = chunks(x), chunks(into), chunks(out)
    dc = chunks(steps)
    decay = (dc * rates).cumsum(2)
    # [B, chunks, H, i, j]: what token i keeps of token j.
    gap = decay.transpose(2, 3)[..., :, None] - decay.transpose(2, 3)[..., None, :]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    kept = gap.masked_fill(~lower, float("-inf")).exp()
    scaled = (xc * dc[..., None].to(x.dtype)).to(x.dtype)
    scores = (cc @ bc.transpose(-1, -2))[:, :, None] * kept.to(x.dtype)
    y = torch.einsum("bchij,bcjhe->bcihe", scores, scaled)
    # What each chunk leaves behind, then what arrives at each.
    late = (decay[:, :, -1:] - decay).exp()
    left = torch.einsum("bcjhe,bcjk->bchek", (scaled * late[..., None].to(x.dtype)), bc).float()
    whole = decay[:, :, -1].exp()
    state, arrived = torch.zeros_like(left[:, 0]), []
    for c in range(left.shape[1]):
        arrived.append(state)
        state = state * whole[:, c, :, None, None] + left[:, c]
    before = torch.einsum("bchek,bcik->bcihe", torch.stack(arrived, 1).to(x.dtype), cc)
    y = y + before * decay.exp()[..., None].to(x.dtype)
    y = (y.flatten(1, 2) + t["skip"][:, None] * x)[:, :n]
    return finish(y, t, case)


def finish(y, t: dict, case):
    """The order of the tokens and the residual."""
    y = y.flatten(2)
    y = y.flip(1) if case.params["reverse"] else y
    return y if t["residual"] is None else y + t["residual"]


@peer("mamba2", "mamba_ssm")
def package(t: dict, case, context: Context) -> Callable:
    """The Triton kernels of its authors."""
    if context.device == "cpu":
        raise CannotRun("mamba_ssm needs a GPU")
    function = module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    first, d = int(case.params["dt_offset"]), case.dims

    def call():
        x, into, out = t["xbc"].split([d["H"] * d["E"], d["K"], d["K"]], -1)
        dt = t["p"][..., first : first + d["H"]]
        if case.params["reverse"]:
            x, into, out, dt = (v.flip(1) for v in (x, into, out, dt))
        y = function(
            x.unflatten(-1, (d["H"], d["E"])), dt, -t["a_log"].float().exp(), into[:, :, None], out[:, :, None],
            chunk_size=256, D=t["skip"], dt_bias=t["dt_bias"], dt_softplus=True)
        return finish(y, t, case)

    return call


eager_and_compiled("mamba2", mamba2, "chunked,")
