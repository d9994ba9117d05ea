#!/usr/bin/env python3
"""Stub GPU libraries for a CUDA build of PyTorch that only ever runs on the CPU.

Run by the Python of the environment.  Finds the shared libraries that PyTorch names and that are not there, and the
symbols that it expects of them, and compiles libraries that export exactly those.  A stub that is called says its
name and aborts: nothing can silently compute with it.
"""

import collections
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PACKAGES = Path(sysconfig.get_paths()["purelib"])
GPU_LIBRARY = re.compile(r"lib(cu|nccl|nvshmem|nvrtc|nvJitLink|nvToolsExt)")
GPU_SYMBOL = re.compile(r"(cu[a-zA-Z]|p?nccl|nvshmem|nvrtc|nvJitLink)")
# Part of the driver: with a stub in its place PyTorch would believe that there is one.
NEVER = {"libcuda.so.1"}


def readelf(option: str, library: Path) -> str:
    """Output of `readelf` on a library."""
    done = subprocess.run(["readelf", "-W", option, str(library)], capture_output=True, text=True, check=True)
    return done.stdout


def expected(libraries: list[Path]) -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """Versioned symbols by library and version, and unversioned GPU symbols that nobody defines."""
    versioned: dict[str, dict[str, set[str]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    wanted, defined = set(), set()
    for library in libraries:
        # "Version: 1  File: libcublas.so.13" begins the versions that come from one library.
        source, file = {}, ""
        for line in readelf("-V", library).splitlines():
            if found := re.search(r"File: (\S+)", line):
                file = found[1]
            if found := re.search(r"Name: (\S+)\s+Flags: \S+\s+Version: \d+", line):
                source[found[1]] = file
        for line in readelf("--dyn-syms", library).splitlines():
            columns = line.split()
            if len(columns) < 8 or columns[4] not in {"GLOBAL", "WEAK"}:
                continue
            name, _, version = columns[7].partition("@")
            if columns[6] != "UND":
                defined.add(name)
            elif version.lstrip("@") in source:
                versioned[source[version.lstrip("@")]][version.lstrip("@")].add(name)
            elif GPU_SYMBOL.match(name):
                wanted.add(name)
    return versioned, wanted - defined


def compile_stub(path: Path, versions: dict[str, set[str]], extra: set[str]) -> None:
    """One library that exports the symbols, each an abort."""
    names = sorted(extra.union(*versions.values()))
    body = "".join(f'void {n}(void) {{ fputs("stub {path.name}: {n}\\n", stderr); abort(); }}\n' for n in names)
    with tempfile.TemporaryDirectory() as folder:
        code, script = Path(folder, "stub.c"), Path(folder, "stub.map")
        code.write_text("#include <stdio.h>\n#include <stdlib.h>\n" + body)
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", str(code), f"-Wl,-soname,{path.name}", "-o", str(path)]
        if versions:
            nodes = [f"{v} {{ global: {' '.join(f'{n};' for n in sorted(s))} }};" for v, s in sorted(versions.items())]
            script.write_text("\n".join(nodes) + "\n")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


def main() -> None:
    torch = PACKAGES / "torch/lib"
    if not torch.is_dir():
        sys.exit(f"{torch}: no PyTorch here; run setup_torch_cpu.sh")
    ours = sorted(torch.glob("*.so*"))
    others = sorted((PACKAGES / "nvidia").glob("**/*.so*"))
    present = {p.name for p in ours + others}
    needed = set()
    for library in ours:
        needed.update(re.findall(r"NEEDED.*\[([^\]]+)\]", readelf("-d", library)))
    missing = sorted(n for n in needed - present - NEVER if GPU_LIBRARY.match(n))
    if not missing:
        print("nothing is missing")
        return
    versioned, loose = expected(ours + others)
    # Beside the real CUDA runtime, where PyTorch looks for its GPU libraries.
    runtime = next((p.parent for p in others if p.name.startswith("libcudart.so")), None)
    if runtime is None:
        sys.exit("libcudart.so: not installed; run setup_torch_cpu.sh")
    for position, name in enumerate(missing):
        # An unversioned symbol may come from any library: the first one has them all.
        compile_stub(runtime / name, versioned.get(name, {}), loose if position == 0 else set())
    print(f"made {len(missing)} stubs in {runtime}")


if __name__ == "__main__":
    main()
