#!/usr/bin/env python3
"""A DiT in plain PyTorch: the peer of `cargo run -p graft-benches --bin paired`.

    pytorch_cpu.py DIR --work forward|training-step --dtype f32|bf16 --threads N

DIR holds `model/` (config.json and safetensors in the diffusers layout) and `inputs.safetensors`.  The first line
of output says who answers.  Then each line of input is a request, answered by one JSON line:

    run      one unit of work                    {"ms": ..., "loss": ...}
    output   one forward pass, written to DIR/peer_output.f32     {"ok": true}

PyTorch is given its best: fused attention, its own tanh GELU and fused AdamW, weights in bf16 for bf16 forward
passes, autocast for bf16 training.
"""

import argparse
import json
import math
import struct
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
EPS = 1e-6
OPTIMISER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, copied."""
    data = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        flat = torch.frombuffer(data[begin:end], dtype=DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"]).clone()
    return tensors


def position_table(grid: int, width: int) -> Tensor:
    """[N, D]: the first half of a row encodes the column, the second the row, each as sines and cosines."""
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    waves = torch.outer(torch.arange(grid, dtype=torch.float64), frequencies)
    one = torch.cat([waves.sin(), waves.cos()], dim=1)
    columns = one.unsqueeze(0).expand(grid, grid, -1)
    rows = one.unsqueeze(1).expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, width).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift per sample."""
    normal = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """adaLN-zero transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, D], condition [B, D] after its SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        batch, tokens, width = x.shape
        qkv = self.qkv(modulate(x, shift1, scale1)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1.unsqueeze(1) * self.proj(mixed)
        hidden = F.gelu(self.fc1(modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.fc2(hidden)


class DiT(nn.Module):
    """Class-conditional diffusion transformer with the published semantics."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        heads = config["num_attention_heads"]
        width = heads * config["attention_head_dim"]
        self.patch = config["patch_size"]
        self.grid = config["sample_size"] // self.patch
        self.out_channels = config["out_channels"]
        self.embed = nn.Conv2d(config["in_channels"], width, self.patch, stride=self.patch)
        self.register_buffer("positions", position_table(self.grid, width), persistent=False)
        self.time1, self.time2 = nn.Linear(256, width), nn.Linear(width, width)
        self.labels = nn.Embedding(config["num_embeds_ada_norm"] + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(config["num_layers"]))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, self.patch**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, C, S, S], t [B] timesteps, y [B] labels -> [B, out_channels, S, S]."""
        frequencies = torch.exp(-math.log(10_000) / 128 * torch.arange(128, dtype=torch.float32))
        waves = t.float().unsqueeze(1) * frequencies
        features = torch.cat([waves.cos(), waves.sin()], dim=1).to(self.time1.weight.dtype)
        condition = F.silu(self.time2(F.silu(self.time1(features))) + self.labels(y))
        h = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.last_modulation(condition).chunk(2, dim=1)
        h = self.last(modulate(h, shift, scale))
        h = h.reshape(-1, self.grid, self.grid, self.patch, self.patch, self.out_channels)
        side = self.grid * self.patch
        return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side, side)


def rename(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of the diffusers layout under the names of this file."""
    first = "transformer_blocks.0.norm1.emb."
    modules = {
        "embed": "pos_embed.proj",
        "time1": first + "timestep_embedder.linear_1",
        "time2": first + "timestep_embedder.linear_2",
        "last_modulation": "proj_out_1",
        "last": "proj_out_2",
    }
    for i in range(layers):
        theirs = f"transformer_blocks.{i}."
        for ours, name in {"modulation": "norm1.linear", "proj": "attn1.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2"}.items():
            modules[f"blocks.{i}.{ours}"] = theirs + name
    state = {f"{ours}.{kind}": weights[f"{name}.{kind}"] for ours, name in modules.items() for kind in ("weight", "bias")}
    state["labels.weight"] = weights[first + "class_embedder.embedding_table.weight"]
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [weights[f"transformer_blocks.{i}.attn1.to_{p}.{kind}"] for p in "qkv"]
            state[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", choices=["forward", "training-step"], required=True)
    parser.add_argument("--dtype", choices=["f32", "bf16"], required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)

    config = json.loads((args.folder / "model/config.json").read_text())
    model = DiT(config)
    weights = read_safetensors(args.folder / "model/diffusion_pytorch_model.safetensors")
    model.load_state_dict(rename(weights, config["num_layers"]))
    del weights
    inputs = read_safetensors(args.folder / "inputs.safetensors")
    x, t, y, target = inputs["x"], inputs["t"], inputs["y"].long(), inputs["target"]
    bf16 = args.dtype == "bf16"

    if args.work == "forward":
        if bf16:
            model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
        model.eval()

        @torch.inference_mode()
        def work() -> Tensor:
            return model(x, t, y)

    else:
        optimiser = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMISER)

        def work() -> Tensor:
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                out = model(x, t, y)
            loss = F.mse_loss(out.float(), target)
            loss.backward()
            optimiser.step()
            return loss.detach()

    versions = {"name": "PyTorch", "version": torch.__version__, "mkldnn": torch.backends.mkldnn.is_available()}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        request = line.strip()
        if request == "output":
            work().float().numpy().tofile(args.folder / "peer_output.f32")
            answer = {"ok": True}
        elif request == "run":
            start = time.perf_counter()
            result = work()
            answer = {"ms": (time.perf_counter() - start) * 1e3}
            if args.work == "training-step":
                answer["loss"] = result.item()
        else:
            sys.exit(f"unknown request {request!r}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
