#!/usr/bin/env python3
"""Operators in ONNX Runtime on the CPU: a peer of `paired op`, for what its graphs can state; forward passes.

    onnx_ops.py --threads N

Requests as those of pytorch_ops.py.  A graph is built for every way, with its weights as constants, so that the
runtime may pack them; images are channels first, as its convolutions want them.  Inputs and outputs are bound once, so
a call is the runtime's own work.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from common import read_safetensors, serve, write_safetensors

OPSET = 21


class Graph:
    """A graph that grows by nodes."""

    def __init__(self) -> None:
        self.nodes, self.inputs, self.constants = [], [], []
        self.feeds: dict[str, np.ndarray] = {}

    def input(self, values: np.ndarray) -> str:
        """A tensor that is given at every call."""
        name = f"in{len(self.inputs)}"
        self.feeds[name] = np.ascontiguousarray(values)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape))
        return name

    def constant(self, values) -> str:
        name = f"c{len(self.constants)}"
        values = np.ascontiguousarray(values, dtype=None if isinstance(values, np.ndarray) else np.float32)
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def __getattr__(self, operator: str) -> Callable[..., str]:
        """`g.MatMul(a, b)` adds a node and names its output."""

        def add(*inputs: str, outputs: int = 1, domain: str = "", **attributes):
            names = [f"n{len(self.nodes)}_{i}" for i in range(outputs)]
            self.nodes.append(helper.make_node(operator, list(inputs), names, domain=domain, **attributes))
            return names[0] if outputs == 1 else names

        return add

    def model(self, output: str) -> bytes:
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "peer", self.inputs, [result], self.constants)
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()


def first_channels(x: np.ndarray) -> np.ndarray:
    """[B, H, W, C] -> [B, C, H, W]."""
    return x.transpose(0, 3, 1, 2)


def last_channels(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def same(x: np.ndarray) -> np.ndarray:
    return x


# An operator is a function from a case to its ways: each a function that fills a graph and names the output, with what
# turns that output into ours.


def gemm(c):
    act = int(c.params["act"])
    t = c.t

    def build(g: Graph) -> str:
        y = g.MatMul(g.input(t["x"]), g.constant(t["w"].T))
        if "bias" in t:
            y = g.Add(y, g.constant(t["bias"]))
        if "pos" in t:
            y = g.Add(y, g.constant(t["pos"]))
        if act == 1:
            y = g.Gelu(y, approximate="tanh")
        elif act == 2:
            y = g.Mul(y, g.Sigmoid(y))
        elif act == 3:
            y = g.Sin(y)
        if "gate" in t:
            row = int(c.params["gate_row"])
            y = g.Mul(y, g.input(t["gate"][:, row : row + 1]))
        return g.Add(g.input(t["residual"]), y) if "residual" in t else y

    return {"MatMul": (build, same)}


def heads_of(g: Graph, qkv: str, shape: tuple[int, ...]) -> list[str]:
    """[B, N, 3, H, E] -> three of [B, N, H, E]."""
    b, n, _, h, e = shape
    parts = g.Split(qkv, g.integers(1, 1, 1), outputs=3, axis=2)
    return [g.Reshape(part, g.integers(b, n, h, e)) for part in parts]


def products(g: Graph, q: str, k: str, v: str, scale: float) -> str:
    """Two products with a softmax between them; all [B, N, H, E]."""
    q, k, v = (g.Transpose(q, perm=[0, 2, 1, 3]), g.Transpose(k, perm=[0, 2, 3, 1]), g.Transpose(v, perm=[0, 2, 1, 3]))
    weights = g.Softmax(g.MatMul(g.Mul(q, g.constant(scale)), k), axis=-1)
    return g.Transpose(g.MatMul(weights, v), perm=[0, 2, 1, 3])


def fused(g: Graph, q: str, k: str, v: str, scale: float, sizes: tuple[int, int, int, int, int]) -> str:
    """The runtime's own attention; all [B, N, H, E]."""
    b, n, m, h, e = sizes
    q, k, v = (g.Reshape(x, g.integers(b, rows, h * e)) for x, rows in ((q, n), (k, m), (v, m)))
    return g.MultiHeadAttention(q, k, v, domain="com.microsoft", num_heads=h, scale=scale)


