"""The public ActionVAE checkpoint <-> ours: names, layouts, configuration. No torch here."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rynnvla_jax import metadata
from rynnvla_jax.config import ActionVAEConfig, ConfigError
from rynnvla_jax.convert.table import LINEAR, Entry, Transform
from rynnvla_jax.metadata import Layers, Share, Size
from rynnvla_jax.models.action_vae import sinusoidal_positions

# Arguments of the public constructor that do not change this model: its image backbone was removed.
UNUSED_ARGUMENTS = ("backbone", "position_embedding", "masks", "dilation", "camera_names", "lr_backbone")


def table(config: ActionVAEConfig) -> list[Entry]:
    """One entry per parameter. `pos_table` is a buffer, not a parameter: see `constants`."""
    entries = [
        Entry("query_embed.weight", "query_embed"),
        Entry("pos.weight", "pos", _ROW),
        Entry("cls_embed.weight", "cls_embed", _ROW),
    ]
    for name in (
        "action_head",
        "is_pad_head",
        "encoder_action_proj",
        "encoder_joint_proj",
        "latent_proj",
        "latent_out_proj",
    ):
        entries += [Entry(f"{name}.weight", f"{name}.kernel", LINEAR), Entry(f"{name}.bias", f"{name}.bias")]
    entries += _stack("encoder", config, config.encoder_layers, cross=False, final_norm=config.pre_norm)
    entries += _stack("transformer.encoder", config, config.encoder_layers, cross=False, final_norm=config.pre_norm)
    entries += _stack("transformer.decoder", config, config.decoder_layers, cross=True, final_norm=True)
    return entries


def constants(config: ActionVAEConfig) -> dict[str, np.ndarray]:
    """Tensors that are determined by the configuration: checked on import, written on export."""
    return {"pos_table": sinusoidal_positions(config.chunk + 1, config.width)[None]}


def config_from_foreign(arguments: Mapping[str, Any], *, latent: int = 32, kl_weight: float = 1e-4) -> ActionVAEConfig:
    """The public constructor's arguments (`num_queries`, `hidden_dim`, ...) -> ActionVAEConfig.

    The public code fixes the latent width (32) outside these arguments, and its `state_dim` is both the action's and
    the joint state's width.
    Raises:
      ConfigError: missing or unknown argument, by name.
    """
    known = {*_FIELDS, *UNUSED_ARGUMENTS}
    if unknown := [k for k in arguments if k not in known]:
        raise ConfigError(f"ActionVAE arguments: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if missing := [k for k in _FIELDS if k not in arguments]:
        raise ConfigError(f"ActionVAE arguments lack {', '.join(missing)}")
    try:
        arguments = metadata.checked(_KINDS, arguments, "ActionVAE arguments")
    except metadata.MetadataError as error:
        raise ConfigError(f"{error}; correct it") from None
    return ActionVAEConfig(
        **{ours: arguments[foreign] for foreign, ours in _FIELDS.items()}, latent=latent, kl_weight=kl_weight
    )


def config_to_foreign(config: ActionVAEConfig) -> dict[str, Any]:
    """The inverse of `config_from_foreign`, without the unused arguments."""
    return {foreign: getattr(config, ours) for foreign, ours in _FIELDS.items()}


_FIELDS = {
    "num_queries": "chunk",
    "state_dim": "action_dim",
    "hidden_dim": "width",
    "dim_feedforward": "feed_forward",
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "nheads": "num_heads",
    "dropout": "dropout",
    "pre_norm": "pre_norm",
}
_KINDS = {
    **dict.fromkeys(("num_queries", "state_dim", "hidden_dim", "dim_feedforward", "nheads"), Size),
    "enc_layers": Layers,
    "dec_layers": Layers,
    "dropout": Share,
    "pre_norm": bool,
}
_ROW = Transform(lambda x: x[0], lambda x: x[None])


def _stack(name: str, config: ActionVAEConfig, layers: int, *, cross: bool, final_norm: bool) -> list[Entry]:
    heads, width = config.num_heads, config.width
    in_kernel = Transform(lambda x: x.T.reshape(width, 3, heads, -1), lambda x: x.reshape(width, -1).T)
    in_bias = Transform(lambda x: x.reshape(3, heads, -1), lambda x: x.reshape(-1))
    out_kernel = Transform(lambda x: x.T.reshape(heads, -1, width), lambda x: x.reshape(-1, width).T)
    attentions = {"self": "self_attn", "cross": "multihead_attn"} if cross else {"self": "self_attn"}
    norms = ("self", "cross", "mlp") if cross else ("self", "mlp")
    entries = []
    for i in range(layers):
        foreign = f"{name}.layers.{i}"
        for ours, theirs in attentions.items():
            entries += [
                Entry(f"{foreign}.{theirs}.in_proj_weight", f"{name}.{ours}_in_kernel", in_kernel, i),
                Entry(f"{foreign}.{theirs}.in_proj_bias", f"{name}.{ours}_in_bias", in_bias, i),
                Entry(f"{foreign}.{theirs}.out_proj.weight", f"{name}.{ours}_out_kernel", out_kernel, i),
                Entry(f"{foreign}.{theirs}.out_proj.bias", f"{name}.{ours}_out_bias", layer=i),
            ]
        for ours, theirs in (("up", "linear1"), ("down", "linear2")):
            entries += [
                Entry(f"{foreign}.{theirs}.weight", f"{name}.{ours}_kernel", LINEAR, i),
                Entry(f"{foreign}.{theirs}.bias", f"{name}.{ours}_bias", layer=i),
            ]
        for number, ours in enumerate(norms, start=1):
            entries += [
                Entry(f"{foreign}.norm{number}.weight", f"{name}.{ours}_norm_scale", layer=i),
                Entry(f"{foreign}.norm{number}.bias", f"{name}.{ours}_norm_bias", layer=i),
            ]
    if final_norm:
        entries += [Entry(f"{name}.norm.weight", f"{name}.norm_scale"), Entry(f"{name}.norm.bias", f"{name}.norm_bias")]
    return entries
