"""Peers of the matrix products: cuBLASLt by way of PyTorch, with its fused epilogues and without, in bf16 and fp8."""

from __future__ import annotations

from collections.abc import Callable

from .base import CannotRun, Context, F, eager_and_compiled, peer, torch, triton_twin

# Largest finite number of e4m3.
E4M3 = 448.0


def activation(u, act: int):
    """The activations of the contract."""
    return [lambda v: v, lambda v: F.gelu(v, approximate="tanh"), F.silu, torch.sin][act](u)


def rounded(t: dict, case) -> tuple:
    """x and w, rounded to bf16 where the case multiplies so."""
    x, w = t["x"], t["w"]
    if case.params.get("bf16"):
        return x.bfloat16().to(x.dtype), w.bfloat16().to(w.dtype)
    return x, w


def epilogue(u, t: dict, case):
    """What a linear layer does after its product."""
    if t.get("pos") is not None:
        u = u + t["pos"]
    y = activation(u, int(case.params["act"]))
    if t["gate"] is not None:
        y = y * t["gate"][:, int(case.params["gate_row"]), None]
    return y if t["residual"] is None else t["residual"] + y


def gemm(t: dict, case):
    """A linear layer in plain PyTorch."""
    x, w = rounded(t, case)
    return epilogue(F.linear(x, w, t["bias"]), t, case)


@peer("gemm", "cuBLASLt alone", less="no bias and no epilogue", backward=False)
def plain(t: dict, case, context: Context) -> Callable:
    """The product alone: what the library does best."""
    x, w = rounded(t, case)
    return lambda: F.linear(x, w)


# On a processor its GELU is the exact one and not that of the tanh.
@peer("gemm", "cuBLASLt, its fused epilogue", backward=False, error=1e-3)
def fused(t: dict, case, context: Context) -> Callable:
    """One library call with bias, or bias and GELU, or a residual, where that is all the case asks for."""
    (x, w), bias, act = rounded(t, case), t["bias"], int(case.params["act"])
    if t["gate"] is not None or t["pos"] is not None or act not in (0, 1):
        raise CannotRun("the library fuses no gate, no positions and no other activation than GELU")
    rows, wide = x.flatten(0, 1), w.t()
    if bias is not None and act == 1 and t["residual"] is None:
        return lambda: torch._addmm_activation(bias, rows, wide, use_gelu=True).unflatten(0, x.shape[:2])
    if bias is not None and act == 0 and t["residual"] is None:
        return lambda: torch.addmm(bias, rows, wide).unflatten(0, x.shape[:2])
    if bias is None and act == 0 and t["residual"] is not None:
        residual = t["residual"].flatten(0, 1)
        return lambda: torch.addmm(residual, rows, wide).unflatten(0, x.shape[:2])
    raise CannotRun("the library fuses either a bias or a residual")


@peer("gemm", "compile max-autotune")
def tuned(t: dict, case, context: Context) -> Callable:
    """Triton products with the epilogue fused, the fastest of those that the compiler tries and the library."""
    if context.device == "cpu":
        raise CannotRun("it tries kernels on a GPU")
    torch._dynamo.reset()
    function = torch.compile(lambda tensors: gemm(tensors, case), dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda: function(t)


def quantised(rows) -> tuple:
    """A matrix in e4m3 and the scale of each of its rows [R, 1] f32."""
    largest = rows.float().abs().amax(-1, keepdim=True)
    scale = torch.where(largest > 0, largest / E4M3, 1.0)
    return (rows.float() / scale).clamp(-E4M3, E4M3).to(torch.float8_e4m3fn), scale


def fp8(t: dict, case, compiled: Callable) -> Callable:
    """A product of e4m3 with a scale for each row of both; x is quantised in every call and w once."""
    x, (w, w_scale) = t["x"], quantised(t["w"])
    wide, scales, rows = w.t(), w_scale.t().contiguous(), x.flatten(0, 1)

    def layer(x_rows):
        q, scale = quantised(x_rows)
        u = torch._scaled_mm(q, wide, scale_a=scale, scale_b=scales, out_dtype=torch.bfloat16, use_fast_accum=True)
        u = u if t["bias"] is None else u + t["bias"]
        return epilogue(u.unflatten(0, x.shape[:2]), t, case)

    layer = compiled(layer)
    return lambda: layer(rows)


@peer("gemm_fp8", "scaled product, eager", backward=False, error=5e-2)
def fp8_eager(t: dict, case, context: Context) -> Callable:
    """Rowwise scales, everything around the product by separate kernels."""
    return fp8(t, case, lambda f: f)


@peer("gemm_fp8", "scaled product, compile", backward=False, error=5e-2)
def fp8_compiled(t: dict, case, context: Context) -> Callable:
    """Rowwise scales, quantisation and epilogue compiled."""
    return fp8(t, case, context.compile)


@peer("gemm_fp8", "bf16, compile", backward=False, error=5e-2)
def fp8_as_bf16(t: dict, case, context: Context) -> Callable:
    """The same layer in bf16, compiled: what fp8 has to be faster than."""
    case = type(case)(case.op, case.name, case.dims, case.params | {"bf16": False}, case.absent, case.contract)
    compiled = context.compile(lambda tensors: gemm(tensors, case))
    return lambda: compiled(t)


eager_and_compiled("gemm", gemm)
triton_twin("gemm")
