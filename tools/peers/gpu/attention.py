"""Peers of the attention family: SDPA by backend, FlashAttention, FlexAttention, NATTEN, Triton twins."""

from __future__ import annotations

from collections.abc import Callable

from .base import CannotRun, Context, F, eager_and_compiled, module, peer, torch, triton_twin

BACKENDS = {
    "SDPA cuDNN": "CUDNN_ATTENTION",
    "SDPA flash": "FLASH_ATTENTION",
    "SDPA memory-efficient": "EFFICIENT_ATTENTION",
    "SDPA math": "MATH",
}
# Bytes of scores that the plain way may write.
MOST_SCORES = 16 << 30


def packed(t: dict) -> tuple:
    """q, k, v [B, H, N, E] as views of a packed projection [B, N, 3, H, E]."""
    return tuple(x.transpose(1, 2) for x in t["qkv"].unbind(2))


def heads_last(y):
    """[B, H, N, E] as [B, N, H, E]."""
    return y.transpose(1, 2)


def sdpa(backend: str, q, k, v, case, mask=None) -> Callable:
    """Scaled dot product attention by one backend and no other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if backend == "MATH":
        scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
        if scores > MOST_SCORES:
            raise CannotRun(f"its scores take {scores >> 30} GiB")
    chosen, scale = getattr(SDPBackend, backend), case.params["scale"]

    def call():
        with sdpa_kernel(chosen):
            return heads_last(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))

    return call


def sdpa_by_backend() -> None:
    """Enters attention and cross attention by every backend."""
    for name, backend in BACKENDS.items():

        @peer("attention", name)
        def _(t: dict, case, context: Context, backend: str = backend) -> Callable:
            return sdpa(backend, *packed(t), case)

        @peer("cross_attention", name)
        def _(t: dict, case, context: Context, backend: str = backend) -> Callable:
            q, (k, v) = t["q"][:, :, 0].transpose(1, 2), (x.transpose(1, 2) for x in t["kv"].unbind(2))
            return sdpa(backend, q, k, v, case, counted(t, case))

        @peer("relative_attention", name)
        def _(t: dict, case, context: Context, backend: str = backend) -> Callable:
            n = case.dims["N"]
            at = torch.arange(n, device=t["qkv"].device)
            place = at[None, :] - at[:, None] + n - 1
            seen = counted(t, case)

            def bias():
                scores = t["bias"].t()[:, place][None]
                return scores if seen is None else scores.masked_fill(~seen, float("-inf"))

            made = bias().contiguous() if not t["bias"].requires_grad else None
            return lambda: sdpa(backend, *packed(t), case, bias() if made is None else made)()


def counted(t: dict, case):
    """[B, 1, 1, M]: the keys of each sample, None where all count."""
    counts = t.get("counts")
    if counts is None:
        return None
    if int(counts.min()) == 0:
        raise CannotRun("a sample without keys")
    keys = case.dims.get("M", case.dims["N"])
    return (torch.arange(keys, device=counts.device)[None] < counts[:, None])[:, None, None]


def flash_attention() -> None:
    """Enters the flash-attn package, version 2 and 3."""
    for name, library in {"FlashAttention 2": "flash_attn", "FlashAttention 3": "flash_attn_interface"}.items():

        @peer("attention", name)
        def _(t: dict, case, context: Context, library: str = library) -> Callable:
            function, (q, k, v) = module(library).flash_attn_func, t["qkv"].unbind(2)
            return lambda: first_of(function(q, k, v, softmax_scale=case.params["scale"]))

        @peer("cross_attention", name)
        def _(t: dict, case, context: Context, library: str = library) -> Callable:
            if t.get("counts") is not None:
                raise CannotRun("a count of keys for each sample")
            function, q, (k, v) = module(library).flash_attn_func, t["q"][:, :, 0], t["kv"].unbind(2)
            return lambda: first_of(function(q, k, v, softmax_scale=case.params["scale"]))

        @peer("window_attention", name)
        def _(t: dict, case, context: Context, library: str = library) -> Callable:
            function, (q, k, v), w = module(library).flash_attn_func, t["qkv"].unbind(2), case.dims["W"]
            return lambda: first_of(function(q, k, v, softmax_scale=case.params["scale"], window_size=(w, w)))


def first_of(result):
    """The output of a function that may give others beside it."""
    return result[0] if isinstance(result, tuple) else result


def flex(q, k, v, tokens: int, sees: Callable, context: Context, scale: float) -> Callable:
    """FlexAttention over the keys that `sees(query, key)`."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: sees(i, j), None, None, tokens, tokens, device=context.device)
    # Uncompiled it is the plain way, which the CPU has.
    function = flex_attention if context.tiny else context.compile(flex_attention)
    return lambda: heads_last(function(q, k, v, block_mask=mask, scale=scale))


