#!/usr/bin/env python3
"""Everything that the battery needs on a machine with a GPU, in one folder: no cargo, no compiler, no sources.

    python3 tools/setup/gpu_kit.py target/gpu-kit     # builds what is missing
    target/gpu-kit/graft gpu --probes target/gpu-kit/probes --out results     # there
    … --peers target/gpu-kit/kernels-triton-ref/check.py     # where python3 has torch and triton

The program is stripped; `graft.cubins` lies beside it, where it looks for it.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What may travel to a lent machine in one go.
LIMIT = 60 << 20


def run(*command: str) -> None:
    print("+", *command)
    subprocess.run(command, cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the kit goes")
    folder = parser.parse_args().folder
    run("cargo", "build", "--release", "-p", "graft-engine", "--bin", "graft")
    run(sys.executable, "tools/setup/cuda_compiler.py")
    run("cargo", "xtask", "cubins")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    built = ROOT / "target/release"
    shutil.copy2(built / "graft", folder / "graft")
    if shutil.which("strip"):
        run("strip", str((folder / "graft").resolve()))
    shutil.copy2(built / "graft.cubins", folder / "graft.cubins")
    probes = ROOT / "tests/golden/probes"
    if probes.is_dir():
        shutil.copytree(probes, folder / "probes")
    # The Triton twins with the cases that they read, for a machine whose Python has Triton.
    for source in [*(ROOT / "kernels-triton-ref").glob("*.py"), *(ROOT / "kernels-cu").glob("*/op.toml")]:
        to = folder / source.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, to)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        print(f"larger than {LIMIT >> 20} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
