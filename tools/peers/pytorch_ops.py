#!/usr/bin/env python3
"""Operators in PyTorch on the CPU: the peer of `paired op`.

    pytorch_ops.py --threads N

Requests (see common.py):

    knows    op                                   {} or {"none": why}
    case     op, case, dims, params, inputs …     {"ways": {"forward": [...], "backward": [...]}}
    output   pass, way                            {"file": outputs or gradients}
    run      pass, way, calls                     {"ms": of all calls together}

An operator has one or more ways to be written; the caller compares the outputs of all and times the fastest.  Inputs
are prepared outside the time.  A forward pass runs in inference mode.  A backward pass is autograd.grad of a graph
that is recorded once and kept, so only gradients are timed.  A loop of calls runs inside, so a measurement holds
one Python call per operator of PyTorch and nothing else.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from common import read_safetensors, serve, write_safetensors
from torch_operators import NONE, OPERATORS


class Case:
    """Inputs, dims and parameters of a case; `t` holds the tensors under the names of the contract."""

    def __init__(self, request: dict) -> None:
        self.op, self.dims, self.params = request["op"], request["dims"], request["params"]
        self.bf16 = request["dtype"] == "bf16"
        self.outputs, self.grads = request["outputs"], request["grads"]
        self.backward = False
        self.whole = set(request["i32"])
        self.arrays = read_safetensors(Path(request["folder"]) / "inputs.safetensors")
        self.t: dict[str, Tensor] = {}
        self.refresh(backward=False)

    def refresh(self, backward: bool) -> None:
        """Tensors as the case gives them: what works in place starts anew, gradients start at leaves."""
        self.backward = backward
        self.t = {}
        for name, values in self.arrays.items():
            t = torch.from_numpy(values).clone()
            if name in self.whole:
                t = t.long()
            elif backward and name in self.grads:
                t.requires_grad_(True)
            self.t[name] = t

    def __getitem__(self, name: str) -> int:
        """A dim."""
        return self.dims[name]


class Peer:
    def __init__(self) -> None:
        self.case: Case | None = None
        self.folder = Path()
        self.held: tuple | None = None

    def knows(self, request: dict) -> dict:
        op = request["op"]
        return {} if op in OPERATORS else {"none": NONE.get(op, "not written")}

    def take(self, request: dict) -> dict:
        self.held = None
        self.case = Case(request)
        self.folder = Path(request["folder"])
        forward = self.ways(backward=False)
        backward = self.ways(backward=True) if self.case.grads else {}
        return {"ways": {"forward": list(forward), "backward": list(backward)}}

    def ways(self, backward: bool) -> dict:
        """The ways of the case, on fresh tensors."""
        self.case.refresh(backward)
        return OPERATORS[self.case.op](self.case)

    def work(self, which: str, way: str):
        """A call of the pass, kept from request to request."""
        if self.held is None or self.held[0] != (which, way):
            self.held = None
            self.held = ((which, way), self.fresh(which, way))
        return self.held[1]

    def fresh(self, which: str, way: str):
        case = self.case
        if which == "forward":
            return self.ways(backward=False)[way]
        call = self.ways(backward=True)[way]
        with torch.enable_grad():
            y = call()
        leaves = [case.t[name] for name in case.grads]
        first = case.outputs[0]
        seed = case.t[f"d{first}"].reshape(y.shape)

        def backward():
            return torch.autograd.grad(y, leaves, seed, retain_graph=True)

        return backward

    def output(self, request: dict) -> dict:
        which, way = request["pass"], request["way"]
        self.held = None
        result = self.call(which, self.work(which, way))
        if which == "backward":
            named = {f"d{name}": grad for name, grad in zip(self.case.grads, result)}
        elif isinstance(result, dict):
            named = result
        else:
            named = {self.case.outputs[0]: result}
        path = self.folder / "peer.safetensors"
        write_safetensors(path, {name: t.detach().float().numpy() for name, t in named.items()})
        return {"file": str(path)}

    def call(self, which: str, work):
        with torch.inference_mode(which == "forward"):
            return work()

    def run(self, request: dict) -> dict:
        which, calls = request["pass"], request["calls"]
        work = self.work(which, request["way"])
        with torch.inference_mode(which == "forward"):
            start = time.perf_counter()
            for _ in range(calls):
                work()
            return {"ms": (time.perf_counter() - start) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    peer = Peer()
    about = {"name": "PyTorch", "version": torch.__version__, "mkldnn": torch.backends.mkldnn.is_available()}
    serve(about, {"knows": peer.knows, "case": peer.take, "output": peer.output, "run": peer.run})


if __name__ == "__main__":
    main()
