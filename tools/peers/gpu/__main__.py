#!/usr/bin/env python3
"""Peers of our operators on a GPU, at the shapes of the contracts' real cases.

    python3 tools/peers/gpu [OP ...] [--out FILE]      a line of JSON each, as `graft --json bench op` has them
    python3 tools/peers/gpu --list                     what there is; needs no PyTorch
    python3 tools/peers/gpu --device cpu --tiny        every peer on the tiny cases, compared; the times say nothing

Every peer is compared with a reference in f32 before it is timed.  What cannot run here is a row with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

# The folder is a package, whichever way it is started; its own files would hide libraries and twins of their names.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]

from gpu import attention, convolutions, pointwise, products, scans  # noqa: E402, F401
from gpu.base import REGISTRY, Context, torch  # noqa: E402
from contract import cases, operators  # noqa: E402

PASSES = ["forward", "backward"]
# Widest of the kinds of rows first; what is not named comes after.
FIRST = ["attention", "gemm", "gated_conv", "ln_modulate", "window_attention", "linear_attention", "cross_attention", "gemm_fp8", "adamw"]


def order() -> list[str]:
    """Operators that have peers, the most valuable first."""
    known = [op for op in operators() if any(p.op == op for p in REGISTRY)]
    return sorted(known, key=lambda op: FIRST.index(op) if op in FIRST else len(FIRST))


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", metavar="OP", help="operators; ceilings for a copy and a product; all where none is given")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--case", default="", help="part of a case's name")
    parser.add_argument("--peer", default="", help="part of a peer's name")
    parser.add_argument("--first", type=int, help="only the first cases of every operator")
    parser.add_argument("--work", choices=PASSES)
    parser.add_argument("--element", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="the tiny cases, to check the program")
    parser.add_argument("--cold", action="store_true", help="cases that the L2 cache can hold once more, with it emptied before every call")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which nothing new is started")
    parser.add_argument("--out", type=Path, help="rows are added to this file, too")
    args = parser.parse_args()
    if unknown := [op for op in args.ops if op not in [*order(), "ceilings"]]:
        parser.error(f"no peer of {', '.join(unknown)}")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny: times of a processor are another program's")
    return args


def main() -> None:
    """See the top."""
    args = arguments()
    passes = [args.work] if args.work else PASSES
    wanted = [op for op in order() if not args.ops or op in args.ops]
    chosen = {op: [p for p in REGISTRY if p.op == op and args.peer in p.name] for op in wanted}
    tier = "tiny" if args.tiny else "real"
    named = {op: [case for case in cases(op, tier) if args.case in case.name][: args.first] for op in wanted if chosen[op]}
    found = [(op, case) for op, some in named.items() for case in some]
    if args.list:
        for op, case in found:
            for peer in chosen[op]:
                backward = peer.backward and "gradient" in case.contract
                works = [w for w in passes if w == "forward" or backward]
                print(f"{op}/{case.name}  {', '.join(works)}  {peer.name}{f' ({peer.less})' if peer.less else ''}")
        return
    if torch is None:
        sys.exit(f"gpu: {sys.executable} has no torch; a machine with a GPU needs PyTorch 2.5 or newer")
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("gpu: PyTorch sees no GPU; --device cpu --tiny checks the program without one")
    from gpu.rows import Bench

    if args.device == "cpu":
        torch.set_num_threads(1)

    bench = Bench(Context(args.device, args.tiny), args.element, 2 if args.tiny else args.samples)
    sink, end = args.out.open("a") if args.out else None, time.monotonic() + args.budget

    def show(row: dict) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        if sink:
            print(line, file=sink, flush=True)

    if not args.ops or "ceilings" in args.ops:
        for row in bench.ceilings():
            show(row)
    for op, case in found:
        peers = chosen[op]
        if time.monotonic() > end:
            for peer in peers:
                what = {"bench": "op", "case": f"{op}/{case.name}", "work": passes[0], "axes": {}, "peer": peer.name}
                show(what | bench.same | {"could_not_run": "the time was over"})
            continue
        for row in bench.case(case, peers, passes, args.cold):
            show(row)


if __name__ == "__main__":
    main()
