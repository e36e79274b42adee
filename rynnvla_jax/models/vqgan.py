"""VQGAN: a frame <-> a grid of integer codes. NHWC, images in [-1, 1]."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rynnvla_jax.config import VQGANConfig
from rynnvla_jax.models.params import constant, normal, uniform

CODE_BLOCK = 1024  # codes whose distances exist at once
HIGHEST = jax.lax.Precision.HIGHEST  # a bf16 product flips codes


class VQGAN(nnx.Module):
    """Convolutional encoder and decoder around a codebook.

    `dtype` is the compute dtype of the convolutions; normalisation statistics, distances and losses are float32.
    `decoder=False` leaves out the decoder and `post_quant_conv`, which encoding does not need.

    Source: taming-transformers (arXiv 2012.09841) as configured by Chameleon, without its discriminator and
    perceptual loss: a released tokenizer is imported; a small one for one camera is trained here on pixels alone.
    """

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, decoder: bool = True):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = Conv(config.z_channels, config.code_width, 1, rngs=rngs)
        # taming draws from uniform(-1/n, 1/n): all codes then sit in one spot and few are ever chosen. This is about
        # the spread of the latents at the start; `loss` pulls the codes that stay unused to where latents are.
        self.codebook = normal(rngs, (config.num_codes, config.code_width), 0.2, (None, None))
        if decoder:
            self.post_quant_conv = Conv(config.code_width, config.z_channels, 1, rngs=rngs)
            self.decoder = Decoder(config, rngs=rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in [-1, 1], H and W multiples of the downsampling -> latents [B, h, w, code_width]."""
        factor = self.config.downsampling
        if images.ndim != 4 or images.shape[1] % factor or images.shape[2] % factor:
            raise ValueError(f"images {images.shape} must be [B, H, W, 3] with H and W multiples of {factor}")
        return self.quant_conv(self.encoder(images.astype(self.dtype)))

    def quantize(self, z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Latents [B, h, w, code_width] -> (codes int32 [B, h, w], quantised, codebook loss).

        The quantised latents pass gradients straight through to `z`. The loss is taming's legacy form, in which
        `commitment` weights the codebook's term and not the encoder's.
        """
        z = z.astype(jnp.float32)
        codes = nearest_code(jax.lax.stop_gradient(z), jax.lax.stop_gradient(self.codebook[...]))
        chosen = jnp.take(self.codebook[...], codes, axis=0)
        stop = jax.lax.stop_gradient
        loss = jnp.mean((stop(chosen) - z) ** 2) + self.config.commitment * jnp.mean((chosen - stop(z)) ** 2)
        return codes, z + stop(chosen - z), loss

    def codes(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] -> codes int32 [B, h, w]."""
        return nearest_code(self.encode(images).astype(jnp.float32), self.codebook[...])

    def decode(self, quantised: jax.Array) -> jax.Array:
        """Quantised latents [B, h, w, code_width] -> images [B, H, W, 3] float32, not clipped."""
        return self.decoder(self.post_quant_conv(quantised.astype(self.dtype))).astype(jnp.float32)

    def decode_codes(self, codes: jax.Array) -> jax.Array:
        """Codes int [B, h, w] -> images [B, H, W, 3] float32, not clipped."""
        return self.decode(jnp.take(self.codebook[...], codes, axis=0))

    def frames_to_codes(self, frames: jax.Array) -> jax.Array:
        """Frames uint8 [B, H, W, 3] -> codes int32 [B, h, w]."""
        return self.codes(to_unit_range(frames))

    def codes_to_frames(self, codes: jax.Array) -> jax.Array:
        """Codes int [B, h, w] -> frames uint8 [B, H, W, 3]."""
        return to_uint8(self.decode_codes(codes))

    def loss(self, images: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Images [B, H, W, 3] in [-1, 1] -> total and {"reconstruction", "codebook", "perplexity", "dead_codes"}.

        Reconstruction is L1 + L2, per element. Against collapse each code that no latent of this batch chose is
        pulled towards one latent, a different one for each code and taken at even distances over the batch: a term
        of the loss, so it needs no state beside the parameters. Perplexity is of the codes used in this batch, at
        most `num_codes`; `dead_codes` is the share of all codes that none of its latents chose. All float32 scalars,
        with "rows": (sums [B], counts [B]) of the reconstruction.
        """
        if self.config.dropout:
            raise ValueError(f"VQGAN dropout {self.config.dropout} is not implemented in training; set it to 0")
        z = self.encode(images).astype(jnp.float32)
        codes, quantised, codebook_loss = self.quantize(z)
        error = self.decode(quantised) - images.astype(jnp.float32)
        distance = jnp.abs(error) + error**2
        reconstruction = jnp.mean(distance)

        N, latents = self.config.num_codes, jax.lax.stop_gradient(z.reshape(-1, z.shape[-1]))
        share = jnp.zeros((N,)).at[codes.reshape(-1)].add(1.0) / codes.size
        target = latents[jnp.arange(N) * len(latents) // N]
        revival = jnp.where(share[:, None] > 0, 0.0, (self.codebook[...] - target) ** 2).mean()
        perplexity = jnp.exp(jax.scipy.special.entr(share).sum())
        metrics = {"reconstruction": reconstruction, "codebook": codebook_loss, "perplexity": perplexity}
        metrics["dead_codes"] = jnp.mean(share == 0, dtype=jnp.float32)
        each = distance.mean((1, 2, 3))
        return reconstruction + codebook_loss + revival, {
            **metrics,
            "rows": {"reconstruction": (each, jnp.ones_like(each))},
        }


def to_unit_range(pixels: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-1, 1], as `images.normalize` does on the host."""
    return (pixels.astype(jnp.float32) / 255.0 - 0.5) / 0.5


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] -> uint8. Truncates, as the public code does."""
    return ((jnp.clip(images, -1, 1) + 1) / 2 * 255).astype(jnp.uint8)


def nearest_code(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index int32 [...] of the codebook row [N, Z] nearest to each of z [..., Z]; the lower index on a tie.

    Goes over the book in blocks and not over z, so that a sharded batch stays sharded. The two nearest rows are
    compared again by their differences from z: |c|^2 - 2 z.c of rows much alike differs by less than its rounding, and
    one frame would get other codes here and in PyTorch.
    """
    size = min(CODE_BLOCK, codebook.shape[0])
    blocks = jnp.pad(codebook, ((0, -codebook.shape[0] % size), (0, 0))).reshape(-1, size, codebook.shape[1])
    # |z|^2 is the same for every code: left out.
    square = jnp.pad((codebook**2).sum(-1), (0, -codebook.shape[0] % size), constant_values=jnp.inf).reshape(-1, size)

    def visit(nearest, block):
        rows, square, first = block
        distance = square - 2 * jnp.einsum("...z,nz->...n", z, rows, precision=HIGHEST)
        for _ in range(2):
            index = jnp.argmin(distance, axis=-1).astype(jnp.int32)  # int64 where JAX_ENABLE_X64 is set
            nearest = _nearer(nearest, (jnp.min(distance, axis=-1), first + index))
            distance = jnp.where(jnp.arange(size) == index[..., None], jnp.inf, distance)
        return nearest, None

    nothing = jnp.full(z.shape[:-1], jnp.inf, z.dtype), jnp.zeros(z.shape[:-1], jnp.int32)
    first = jnp.arange(len(blocks), dtype=jnp.int32) * size
    ((_, one), (_, two)), _ = jax.lax.scan(visit, (nothing, nothing), (blocks, square, first))
    a, b = (jnp.take(codebook, index, axis=0) for index in (one, two))
    further = ((a - b) * ((a - z) + (b - z))).sum(-1)  # |a - z|^2 - |b - z|^2
    return jnp.where((further > 0) | ((further == 0) & (two < one)), two, one)


def _nearer(nearest, new):
    """The two nearest of two (distance, index), nearest first, and a third; the earlier ones on a tie."""
    best, second = nearest

    def choose(condition, a, b):
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)

    wins, follows = new[0] < best[0], new[0] < second[0]
    return choose(wins, new, best), choose(wins, best, choose(follows, new, second))


