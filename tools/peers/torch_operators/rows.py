"""Linear layers, norms, losses, optimiser, and what moves or adds rows."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def gemm(c):
    names = ("x", "w", "bias", "pos", "gate", "residual")
    act = {0: lambda u: u, 1: lambda u: F.gelu(u, approximate="tanh"), 2: F.silu, 3: torch.sin}[int(c.params["act"])]
    row = int(c.params["gate_row"])

    def way(*tensors: Tensor | None):
        x, w, bias, pos, gate, residual = tensors

        def run():
            u = F.linear(x, w, bias)
            y = act(u if pos is None else u + pos)
            if gate is not None:
                g = gate[:, row, None]
                return g * y if residual is None else torch.addcmul(residual, g, y)
            return y if residual is None else residual + y

        return run

    given = [c.t.get(name) for name in names]
    ways = {"linear": way(*given)}
    if c.bf16 and not c.backward:
        ways["linear, bf16"] = way(*(None if t is None else t.bfloat16() for t in given))
    elif c.bf16:
        ways["linear, autocast to bf16"] = autocast(ways["linear"])
    return ways


def autocast(run):
    def inner():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return run()

    return inner


def ln_modulate(c):
    eps, d = c.params["eps"], c["D"]
    shift, scale = int(c.params["shift"]), int(c.params["scale"])
    x, table = c.t["x"], c.t["modulation"]

    def eager():
        normal = F.layer_norm(x, (d,), eps=eps)
        return torch.addcmul(table[:, shift, None], normal, 1 + table[:, scale, None])

    def by_sample():
        """The norm's own factor and shift, sample by sample: one pass over memory."""
        ys = [F.layer_norm(xb, (d,), 1 + tb[scale], tb[shift], eps) for xb, tb in zip(x, table)]
        return torch.stack(ys)

    return {"layer_norm, addcmul": eager, "layer_norm by samples": by_sample}


def rms_norm(c):
    eps, d, offset = c.params["eps"], c["D"], int(c.params["gate_offset"])
    x, gate, weight = c.t["x"], c.t.get("gate"), c.t["weight"]
    gated = lambda: x if gate is None else x * F.silu(gate[..., offset : offset + d])

    def by_hand():
        u = gated()
        return u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps) * weight

    return {"rms_norm": lambda: F.rms_norm(gated(), (d,), weight, eps), "rsqrt of the mean": by_hand}


def qk_norm(c):
    eps, d, x, t = c.params["eps"], c["D"], c.t["x"], c.t

    def normal(i: int, name: str) -> Tensor:
        return F.layer_norm(x[:, :, i], (d,), t[f"{name}_gamma"], t[f"{name}_beta"], eps)

    def stacked():
        return torch.stack([normal(0, "q"), normal(1, "k"), x[:, :, 2]], 2)

    def written():
        y = torch.empty_like(x)
        y[:, :, 0], y[:, :, 1], y[:, :, 2] = normal(0, "q"), normal(1, "k"), x[:, :, 2]
        return y

    return {"layer_norm, stack": stacked} if c.backward else {"layer_norm, stack": stacked, "layer_norm, copies": written}


def gate_residual(c):
    row, t = int(c.params["gate_row"]), c.t
    return {
        "addcmul": lambda: torch.addcmul(t["residual"], t["modulation"][:, row, None], t["branch"]),
        "multiply, add": lambda: t["residual"] + t["modulation"][:, row, None] * t["branch"],
    }


def embed(c):
    act = F.silu if int(c.params["act"]) == 2 else (lambda x: x)
    t, addend = c.t, c.t.get("addend")

    def run():
        rows = F.embedding(t["index"], t["table"])
        return act(rows if addend is None else rows + addend)

    return {"embedding": run}


def cross_entropy(c):
    t = c.t
    return {"cross_entropy": lambda: F.cross_entropy(t["logits"], t["labels"])}


