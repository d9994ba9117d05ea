#!/usr/bin/env python3
"""Runs the Triton twins against their oracles.

    check.py [OP ...] [--element f32|bf16]     every tiny case of the contracts; without a GPU in Triton's interpreter,
                                               which has f32 alone

Where this Python has no Triton, PyTorch for CPUs and Triton are installed into .venv-twins (about 1.2 GB) and used from
there.  `tools/peers/gpu` times the twins.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENV = HERE.parent / ".venv-twins"
TRITON = "triton==3.6.0"
OPS = ["attention", "window_attention", "linear_attention", "gated_conv", "ln_modulate", "gemm"]


def environment() -> None:
    """Goes on in a Python that has torch and triton, made if need be."""
    if all(importlib.util.find_spec(name) for name in ("torch", "triton", "numpy")):
        return
    python = VENV / "bin/python"
    if Path(sys.prefix) == VENV:
        sys.exit(f"check.py: {VENV} has no torch or triton; remove it and run again")
    if not (VENV / "ready").is_file():
        subprocess.run(["bash", HERE.parent / "tools/peers/setup_torch_cpu.sh", VENV], check=True)
        subprocess.run([VENV / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", TRITON], check=True)
        (VENV / "ready").touch()
    os.execv(python, [str(python), *sys.argv])


def check(op: str, element: str, device: str) -> int:
    """The number of outputs of the tiny cases that are out of bounds."""
    import numpy as np
    import torch
    from contract import cases

    twin, failed = importlib.import_module(op), 0
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[element]
    for case in cases(op, "tiny"):
        params = dict(case.params)
        tensors = {k: None if v is None else torch.from_numpy(v).to(dtype).to(device) for k, v in case.inputs().items()}
        wide = {k: None if v is None else v.double().cpu().numpy() for k, v in tensors.items()}
        got, want = twin.run(tensors, case.dims, params), twin.oracle(wide, case.dims, params)
        atol, rtol, rms = case.tolerance(element)
        for name, exact in want.items():
            value = got[name].double().cpu().numpy()
            error = np.abs(value - exact)
            worst = float((error / (atol + rtol * np.abs(exact))).max(initial=0.0))
            relative = float(np.sqrt((error**2).sum() / max((exact**2).sum(), 1e-300)))
            # Written so that a NaN fails.
            ok = value.shape == exact.shape and worst <= 1.0 and relative <= rms
            failed += not ok
            print(f"{op:<17} {case.name:<24} {name:<6} {'ok  ' if ok else 'FAIL'} worst {worst:.2f} of its bound, rel rms {relative:.1e}", flush=True)
    return failed


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help=", ".join(OPS))
    parser.add_argument("--element", choices=["f32", "bf16"])
    args = parser.parse_args()
    if unknown := [op for op in args.ops if op not in OPS]:
        parser.error(f"no twin of {', '.join(unknown)}")
    environment()
    import torch

    gpu = torch.cuda.is_available()
    ops = args.ops or OPS
    if not gpu:
        if args.element == "bf16":
            sys.exit("check.py: --element bf16 needs a GPU: the interpreter multiplies bf16 as the integers that hold it")
        # Before the twins are imported: the decorators read it.
        os.environ["TRITON_INTERPRET"] = "1"
    failed = sum(check(op, args.element or "f32", "cuda" if gpu else "cpu") for op in ops)
    if failed:
        sys.exit(f"check.py: {failed} outputs out of bounds")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
