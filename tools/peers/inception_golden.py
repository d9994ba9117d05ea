#!/usr/bin/env python3
"""Record what PyTorch makes of the Inception network: the case `tests/golden/metrics/inception_features`.

    inception_golden.py NETWORK FOLDER

NETWORK is the TorchScript archive that `tools/setup/fetch_data.py inception` fetches.  The images are seeded; the
network runs in f64, so the recorded values are exact to the f32 that they are stored in.  Layers are recorded as the
means over the image of their first channels.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

SEED = 2015
# Rows and columns differ, so that no exchange of the two goes unnoticed.
SHAPE = (4, 40, 32, 3)
SIDE = 299
CHANNELS = 8
LAYERS = ["conv", "conv_2", "pool1", "mixed", "mixed_3", "mixed_4", "mixed_8", "mixed_9", "mixed_10"]


def images() -> np.ndarray:
    """Smooth colours with noise; the last image is black and white noise alone."""
    rng = np.random.default_rng(SEED)
    n, h, w, c = SHAPE
    y, x = np.mgrid[0:h, 0:w]
    phase, frequency = rng.uniform(0, 6.28, (n, 1, 1, c)), rng.uniform(0.1, 0.5, (2, n, 1, 1, c))
    waves = np.sin(phase + frequency[0] * y[None, :, :, None]) * np.cos(frequency[1] * x[None, :, :, None])
    values = 128 + 90 * waves + rng.normal(0, 12, SHAPE)
    values[-1] = 255 * rng.integers(0, 2, (h, w, 1))
    return np.clip(values, 0, 255).astype(np.uint8)


def axis(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left pixel, right pixel and weight of the right one, as the first versions of TensorFlow resize."""
    at = np.arange(SIDE, dtype=np.float32) * np.float32(np.float32(size) / np.float32(SIDE))
    left = np.floor(at).astype(np.int64)
    return left, np.minimum(left + 1, size - 1), at - left.astype(np.float32)


def resize(pixels: np.ndarray) -> np.ndarray:
    """Bilinear, f32, without half-pixel offsets and without anti-aliasing: [n, 299, 299, C]."""
    top, bottom, down = axis(pixels.shape[1])
    left, right, across = axis(pixels.shape[2])
    values, across, down = pixels.astype(np.float32), across[:, None], down[:, None, None]
    row = lambda ys: (v := values[:, ys])[:, :, left] + (v[:, :, right] - v[:, :, left]) * across
    upper, lower = row(top), row(bottom)
    return upper + (lower - upper) * down


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    pixels = images()
    resized = resize(pixels)
    network = torch.jit.load(str(args.network), map_location="cpu").double().eval()
    x = (torch.from_numpy(resized).permute(0, 3, 1, 2).double() - 128) / 128
    expected = {"resized": np.ascontiguousarray(resized[:, ::37, ::41])}
    with torch.no_grad():
        for name, layer in network.net.layers.named_children():
            x = layer(x)
            if name in LAYERS:
                expected[f"{name}.mean"] = x[:, :CHANNELS].mean(dim=(2, 3)).float().numpy()
            if name == "mixed_6":
                expected["spatial"] = x[:, :7].permute(0, 2, 3, 1).flatten(1).float().contiguous().numpy()
    expected["pool3"] = x.flatten(1).float().numpy()
    args.folder.mkdir(parents=True, exist_ok=True)
    tensors = {"inputs.safetensors": {"images": pixels}, "expected.safetensors": expected}
    for file, content in tensors.items():
        save_file(content, args.folder / file)
    shapes = {
        file: {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in content.items()}
        for file, content in tensors.items()
    }
    case = {
        "format_version": 1,
        "family": "metrics",
        "case": args.folder.name,
        "description": "Features of four images from the Inception network of the Frechet distance: pool3, the first "
        "seven channels of mixed_6 by row, column and channel, means of layers, and pixels after resizing.",
        "formulas": ["src = dst*in/299, edges clamped; (x - 128)/128; batch norm with eps 1e-3, no scale"],
        "config": {"n": SHAPE[0], "channels": CHANNELS},
        "tensors": shapes,
        "tolerance": {
            "pool3 (f32)": {"max_abs": 2e-5, "rel_l2": 5e-6},
            "spatial (f32)": {"max_abs": 2e-5, "rel_l2": 5e-6},
            "resized (f32)": {"max_abs": 0.0},
            **{f"{name}.mean (f32)": {"max_abs": 1e-5, "rel_l2": 5e-6} for name in LAYERS},
        },
        "provenance": {
            "generator": Path(__file__).name,
            "seed": SEED,
            "computed_by": "PyTorch, the archive's own TorchScript",
            "computed_in": "float64, images resized in float32",
            "packages": {"torch": torch.__version__.split("+")[0], "numpy": np.__version__},
        },
    }
    (args.folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")
    print(f"{args.folder}: {', '.join(sorted(expected))}", file=sys.stderr)


if __name__ == "__main__":
    main()