def windows() -> None:
    """Enters window and neighbourhood attention by FlexAttention, from the packed projection and from heads of their own."""
    for name, own in {"FlexAttention": False, "FlexAttention, contiguous heads": True}.items():

        @peer("window_attention", name)
        def _(t: dict, case, context: Context, own: bool = own) -> Callable:
            n, w = case.dims["N"], case.dims["W"]
            q, k, v = heads(packed(t), own)
            return flex(q, k, v, n, lambda i, j: (i - j).abs() <= w, context, case.params["scale"])

        @peer("neighborhood_attention", name)
        def _(t: dict, case, context: Context, own: bool = own) -> Callable:
            d = case.dims
            rows, columns, taps = d["Gh"], d["Gw"], d["K"]
            flat = {"qkv": t["qkv"].flatten(1, 2)}
            q, k, v = heads(packed(flat), own)

            def near(i, j, count):
                start = (i - (taps - 1) // 2).clamp(0, count - taps)
                return (j >= start) & (j < start + taps)

            sees = lambda i, j: near(i // columns, j // columns, rows) & near(i % columns, j % columns, columns)
            call = flex(q, k, v, rows * columns, sees, context, case.params["scale"])
            return lambda: call().unflatten(1, (rows, columns))

    @peer("window_attention", "FlexAttention, heads padded to 128", backward=False)
    def _(t: dict, case, context: Context) -> Callable:
        n, w, e = case.dims["N"], case.dims["W"], case.dims["E"]
        if e >= 128:
            raise CannotRun("its heads are as wide")
        q, k, v = (F.pad(x, (0, 128 - e)) for x in packed(t))
        call = flex(q, k, v, n, lambda i, j: (i - j).abs() <= w, context, case.params["scale"])
        return lambda: call()[..., :e]

    @peer("neighborhood_attention", "NATTEN")
    def _(t: dict, case, context: Context) -> Callable:
        function, taps = module("natten").na2d, case.dims["K"]
        q, k, v = t["qkv"].unbind(3)
        return lambda: function(q, k, v, kernel_size=taps, scale=case.params["scale"])


def heads(parts: tuple, own: bool) -> tuple:
    """q, k, v as they are, or copied once so that the tokens of a head lie together."""
    return tuple(x.contiguous() for x in parts) if own else parts


def int8() -> None:
    """Enters attention with 8-bit scores."""

    @peer("attention_int8", "SageAttention", backward=False, error=5e-2)
    def _(t: dict, case, context: Context) -> Callable:
        function, (q, k, v) = module("sageattention").sageattn, t["qkv"].unbind(2)
        return lambda: function(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=case.params["scale"])

    @peer("attention_int8", "SDPA cuDNN, bf16", backward=False)
    def _(t: dict, case, context: Context) -> Callable:
        return sdpa("CUDNN_ATTENTION", *packed(t), case)


def linear(t: dict, case):
    """y [B, N, H, E] of linear attention in plain PyTorch."""
    q, k, v = (x.transpose(1, 2) for x in t["qkv"].unbind(2))
    if int(case.params["map"]):
        q, k = F.relu(q), F.relu(k)
    else:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    norm = (q.float() @ k.float().sum(2).unsqueeze(-1)) + case.params["eps"]
    return heads_last(((q @ (k.transpose(-1, -2) @ v)).float() / norm).to(v.dtype))


sdpa_by_backend()
flash_attention()
windows()
int8()
eager_and_compiled("linear_attention", linear)
for twin in ("attention", "window_attention", "linear_attention"):
    triton_twin(twin)
