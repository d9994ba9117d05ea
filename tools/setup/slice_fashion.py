#!/usr/bin/env python3
"""Cut the bundled slice assets/fashion-mnist/ out of the full Fashion-MNIST in data-cache/.

    python3 tools/setup/fetch_data.py fashion-mnist
    python3 tools/setup/slice_fashion.py

Takes the first 10,000 training and the first 2,000 test images with their labels, in their order, and writes
them as idx files under the original names.  Every class must hold its tenth of a split within a fifth, so that
a cut that lost the balance is refused.  The gzip headers carry no time and no name, so running the script again
on the same zlib writes the same bytes; the SHA-256 printed is that of the decompressed content, which is the same
on every machine.  Needs only the Python standard library.
"""

import argparse
import gzip
import hashlib
import os
import struct
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# File stem -> images to keep.
SPLITS = {"train": 10_000, "t10k": 2_000}
CLASSES = 10
# Largest relative deviation of a class from its equal share.
IMBALANCE = 0.2


class SliceError(Exception):
    """A failure that is explained to the user in one line."""


def read_idx(path: Path, rank: int) -> tuple[tuple[int, ...], bytes]:
    """Dimensions and bytes of a gzipped idx file of bytes."""
    with gzip.open(path, "rb") as stream:
        content = stream.read()
    header = 4 + 4 * rank
    if content[:4] != bytes([0, 0, 8, rank]):
        raise SliceError(f"{path}: not an idx file of bytes with {rank} dimensions")
    dims = struct.unpack(f">{rank}I", content[4:header])
    body = content[header:]
    size = 1
    for dim in dims:
        size *= dim
    if len(body) != size:
        raise SliceError(f"{path}: holds {len(body)} bytes, must be {size} for {dims}; fix: fetch it again")
    return dims, body


def write_idx(path: Path, dims: tuple[int, ...], body: bytes) -> None:
    """A gzipped idx file that takes its place only when it is complete."""
    content = bytes([0, 0, 8, len(dims)]) + struct.pack(f">{len(dims)}I", *dims) + body
    scratch = path.with_name(path.name + ".tmp")
    with open(scratch, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as stream:
        stream.write(content)
    os.replace(scratch, path)
    print(f"{hashlib.sha256(content).hexdigest()}  {path.name}")


def check_balance(stem: str, labels: bytes) -> None:
    """Refuse a slice in which some class is far from its equal share."""
    share = len(labels) / CLASSES
    counts = Counter(labels)
    found = [counts[label] for label in range(CLASSES)]
    print(f"{stem}: {len(labels)} images, per class {found}")
    if any(abs(count - share) > IMBALANCE * share for count in found):
        raise SliceError(f"{stem}: classes are out of balance, must be within {IMBALANCE:.0%} of {share:.0f}")


def cut(source: Path, target: Path) -> None:
    """Write every split's slice."""
    target.mkdir(parents=True, exist_ok=True)
    for stem, keep in SPLITS.items():
        names = f"{stem}-images-idx3-ubyte.gz", f"{stem}-labels-idx1-ubyte.gz"
        (n, height, width), pixels = read_idx(source / names[0], 3)
        (label_count,), labels = read_idx(source / names[1], 1)
        if n != label_count or n < keep:
            raise SliceError(f"{source}: {n} images and {label_count} labels, must be equal and at least {keep}")
        check_balance(stem, labels[:keep])
        write_idx(target / names[0], (keep, height, width), pixels[: keep * height * width])
        write_idx(target / names[1], (keep,), labels[:keep])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--source", type=Path, default=ROOT / "data-cache" / "fashion-mnist", help="the full set")
    parser.add_argument("--target", type=Path, default=ROOT / "assets" / "fashion-mnist", help="where the slice goes")
    options = parser.parse_args()
    try:
        cut(options.source, options.target)
    except (SliceError, OSError, EOFError) as error:
        print(f"slice_fashion: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
