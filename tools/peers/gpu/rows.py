"""Runs the peers of a case: checks what they compute against the reference, times them, and gives rows of JSON."""

from __future__ import annotations

import gc
from collections.abc import Iterator

from . import reference
from .base import CannotRun, Context, Peer, torch
from .timing import Timer

# Largest relative error of an output and of a gradient, root mean square, by working type.
ERRORS = {"bf16": (1e-2, 2e-2), "f32": (1e-4, 3e-4)}
# The axis of a row of a cold measurement, and the bytes in f32 beyond which a case leaves nothing in a cache: as in
# `graft bench op --cold`.
COLD = {"cold L2": 1.0}
CACHED = 400 << 20


class Bench:
    """Peers on one device."""

    def __init__(self, context: Context, element: str, samples: int) -> None:
        self.context, self.element = context, element
        self.dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[element]
        self.timer = Timer(context.device, samples)
        # Products of the reference are f32 throughout.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        cuda = context.device != "cpu"
        self.same = {
            "backend": "cuda" if cuda else "cpu",
            "element": element,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "version": f"PyTorch {torch.__version__}",
        } | ({"tiny": True} if context.tiny else {})

    def tensors(self, case) -> dict:
        """The inputs of a case, drawn as its contract says, None where absent."""
        random, made = torch.Generator(self.context.device).manual_seed(7), {}
        for tensor in [*case.contract.get("input", []), *case.contract.get("inout", [])]:
            name, shape, dtype = tensor["name"], case.shape(tensor), tensor.get("dtype", "")
            if name in case.absent:
                made[name] = None
                continue
            kind, _, bounds = tensor.get("fill", "normal").partition(":")
            where = {"device": self.context.device, "generator": random}
            if kind == "index":
                below = int(eval(bounds, {"__builtins__": {}}, dict(case.dims)))
                made[name] = torch.randint(below, shape, dtype=torch.int32, **where)
                continue
            if kind == "uniform":
                low, high = (float(v) for v in bounds.split(":"))
                value = low + (high - low) * torch.rand(shape, **where)
            else:
                value = torch.randn(shape, **where)
                value = value.abs() if kind == "positive" else value
            made[name] = value.to(torch.float32 if dtype == "f32" else self.dtype)
        return made

    def case(self, case, peers: list[Peer], passes: list[str], cold: bool) -> Iterator[dict]:
        """The rows of a case, each peer and pass, as they are measured."""
        tensors = self.tensors(case)
        graded = [i["name"] for i in case.contract.get("input", []) if i.get("grad") and tensors[i["name"]] is not None]
        backward = "backward" in passes and "gradient" in case.contract and any(p.backward for p in peers)
        want, dy = self.want(case, tensors, graded if backward else [])
        # What the cache could keep from one call to the next.
        small = self.context.device != "cpu" and case.cost("bytes") < CACHED
        for peer in peers:
            for work in passes:
                if work == "backward" and not (backward and peer.backward):
                    continue
                row = {"bench": "op", "case": f"{case.op}/{case.name}", "work": work, "axes": {}, **self.same, "peer": peer.name}
                row |= {"less": peer.less} if peer.less else {}
                try:
                    exact = want
                    if peer.less:
                        exact = {"y": reference.gemm(self.wide(tensors), case.dims, case.params, product=True)}
                    call, error = self.checked(case, peer, work, tensors, graded, exact, dy)
                    for is_cold in [False, True] if cold and small else [False]:
                        yield row | self.measured(case, work, call, is_cold) | {"error": error}
                except Exception as error:  # Whatever a library throws, the others go on.
                    why = str(error) if isinstance(error, CannotRun) else f"{type(error).__name__}: {error}"
                    yield row | {"could_not_run": " ".join(why.split())[:300]}
                call = None
                gc.collect()
                if self.context.device != "cpu":
                    torch.cuda.empty_cache()

    def wide(self, tensors: dict) -> dict:
        """The tensors in the type of the reference."""
        to = torch.float64 if self.context.tiny else torch.float32
        return {k: v.to(to) if v is not None and v.is_floating_point() else v for k, v in tensors.items()}

    def want(self, case, tensors: dict, graded: list[str]) -> tuple:
        """The first output of the reference, and the gradients of `graded` for a random `dy`."""
        wide = self.wide(tensors)
        leaves = [wide[name].requires_grad_() for name in graded]
        with torch.set_grad_enabled(bool(leaves)):
            y = reference.of(case.op)(wide, case.dims, case.params)
        found, dy = {"y": y.detach()}, None
        if leaves:
            random = torch.Generator(self.context.device).manual_seed(8)
            dy = torch.randn(y.shape, generator=random, device=y.device).to(self.dtype)
            grads = torch.autograd.grad(y, leaves, dy.to(y.dtype))
            found |= {f"d{name}": g for name, g in zip(graded, grads, strict=True)}
        return found, dy

    def checked(self, case, peer: Peer, work: str, tensors: dict, graded: list[str], want: dict, dy) -> tuple:
        """A function that does the work, after what it gives was compared; and the largest error."""
        ours = dict(tensors)
        forward, back = ERRORS[self.element]
        self.wait()
        if work == "forward":
            with torch.no_grad():
                call = peer.make(ours, case, self.context)
                got, bound = {"y": call()}, max(peer.error or 0.0, forward)
            inner = call

            def call():
                with torch.no_grad():
                    return inner()
        else:
            leaves = []
            # On the stream of the timer: a captured backward pass belongs to the stream of its forward pass.
            with torch.cuda.stream(getattr(self.timer, "stream", None)):
                for name in graded:
                    ours[name] = tensors[name].detach().clone().requires_grad_()
                    leaves.append(ours[name])
                y = peer.make(ours, case, self.context)()
                call = lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
                got, bound = {f"d{n}": g for n, g in zip(graded, call(), strict=True)}, max(peer.error or 0.0, back)
        self.wait()
        worst = 0.0
        for name, value in got.items():
            error = relative(value, want[name])
            # Written so that a NaN fails.
            if not error <= bound:
                raise CannotRun(f"wrong: {name} is off by {error:.1e}, at most {bound:.0e} is allowed")
            worst = max(worst, error)
        return call, worst

    def wait(self) -> None:
        """Until all streams are done: one reads what another made."""
        if self.context.device != "cpu":
            torch.cuda.synchronize()

    def measured(self, case, work: str, call, cold: bool) -> dict:
        """The times of a call, and what it moves."""
        cuda = self.context.device != "cpu"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times = self.timer.time(call, cold)
        row = {"ms": times.at(0.5), "ms_min": times.at(0.0), "ms_p90": times.at(0.9), "samples": len(times.ms), "timing": times.how}
        if cold:
            row["axes"] = dict(COLD)
        if work == "forward":
            # The contract counts a forward call, with every tensor in f32.
            size = torch.finfo(self.dtype).bits / 32
            row |= {"flops": case.cost("flops"), "bytes": case.cost("bytes") * size}
        if cuda:
            # What the work adds to its inputs and to what the check keeps.
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        return row | times.clocks

    def ceilings(self) -> Iterator[dict]:
        """A large copy and a large product, as PyTorch does them."""
        cuda = self.context.device != "cpu"
        floats, side = (1 << 28, 8192) if cuda else (1 << 16, 64)
        source = torch.randn(floats, device=self.context.device)
        target = torch.empty_like(source)
        times = self.timer.time(lambda: target.copy_(source))
        same = {"bench": "ceiling", "axes": {}, **self.same, "samples": len(times.ms)}
        span = lambda t: {"ms": t.at(0.5), "ms_min": t.at(0.0), "ms_p90": t.at(0.9), **t.clocks}
        yield same | {"case": "copy", "work": "read and write", "peer": "copy_", "bytes": 8.0 * floats, **span(times)}
        a, b = (torch.randn(side, side, device=self.context.device, dtype=self.dtype) for _ in range(2))
        times = self.timer.time(lambda: a @ b)
        yield same | {"case": "product", "work": f"{side} cubed", "peer": "cuBLAS", "flops": 2.0 * side**3, **span(times)}


def relative(value, exact) -> float:
    """Root mean square of the difference over that of the exact values; NaN where a value is none."""
    if value.shape != exact.shape:
        raise CannotRun(f"wrong: shape {list(value.shape)}, must be {list(exact.shape)}")
    difference, scale = (value.to(exact.dtype) - exact).square().mean().sqrt(), exact.square().mean().sqrt()
    return float(difference / scale.clamp(min=1e-20)) if float(difference) != 0.0 else 0.0
