#!/usr/bin/env python3
"""Everything that `graft gpu` needs on a machine with a GPU, in one folder: no cargo, no compiler, no sources.

    python3 tools/setup/gpu_kit.py target/gpu-kit     # builds what is missing
    cd target/gpu-kit && ./graft gpu                  # there; rows in benches/results/<gpu>

The program is stripped; `graft.cubins` lies beside it, where it looks for it.  The rest has its place in the repository:
recorded probes, contracts, targets, peers and Triton twins for a python3 (or GRAFT_PYTHON) with PyTorch and Triton.
`--target sm_90a` leaves out the kernels of other devices; `--without-building` takes program and archive as they are.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What may travel to a lent machine in one go.
LIMIT = 60 << 20
# What travels besides the program and its archive: patterns below the root.
CARRIED = [
    "tests/golden/probes/*",
    "kernels-cu/*/op.toml",
    "kernels-cu/tuned.csv",
    "kernels-triton-ref/*.py",
    "tools/peers/common.py",
    "tools/peers/models.py",
    "tools/peers/gpu/*.py",
    "benches/targets.toml",
]


def run(*command: str) -> None:
    print("+", *command)
    subprocess.run(command, cwd=ROOT, check=True)


def carry(folder: Path) -> None:
    """Copies what travels; a pattern that names nothing is an error."""
    for pattern in CARRIED:
        found = [path for path in sorted(ROOT.glob(pattern)) if path.is_file()]
        if not found:
            sys.exit(f"gpu_kit.py: nothing is called {pattern}")
        for source in found:
            to = folder / source.relative_to(ROOT)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the kit goes")
    parser.add_argument("--target", help="kernels of one kind of device alone, as sm_90a")
    parser.add_argument("--without-building", action="store_true")
    args = parser.parse_args()
    folder = args.folder
    if not args.without_building:
        run("cargo", "build", "--release", "-p", "graft-engine", "--bin", "graft")
        run(sys.executable, "tools/setup/cuda_compiler.py")
        run("cargo", "xtask", "cubins", *(["--target", args.target] if args.target else []))
    archive = f"target/{args.target}.cubins" if args.target else "target/release/graft.cubins"
    made = {"graft": ROOT / "target/release/graft", "graft.cubins": ROOT / archive}
    if missing := [str(path) for path in made.values() if not path.is_file()]:
        sys.exit(f"gpu_kit.py: no {' and no '.join(missing)}; leave out --without-building")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for name, path in made.items():
        shutil.copy2(path, folder / name)
    if shutil.which("strip"):
        run("strip", str((folder / "graft").resolve()))
    carry(folder)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        print(f"larger than {LIMIT >> 20} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
