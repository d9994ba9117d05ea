#!/usr/bin/env python3
"""Whole models in PyTorch beside ours: DiT-XL/2 and PixArt-Sigma, with the same random weights.

    python3 tools/peers/gpu/whole.py dit --work forward --pixels 256,512 --batch 2,64 --graft ./graft [--out FILE]
    python3 tools/peers/gpu/whole.py pixart --pixels 2048 --batch 2
    python3 tools/peers/gpu/whole.py dit --device cpu --tiny     a small model, compared; the times say nothing

Random weights go to a folder in the diffusers layout, which PyTorch and `graft forward` read.  Both outputs are compared
with PyTorch's in f32 before anything is timed.  Rows have the names and axes of `graft bench model|train`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PEERS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PEERS))

from gpu.base import CannotRun, torch  # noqa: E402

# Pixels for each latent of the published autoencoder, and tokens of a prompt.
PIXELS, TEXT = 8, 300
# Largest relative error of a forward pass in bf16 and in f32, root mean square, against PyTorch in f32.
ERRORS = {"bf16": 5e-2, "f32": 1e-3}
OPTIMISER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

COMMON = {
    "activation_fn": "gelu-approximate", "attention_bias": True, "dropout": 0.0, "in_channels": 4,
    "norm_elementwise_affine": False, "norm_num_groups": 32, "out_channels": 8, "patch_size": 2, "upcast_attention": False,
}
DIT = COMMON | {"_class_name": "DiTTransformer2DModel", "norm_eps": 1e-5, "norm_type": "ada_norm_zero"}
PIXART = COMMON | {
    "_class_name": "PixArtTransformer2DModel", "norm_eps": 1e-6, "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000, "use_additional_conditions": False,
}


def config_of(kind: str, pixels: int, tiny: bool) -> dict:
    """The published configuration for images of `pixels` a side, or one of two blocks."""
    latent = pixels // PIXELS
    layers, heads, each = (2, 2, 24) if tiny else (28, 16, 72)
    size = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": each}
    if kind == "dit":
        return DIT | size | {"sample_size": latent, "num_embeds_ada_norm": 10 if tiny else 1000}
    wide = size["num_attention_heads"] * size["attention_head_dim"]
    words = {"caption_channels": 32 if tiny else 4096, "cross_attention_dim": wide}
    return PIXART | size | words | {"sample_size": latent, "interpolation_scale": max(latent / 64, 0.5)}


def shapes(kind: str, c: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a model in the diffusers layout."""
    wide = c["num_attention_heads"] * c["attention_head_dim"]
    last = c["patch_size"] ** 2 * c["out_channels"]
    linears: dict[str, tuple[int, int]] = {}
    yield "pos_embed.proj.weight", (wide, c["in_channels"], c["patch_size"], c["patch_size"])
    yield "pos_embed.proj.bias", (wide,)
    for i in range(c["num_layers"]):
        at = f"transformer_blocks.{i}."
        for attention in ["attn1"] if kind == "dit" else ["attn1", "attn2"]:
            linears |= {f"{at}{attention}.{part}": (wide, wide) for part in ("to_q", "to_k", "to_v", "to_out.0")}
        linears |= {f"{at}ff.net.0.proj": (4 * wide, wide), f"{at}ff.net.2": (wide, 4 * wide)}
        if kind == "dit":
            # Every block has a copy of the embedders; the first block's are used.
            emb = at + "norm1.emb."
            time = emb + "timestep_embedder."
            linears |= {f"{time}linear_1": (wide, 256), f"{time}linear_2": (wide, wide), f"{at}norm1.linear": (6 * wide, wide)}
            yield f"{emb}class_embedder.embedding_table.weight", (c["num_embeds_ada_norm"] + 1, wide)
        else:
            yield f"{at}scale_shift_table", (6, wide)
    if kind == "dit":
        linears |= {"proj_out_1": (2 * wide, wide), "proj_out_2": (last, wide)}
    else:
        time = "adaln_single.emb.timestep_embedder."
        linears |= {f"{time}linear_1": (wide, 256), f"{time}linear_2": (wide, wide), "adaln_single.linear": (6 * wide, wide)}
        linears |= {"caption_projection.linear_1": (wide, c["caption_channels"]), "caption_projection.linear_2": (wide, wide)}
        linears |= {"proj_out": (last, wide)}
        yield "scale_shift_table", (2, wide)
    for name, (rows, columns) in linears.items():
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)


def write_model(kind: str, c: dict, folder: Path, device: str) -> None:
    """A folder with random weights, the same for every block's copy of the embedders; bf16 holds all of them exactly."""
    from common import write_safetensors

    random, made = torch.Generator(device).manual_seed(1), {}
    for name, shape in shapes(kind, c):
        first = re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)
        if first not in made:
            scale = shape[-1] ** -0.5 if len(shape) == 2 and "table" not in name else 0.1
            made[first] = (scale * torch.randn(shape, generator=random, device=device)).bfloat16().float().cpu().numpy()
        made[name] = made[first]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", made)


