"""taming-transformers VQGAN checkpoints <-> ours: names, layouts, configuration. No torch here."""

from collections.abc import Mapping
from typing import Annotated, Any

from rynnvla_jax import metadata
from rynnvla_jax.config import ConfigError, VQGANConfig
from rynnvla_jax.convert.table import CONV, Entry
from rynnvla_jax.metadata import Between, Entries, Share, Size

Multipliers = Annotated[list[Annotated[int, Between(1, 1024)]], Entries(1, 12)]
Blocks = Annotated[int, Between(0, 16)]
Resolutions = Annotated[list[Annotated[int, Between(0, 2**24)]], Entries(0, 64)]

# Parts of `vqgan.ckpt`'s state dict that tokenising and decoding do not use.
IGNORED = ("loss.discriminator.", "loss.perceptual_loss.")


def table(config: VQGANConfig, decoder: bool = True) -> list[Entry]:
    """One entry per parameter; `decoder=False` for files with only the encoding half."""
    levels = range(len(config.multipliers))
    widths = [config.channels * m for m in config.multipliers]
    attention = [config.resolution // 2**i in config.attention_resolutions for i in levels]
    last = len(widths) - 1
    entries = [Entry("quantize.embedding.weight", "codebook"), *_conv("quant_conv", "quant_conv")]
    entries += _ends("encoder", "mid", "middle")
    for i in levels:
        inputs = widths[i - 1] if i else config.channels
        entries += _level(f"encoder.down.{i}", inputs, widths[i], config.num_res_blocks, attention[i])
        if i < last:
            entries += _conv(f"encoder.down.{i}.downsample.conv", f"encoder.down.{i}.resample")
    if not decoder:
        return entries
    entries += _conv("post_quant_conv", "post_quant_conv") + _ends("decoder", "mid", "middle")
    for i in levels:
        inputs = widths[min(i + 1, last)]
        entries += _level(f"decoder.up.{i}", inputs, widths[i], config.num_res_blocks + 1, attention[i])
        if i > 0:
            entries += _conv(f"decoder.up.{i}.upsample.conv", f"decoder.up.{i}.resample")
    return entries


def config_from_foreign(params: Mapping[str, Any]) -> VQGANConfig:
    """`model.params` of a `vqgan.yaml` (`ddconfig`, `n_embed`, `embed_dim`) -> VQGANConfig.

    Keys beside these three (loss, checkpoint path, ...) concern training and are not read.
    Raises:
      ConfigError: missing or unknown ddconfig key, or an option this model does not have.
    """
    if missing := [k for k in ("ddconfig", "n_embed", "embed_dim") if params.get(k) is None]:
        raise ConfigError(f"vqgan.yaml model.params lacks {', '.join(missing)}")
    dd = params["ddconfig"] if isinstance(params["ddconfig"], Mapping) else {}
    if unknown := [k for k in dd if k not in {*_FIELDS, *_FIXED}]:
        raise ConfigError(f"vqgan.yaml ddconfig: unknown {', '.join(map(metadata.shown, unknown))}")
    if missing := [k for k in _FIELDS if k not in dd]:
        raise ConfigError(f"vqgan.yaml ddconfig lacks {', '.join(missing)}")
    for key, value in _FIXED.items():
        if dd.get(key, value) != value:
            raise ConfigError(f"vqgan.yaml ddconfig.{key} is {metadata.shown(dd[key])}; only {value!r} is supported")
    try:
        given = metadata.checked({"ddconfig": _KINDS, "n_embed": Size, "embed_dim": Size}, params, "vqgan.yaml")
    except metadata.MetadataError as error:
        raise ConfigError(f"{error}; correct it, or copy it again") from None
    values: dict[str, Any] = {ours: given["ddconfig"][k] for k, ours in _FIELDS.items()}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return VQGANConfig(**values, num_codes=given["n_embed"], code_width=given["embed_dim"])


def config_to_foreign(config: VQGANConfig) -> dict[str, Any]:
    """The inverse of `config_from_foreign`."""
    values = {k: getattr(config, ours) for k, ours in _FIELDS.items()}
    ddconfig = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | {"double_z": False}
    return {"ddconfig": ddconfig, "n_embed": config.num_codes, "embed_dim": config.code_width}


_FIELDS = {
    "z_channels": "z_channels",
    "resolution": "resolution",
    "in_channels": "in_channels",
    "out_ch": "out_channels",
    "ch": "channels",
    "ch_mult": "multipliers",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attention_resolutions",
    "dropout": "dropout",
}
_KINDS = {
    **dict.fromkeys(("z_channels", "resolution", "in_channels", "out_ch", "ch"), Size),
    "ch_mult": Multipliers,
    "num_res_blocks": Blocks,
    "attn_resolutions": Resolutions,
    "dropout": Share,
}
_FIXED = {"double_z": False, "resamp_with_conv": True, "give_pre_end": False}


def _conv(foreign: str, ours: str) -> list[Entry]:
    return [Entry(f"{foreign}.weight", f"{ours}.kernel", CONV), Entry(f"{foreign}.bias", f"{ours}.bias")]


def _norm(foreign: str, ours: str) -> list[Entry]:
    return [Entry(f"{foreign}.weight", f"{ours}.scale"), Entry(f"{foreign}.bias", f"{ours}.bias")]


def _res_block(foreign: str, ours: str, shortcut: bool) -> list[Entry]:
    entries = []
    for i in (1, 2):
        entries += _norm(f"{foreign}.norm{i}", f"{ours}.norm{i}") + _conv(f"{foreign}.conv{i}", f"{ours}.conv{i}")
    return entries + (_conv(f"{foreign}.nin_shortcut", f"{ours}.shortcut") if shortcut else [])


def _attention(foreign: str, ours: str) -> list[Entry]:
    entries = _norm(f"{foreign}.norm", f"{ours}.norm")
    for theirs, name in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
        entries += _conv(f"{foreign}.{theirs}", f"{ours}.{name}")
    return entries


def _level(name: str, inputs: int, outputs: int, blocks: int, attention: bool) -> list[Entry]:
    entries = []
    for j in range(blocks):
        entries += _res_block(f"{name}.block.{j}", f"{name}.blocks.{j}", j == 0 and inputs != outputs)
        if attention:
            entries += _attention(f"{name}.attn.{j}", f"{name}.attention.{j}")
    return entries


def _ends(side: str, foreign: str, ours: str) -> list[Entry]:
    """What encoder and decoder share: first and last convolution, middle."""
    return [
        *_conv(f"{side}.conv_in", f"{side}.conv_in"),
        *_res_block(f"{side}.{foreign}.block_1", f"{side}.{ours}.block_1", False),
        *_attention(f"{side}.{foreign}.attn_1", f"{side}.{ours}.attention"),
        *_res_block(f"{side}.{foreign}.block_2", f"{side}.{ours}.block_2", False),
        *_norm(f"{side}.norm_out", f"{side}.norm_out"),
        *_conv(f"{side}.conv_out", f"{side}.conv_out"),
    ]
