#!/usr/bin/env python3
"""Set up the pinned CUDA compiler and disassembler in .venv-cuda/, without a GPU or a driver.

    python3 tools/setup/cuda_compiler.py            # compilers, disassembler, CUTLASS headers
    python3 tools/setup/cuda_compiler.py --check    # say what is there, change nothing
    python3 tools/setup/cuda_compiler.py --try      # the first, but no failure where it cannot be had

The tools are wheels of the package manager; each is pinned, and none may pull in others, because their own
requirements are open.  Running the script again does nothing where everything is in place.  The compile gate
(`cargo test -p graft-tests --test compile_gate`) finds the folder by itself.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-cuda"

# Compiler, its back end and headers; the C++ library that CUTLASS wants; tools that read machine code (their
# first release is newer than the compiler); CUTLASS, the second source of the instruction wrappers.
PINNED = {
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-nvvm": "13.0.88",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-cuda-runtime": "13.0.96",
    "nvidia-cuda-cccl": "13.0.85",
    "nvidia-cuda-cuobjdump": "13.2.78",
    "nvidia-cuda-nvdisasm": "13.2.78",
    "nvidia-cuda-nvrtc": "13.0.88",
    "nvidia-cutlass": "4.2.0.0",
}


def installed() -> dict[str, str]:
    """Version of every distribution in the folder, by name."""
    found = {}
    for info in FOLDER.glob("lib/python3*/site-packages/*.dist-info"):
        name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
        found[name.replace("_", "-").lower()] = version
    return found


def missing() -> list[str]:
    """Requirements that are not met, as `name==version`."""
    found = installed()
    return [f"{name}=={version}" for name, version in PINNED.items() if found.get(name) != version]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    parser.add_argument("--try", dest="attempt", action="store_true", help="succeed where the tools cannot be had")
    arguments = parser.parse_args()
    wanted = missing()
    if arguments.check:
        print("missing: " + " ".join(wanted) if wanted else "everything is in place")
        return 1 if wanted else 0
    if not wanted:
        print(f"{FOLDER.name}: everything is in place")
        return 0
    done = install(wanted)
    if not done and arguments.attempt:
        print(f"{FOLDER.name}: going on without; the compile gate will be skipped")
        return 0
    return 0 if done else 1


def install(wanted: list[str]) -> bool:
    """Whether the requirements were installed."""
    python = FOLDER / "bin" / "python"
    try:
        if not python.exists():
            venv.create(FOLDER, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as e:
        print(f"{FOLDER.name}: no environment can be made: {e}", file=sys.stderr)
        return False
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *wanted]
    if subprocess.run(command).returncode != 0:
        print(f"{FOLDER.name}: the package manager failed; the message above says why", file=sys.stderr)
        return False
    print(f"{FOLDER.name}: installed {' '.join(wanted)}")
    return True


if __name__ == "__main__":
    sys.exit(main())
