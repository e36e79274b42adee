"""Chameleon and RynnVLA checkpoints (HF-style keys) <-> ours: names, layouts, configuration. Numpy only.

Source: Hugging Face's Chameleon keys and `config.json`, with RynnVLA-001's two projections.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np

from rynnvla_jax import metadata
from rynnvla_jax.config import TransformerConfig, VLAConfig
from rynnvla_jax.convert import ConversionError
from rynnvla_jax.convert.table import LINEAR, SAME, Entry, Transform, axis_size, split_in, split_out
from rynnvla_jax.deploy.export_format import CHAMELEON, HF_FIELDS
from rynnvla_jax.metadata import Between, Index, Layers, Name, Share, Size

# Left in old checkpoints, recomputed from the configuration.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
NEW_ROWS = 4  # `<action>`, wrist start, wrist end, state
HEADS = ("state_projection", "action_head")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_MLP_LAYERS = 5

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_IMAGE_NAME = re.compile(r"IMGIMG[A-J]+Z")


def table(config: VLAConfig, heads: bool = True, norm_rows: tuple[int, int] | None = None) -> list[Entry]:
    """One entry per public tensor.

    Args:
      heads: with `state_projection` (where there is a state) and `action_head`.
      norm_rows: rows of the foreign q and k LayerNorm; None: as many as ours. More than ours are repetitions.
    """
    t = config.transformer
    q_rows, k_rows = norm_rows or (t.q_norm_rows, t.k_norm_rows)
    entries = [Entry(EMBED, "transformer.embed", rows=t.vocab_size)]
    for i in range(t.num_layers):
        entries += _layer(t, i, q_rows, k_rows)
    entries.append(Entry("model.norm.weight", "transformer.final_norm"))
    entries.append(Entry(HEAD, "transformer.head", LINEAR, rows=t.vocab_size))
    if not heads:
        return entries
    if config.state_dim:
        entries += _linear("state_projection", "state_projection")
    if config.action_head == "one_layer":
        return entries + _linear("action_head", "action_head.layer_0")
    for i in range(_MLP_LAYERS):  # an nn.Sequential, whose ReLUs take the odd numbers
        entries += _linear(f"action_head.{2 * i}", f"action_head.layer_{i}")
    return entries


def _layer(t: TransformerConfig, i: int, q_rows: int, k_rows: int) -> list[Entry]:
    foreign, ours = f"model.layers.{i}", "transformer.blocks"
    attention = f"{foreign}.self_attn"
    kv = split_out(t.num_kv_heads)
    entries = [
        Entry(f"{foreign}.input_layernorm.weight", f"{ours}.attention_norm", layer=i),
        Entry(f"{attention}.q_proj.weight", f"{ours}.wq", split_out(t.num_heads), i),
        Entry(f"{attention}.k_proj.weight", f"{ours}.wk", kv, i),
        Entry(f"{attention}.v_proj.weight", f"{ours}.wv", kv, i),
        Entry(f"{attention}.o_proj.weight", f"{ours}.wo", split_in(t.num_heads), i),
        Entry(f"{attention}.q_norm.weight", f"{ours}.q_norm_scale", _rows(t.q_norm_rows, q_rows), i),
        Entry(f"{attention}.q_norm.bias", f"{ours}.q_norm_bias", _rows(t.q_norm_rows, q_rows), i),
        Entry(f"{attention}.k_norm.weight", f"{ours}.k_norm_scale", _rows(t.k_norm_rows, k_rows), i),
        Entry(f"{attention}.k_norm.bias", f"{ours}.k_norm_bias", _rows(t.k_norm_rows, k_rows), i),
        Entry(f"{foreign}.post_attention_layernorm.weight", f"{ours}.mlp_norm", layer=i),
        Entry(f"{foreign}.mlp.gate_proj.weight", f"{ours}.w_gate", LINEAR, i),
        Entry(f"{foreign}.mlp.up_proj.weight", f"{ours}.w_up", LINEAR, i),
        Entry(f"{foreign}.mlp.down_proj.weight", f"{ours}.w_down", LINEAR, i),
    ]
    if t.attention_bias:
        for name, heads in (("q", t.num_heads), ("k", t.num_kv_heads), ("v", t.num_kv_heads)):
            entries.append(Entry(f"{attention}.{name}_proj.bias", f"{ours}.b{name}", _split_bias(heads), i))
        entries.append(Entry(f"{attention}.o_proj.bias", f"{ours}.bo", layer=i))
    if t.mlp_bias:
        for name in ("gate", "up", "down"):
            entries.append(Entry(f"{foreign}.mlp.{name}_proj.bias", f"{ours}.b_{name}", layer=i))
    return entries


def _linear(foreign: str, ours: str) -> list[Entry]:
    return [Entry(f"{foreign}.weight", f"{ours}.kernel", LINEAR), Entry(f"{foreign}.bias", f"{ours}.bias")]


def _split_bias(heads: int) -> Transform:
    """[H*E] <-> [H, E]."""
    return Transform(lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1))


def _rows(ours: int, foreign: int) -> Transform:
    """[foreign, E] of which neighbouring rows repeat <-> [ours, E]."""
    if ours == foreign:
        return SAME
    times = foreign // ours
    return Transform(lambda x: x[::times], lambda x: np.repeat(x, times, axis=0))


def collapsed_rows(stored: list[np.ndarray], heads: int, model_parallel_size: int, what: str) -> int:
    """The number of distinct rows of a q or k LayerNorm.

    Args:
      stored: every layer's scale and bias, [rows, E] each.
      heads: heads that the rows are spread over.

    Returns:
      `model_parallel_size` when the stored rows repeat that many rows, else all of them; 1 when they do not
      divide the heads but are all equal (shards of one KV head).

    Raises:
      ConversionError: distinct rows that do not divide the heads.
    """
    rows = stored[0].shape[0]

    def repeat(kept: int) -> bool:
        return all((g == g[:, :1]).all() for g in (x.reshape(kept, rows // kept, -1) for x in stored))

    if rows % model_parallel_size == 0 and heads % model_parallel_size == 0 and repeat(model_parallel_size):
        return model_parallel_size
    if heads % rows == 0:
        return rows
    if repeat(1):
        return 1
    raise ConversionError(f"{what} has {rows} distinct rows, which do not divide {heads} heads; check config.json")


@dataclass(frozen=True)
class _Rope:
    """The group rope_parameters of transformers 5."""

    rope_type: str = "default"
    rope_theta: float | None = None


@dataclass(frozen=True)
class _Fields:
    """What is read of a Chameleon or RynnVLA `config.json`; None, as in the file: not given."""

    vocab_size: Size | None = None
    hidden_size: Size | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    intermediate_size: Size | None = None
    head_dim: Size | None = None
    model_parallel_size: Size | None = None
    rms_norm_eps: float | None = None
    initializer_range: float | None = None
    dropout: Share | None = None
    attention_dropout: float | None = None
    swin_norm: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    mask_image_logits: bool | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: Name | None = None
    rope_theta: float | None = None
    rope_scaling: Any = None
    rope_parameters: _Rope | None = None
    image_tokens: tuple[Index, Index] | None = None
    vocabulary_map: dict[str, Index] | None = None
    state_dim: Annotated[int, Between(0, 2**16)] | None = None
    stateless: bool | None = None
    action_head_type: Name | None = None
    action_latent_dim: Size | None = None
    vq_config: Any = None


def given_fields(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The fields of a `config.json` that are read and given. Raises ConversionError naming a field of a wrong kind."""
    try:
        fields = metadata.parse(_Fields, config, where)
    except metadata.MetadataError as error:
        raise ConversionError(f"{error}; correct it, or copy it again") from None
    return {name: value for name, value in asdict(fields).items() if value is not None}


