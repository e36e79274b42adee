"""The two frozen models, ActionVAE and VQGAN: public files <-> model directories. Small, so held in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from rynnvla_jax import metadata
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.config import ActionVAEConfig, ConfigError, VQGANConfig, from_dict
from rynnvla_jax.convert import ConversionError, action_vae, stream, vqgan
from rynnvla_jax.convert.foreign import Checkpoint
from rynnvla_jax.convert.report import ImportReport
from rynnvla_jax.convert.table import Entry, axis_size, leaves, to_params
from rynnvla_jax.errors import shorten
from rynnvla_jax.metadata import Share, Size
from rynnvla_jax.models.action_vae import ActionVAE
from rynnvla_jax.models.vqgan import VQGAN

T = TypeVar("T", ActionVAEConfig, VQGANConfig)

VQ_PREFIX = "model.vqmodel."


@dataclass(frozen=True)
class _VQFields:
    """What is read of `vq_config` in a Chameleon config.json; None: not given."""

    base_channels: Size | None = None
    channel_multiplier: vqgan.Multipliers | None = None
    num_res_blocks: vqgan.Blocks | None = None
    attn_resolutions: vqgan.Resolutions | None = None
    resolution: Size | None = None
    latent_channels: Size | None = None
    num_embeddings: Size | None = None
    embed_dim: Size | None = None
    in_channels: Size | None = None
    dropout: Share | None = None
    double_latent: bool | None = None


def import_action_vae(source: Checkpoint, out: str | Path, arguments: Mapping[str, Any] | None = None) -> ImportReport:
    """Fills the folder `out` with a model directory, from a public ActionVAE state dict.

    Args:
      arguments: the public constructor's arguments (`nheads`, `num_queries`, ...), which the tensors do not determine
        completely; None reads the config.json of our own export, or else infers them from the tensors, with the
        published 8 heads and dropout 0.1.
    """
    report = ImportReport("action_vae", str(source.source), source.format)
    config = _action_vae_config(source, arguments, report)
    constants = action_vae.constants(config)
    tensors = _read_all(source, report)
    for key, value in constants.items():
        found = tensors.pop(key, None)
        if found is not None and (found.shape != value.shape or np.abs(found - value).max() > 1e-5):
            raise ConversionError(f"{source.source}: {key} is not the sinusoidal table that this model computes")
    joints = axis_size(source.shapes, "encoder_joint_proj.weight", 1)
    template = stream.abstract(lambda: ActionVAE(config, state_dim=joints, rngs=nnx.Rngs(0)))
    _save(out, "action_vae", config, action_vae.table(config), tensors, template, (), report)
    return report


def import_vqgan(source: Checkpoint, out: str | Path, params: Mapping[str, Any] | None = None) -> ImportReport:
    """Fills the folder `out` with a model directory, from `vqgan.ckpt`.

    Args:
      params: `model.params` of `vqgan.yaml`; None uses the file next to the checkpoint, or the config.json of our own
        export there, or else Chameleon's.

    A file without the decoder is accepted: it can only encode, and its decoder is randomly initialised (reported).
    """
    report = ImportReport("vqgan", str(source.source), source.format)
    config = _vqgan_config(source, params, report)
    _save_vqgan(out, config, _read_all(source, report, vqgan.IGNORED), report)
    return report


def import_vqmodel(source: Checkpoint, out: str | Path) -> ImportReport:
    """`model.vqmodel.*` of an HF Chameleon checkpoint -> assets/vqgan. It has no decoder."""
    shapes = {k.removeprefix(VQ_PREFIX): s for k, s in source.shapes.items() if k.startswith(VQ_PREFIX)}
    if not shapes:
        raise ConversionError(f"{source.source} has no {VQ_PREFIX}* tensors; drop --vq, or give --vqgan vqgan.ckpt")
    given = source.config.get("vq_config")
    part = Checkpoint(source.source, source.format, shapes, lambda k: source.read(VQ_PREFIX + k))
    report = ImportReport("vqgan", f"{source.source} ({VQ_PREFIX}*)", source.format)
    if given is None:
        raise ConversionError(f"{source.source}: config.json lacks vq_config; give --vqgan vqgan.ckpt instead")
    config = vqgan_config_from_hf(given)
    _save_vqgan(out, config, _read_all(part, report, vqgan.IGNORED), report)
    return report


def vqgan_config_from_hf(given: Mapping[str, Any]) -> VQGANConfig:
    """`vq_config` of a Chameleon config.json -> VQGANConfig. Missing fields have Chameleon's value."""
    try:
        fields = metadata.parse(_VQFields, given, "config.json vq_config")
    except metadata.MetadataError as error:
        raise ConversionError(f"{error}; correct it, or give --vqgan vqgan.ckpt") from None
    if fields.double_latent:
        raise ConversionError("config.json vq_config.double_latent is true; only false is supported")
    names = {
        "base_channels": "channels",
        "channel_multiplier": "multipliers",
        "num_res_blocks": "num_res_blocks",
        "attn_resolutions": "attention_resolutions",
        "resolution": "resolution",
        "latent_channels": "z_channels",
        "num_embeddings": "num_codes",
        "embed_dim": "code_width",
        "in_channels": "in_channels",
        "dropout": "dropout",
    }
    values: dict[str, Any] = {ours: getattr(fields, k) for k, ours in names.items() if getattr(fields, k) is not None}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return VQGANConfig(**values)


