"""Peers of the operators that move bytes: plain PyTorch as it stands and compiled, its own fused kernels."""

from __future__ import annotations

from collections.abc import Callable

from .base import Context, F, eager_and_compiled, peer, torch, triton_twin


def ln_modulate(t: dict, case):
    """LayerNorm without parameters, then scale and shift per sample."""
    p, modulation = case.params, t["modulation"]
    shift, scale = (modulation[:, int(p[row]), None] for row in ("shift", "scale"))
    return F.layer_norm(t["x"], t["x"].shape[-1:], eps=p["eps"]) * (1 + scale) + shift


def gate_residual(t: dict, case):
    """The branch times its gate, added to the stream."""
    return t["residual"] + t["modulation"][:, int(case.params["gate_row"]), None] * t["branch"]


def rms_norm(t: dict, case):
    """Root mean square norm of a gated row."""
    p, u, width = case.params, t["x"], t["x"].shape[-1]
    if t["gate"] is not None:
        first = int(p["gate_offset"])
        u = u * F.silu(t["gate"][..., first : first + width])
    return F.rms_norm(u, (width,), t["weight"], p["eps"])


def qk_norm(t: dict, case):
    """LayerNorm of queries and keys in a packed projection."""
    (q, k, v), eps = t["x"].unbind(2), case.params["eps"]
    width = q.shape[-1:]
    q, k = F.layer_norm(q, width, t["q_gamma"], t["q_beta"], eps), F.layer_norm(k, width, t["k_gamma"], t["k_beta"], eps)
    return torch.stack([q, k, v], 2)


def group_norm_silu(t: dict, case):
    """GroupNorm over channels that lie last, and SiLU."""
    x, groups, p = t["x"].movedim(-1, 1), case.dims["G"], case.params
    if t["stats"] is None:
        y = F.group_norm(x, groups, t["gamma"], t["beta"], p["eps"])
    else:
        each = x.shape[1] // groups
        mean, var = (s.repeat_interleave(each, 1)[..., None, None] for s in t["stats"].unbind(1))
        gamma, beta = (v[:, None, None] for v in (t["gamma"], t["beta"]))
        y = ((x - mean) * torch.rsqrt(var + p["eps"]) * gamma + beta).to(x.dtype)
    return (F.silu(y) if p["silu"] else y).movedim(1, -1)


def branch_deltas(t: dict, case):
    """What two branches change, side by side."""
    return torch.stack([t["first"] - t["x"], t["second"] - t["x"]], 2)


def upsample(t: dict, case):
    """Every pixel four times."""
    return F.interpolate(t["x"].movedim(-1, 1), scale_factor=2, mode="nearest").movedim(1, -1)


def add_noise(t: dict, case):
    """A sample between data and noise."""
    return t["coefs"][:, :1] * t["x0"] + t["coefs"][:, 1:] * t["noise"]


def adamw(t: dict, case):
    """One update by the formula; `param` afterwards."""
    p, grad = case.params, t["grad"] * case.params["grad_scale"]
    m = t["m"] + p["rate1"] * (grad - t["m"])
    v = t["v"] + p["rate2"] * (grad * grad - t["v"])
    step = p["lr"] / p["bias1"] * m / (v.sqrt() / p["bias2"] ** 0.5 + p["eps"])
    param = t["param"] - p["lr"] * p["weight_decay"] * t["param"] - step
    return param, m, v, None if t["ema"] is None else t["ema"] + p["ema_rate"] * (param - t["ema"])


@peer("adamw", "fused AdamW", backward=False)
def fused_adamw(t: dict, case, context: Context) -> Callable:
    """PyTorch's fused kernel; the moving average by another call, as it has none."""
    p, own = case.params, {k: v.clone() for k, v in t.items() if v is not None}
    # It makes the bias corrections from the step, which is what the contract's numbers are of the first.
    steps = [torch.tensor(1.0, device=context.device)]

    def call():
        torch._fused_adamw_(
            [own["param"]], [own["grad"]], [own["m"]], [own["v"]], [], steps, lr=p["lr"], beta1=1 - p["rate1"],
            beta2=1 - p["rate2"], weight_decay=p["weight_decay"], eps=p["eps"], amsgrad=False, maximize=False)
        if "ema" in own:
            own["ema"].lerp_(own["param"], p["ema_rate"])
        return own["param"]

    return call


@peer("adamw", "compile", backward=False)
def compiled_adamw(t: dict, case, context: Context) -> Callable:
    """The formula, its results written back into the same tensors."""
    own = {k: v.clone() for k, v in t.items() if v is not None} | ({"ema": None} if t["ema"] is None else {})

    def update(tensors):
        for name, value in zip(("param", "m", "v", "ema"), adamw(tensors, case), strict=True):
            if value is not None:
                tensors[name].copy_(value)

    compiled = context.compile(update)

    def call():
        compiled(own)
        return own["param"]

    return call


@peer("axpy", "add_", backward=False)
def axpy(t: dict, case, context: Context) -> Callable:
    """y + alpha x, in place."""
    y = t["y"].clone()
    return lambda: y.add_(t["x"], alpha=case.params["alpha"])


for op, function in {
    "ln_modulate": ln_modulate,
    "gate_residual": gate_residual,
    "rms_norm": rms_norm,
    "qk_norm": qk_norm,
    "group_norm_silu": group_norm_silu,
    "branch_deltas": branch_deltas,
    "upsample": upsample,
    "add_noise": add_noise,
}.items():
    eager_and_compiled(op, function)
triton_twin("ln_modulate")