def loss_regression(c):
    pred, target, delta = c.t["pred"], c.t["target"], c.params["delta"]
    kinds = [lambda: F.l1_loss(pred, target), lambda: F.mse_loss(pred, target), lambda: F.huber_loss(pred, target, delta=delta)]
    return {"loss": kinds[int(c.params["kind"])]}


def loss_diffusion(c):
    weight, channels, t = c.params["vlb_weight"], c["C"], c.t
    noise, x0 = t["noise"], t["x0"]
    gap, log_lo, log_range, first = (t["coefs"][:, i, None, None] for i in range(4))
    root = 2 * math.sqrt(2 / math.pi)
    # Timestep 0 has a term of its own; a loss computes it where a batch has one.
    likelihood = first > 0.5
    any_first = bool(likelihood.any())

    def cdf(u: Tensor) -> Tensor:
        """(1 + tanh(x))/2 as a sigmoid, which keeps its digits where it is small."""
        return torch.sigmoid(root * (u + 0.044715 * u**3))

    def run():
        eps, v = t["model_output"][:, :channels], t["model_output"][:, channels:]
        rise = (v + 1) / 2 * log_range
        distance = gap * (eps.detach() - noise)
        mse = (noise - eps).square().mean((1, 2))
        vb = 0.5 * (rise + torch.expm1(-rise) + distance.square() * (-log_lo - rise).exp())
        if any_first:
            rate = (-0.5 * (log_lo + rise)).exp()
            # The bin on the side where both ends are small.
            near = -distance.abs()
            inside = cdf(rate * (near + 1 / 255)) - cdf(rate * (near - 1 / 255))
            ends = torch.where(x0 < 0, cdf(rate * (distance + 1 / 255)), cdf(-rate * (distance - 1 / 255)))
            p = torch.where(x0.abs() > 0.999, ends, inside)
            vb = torch.where(likelihood, -p.clamp(min=1e-12).log(), vb)
        return (mse + weight * vb.mean((1, 2)) / math.log(2)).mean()

    return {"eager": run}


