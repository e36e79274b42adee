"""Compares the JAX model with the exported PyTorch modules on the same random input.

The transformer is compared layer by layer, each side keeping its own hidden states, so memory is about four
layers in float32 (7B: 4 GB, 34B: 14 GB) and never the model. Compute is float32 on both sides.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.config import ActionVAEConfig, LoraConfig, VLAConfig, VQGANConfig
from rynnvla_jax.convert import ConversionError, stream, vla
from rynnvla_jax.convert.exporter import open_vla, read_kind
from rynnvla_jax.convert.foreign import Checkpoint, open_checkpoint
from rynnvla_jax.deploy import export_format, torch_transformer
from rynnvla_jax.deploy.torch_action_vae import ActionVAE as TorchActionVAE
from rynnvla_jax.deploy.torch_vqgan import VQGAN as TorchVQGAN
from rynnvla_jax.deploy.torch_weights import load_module
from rynnvla_jax.models.action_vae import ActionVAE
from rynnvla_jax.models.layers import rms_norm
from rynnvla_jax.models.lora import adapters
from rynnvla_jax.models.transformer import rotary_angles
from rynnvla_jax.models.vla import VLA
from rynnvla_jax.models.vqgan import VQGAN
from rynnvla_jax.storage import files

# Largest difference, as a share of max(1, largest value), by the dtype of the exported transformer. bfloat16 keeps 8
# bits and float16 11, and rounding adds up over the layers; the frozen models are always float32.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
FLIPPED_CODES = 0.01  # share of VQ codes that float32 rounding may turn to a neighbour
VOCABULARY_BLOCK = 8192
IGNORED = "model.vqmodel."


@dataclass(frozen=True)
class Difference:
    """One compared quantity."""

    quantity: str
    largest: float  # |torch - jax|
    scale: float  # max(1, largest |jax|)
    limit: float  # on largest / scale

    @property
    def passed(self) -> bool:
        return bool(self.largest / self.scale <= self.limit)  # NaN fails


def verify(
    model: str | Path,
    export: str | Path,
    *,
    step: int = -1,
    tokens: int = 16,
    seed: int = 0,
    tolerance: float | None = None,
    weights: str = "raw",
) -> list[Difference]:
    """Compares a model directory with an export of it (either layout).

    Args:
      tokens: length of the random prompt; its last token carries a random state.
      tolerance: on the transformer's quantities; None: `TOLERANCES`.
      weights: of the model directory, "raw" or "ema".

    Raises:
      ConversionError: the export is of a different model: keys or sizes differ.
    """
    export, kind = Path(export), read_kind(model)
    step = reader.find_step(model, step)
    with jax.default_matmul_precision("highest"), torch.inference_mode():
        if kind == "vqgan":
            return list(_vqgan(model, step, export, seed, weights))
        if kind == "action_vae":
            return list(_action_vae(model, step, export, seed, weights))
        found = list(_transformer(model, step, export, tokens, seed, tolerance, weights))
        assets = files.place(model) / "assets"
        for name, compare in (("vqgan", _vqgan), ("action_vae", _action_vae)):
            if (export / name).exists():
                found += compare(assets / name, reader.find_step(assets / name), export / name, seed)
    return found


def table(differences: list[Difference]) -> str:
    """The differences as a text table."""
    width = max(len(d.quantity) for d in differences)
    lines = [f"{'quantity':{width}}  largest difference  of scale   limit"]
    for d in differences:
        mark = "" if d.passed else "  TOO LARGE"
        lines.append(f"{d.quantity:{width}}  {d.largest:18.3e}  {d.scale:8.3g}  {d.limit:6.0e}{mark}")
    return "\n".join(lines)


def to_json(differences: list[Difference]) -> str:
    """The differences, ready for JSON."""
    rows = [dataclasses.asdict(d) | {"pass": d.passed} for d in differences]
    return json.dumps({"pass": all(d.passed for d in differences), "differences": rows}, indent=2)


def _compare(quantity: str, ours: Any, theirs: torch.Tensor, limit: float) -> Difference:
    one, two = np.asarray(ours, np.float32), theirs.float().numpy()
    if one.shape != two.shape:
        raise ConversionError(
            f"{quantity}: shape {list(two.shape)} in the export, {list(one.shape)} in the model directory"
        )
    return Difference(quantity, float(np.abs(one - two).max()), max(1.0, float(np.abs(one).max())), limit)


def _transformer(
    model: str | Path, step: int, export: Path, length: int, seed: int, tolerance: float | None, which: str
) -> Iterator[Difference]:
    config, arrays = open_vla(model, step, which)
    # As it was trained: with adapters beside their matrices, where the export has merged both.
    trained = stream.open_params(model, step, which, merge=False)
    stored = model_dir.stored_config(model)
    lora = stored.finetune.lora if stored else LoraConfig()
    opened = open_checkpoint(export)
    robot = "rynnvla" in opened.config
    theirs = _torch_config(opened, config)
    _check_keys(opened, theirs, robot)
    limit = tolerance if tolerance is not None else TOLERANCES[opened.read("model.norm.weight").dtype.name]
    t = config.transformer
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, t.vocab_size - 1, length)
    state = rng.standard_normal((1, config.state_dim)).astype(np.float32)

    one_layer = dataclasses.replace(config, transformer=dataclasses.replace(t, num_layers=1))
    ours = nnx.eval_shape(
        lambda: VLA(one_layer, rngs=nnx.Rngs(0), lora=adapters(one_layer.transformer, lora, nnx.Rngs(0)))
    )
    heads = [name for name in vla.HEADS if config.state_dim or name != "state_projection"]
    small = {k: jnp.asarray(a.read()) for k, a in arrays.items() if k.split(".")[0] in heads}
    nnx.update(
        ours, stream.nest({**small, "transformer.final_norm": jnp.asarray(arrays["transformer.final_norm"].read())})
    )
    with torch.device("meta"):
        other = torch_transformer.VLA(
            dataclasses.replace(theirs, transformer=dataclasses.replace(theirs.transformer, num_layers=1))
        )
    _load(other.model.norm, opened, "model.norm.")

    x: Any = np.stack([arrays["transformer.embed"].read((slice(i, i + 1),))[0] for i in tokens])
    y = torch.from_numpy(np.stack([_rows(opened, vla.EMBED, i, i + 1)[0] for i in tokens]))[None]
    if robot:
        for name in heads:
            _load(getattr(other, name), opened, f"{name}.")
    if robot and config.state_dim:
        projected = ours.state_projection(jnp.asarray(state))
        yield _compare("state projection", projected, other.state_projection(torch.from_numpy(state)), limit)
        x[-1] = np.asarray(projected)[0]
        y[0, -1] = other.state_projection(torch.from_numpy(state))[0]
    x = jnp.asarray(x)[None]
    yield _compare("embeddings", x, y, limit)

    graphdef, _ = nnx.split(ours.transformer.blocks)
    angles = rotary_angles(jnp.arange(length), t.head_dim, t.rope_theta)
    run = jax.jit(lambda weights, x: nnx.merge(graphdef, weights)(x, angles)[0])
    rotary = torch_transformer.rotary_tables(length, theirs.transformer, torch.device("cpu"), torch.float32)
    worst: Any = None
    for i in range(t.num_layers):
        prefix = "transformer.blocks."
        layer = {k.removeprefix(prefix): jnp.asarray(a.read((i,))) for k, a in trained.items() if k.startswith(prefix)}
        weights = stream.nest(layer)
        x = jax.block_until_ready(run(weights, x))
        del layer, weights
        _load(other.model.layers[0], opened, f"model.layers.{i}.")
        y = other.model.layers[0](y, rotary)
        other.model.layers[0].to_empty(device="meta")
        found = _compare(f"hidden states (worst: after layer {i})", x, y, limit)
        if worst is None or not found.largest / found.scale <= worst.largest / worst.scale:
            worst = found
    yield worst
    x = rms_norm(x, ours.transformer.final_norm, t.norm_eps)
    y = other.model.norm(y)
    yield _compare("final hidden states", x, y, limit)
    if robot:
        yield _compare("action latent", ours.predict_action(x[:, -1]), other.action_head(y[:, -1]), limit)
    yield _logits(arrays["transformer.head"], opened, x, y, t.vocab_size, limit)


def _logits(head: stream.StoredArray, opened: Checkpoint, x: jax.Array, y: torch.Tensor, rows: int, limit: float):
    """Unmasked logits of the real vocabulary rows; ours summed over the stored pieces of the width."""
    ours = np.zeros((x.shape[1], rows), np.float32)
    for index in head.pieces():
        columns = slice(index[1].start, min(index[1].stop, rows))
        ours[:, columns] += np.asarray(x[0, :, index[0]] @ head.read(index)[:, : columns.stop - columns.start])
    theirs = torch.cat(
        [
            torch.nn.functional.linear(y[0], torch.from_numpy(_rows(opened, vla.HEAD, i, i + VOCABULARY_BLOCK)))
            for i in range(0, rows, VOCABULARY_BLOCK)
        ],
        -1,
    )
    return _compare("logits", ours, theirs, limit)


def _torch_config(opened: Checkpoint, config: VLAConfig) -> VLAConfig:
    """The configuration of the export; it must be the same model, up to repeated q/k norm rows."""
    if "rynnvla" in opened.config:
        theirs = export_format.config_from_json(opened.config, str(opened.source / export_format.CONFIG)).vla
    else:
        theirs = vla.config_from_foreign(opened.config, opened.shapes)
    same: dict[str, Any] = {"q_norm_rows": 0, "k_norm_rows": 0, "dropout": 0.0, "init_std": 0.0, "vocab_multiple": 1}
    if "rynnvla" not in opened.config:  # transformers always masks, by names
        same |= {"mask_image_logits": False, "image_tokens": ()}
    one, two = (dataclasses.asdict(c.transformer) | same for c in (config, theirs))
    if different := [f"{k} {two[k]!r} (model directory: {one[k]!r})" for k in one if one[k] != two[k]]:
        raise ConversionError(f"{opened.source} is an export of a different model: {', '.join(different)}")
    return theirs


def _check_keys(opened: Checkpoint, config: VLAConfig, robot: bool) -> None:
    wanted = {e.foreign for e in vla.table(config, heads=robot)}
    faults = [f"{k}: missing" for k in sorted(wanted - set(opened.shapes))]
    faults += [f"{k}: unexpected" for k in opened.shapes if k not in wanted and not k.startswith(IGNORED)]
    if faults:
        raise ConversionError(f"{opened.source} does not fit its config.json: {'; '.join(faults)}")


def _load(module: torch.nn.Module, opened: Checkpoint, prefix: str) -> None:
    """Gives a module without storage the tensors under `prefix`, in float32."""
    tensors = {
        k: torch.from_numpy(np.asarray(opened.read(prefix + k)).astype(np.float32, copy=False))
        for k in module.state_dict()
    }
    try:
        module.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConversionError(f"{opened.source}: {prefix}*: {' '.join(str(error).split())}") from None


def _rows(opened: Checkpoint, key: str, start: int, stop: int) -> np.ndarray:
    """Reads only these rows of a tensor, as float32."""
    return np.array(cast(Any, opened.read_rows)(key, start, stop), np.float32)  # an export is safetensors


def _vqgan(model: str | Path, step: int, export: Path, seed: int, weights: str = "raw") -> Iterator[Difference]:
    config = model_dir.read_model_config(model, "vqgan")
    params = model_dir.load_params(model, step=step, weights=weights)[0]
    other = load_module(lambda: TorchVQGAN(export_format.read_model_config(export, VQGANConfig)), export)
    ours = nnx.merge(nnx.split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0))))[0], params)
    limit = TOLERANCES["float32"]
    size = 4 * config.downsampling
    image = np.random.default_rng(seed).uniform(-1, 1, (1, size, size, config.in_channels)).astype(np.float32)
    nchw = torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    z = jax.jit(ours.encode)(image)
    yield _compare("vqgan latents", z, other.encode(nchw).movedim(1, -1), limit)
    codes = np.asarray(ours.quantize(z)[0])
    flipped = float((codes != other.codes(nchw).numpy()).mean())
    yield Difference("vqgan codes, share that differ", flipped, 1.0, FLIPPED_CODES)
    decoded = other.decode_codes(torch.from_numpy(codes.astype(np.int64))).movedim(1, -1)
    yield _compare("vqgan decoded image", jax.jit(ours.decode_codes)(codes), decoded, limit)


def _action_vae(model: str | Path, step: int, export: Path, seed: int, weights: str = "raw") -> Iterator[Difference]:
    config = model_dir.read_model_config(model, "action_vae")
    params = model_dir.load_params(model, step=step, weights=weights)[0]
    joints = params["encoder_joint_proj"]["kernel"].shape[0]
    other = load_module(
        lambda: TorchActionVAE(export_format.read_model_config(export, ActionVAEConfig), state_dim=joints), export
    )
    build = nnx.eval_shape(lambda: ActionVAE(config, state_dim=joints, rngs=nnx.Rngs(0)))
    ours = nnx.merge(nnx.split(build)[0], params)
    limit = TOLERANCES["float32"]
    rng = np.random.default_rng(seed)
    actions = rng.standard_normal((2, config.chunk, config.action_dim)).astype(np.float32)
    is_pad = np.arange(config.chunk)[None] >= np.array([[config.chunk], [config.chunk // 2]])
    latent = jax.jit(ours.encode)(actions, is_pad)
    yield _compare(
        "action VAE embedding", latent, other.encode(torch.from_numpy(actions), torch.from_numpy(is_pad)), limit
    )
    mean = np.array(latent[:, : config.latent])
    decoded = jax.jit(ours.decode)(mean)[0]
    yield _compare("action VAE decoded chunk", decoded, other.decode(torch.from_numpy(mean))[0], limit)


def failures(differences: list[Difference]) -> str:
    """The quantities that differ too much, in one line; "" if none does."""
    return ", ".join(f"{d.quantity} {d.largest / d.scale:.2e} > {d.limit:.0e}" for d in differences if not d.passed)
