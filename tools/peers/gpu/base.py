"""What a peer is, and the register of them.  Nothing here needs PyTorch, so that they can be listed without it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[3]
TWINS = ROOT / "kernels-triton-ref"
sys.path.append(str(TWINS))

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    torch = F = None


class CannotRun(Exception):
    """Why a peer cannot run a case here."""


@dataclass
class Context:
    """Where peers run."""

    device: str
    tiny: bool

    def compile(self, function: Callable) -> Callable:
        """`torch.compile` with static shapes; in the tiny mode traced and differentiated, with no code made."""
        torch._dynamo.reset()
        if self.tiny:
            return torch.compile(function, dynamic=False, backend="aot_eager")
        return torch.compile(function, dynamic=False)


@dataclass
class Peer:
    """One way in which others run an operator.

    `make(tensors, case, context)` gives a function without arguments that computes the operator's first output from the
    tensors; everything that may be done once (masks, packed weights) is done before it returns.  It raises `CannotRun`.
    """

    op: str
    name: str
    make: Callable
    # Whether it has a backward pass, by autograd.
    backward: bool
    # What it leaves out of the operator's work: such a row is a yardstick and not a peer.
    less: str | None
    # Largest error of its outputs relative to the f32 reference, root mean square, where it is not that of the type.
    error: float | None


REGISTRY: list[Peer] = []


def peer(op: str, name: str, backward: bool = True, less: str | None = None, error: float | None = None) -> Callable:
    """Enters `make` of a peer into the register."""

    def enter(make: Callable) -> Callable:
        REGISTRY.append(Peer(op, name, make, backward, less, error))
        return make

    return enter


def module(name: str) -> ModuleType:
    """A library that may not be installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except Exception as error:  # A library built for another PyTorch fails with whatever it likes.
        raise CannotRun(f"no {name}: {type(error).__name__}: {error}") from None


def eager_and_compiled(op: str, function: Callable, what: str = "") -> None:
    """Enters a formula in plain PyTorch, `function(tensors, case)`, as it stands and compiled."""
    prefix = f"{what} " if what else ""

    @peer(op, f"{prefix}eager")
    def _(t: dict, case, context: Context) -> Callable:
        return lambda: function(t, case)

    @peer(op, f"{prefix}compile")
    def _(t: dict, case, context: Context) -> Callable:
        compiled = context.compile(lambda tensors: function(tensors, case))
        return lambda: compiled(t)


def triton_twin(op: str) -> None:
    """Enters our own Triton kernel of an operator, which has no backward pass."""

    @peer(op, "Triton twin", backward=False)
    def _(t: dict, case, context: Context) -> Callable:
        if context.device == "cpu":
            raise CannotRun("Triton needs a GPU; check.py runs the twins in its interpreter")
        module("triton")
        twin, params = module(op), dict(case.params)
        first = case.contract["output"][0]["name"]
        return lambda: twin.run(t, case.dims, params)[first]