def adamw(c):
    p, t = c.params, c.t
    param, grad, m, v, ema = t["param"], t["grad"], t["m"], t["v"], t.get("ema")
    beta1, beta2 = 1 - p["rate1"], 1 - p["rate2"]
    step = torch.tensor(round(math.log1p(-p["bias1"]) / math.log1p(-p["rate1"])), dtype=torch.float32)
    settings = {"lr": p["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": p["weight_decay"], "eps": p["eps"]}
    result = {"param": param, "m": m, "v": v} | ({} if ema is None else {"ema": ema})

    def fused():
        torch._fused_adamw_([param], [grad], [m], [v], [], [step], amsgrad=False, maximize=False, **settings)
        if ema is not None:
            ema.lerp_(param, p["ema_rate"])
        return result

    def foreach():
        param.mul_(1 - p["lr"] * p["weight_decay"])
        m.lerp_(grad, p["rate1"])
        v.mul_(beta2).addcmul_(grad, grad, value=p["rate2"])
        root = (v.sqrt() / math.sqrt(p["bias2"])).add_(p["eps"])
        param.addcdiv_(m, root, value=-p["lr"] / p["bias1"])
        if ema is not None:
            ema.lerp_(param, p["ema_rate"])
        return result

    return {"fused AdamW": fused, "tensor by tensor": foreach}


def axpy(c):
    x, y, alpha = c.t["x"], c.t["y"], c.params["alpha"]

    def run():
        return {"y": y.add_(x, alpha=alpha)}

    return {"add_": run}


def add_noise(c):
    x0, noise, coefs = c.t["x0"], c.t["noise"], c.t["coefs"]
    return {"addcmul": lambda: torch.addcmul(coefs[:, :1] * x0, coefs[:, 1:], noise)}


def branch_deltas(c):
    x, first, second = c.t["x"], c.t["first"], c.t["second"]

    def stacked():
        return torch.stack([first - x, second - x], 2)

    def written():
        y = torch.empty(c["B"], c["N"], 2, c["D"])
        torch.sub(first, x, out=y[:, :, 0])
        torch.sub(second, x, out=y[:, :, 1])
        return y

    return {"stack": stacked} if c.backward else {"stack": stacked, "sub into slices": written}


def filter_window(c):
    centre, period, slow, fast = (c.params[name] for name in ("centre", "period", "slow", "fast"))
    rate = slow + (fast - slow) * (torch.arange(c["C"]) % int(period)) / max(period - 1, 1)
    away = (torch.arange(c["L"]) - int(centre)).abs()
    x = c.t["x"]
    once = torch.exp(-rate[:, None] * away)
    return {
        "exp, multiply": lambda: x.t() * torch.exp(-rate[:, None] * away),
        # The window is the same at every step, so a model may keep it.
        "kept window": lambda: (x.t() * once).contiguous(),
    }


def patchify(c):
    x, p, rows, columns = c.t["x"], c["P"], c["Gh"], c["Gw"]
    b, channels = c["B"], c["C"]

    def permuted():
        return x.reshape(b, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, -1)

    return {"permute": permuted, "unfold": lambda: F.unfold(x, p, stride=p).transpose(1, 2).contiguous()}


def unpatchify(c):
    tokens, p, rows, columns = c.t["tokens"], c["P"], c["Gh"], c["Gw"]
    b, channels = c["B"], c["C"]

    def permuted():
        grid = tokens.reshape(b, rows, columns, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, channels, rows * p, columns * p)

    return {"permute": permuted}


def sinusoid(c):
    t, half = c.t["t"], c["D"] // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / c.params["denominator"])

    def run():
        phase = t[:, None] * frequencies
        return torch.cat([phase.cos(), phase.sin()], 1)

    return {"cos, sin, cat": run}


def solver_step(c):
    p, t, channels = c.params, c.t, c["C"]
    x, cond, uncond = t["x"], t["cond"], t.get("uncond")
    guided = int(p["guided_channels"])

    def run():
        e = cond
        if uncond is not None:
            part = torch.lerp(uncond[:, :guided], cond[:, :guided], p["guidance"])
            e = part if guided == cond.shape[1] else torch.cat([part, cond[:, guided:]], 1)
        eps = e[:, :channels]
        x0 = p["inv_alpha"] * (x - p["sigma"] * eps)
        y = p["cx"] * x + p["ce"] * eps + p["c0"] * x0
        if t.get("x0_prev") is not None:
            y = y + p["c1"] * t["x0_prev"]
        if t.get("noise") is not None and p["cn"] != 0:
            scale = p["cn"]
            if p["learned"]:
                f = (e[:, channels:] + 1) / 2
                scale = torch.exp((f * p["log_hi"] + (1 - f) * p["log_lo"]) / 2)
            y = y + scale * t["noise"]
        return {"x_next": y, "x0": x0}

    return {"eager": run}


def sum_squares(c):
    x = c.t["x"]
    return {
        "vector_norm in f64": lambda: torch.linalg.vector_norm(x, dtype=torch.float64).square().reshape(1),
        "vector_norm": lambda: torch.linalg.vector_norm(x).square().reshape(1),
        "square, sum": lambda: x.square().sum().reshape(1),
        "dot": lambda: torch.dot(x, x).reshape(1),
    }


ROWS = {
    "gemm": gemm,
    "ln_modulate": ln_modulate,
    "rms_norm": rms_norm,
    "qk_norm": qk_norm,
    "gate_residual": gate_residual,
    "embed": embed,
    "cross_entropy": cross_entropy,
    "loss_regression": loss_regression,
    "loss_diffusion": loss_diffusion,
    "adamw": adamw,
    "axpy": axpy,
    "add_noise": add_noise,
    "branch_deltas": branch_deltas,
    "filter_window": filter_window,
    "patchify": patchify,
    "unpatchify": unpatchify,
    "sinusoid": sinusoid,
    "solver_step": solver_step,
    "sum_squares": sum_squares,
}