def attention(c):
    scale, qkv = c.params["scale"], c.t["qkv"]
    b, n, h, e = (c.dims[d] for d in "BNHE")
    sizes = (b, n, n, h, e)
    return {
        "MatMul, Softmax": (lambda g: products(g, *heads_of(g, g.input(qkv), qkv.shape), scale), same),
        "MultiHeadAttention": (lambda g: fused(g, *heads_of(g, g.input(qkv), qkv.shape), scale, sizes), same),
    }


def cross_attention(c):
    if "counts" in c.t:
        raise NotWritten("keys that do not count")
    scale, q, kv = c.params["scale"], c.t["q"][:, :, 0], c.t["kv"]
    b, n, m, h, e = (c.dims[d] for d in "BNMHE")

    def inputs(g: Graph):
        return g.input(q), g.input(kv[:, :, 0]), g.input(kv[:, :, 1])

    return {
        "MatMul, Softmax": (lambda g: products(g, *inputs(g), scale), same),
        "MultiHeadAttention": (lambda g: fused(g, *inputs(g), scale, (b, n, m, h, e)), same),
    }


def ln_modulate(c):
    shift, scale = int(c.params["shift"]), int(c.params["scale"])
    x, table = c.t["x"], c.t["modulation"]

    def build(g: Graph) -> str:
        normal = g.LayerNormalization(g.input(x), g.constant(np.ones(c.dims["D"], np.float32)), axis=-1, epsilon=c.params["eps"])
        factor = g.Add(g.input(table[:, scale : scale + 1]), g.constant(1.0))
        return g.Add(g.Mul(normal, factor), g.input(table[:, shift : shift + 1]))

    return {"LayerNormalization": (build, same)}


def rms_norm(c):
    eps, offset, d = c.params["eps"], int(c.params["gate_offset"]), c.dims["D"]

    def build(g: Graph) -> str:
        x = g.input(c.t["x"])
        if "gate" in c.t:
            gate = g.input(c.t["gate"][..., offset : offset + d])
            x = g.Mul(x, g.Mul(gate, g.Sigmoid(gate)))
        return g.SimplifiedLayerNormalization(x, g.constant(c.t["weight"]), axis=-1, epsilon=eps)

    return {"SimplifiedLayerNormalization": (build, same)}


def convolve(g: Graph, x: str, filters: np.ndarray, bias: np.ndarray | None, **attributes) -> str:
    return g.Conv(x, g.constant(filters), *([] if bias is None else [g.constant(bias)]), **attributes)


def conv2d(c):
    stride, ph, pw = (int(c.params[name]) for name in ("stride", "pad_h", "pad_w"))

    def build(g: Graph) -> str:
        pads = [ph, pw, ph, pw]
        y = convolve(g, g.input(first_channels(c.t["x"])), first_channels(c.t["filters"]), c.t.get("bias"), pads=pads, strides=[stride, stride])
        return g.Relu(y) if c.params["relu"] else y

    return {"Conv": (build, last_channels)}


def group_norm(g: Graph, x: str, c) -> str:
    """Group norm, then SiLU, of [B, C, H, W]."""
    gamma, beta = g.constant(c.t["gamma"]), g.constant(c.t["beta"])
    y = g.GroupNormalization(x, gamma, beta, num_groups=c.dims["G"], epsilon=c.params["eps"])
    return g.Mul(y, g.Sigmoid(y))


def group_norm_silu(c):
    if "stats" in c.t or not c.params["silu"]:
        raise NotWritten("given statistics")
    return {"GroupNormalization": (lambda g: group_norm(g, g.input(first_channels(c.t["x"])), c), last_channels)}


def norm_silu_conv2d(c):
    def build(g: Graph) -> str:
        h, w = c.dims["Kh"] // 2, c.dims["Kw"] // 2
        a = group_norm(g, g.input(first_channels(c.t["x"])), c)
        y = convolve(g, a, first_channels(c.t["filters"]), c.t.get("bias"), pads=[h, w, h, w])
        return g.Add(y, g.input(first_channels(c.t["residual"]))) if "residual" in c.t else y

    return {"GroupNormalization, Conv": (build, last_channels)}