class Conv(nnx.Module):
    """Convolution NHWC, kernel HWIO; `padding` is ((top, bottom), (left, right)), by default it keeps the size."""

    def __init__(self, inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs):
        bound = (inputs * size * size) ** -0.5
        shape = (size, size, inputs, outputs)
        self.kernel = uniform(rngs, shape, bound, (None,) * 4)
        self.bias = constant((outputs,), 0.0, (None,))

    def __call__(self, x: jax.Array, stride: int = 1, padding=None) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        pad = kernel.shape[0] // 2
        out = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding or ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return out + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """32 groups, eps 1e-6, statistics in float32."""

    def __init__(self, channels: int):
        self.scale = constant((channels,), 1.0, (None,))
        self.bias = constant((channels,), 0.0, (None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Means over pixels first, then over the channels of a group: XLA:CPU is several times slower, above all in
        # the gradient, when one reduction spans both.
        x32 = x.astype(jnp.float32)
        mean = _group_mean(x32.mean((1, 2), keepdims=True))
        variance = _group_mean(((x32 - mean) ** 2).mean((1, 2), keepdims=True))
        scale = self.scale[...] * jax.lax.rsqrt(variance + 1e-6)
        return (x32 * scale + (self.bias[...] - mean * scale)).astype(x.dtype)


def _group_mean(x: jax.Array) -> jax.Array:
    """[B, 1, 1, C] -> the mean over each of 32 groups, for every channel."""
    size = x.shape[-1] // 32
    return jnp.repeat(x.reshape(*x.shape[:-1], 32, size).mean(-1), size, axis=-1)


class ResBlock(nnx.Module):
    """Two normalised convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1, self.conv1 = GroupNorm(inputs), Conv(inputs, outputs, 3, rngs=rngs)
        self.norm2, self.conv2 = GroupNorm(outputs), Conv(outputs, outputs, 3, rngs=rngs)
        self.shortcut = Conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class AttentionBlock(nnx.Module):
    """Attention of one head over all pixels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.out = (Conv(channels, channels, 1, rngs=rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x)
        q, k, v = (conv(y).reshape(x.shape[0], -1, x.shape[-1]) for conv in (self.q, self.k, self.v))
        scores = jnp.einsum("bsd,btd->bst", q, k).astype(jnp.float32) * x.shape[-1] ** -0.5
        y = jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores, axis=-1).astype(x.dtype), v)
        return x + self.out(y.reshape(x.shape))


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.block_1 = ResBlock(channels, channels, rngs=rngs)
        self.attention = AttentionBlock(channels, rngs=rngs)
        self.block_2 = ResBlock(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x)))


