"""The VQGAN of taming-transformers in PyTorch, NCHW, with taming's parameter names.

Source: Esser et al. (arXiv 2012.09841) as configured by Chameleon: attention only in the middle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rynnvla_jax.config import VQGANConfig

# Key prefixes of the decoding half.
DECODER_KEYS = ("decoder.", "post_quant_conv.")


class ResBlock(nn.Module):
    """Two normalised convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class AttentionBlock(nn.Module):
    """One-head attention over all pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (conv(y).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Halves height and width; pads one pixel at the bottom and right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then smooths."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution (each with attention where configured) and the way to the next."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outputs) for _ in range(blocks if attention else 0))
        self.resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image [B, 3, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            last = i == len(widths) - 1
            down = None if last else ("downsample", Downsample(outputs))
            self.down.append(Level(inputs, outputs, config.num_res_blocks, _has_attention(config, i), down))
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> image [B, 3, H, W]; its levels are numbered by resolution, highest first."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (outputs, inputs) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            up = None if i == 0 else ("upsample", Upsample(outputs))
            self.up.append(Level(inputs, outputs, config.num_res_blocks + 1, _has_attention(config, i), up))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    """The learned codes; taming calls it `quantize`."""

    def __init__(self, config: VQGANConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.num_codes, config.code_width)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, code_width, h, w] -> nearest code int64[B, h, w]; the first on a tie."""
        flat = z.movedim(1, -1).flatten(0, -2)
        table = self.embedding.weight
        # |z|^2 is the same for every code: left out. min, because argmin takes twice as long on a CPU.
        distance = torch.addmm(table.square().sum(1), flat, table.T, alpha=-2)
        one = distance.min(1).indices
        two = distance.scatter_(1, one[:, None], torch.inf).min(1).indices
        # Of codes much alike these distances differ by less than their rounding; differences from z tell, as in JAX.
        a, b = table[one], table[two]
        further = ((a - b) * ((a - flat) + (b - flat))).sum(1)  # |a - z|^2 - |b - z|^2
        nearest = torch.where((further > 0) | ((further == 0) & (two < one)), two, one)
        return nearest.view(z.shape[0], *z.shape[2:])


class VQGAN(nn.Module):
    """Images in [-1, 1] <-> codes. A policy only encodes and uses `with_decoder=False`."""

    def __init__(self, config: VQGANConfig, with_decoder: bool = True):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_width, 1)
        self.quantize = Codebook(config)
        if with_decoder:
            self.post_quant_conv = nn.Conv2d(config.code_width, config.z_channels, 1)
            self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> z [B, code_width, h, w], not yet quantised."""
        return self.quant_conv(self.encoder(images))

    @torch.inference_mode()
    def codes(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1] -> codes int64[B, H / 16, W / 16]."""
        return self.quantize(self.encode(images))

    def decode(self, z_q: Tensor) -> Tensor:
        """Quantised z_q [B, code_width, h, w] -> images [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z_q))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes int64[B, h, w] -> images [B, 3, H, W]."""
        return self.decode(self.quantize.embedding(codes).movedim(-1, 1))


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8, truncating as the reference does."""
    return ((images.clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, eps 1e-6, everywhere."""
    return nn.GroupNorm(32, channels, eps=1e-6)


def _has_attention(config: VQGANConfig, level: int) -> bool:
    return config.resolution // 2**level in config.attention_resolutions
