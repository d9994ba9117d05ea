"""The cases of the contracts, kernels-cu/<op>/op.toml, with the numbers that the engine's tests draw for them."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ROOT = Path(__file__).resolve().parent.parent / "kernels-cu"
# atol, rtol, rms of kernels-cu/check.rs, for contracts that state none of their own.
TOLERANCES = {"f32": (2e-5, 1e-5, 3e-6), "bf16": (1e-3, 1.6e-2, 4e-3)}
MASK = (1 << 64) - 1


@dataclass
class Case:
    """One named shape of an operator."""

    op: str
    name: str
    dims: dict[str, int]
    params: dict[str, float]
    absent: list[str]
    contract: dict

    def shape(self, tensor: dict) -> tuple[int, ...]:
        """The shape of an input or output: sums and products of dims in letters, with whole quotients."""
        return tuple(int(evaluate(d.replace("/", "//"), self.dims)) for d in tensor["shape"])

    def inputs(self) -> dict[str, np.ndarray | None]:
        """Every input in f32, None where it is absent."""
        found = {}
        for tensor in self.contract["input"]:
            name = tensor["name"]
            count = math.prod(self.shape(tensor))
            absent = name in self.absent
            found[name] = None if absent else draw(self.name, name, count, tensor.get("fill", "normal")).reshape(self.shape(tensor))
        return found

    def cost(self, what: str) -> float:
        """`flops` or `bytes` of a forward call, the bytes with every tensor in f32."""
        return evaluate(self.contract["cost"][what].replace("/", "//"), self.dims)

    def tolerance(self, element: str) -> tuple[float, float, float]:
        """atol, rtol, rms."""
        own = self.contract.get("tolerance" if element == "f32" else "tolerance_bf16")
        return (own["atol"], own["rtol"], own["rms"]) if own else TOLERANCES[element]


def cases(op: str, tier: str) -> list[Case]:
    """The cases of a size class, in their order."""
    contract = tomllib.loads((ROOT / op / "op.toml").read_text())
    return [
        Case(op, c["name"], c["dims"], c.get("params", {}), c.get("absent", []), contract)
        for c in contract["case"]
        if c["tier"] == tier
    ]


def evaluate(formula: str, dims: dict[str, int]) -> float:
    """A formula of a contract in its dims."""
    return eval(formula, {"__builtins__": {}}, dict(dims))


def operators() -> list[str]:
    """Names of the contracts."""
    return sorted(path.parent.name for path in ROOT.glob("*/op.toml"))


def uniforms(seed: int, count: int) -> np.ndarray:
    """`count` draws of splitmix64 after `seed`, as numbers in [0, 1)."""
    import numpy as np

    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def draw(case: str, tensor: str, count: int, fill: str) -> np.ndarray:
    """The numbers of a tensor of a case: the seed is an FNV-1a hash of both names."""
    import numpy as np

    seed = 0xCBF29CE484222325
    for byte in f"{case}/{tensor}".encode():
        seed = (seed ^ byte) * 0x100000001B3 & MASK
    if fill.startswith("uniform:"):
        low, high = (float(v) for v in fill.split(":")[1:])
        return (low + (high - low) * uniforms(seed, count)).astype(np.float32)
    if fill != "normal":
        raise ValueError(f"{tensor}: no twin draws {fill}")
    pairs = uniforms(seed, 2 * count)
    radius = np.sqrt(-2.0 * np.log(1.0 - pairs[0::2]))
    return (radius * np.cos(2.0 * np.pi * pairs[1::2])).astype(np.float32)