def config_from_foreign(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    norm_rows: tuple[int, int] | None = None,
    vocab_size: int | None = None,
) -> VLAConfig:
    """A Chameleon or RynnVLA `config.json` and its tensors' shapes -> VLAConfig.

    Args:
      norm_rows: rows to keep of the q and k LayerNorm (`collapsed_rows`); None: as stored.
      vocab_size: rows of our vocabulary; None: config.json's.

    `dropout` and `state_dim` fall back to the published 0.05 and 6. `num_key_value_heads` falls back to all heads,
    `mask_image_logits` to false (transformers always masks: that is generation, not the model).

    Raises:
      ConversionError: a missing field, or one that this model does not support.
    """
    config = given_fields(config)
    if missing := [k for k in _REQUIRED if k not in config]:
        raise ConversionError(f"config.json lacks {', '.join(missing)}")
    _check_supported(config)
    values = {ours: config[theirs] for theirs, ours in HF_FIELDS.items() if config.get(theirs) is not None}
    values.setdefault("num_kv_heads", values["num_heads"])
    values["rope_theta"] = float(_rope(config))
    values["vocab_size"] = vocab_size or values.get("vocab_size") or axis_size(shapes, EMBED, 0)
    values["image_tokens"] = _image_tokens(config)
    rows = norm_rows or tuple(_stored_rows(shapes, name) for name in "qk")
    values["q_norm_rows"], values["k_norm_rows"] = rows
    for name in ("norm_eps", "dropout", "init_std"):
        if name in values:
            values[name] = float(values[name])
    transformer, state = TransformerConfig(**values), "state_projection.weight"
    head, outputs = _action_head(config, shapes)
    return VLAConfig(
        transformer=transformer,
        state_dim=axis_size(shapes, state, 1) if state in shapes else config.get("state_dim", 6),
        action_head=head,
        action_outputs=outputs,
        stateless=config.get("stateless", False),
    )