def _save_vqgan(out: str | Path, config: VQGANConfig, tensors: dict[str, np.ndarray], report: ImportReport) -> None:
    decoder = any(k.startswith("decoder.") for k in tensors)
    template = stream.abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0), decoder=decoder))
    fresh: dict[str, Any] = {}
    if not decoder:
        for key in [k for k in tensors if k.startswith("post_quant_conv.")]:  # of no use without the decoder
            tensors.pop(key)
            report.ignored["post_quant_conv."] = report.ignored.get("post_quant_conv.", 0) + 1
        whole = stream.abstract(lambda: VQGAN(config, rngs=nnx.Rngs(0)))
        rng = np.random.default_rng(0)
        missing = {path: x.shape for path, x in leaves(whole) if path.split(".")[0] not in template}
        fresh = stream.nest({path: _new_value(path, shape, rng) for path, shape in missing.items()})
        report.new.append("decoder and post_quant_conv (the file has none: it encodes frames but cannot decode them)")
    _save(out, "vqgan", config, vqgan.table(config, decoder), tensors, template, vqgan.IGNORED, report, fresh)


def _new_value(path: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """The model's own initialisation: uniform within 1/sqrt(inputs of a kernel), scales one, biases zero."""
    if path.endswith(".kernel"):
        return rng.uniform(-1, 1, shape).astype(np.float32) * np.prod(shape[:-1]) ** np.float32(-0.5)
    return np.full(shape, path.endswith(".scale"), np.float32)


def _save(
    out: str | Path,
    kind: str,
    config: Any,
    entries: list[Entry],
    tensors: Mapping[str, np.ndarray],
    template: dict[str, Any],
    ignored: tuple[str, ...],
    report: ImportReport,
    fresh: Mapping[str, Any] | None = None,
) -> None:
    """Converts a small model in memory and writes its directory."""
    try:
        params = to_params(entries, tensors, template, ignored)
    except ValueError as error:
        raise ConversionError(f"{report.source}: {error}") from None
    params = {**jax.tree.map(lambda x: np.asarray(x, np.float32), params), **(fresh or {})}
    report.weights = sum(x.size for _, x in leaves(params))
    model_dir.save_model(out, kind, config, params)


def _read_all(source: Checkpoint, report: ImportReport, ignored: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    tensors = {}
    for key in source.shapes:
        prefix = next((p for p in ignored if key.startswith(p)), None)
        if prefix is not None:
            report.ignored[prefix] = report.ignored.get(prefix, 0) + 1
            continue
        tensor = source.read(key)
        report.count(tensor)
        tensors[key] = np.array(tensor, np.float32)
    return tensors


def _action_vae_config(
    source: Checkpoint, arguments: Mapping[str, Any] | None, report: ImportReport
) -> ActionVAEConfig:
    shapes = source.shapes

    def dimension(key: str, axis: int) -> int:
        if key not in shapes:
            raise ConversionError(f"{source.source}: {key} is missing: not an ActionVAE")
        return axis_size(shapes, key, axis)

    def layers(prefix: str) -> int:
        return len({k.removeprefix(prefix).split(".")[0] for k in shapes if k.startswith(prefix)})

    inferred = {
        "num_queries": dimension("query_embed.weight", 0),
        "state_dim": dimension("action_head.weight", 0),
        "hidden_dim": dimension("query_embed.weight", 1),
        "dim_feedforward": dimension("encoder.layers.0.linear1.weight", 0),
        "enc_layers": layers("encoder.layers."),
        "dec_layers": layers("transformer.decoder.layers."),
        "pre_norm": "encoder.norm.weight" in shapes,
    }
    defaults = {"nheads": ActionVAEConfig.num_heads, "dropout": ActionVAEConfig.dropout}
    exported = None if arguments else _exported_config(source, ActionVAEConfig)
    given = action_vae.config_to_foreign(exported) if exported else arguments or {}
    wrong = {k: v for k, v in inferred.items() if k in given and given[k] != v}
    if wrong:
        shown = ", ".join(f"{k} {given[k]} (the tensors say {v})" for k, v in wrong.items())
        raise ConversionError(f"ActionVAE arguments do not fit {source.source}: {shown}")
    if exported:
        return exported
    if "nheads" not in given:
        report.notes.append(f"number of heads is not given: {ActionVAEConfig.num_heads}, as published")
    latent = dimension("latent_proj.weight", 0) // 2
    try:
        return action_vae.config_from_foreign({**defaults, **inferred, **given}, latent=latent)
    except ConfigError as error:
        raise ConversionError(f"{source.source}: {error}") from None


def _vqgan_config(source: Checkpoint, params: Mapping[str, Any] | None, report: ImportReport) -> VQGANConfig:
    if params is None:
        beside = (source.source if source.source.is_dir() else source.source.parent) / "vqgan.yaml"
        if not beside.exists():
            if (exported := _exported_config(source, VQGANConfig)) is not None:
                return exported
            report.notes.append("no vqgan.yaml next to the weights: using Chameleon's configuration")
            return VQGANConfig()
        params = read_vqgan_yaml(beside)
    try:
        return vqgan.config_from_foreign(params)
    except ConfigError as error:
        raise ConversionError(f"{source.source}: {error}") from None


def _exported_config(source: Checkpoint, cls: type[T]) -> T | None:
    """The configuration in the config.json that our own export writes beside the weights; None if it is not ours."""
    names = {f.name for f in fields(cls)}
    if not source.config or not set(source.config) <= names:
        return None
    try:
        return from_dict(cls, source.config, cls.__name__)
    except ConfigError as error:
        raise ConversionError(f"config.json of {source.source}: {error}; export the model again") from None


def read_vqgan_yaml(path: Path) -> dict[str, Any]:
    """`model.params` of a vqgan.yaml."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror}); copy it again") from None
    except Exception as error:  # besides YAMLError, whatever a value with a tag or deep nesting leads to
        raise ConversionError(f"{path} is not YAML ({shorten(' '.join(str(error).split()))}); copy it again") from None
    try:
        return metadata.checked({"model": {"params": dict[str, Any]}}, content, str(path))["model"]["params"]
    except metadata.MetadataError:
        raise ConversionError(f"{path} lacks model.params; give the vqgan.yaml of the checkpoint") from None
