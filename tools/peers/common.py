"""What the peers share: the file format of tensors, and the protocol.

A peer is started once.  Its first line of output says who it is; then each line of input is a request in JSON, answered
by one line of JSON.  An answer with `error` says what went wrong.
"""

import json
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

TYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one file, in writable memory; bf16 becomes f32."""
    data = bytearray(path.read_bytes())
    (header_bytes,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        view = memoryview(data)[begin:end]
        if entry["dtype"] == "BF16":
            wide = np.frombuffer(view, "<u2").astype("<u4") << 16
            tensors[name] = wide.view("<f4").reshape(entry["shape"])
        else:
            tensors[name] = np.frombuffer(view, TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors as f32, whole numbers as i64."""
    kinds = {name: "I64" if values.dtype.kind == "i" else "F32" for name, values in tensors.items()}
    arrays = {name: np.ascontiguousarray(values, dtype=TYPES[kinds[name]]) for name, values in tensors.items()}
    header, offset = {}, 0
    for name, values in arrays.items():
        header[name] = {"dtype": kinds[name], "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for values in arrays.values():
            file.write(values.tobytes())


def serve(about: dict, handlers: dict[str, Callable[[dict], dict]]) -> None:
    """Answers requests until the input ends; `handlers` by the request's `ask`."""
    # Libraries print where they like: answers keep a stream of their own.
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = handlers[request["ask"]](request)
        except Exception as error:  # The other side decides what a failure means.
            traceback.print_exc(limit=3)
            answer = {"error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps(answer), file=answers, flush=True)