class Model:
    """One kind of model on one device."""

    def __init__(self, kind: str, folder: Path, args: argparse.Namespace) -> None:
        import models

        self.kind, self.args, self.folder = kind, args, folder
        self.load = {"dit": models.load_dit, "pixart": models.load_pixart}[kind]
        self.build = {"dit": models.DiT, "pixart": models.PixArt}[kind]
        self.state = self.load(folder).state_dict()

    def net(self, pixels: int, dtype):
        """The network for images of `pixels` a side, with the same weights whatever the size."""
        with torch.device("cpu"):
            net = self.build(config_of(self.kind, pixels, self.args.tiny))
        net.load_state_dict(self.state)
        return net.to(self.args.device, dtype)

    def inputs(self, pixels: int, batch: int) -> dict:
        """Inputs in f32, of numbers that bf16 holds."""
        side, device = pixels // PIXELS, self.args.device
        random = torch.Generator(device).manual_seed(2)
        draw = lambda *shape: torch.randn(shape, generator=random, device=device).bfloat16().float()
        found = {"x": draw(batch, 4, side, side), "t": torch.arange(batch, device=device).float() * 900 / max(batch - 1, 1) + 50}
        if self.kind == "dit":
            return found | {"y": torch.arange(batch, device=device) % 10}
        tokens, channels = (12, 32) if self.args.tiny else (TEXT, 4096)
        return found | {"text": draw(batch, tokens, channels)}

    def forward(self, net, given: dict, dtype) -> Callable:
        """One forward pass; the text's keys and values are made once, as for all steps of an image."""
        x, t = given["x"].to(dtype), given["t"]
        if self.kind == "dit":
            return lambda: net(x, t, given["y"])
        with torch.no_grad():
            keys = net.keys(given["text"].to(dtype))
        return lambda: net(x, t, keys)

    def ours(self, pixels: int, batch: int, exact) -> dict:
        """What `graft forward` gives for the same weights and inputs, compared with PyTorch in f32."""
        from common import read_safetensors, write_safetensors

        args = self.args
        if args.graft is None:
            return {"ours_compared": "no --graft"}
        with tempfile.TemporaryDirectory() as place:
            inputs, output = Path(place) / "in.safetensors", Path(place) / "out.safetensors"
            given = self.inputs(pixels, batch)
            write_safetensors(inputs, {name: value.cpu().numpy() for name, value in given.items()})
            backend = "cpu" if args.device == "cpu" else "cuda"
            files = ["--model", self.folder, "--inputs", inputs, "--output", output]
            command = map(str, [args.graft, "forward", *files, "--backend", backend, "--dtype", args.element])
            ran = subprocess.run(list(command), capture_output=True, text=True, check=False)
            if ran.returncode != 0:
                return {"ours_compared": f"graft forward failed: {ran.stderr.strip()[-300:]}"}
            got = torch.from_numpy(read_safetensors(output)["output"]).to(exact)
        return {"ours_compared": "yes", "ours_error": checked("graft forward", got, exact, ERRORS[args.element])}


