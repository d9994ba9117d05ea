"""Every operator of the contracts in PyTorch: a function from a case to its ways, each a call without arguments.

A way computes what `formula` in kernels-cu/<op>/op.toml says, from the tensors of the case, with the fastest that
PyTorch has for it: fused attention, channels_last convolutions, fused AdamW.
"""

from torch_operators.attention import ATTENTION
from torch_operators.convolution import CONVOLUTION
from torch_operators.rows import ROWS

OPERATORS = {**ATTENTION, **CONVOLUTION, **ROWS}

# Why an operator has no counterpart here.
NONE = {
    "attention_int8": "scores of 8 bits are for GPUs; on the CPU it computes what attention does",
    "gemm_fp8": "8-bit floats are for GPUs; on the CPU it emulates them",
    "philox": "another random generator gives other numbers, which cannot be compared",
}
