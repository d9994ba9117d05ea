#!/usr/bin/env python3
"""A model in plain PyTorch: the peer of `paired model`.

    pytorch_cpu.py DIR --model dit|pixart|vae_decoder --work forward|training-step --dtype f32|bf16
                   --way eager|compile --threads N

DIR holds `model/` (config.json and safetensors in the diffusers layout) and `inputs.safetensors`.  Requests (see
common.py):

    run      calls       {"ms": of all together, "loss": of the last}
    output               one forward pass, written to DIR/peer_output.f32

PyTorch is given its best: fused attention, its own tanh GELU and fused AdamW, weights in bf16 for bf16 forward
passes, autocast for bf16 training.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from common import read_safetensors, serve

# As it is written, or compiled: the first call of a compiled model takes a minute or more and is never timed.
WAYS = {"eager": lambda model: model, "compile": torch.compile}
NAMES = {"eager": "PyTorch", "compile": "torch.compile"}

OPTIMISER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def forward(name: str, model: nn.Module, inputs: dict[str, Tensor], bf16: bool, way: str) -> Callable[[], Tensor]:
    """A forward pass; what does not change from step to step of a sampler is made before."""
    if bf16:
        model, inputs = model.to(torch.bfloat16), {n: t if n in "ty" else t.to(torch.bfloat16) for n, t in inputs.items()}
    model.eval()
    x = inputs["x"]
    with torch.inference_mode():
        if name == "vae_decoder":
            # Convolutions of PyTorch are faster with the channels innermost.
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
            arguments = (x,)
        elif name == "pixart":
            arguments = (x, inputs["t"], model.keys(inputs["text"]))
        else:
            arguments = (x, inputs["t"], inputs["y"].long())
    called = WAYS[way](model)

    @torch.inference_mode()
    def work() -> Tensor:
        return called(*arguments)

    return work


def training(model: nn.Module, inputs: dict[str, Tensor], bf16: bool, way: str) -> Callable[[], Tensor]:
    """Forward, backward and an update; the loss."""
    optimiser = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMISER)
    x, t, y, target = inputs["x"], inputs["t"], inputs["y"].long(), inputs["target"]
    called = WAYS[way](model)

    def work() -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = called(x, t, y)
        loss = F.mse_loss(out.float(), target)
        loss.backward()
        optimiser.step()
        return loss.detach()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=["dit", "pixart", "vae_decoder"], required=True)
    parser.add_argument("--work", choices=["forward", "training-step"], required=True)
    parser.add_argument("--dtype", choices=["f32", "bf16"], required=True)
    parser.add_argument("--way", choices=list(WAYS), default="eager")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)

    model = getattr(models, f"load_{args.model}")(args.folder / "model")
    inputs = {name: torch.from_numpy(t) for name, t in read_safetensors(args.folder / "inputs.safetensors").items()}
    bf16 = args.dtype == "bf16"
    step = args.work == "training-step"
    work = training(model, inputs, bf16, args.way) if step else forward(args.model, model, inputs, bf16, args.way)

    def output(_: dict) -> dict:
        work().float().numpy().tofile(args.folder / "peer_output.f32")
        return {}

    def run(request: dict) -> dict:
        start = time.perf_counter()
        for _ in range(request["calls"]):
            result = work()
        answer = {"ms": (time.perf_counter() - start) * 1e3}
        return answer | ({"loss": result.item()} if step else {})

    about = {"name": NAMES[args.way], "version": torch.__version__, "mkldnn": torch.backends.mkldnn.is_available()}
    serve(about, {"run": run, "output": output})


if __name__ == "__main__":
    main()