def checked(who: str, got, exact, bound: float) -> float:
    """The relative error, root mean square, of an output; refuses one that is too large or no number."""
    error = float((got.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    if not error <= bound:
        raise CannotRun(f"wrong: {who} is off by {error:.1e}, at most {bound:.0e} is allowed")
    return error


def compiled(net, args: argparse.Namespace):
    """The network with each kind of block compiled once for all layers, shapes static."""
    torch._dynamo.reset()
    for block in net.blocks:
        block.compile(dynamic=False, **({"backend": "aot_eager"} if args.tiny else {}))
    return net


def training_step(model: Model, net, pixels: int, batch: int, parts: int) -> Callable:
    """Forward, backward and one fused AdamW update, f32 weights and bf16 products, in `parts` pieces of the batch."""
    args = model.args
    cuda = args.device != "cpu"
    optimiser = torch.optim.AdamW(net.parameters(), fused=True, **OPTIMISER, **({"capturable": True} if cuda else {}))
    given = model.inputs(pixels, batch // parts)
    target = torch.zeros(batch // parts, 8, pixels // PIXELS, pixels // PIXELS, device=args.device)

    def step():
        optimiser.zero_grad(set_to_none=False)
        for _ in range(parts):
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.element == "bf16", cache_enabled=False):
                out = net(given["x"], given["t"], given["y"])
            loss = torch.nn.functional.mse_loss(out.float(), target) / parts
            loss.backward()
        optimiser.step()

    return step


def rows(model: Model, timer) -> Iterator[dict]:
    """Every size and batch, eager and compiled."""
    args = model.args
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[args.element]
    name = {"dit": "DiT-XL/2", "pixart": "PixArt-Σ"}[model.kind]
    training = args.work == "training"
    for pixels in args.pixels:
        compare = {}
        for batch in args.batch:
            tokens = (pixels // PIXELS // 2) ** 2
            same = {
                "bench": "train" if training else "model", "case": "tiny" if args.tiny else name,
                "work": "training step" if training else "forward",
                "axes": {"batch": float(batch), "percent grafted": 0.0, "tokens": float(tokens)},
                "backend": "cpu" if args.device == "cpu" else "cuda", "element": args.element,
                "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(), "version": f"PyTorch {torch.__version__}",
            }
            if not compare:
                try:
                    with torch.no_grad():
                        exact = model.forward(model.net(pixels, torch.float32), model.inputs(pixels, 2), torch.float32)().float()
                        # The folder is of the first size; PixArt takes any.
                        ours = model.ours(pixels, 2, exact) if pixels == args.pixels[0] else {"ours_compared": "at another size"}
                    compare = {"exact": exact, "ours": ours}
                except Exception as error:  # Memory, or a wrong output: nothing of this size counts.
                    compare = {"failed": error}
            for peer in ("eager", "compile"):
                row = same | {"peer": f"PyTorch {peer}"}
                try:
                    if "failed" in compare:
                        raise compare["failed"]
                    yield row | compare["ours"] | measured(model, timer, peer, pixels, batch, dtype, compare["exact"])
                except Exception as error:  # What does not fit or is not supported is a row, too.
                    why = str(error) if isinstance(error, CannotRun) else f"{type(error).__name__}: {error}"
                    yield row | {"could_not_run": " ".join(why.split())[:300]}
                if args.device != "cpu":
                    torch.cuda.empty_cache()


def measured(model: Model, timer, peer: str, pixels: int, batch: int, dtype, exact) -> dict:
    """Times of one peer at one size, after its forward pass was compared."""
    args = model.args
    training = args.work == "training"
    net = model.net(pixels, torch.float32 if training else dtype)
    net = compiled(net, args) if peer == "compile" else net
    row = {}
    with torch.no_grad(), torch.autocast(args.device, dtype=torch.bfloat16, enabled=training and args.element == "bf16"):
        got = model.forward(net, model.inputs(pixels, 2), net.embed.weight.dtype)()
    row["error"] = checked(peer, got, exact, ERRORS[args.element])
    if not training:
        call = model.forward(net, model.inputs(pixels, batch), dtype)

        def work():
            with torch.no_grad():
                return call()

        times = timer.time(work)
    else:
        for parts in (1, 2, 4, 8):
            try:
                times = timer.time(training_step(model, net, pixels, batch, parts))
                row["pieces"] = parts
                break
            except torch.OutOfMemoryError:
                net.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
        else:
            raise CannotRun("out of memory in eight pieces")
    row |= {"ms": times.at(0.5), "ms_min": times.at(0.0), "ms_p90": times.at(0.9), "samples": len(times.ms), "timing": times.how}
    if args.device != "cpu":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return row | times.clocks


def arguments() -> argparse.Namespace:
    """What was asked for."""
    numbers = lambda text: [int(word) for word in text.split(",")]
    parser = argparse.ArgumentParser(prog="whole.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["dit", "pixart"])
    parser.add_argument("--work", choices=["forward", "training"], default="forward")
    parser.add_argument("--pixels", type=numbers, help="sides of images; 256 where not given, 64 of the small model")
    parser.add_argument("--batch", type=numbers, default=[2])
    parser.add_argument("--element", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="a model of two blocks, to check the program")
    parser.add_argument("--graft", type=Path, help="our program, to compare its output")
    parser.add_argument("--keep", type=Path, help="folder for the weights; a temporary one where not given")
    parser.add_argument("--out", type=Path, help="rows are added to this file, too")
    args = parser.parse_args()
    # By its whole path: a program's name alone would be looked for in PATH.
    args.graft = args.graft and args.graft.resolve()
    args.pixels = args.pixels or [64 if args.tiny else 256]
    if args.work == "training" and args.kind != "dit":
        parser.error("training is measured of dit")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny: times of a processor are another program's")
    return args


def main() -> None:
    """See the top."""
    args = arguments()
    if torch is None:
        sys.exit(f"whole.py: {sys.executable} has no torch")
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("whole.py: PyTorch sees no GPU; --device cpu --tiny checks the program without one")
    from gpu.timing import Timer

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sink = args.out.open("a") if args.out else None
    with tempfile.TemporaryDirectory() as place:
        folder = args.keep or Path(place) / "model"
        write_model(args.kind, config_of(args.kind, args.pixels[0], args.tiny), folder, args.device)
        model = Model(args.kind, folder, args)
        for row in rows(model, Timer(args.device, 1 if args.tiny else args.samples)):
            line = json.dumps(row, ensure_ascii=False)
            print(line, flush=True)
            if sink:
                print(line, file=sink, flush=True)


if __name__ == "__main__":
    main()