def upsample(c):
    def build(g: Graph) -> str:
        scales = g.constant(np.array([1, 1, 2, 2], np.float32))
        return g.Resize(g.input(first_channels(c.t["x"])), "", scales, mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric")

    return {"Resize": (build, last_channels)}


def gated_conv(c):
    lead, k = int(c.params["lead"]), c.dims["K"]
    if c.params["reversed"]:
        raise NotWritten("channels against token order")
    t, width = c.t, c.dims["C"]
    pads = [lead, k - 1 - lead]

    def build(g: Graph) -> str:
        b, n = c.dims["B"], c.dims["N"]
        x = g.input(t["p"].reshape(b, n, 3 * width).transpose(0, 2, 1))
        if "short_weight" in t:
            weight, bias = t["short_weight"].reshape(3 * width, 1, k), t["short_bias"].reshape(-1)
            x = convolve(g, x, weight, bias, group=3 * width, pads=pads)
        q, key, v = g.Split(x, g.integers(width, width, width), outputs=3, axis=1)
        u = g.Mul(key, v)
        if "inner_weight" in t:
            u = convolve(g, u, t["inner_weight"][:, None], t["inner_bias"], group=width, pads=pads)
        return g.Mul(q, u)

    return {"Conv, channels first": (build, lambda y: y.transpose(0, 2, 1))}


OPERATORS = {
    "gemm": gemm,
    "attention": attention,
    "cross_attention": cross_attention,
    "ln_modulate": ln_modulate,
    "rms_norm": rms_norm,
    "conv2d": conv2d,
    "group_norm_silu": group_norm_silu,
    "norm_silu_conv2d": norm_silu_conv2d,
    "upsample": upsample,
    "gated_conv": gated_conv,
}


class NotWritten(Exception):
    """A case that the graphs here do not state."""


class Case:
    def __init__(self, request: dict) -> None:
        self.dims, self.params, self.output = request["dims"], request["params"], request["outputs"][0]
        self.folder = Path(request["folder"])
        self.t = read_safetensors(self.folder / "inputs.safetensors")
        self.ways = OPERATORS[request["op"]](self)


class Peer:
    def __init__(self, threads: int) -> None:
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1
        self.options.log_severity_level = 3
        # Threads that spin while it is our turn would be work of others in our time.
        self.options.add_session_config_entry("session.force_spinning_stop", "1")
        self.case: Case | None = None
        self.held: tuple | None = None

    def knows(self, request: dict) -> dict:
        return {} if request["op"] in OPERATORS else {"none": "no graph is written for it"}

    def take(self, request: dict) -> dict:
        self.held = None
        if request["dtype"] != "f32":
            return {"none": "bf16 has no kernels on the CPU"}
        try:
            self.case = Case(request)
        except NotWritten as what:
            return {"none": f"no graph is written for {what}"}
        return {"ways": {"forward": list(self.case.ways), "backward": []}}

    def session(self, way: str):
        if self.held is None or self.held[0] != way:
            self.held = None
            graph = Graph()
            output = self.case.ways[way][0](graph)
            providers = ["CPUExecutionProvider"]
            session = onnxruntime.InferenceSession(graph.model(output), self.options, providers=providers)
            binding = session.io_binding()
            values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(v) for name, v in graph.feeds.items()}
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            # The first run tells the shape; later ones write to the same memory.
            binding.bind_output(output, "cpu")
            session.run_with_iobinding(binding)
            result = binding.get_outputs()[0]
            binding.clear_binding_outputs()
            binding.bind_ortvalue_output(output, result)
            self.held = (way, session, binding, result, values)
        return self.held[1:4]

    def output(self, request: dict) -> dict:
        session, binding, result = self.session(request["way"])
        session.run_with_iobinding(binding)
        path = self.case.folder / "peer.safetensors"
        write_safetensors(path, {self.case.output: self.case.ways[request["way"]][1](result.numpy())})
        return {"file": str(path)}

    def run(self, request: dict) -> dict:
        session, binding, _ = self.session(request["way"])
        start = time.perf_counter()
        for _ in range(request["calls"]):
            session.run_with_iobinding(binding)
        return {"ms": (time.perf_counter() - start) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, required=True)
    peer = Peer(parser.parse_args().threads)
    about = {"name": "ONNX Runtime", "version": onnxruntime.__version__}
    serve(about, {"knows": peer.knows, "case": peer.take, "output": peer.output, "run": peer.run})


if __name__ == "__main__":
    main()