def config_to_foreign(config: VLAConfig) -> dict[str, Any]:
    """VLAConfig -> the fields of a Chameleon `config.json`, with RynnVLA's `state_dim`, `action_head_type`."""
    t = config.transformer
    return {
        **CHAMELEON,
        "model_parallel_size": t.q_norm_rows,
        "rope_theta": t.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": t.rope_theta},
        **{theirs: getattr(t, ours) for theirs, ours in HF_FIELDS.items()},
        "image_tokens": list(t.image_tokens),
        "state_dim": config.state_dim,
        "action_head_type": config.action_head,
        "action_latent_dim": config.action_outputs,
    }


def notes(config: Mapping[str, Any]) -> list[str]:
    """The settings of config.json that the import changes or leaves out, as lines for the report."""
    lines = []
    if config.get("tie_word_embeddings"):
        lines.append("tied word embeddings are untied: lm_head starts as a copy of the embedding")
    if config.get("attention_dropout"):
        lines.append(f"attention_dropout {config['attention_dropout']} is ignored: this model drops residuals only")
    if config.get("mask_image_logits") is None:
        lines.append("mask_image_logits is not given: false")
    if config.get("dropout") is None:
        lines.append(f"dropout is not given: {TransformerConfig.dropout} in training, as published")
    return lines


def new_values(path: str, shape: tuple[int, ...], config: VLAConfig, seed: int) -> np.ndarray:
    """A randomly initialised parameter or vocabulary rows, float32, as the model initialises them.

    Vocabulary rows are N(0, init_std), projection kernels N(0, 1/sqrt(inputs)), biases zero.
    """
    if path.endswith(".bias"):
        return np.zeros(shape, np.float32)
    # The path is part of the seed: a value does not depend on which other parameters are new.
    std = config.transformer.init_std if path.startswith("transformer.") else shape[0] ** -0.5
    rng = np.random.default_rng([seed, *path.encode()])
    return (rng.standard_normal(shape) * std).astype(np.float32)


def _check_supported(config: Mapping[str, Any]) -> None:
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ConversionError(f"config.json hidden_act is {metadata.shown(act)}; only 'silu' is supported")
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else scaling
    if kind != "default":
        raise ConversionError(
            f"config.json rope_scaling is {metadata.shown(scaling)}; only unscaled rotary positions are supported"
        )
    parameters = config.get("rope_parameters", {})
    if parameters.get("rope_type", "default") != "default":
        shown = metadata.shown(parameters["rope_type"])
        raise ConversionError(f"config.json rope_parameters.rope_type is {shown}; only 'default' is supported")
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise ConversionError(
            f"config.json head_dim {head_dim} x {config['num_attention_heads']} heads is not hidden_size "
            f"{config['hidden_size']}; such models are not supported"
        )


def _rope(config: Mapping[str, Any]) -> float:
    parameters = config.get("rope_parameters", {})
    # Transformers 5 moved it into rope_parameters; files that carry both must agree.
    thetas = {v for v in (config.get("rope_theta"), parameters.get("rope_theta")) if v is not None}
    if len(thetas) > 1:
        raise ConversionError(f"config.json has two different rope_theta: {sorted(thetas)}; keep the correct one")
    return thetas.pop() if thetas else TransformerConfig.rope_theta


def _image_tokens(config: Mapping[str, Any]) -> tuple[int, int]:
    # The map of names is authoritative; `image_tokens` is our own key, for configs without the map.
    names = config.get("vocabulary_map") or {}
    ids = sorted(v for k, v in names.items() if _IMAGE_NAME.fullmatch(k))
    if ids:
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ConversionError(
                f"config.json vocabulary_map: the {len(ids)} image codes are between ids {ids[0]} and {ids[-1]} with "
                "gaps; only one contiguous range is supported"
            )
        return ids[0], ids[-1] + 1
    return config.get("image_tokens", TransformerConfig.image_tokens)


def _stored_rows(shapes: Mapping[str, tuple[int, ...]], which: str) -> int:
    key = f"model.layers.0.self_attn.{which}_norm.weight"
    if key not in shapes:
        raise ConversionError(f"{key} is missing: not a Chameleon checkpoint")
    return axis_size(shapes, key, 0)


def _action_head(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int]:
    named = config.get("action_head_type")
    last = f"action_head.{2 * (_MLP_LAYERS - 1)}.weight"
    found = "one_layer" if "action_head.weight" in shapes else "MLP" if last in shapes else None
    if named and found and named != found:
        raise ConversionError(f"config.json action_head_type is {named!r} but the tensors are of type {found!r}")
    head = found or named or "one_layer"
    weight = "action_head.weight" if head == "one_layer" else last
    return head, axis_size(shapes, weight, 0) if weight in shapes else config.get("action_latent_dim", 64)
