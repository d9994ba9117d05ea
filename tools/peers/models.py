"""Models in plain PyTorch, written for this purpose: peers of ours with the same weights.

`load` builds one from a folder in the diffusers layout (config.json beside safetensors) and gives its weights the
names of this file.  Nothing here knows a device or a dtype: move the module, and it computes there.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import read_safetensors

EPS = 1e-6


def position_table(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """[N, D] of a grid with these coordinates: the first half of a row encodes the column, the second the row, each
    as sines and cosines."""
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def waves(coordinates: Tensor) -> Tensor:
        angles = torch.outer(coordinates.double(), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    shape = (len(rows), len(columns), width // 2)
    pair = waves(columns).unsqueeze(0).expand(shape), waves(rows).unsqueeze(1).expand(shape)
    return torch.cat(pair, dim=2).reshape(-1, width).float()


def time_features(t: Tensor, dtype: torch.dtype) -> Tensor:
    """[B] timesteps -> [B, 256] cosines, then sines; computed in f32, where every timestep is exact."""
    frequencies = torch.exp(-math.log(10_000) / 128 * torch.arange(128, dtype=torch.float32, device=t.device))
    waves = t.float().unsqueeze(1) * frequencies
    return torch.cat([waves.cos(), waves.sin()], dim=1).to(dtype)


def unpatchify(h: Tensor, grid: tuple[int, int], patch: int, channels: int) -> Tensor:
    """[B, N, P·P·C] -> [B, C, H, W]."""
    rows, columns = grid
    h = h.reshape(-1, rows, columns, patch, patch, channels)
    return h.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * patch, columns * patch)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift per sample."""
    normal = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """adaLN-zero transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, N, D], condition [B, D] after its SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        batch, tokens, width = x.shape
        qkv = self.qkv(modulate(x, shift1, scale1)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1.unsqueeze(1) * self.proj(mixed)
        hidden = F.gelu(self.fc1(modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.fc2(hidden)


class DiT(nn.Module):
    """Class-conditional diffusion transformer with the published semantics."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        heads = config["num_attention_heads"]
        width = heads * config["attention_head_dim"]
        self.patch = config["patch_size"]
        self.grid = config["sample_size"] // self.patch
        self.out_channels = config["out_channels"]
        self.embed = nn.Conv2d(config["in_channels"], width, self.patch, stride=self.patch)
        places = torch.arange(self.grid)
        self.register_buffer("positions", position_table(places, places, width), persistent=False)
        self.time1, self.time2 = nn.Linear(256, width), nn.Linear(width, width)
        self.labels = nn.Embedding(config["num_embeds_ada_norm"] + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(config["num_layers"]))
        self.last_modulation = nn.Linear(width, 2 * width)
        self.last = nn.Linear(width, self.patch**2 * self.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x [B, C, S, S], t [B] timesteps, y [B] labels -> [B, out_channels, S, S]."""
        features = time_features(t, self.time1.weight.dtype)
        condition = F.silu(self.time2(F.silu(self.time1(features))) + self.labels(y))
        h = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            h = block(h, condition)
        shift, scale = self.last_modulation(condition).chunk(2, dim=1)
        h = self.last(modulate(h, shift, scale))
        return unpatchify(h, (self.grid, self.grid), self.patch, self.out_channels)


def rename_dit(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of the diffusers layout under the names of this file."""
    first = "transformer_blocks.0.norm1.emb."
    modules = {
        "embed": "pos_embed.proj",
        "time1": first + "timestep_embedder.linear_1",
        "time2": first + "timestep_embedder.linear_2",
        "last_modulation": "proj_out_1",
        "last": "proj_out_2",
    }
    for i in range(layers):
        theirs = f"transformer_blocks.{i}."
        for ours, name in {"modulation": "norm1.linear", "proj": "attn1.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2"}.items():
            modules[f"blocks.{i}.{ours}"] = theirs + name
    state = {f"{ours}.{kind}": weights[f"{name}.{kind}"] for ours, name in modules.items() for kind in ("weight", "bias")}
    state["labels.weight"] = weights[first + "class_embedder.embedding_table.weight"]
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [weights[f"transformer_blocks.{i}.attn1.to_{p}.{kind}"] for p in "qkv"]
            state[f"blocks.{i}.qkv.{kind}"] = torch.cat(parts)
    return state


def load_dit(folder: Path) -> DiT:
    """The DiT of a folder that holds config.json and diffusion_pytorch_model.safetensors."""
    config = json.loads((folder / "config.json").read_text())
    model = DiT(config)
    model.load_state_dict(rename_dit(read_weights(folder), config["num_layers"]))
    return model


class PixArtBlock(nn.Module):
    """Block of PixArt: self-attention, attention to the text without a norm, MLP; one modulation for all blocks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.zeros(6, width))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.cross_q = nn.Linear(width, width)
        self.cross_kv = nn.Linear(width, 2 * width)
        self.cross_proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> keys and values [B, H, T, E]; the same in every step."""
        k, v = self.cross_kv(text).reshape(*text.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, modulation: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x [B, N, D], modulation [B, 6, D]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.table + modulation).unbind(1)
        batch, tokens, width = x.shape
        qkv = self.qkv(modulate(x, shift1, scale1)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1.unsqueeze(1) * self.proj(mixed)
        q = self.cross_q(x).reshape(batch, tokens, self.heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, *keys, attn_mask=mask).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.cross_proj(mixed)
        hidden = F.gelu(self.fc1(modulate(x, shift2, scale2)), approximate="tanh")
        return x + gate2.unsqueeze(1) * self.fc2(hidden)


class PixArt(nn.Module):
    """PixArt-Sigma's transformer, at any number of pixels."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        heads = config["num_attention_heads"]
        width = heads * config["attention_head_dim"]
        self.patch = config["patch_size"]
        self.base, self.interpolation = config["sample_size"] // self.patch, config["interpolation_scale"]
        self.out_channels = config["out_channels"]
        self.width = width
        self.embed = nn.Conv2d(config["in_channels"], width, self.patch, stride=self.patch)
        self.time1, self.time2 = nn.Linear(256, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 6 * width)
        self.caption1, self.caption2 = nn.Linear(config["caption_channels"], width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(PixArtBlock(width, heads) for _ in range(config["num_layers"]))
        self.last_table = nn.Parameter(torch.zeros(2, width))
        self.last = nn.Linear(width, self.patch**2 * self.out_channels)
        self.known: dict[tuple[int, int], Tensor] = {}

    def positions(self, grid: tuple[int, int], like: Tensor) -> Tensor:
        """The table of a grid, kept from call to call."""
        if grid not in self.known:
            rows, columns = (torch.arange(n) * (self.base / n / self.interpolation) for n in grid)
            self.known[grid] = position_table(rows, columns, self.width).to(like)
        return self.known[grid]

    def keys(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every block for the text features [B, T, C]."""
        text = self.caption2(F.gelu(self.caption1(text), approximate="tanh"))
        return [block.keys(text) for block in self.blocks]

    def forward(self, x: Tensor, t: Tensor, keys: list, mask: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], t [B], keys of the text, mask [B, 1, 1, T] true where a token counts."""
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        time = self.time2(F.silu(self.time1(time_features(t, self.time1.weight.dtype))))
        modulation = self.modulation(F.silu(time)).reshape(-1, 6, self.width)
        h = self.embed(x).flatten(2).transpose(1, 2)
        h = h + self.positions(grid, h)
        for block, pair in zip(self.blocks, keys):
            h = block(h, modulation, pair, mask)
        shift, scale = (self.last_table + time.unsqueeze(1)).unbind(1)
        return unpatchify(self.last(modulate(h, shift, scale)), grid, self.patch, self.out_channels)


def rename_pixart(weights: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Tensors of the diffusers layout under the names of this file."""
    modules = {
        "embed": ["pos_embed.proj"],
        "time1": ["adaln_single.emb.timestep_embedder.linear_1"],
        "time2": ["adaln_single.emb.timestep_embedder.linear_2"],
        "modulation": ["adaln_single.linear"],
        "caption1": ["caption_projection.linear_1"],
        "caption2": ["caption_projection.linear_2"],
        "last": ["proj_out"],
    }
    parts = {
        "qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
        "proj": ["attn1.to_out.0"],
        "cross_q": ["attn2.to_q"],
        "cross_kv": ["attn2.to_k", "attn2.to_v"],
        "cross_proj": ["attn2.to_out.0"],
        "fc1": ["ff.net.0.proj"],
        "fc2": ["ff.net.2"],
    }
    state = {"last_table": weights["scale_shift_table"]}
    for i in range(layers):
        theirs = f"transformer_blocks.{i}."
        state[f"blocks.{i}.table"] = weights[theirs + "scale_shift_table"]
        modules |= {f"blocks.{i}.{name}": [theirs + part for part in names] for name, names in parts.items()}
    for name, sources in modules.items():
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = torch.cat([weights[f"{source}.{kind}"] for source in sources])
    return state


def load_pixart(folder: Path) -> PixArt:
    """The PixArt of a folder in the diffusers layout."""
    config = json.loads((folder / "config.json").read_text())
    model = PixArt(config)
    model.load_state_dict(rename_pixart(read_weights(folder), config["num_layers"]))
    return model


class Resnet(nn.Module):
    """Two convolutions behind their norms, beside a path that keeps what comes in."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, eps=EPS), nn.GroupNorm(groups, outputs, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class PixelAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return x + h.transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Upsampler(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, last: bool) -> None:
        super().__init__()
        sizes = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList(Resnet(a, b, groups) for a, b in zip(sizes, sizes[1:]))
        self.upsamplers = nn.ModuleList([] if last else [Upsampler(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class PictureHalf(nn.Module):
    """The half of an autoencoder that makes pictures; its modules have diffusers' names."""

    def __init__(self, channels: list[int], layers: int, latent: int, colours: int, groups: int) -> None:
        super().__init__()
        widest = channels[-1]
        self.conv_in = nn.Conv2d(latent, widest, 3, padding=1)
        self.mid_block = Middle(widest, groups)
        sizes = [widest, *reversed(channels)]
        levels = list(zip(sizes, sizes[1:]))
        self.up_blocks = nn.ModuleList(
            Level(a, b, layers + 1, groups, i + 1 == len(levels)) for i, (a, b) in enumerate(levels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=EPS)
        self.conv_out = nn.Conv2d(channels[0], colours, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VaeDecoder(nn.Module):
    """The decoder of Stable Diffusion's autoencoder: latents of the network [B, 4, h, w] -> pictures [B, 3, 8h, 8w]."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        latent = config["latent_channels"]
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        sizes = config["block_out_channels"], config["layers_per_block"], latent, config["out_channels"]
        self.decoder = PictureHalf(*sizes, config["norm_num_groups"])

    def forward(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def load_vae_decoder(folder: Path) -> VaeDecoder:
    """The decoder of a folder with an AutoencoderKL in the diffusers layout."""
    model = VaeDecoder(json.loads((folder / "config.json").read_text()))
    kept = {name: t for name, t in read_weights(folder).items() if name.startswith(("decoder.", "post_quant_conv."))}
    model.load_state_dict(kept)
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: torch.from_numpy(values) for file in files for name, values in read_safetensors(file).items()}