class Level(nnx.Module):
    """Residual blocks, optionally each followed by attention, and the convolution that changes the resolution."""

    def __init__(self, inputs: int, outputs: int, blocks: int, attention: bool, resample: bool, *, rngs: nnx.Rngs):
        self.blocks = nnx.Dict({str(i): ResBlock(outputs if i else inputs, outputs, rngs=rngs) for i in range(blocks)})
        self.attention = nnx.Dict({str(i): AttentionBlock(outputs, rngs=rngs) for i in range(blocks) if attention})
        self.resample = Conv(outputs, outputs, 3, rngs=rngs) if resample else None

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(len(self.blocks)):
            x = self.blocks[str(i)](x)
            if self.attention:
                x = self.attention[str(i)](x)
        return x


class Encoder(nnx.Module):
    """Images -> z_channels at 1/downsampling. Downsampling pads one pixel, at the bottom and right only."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = Conv(config.in_channels, config.channels, 3, rngs=rngs)
        self.down: nnx.Dict = nnx.Dict()
        for i, (inputs, outputs) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            attention = config.resolution // 2**i in config.attention_resolutions
            last = i == len(widths) - 1
            self.down[str(i)] = Level(inputs, outputs, config.num_res_blocks, attention, not last, rngs=rngs)
        self.middle = Middle(widths[-1], rngs=rngs)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(widths[-1], config.z_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for i in range(len(self.down)):
            level = self.down[str(i)]
            x = level(x)
            if level.resample is not None:
                x = level.resample(x, stride=2, padding=((0, 1), (0, 1)))
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """z_channels -> images; levels are named as the encoder's, so the last one runs first."""

    def __init__(self, config: VQGANConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = Conv(config.z_channels, widths[-1], 3, rngs=rngs)
        self.middle = Middle(widths[-1], rngs=rngs)
        self.up: nnx.Dict = nnx.Dict()
        for i, (inputs, outputs) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            attention = config.resolution // 2**i in config.attention_resolutions
            self.up[str(i)] = Level(inputs, outputs, config.num_res_blocks + 1, attention, i > 0, rngs=rngs)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = Conv(widths[0], config.out_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for i in reversed(range(len(self.up))):
            level = self.up[str(i)]
            x = level(x)
            if level.resample is not None:
                x = level.resample(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))
