"""Predicts future frames with a trained stage 1, 2 or 3, from first frames and instructions."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rynnvla_jax.actions import Statistics, normalize_state
from rynnvla_jax.checkpoint import base, model_dir, reader
from rynnvla_jax.config import NEWEST, ConfigError, DataConfig, TrainConfig, VLAConfig
from rynnvla_jax.inference.codec import FrameCodec
from rynnvla_jax.inference.generate import GREEDY, Sampling, code_positions, frames_of, generate
from rynnvla_jax.models import params as model_params
from rynnvla_jax.models.vla import build_vla
from rynnvla_jax.sequence import compose, frame_length, sequence_length
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.vocabulary import TextTokenizer

_REMEDY = "pass a work dir of stage video, trajectory or robot, or an imported model"

Codes = dict[str, np.ndarray]  # by view: int [..., h, w]


@dataclass(frozen=True, eq=False)
class Model:
    """A model directory whose small files have been read and checked; `load` reads its weights."""

    directory: Path
    step: int
    config: TrainConfig  # as it was trained, but for what inference changes
    tokenizer: TextTokenizer
    statistics: Statistics | None  # of states; None where the model takes none
    imported: bool  # it tells no sequence and image settings: the defaults are taken
    weights: str = "raw"  # or "ema", their average

    @property
    def views(self) -> tuple[str, ...]:
        return STAGES[self.config.stage].views(self.config) or ()

    @property
    def acts(self) -> bool:
        return STAGES[self.config.stage].actions

    def most_frames(self, texts: Sequence[str], size: tuple[int, int]) -> int:
        """How many frames of `size` (height, width) fit into the tokens that the model was trained on, given ones
        included. Raises ConfigError for a size or text that cannot be tokenized."""
        sequence = self.config.sequence
        text, frame = max(len(self.tokenizer.encode(t)) for t in texts), frame_length(*size)
        needed = [sequence_length(text, frame, dataclasses.replace(sequence, num_frames=n)) for n in (1, 2)]
        return 1 + (sequence.length // sequence.clips - needed[0]) // (needed[1] - needed[0])


def find(directory: str | Path, weights: str = "raw", step: int = NEWEST) -> Model:
    """Reads the small files of a work dir or an imported model.

    Args:
      weights: "raw", or "ema": their average.
      step: as `reader.find_step` takes it.

    Raises:
      CheckpointError: not a work dir, a model of another kind, or no checkpoint, average or VQGAN in it.
      ConfigError: a file is missing or not of this version.
    """
    directory = files.place(directory)
    assets = directory / "assets"
    try:
        vla = model_dir.read_model_config(directory, "vla")
    except reader.CheckpointError as error:
        raise reader.CheckpointError(f"{error}; {_REMEDY}") from None
    step = reader.find_step(directory, step)
    base.open_weights(reader.step_folder(directory, step), weights)
    file = assets / "config.json"
    config = model_dir.read_train_config(directory) if file.exists() else _config_of(vla)
    if not (assets / "vqgan").exists():
        raise reader.CheckpointError(
            f"{assets / 'vqgan'} is missing: frames cannot be encoded or decoded; import the model again with --vqgan"
        )
    vqgan = model_dir.read_model_config(assets / "vqgan", "vqgan")
    stored = model_dir.stored_shapes(assets / "vqgan", reader.find_step(assets / "vqgan"))
    if not any(name.startswith("decoder.") for name in stored):
        raise reader.CheckpointError(
            f"{assets / 'vqgan'} has no decoder, so frames cannot be decoded; import the model with --vqgan vqgan.ckpt"
        )
    dtype = "float32" if jax.default_backend() == "cpu" else config.compute_dtype
    config = dataclasses.replace(config, vla=vla, vqgan_model=vqgan, remat="none", compute_dtype=dtype)
    return Model(
        directory=directory,
        step=step,
        config=config,
        tokenizer=TextTokenizer(assets / "tokenizer.json"),
        statistics=_statistics(assets) if vla.state_dim else None,
        imported=not file.exists(),
        weights=weights,
    )


def _config_of(vla: VLAConfig) -> TrainConfig:
    """The config of a model without one: defaults, with the sizes of its outputs."""
    data = DataConfig()
    if vla.acts and vla.actions == "raw":  # into how many steps the outputs are cut does not matter to frames
        vla, data = dataclasses.replace(vla, action_dim=vla.action_outputs), DataConfig(chunk=1)
    config = TrainConfig(stage="robot" if vla.acts else "video", vla=vla, data=data)
    vae = dataclasses.replace(config.action_vae_model, latent=vla.action_outputs // 2)
    sequence = dataclasses.replace(config.sequence, use_wrist_frame=vla.acts)
    return dataclasses.replace(config, action_vae_model=vae, sequence=sequence)


def _statistics(assets: Path) -> Statistics:
    """The statistics of the work dir, or else those of its ActionVAE."""
    own = assets / "statistics.json"
    return Statistics.from_json(own if own.exists() else assets / "action_vae" / "assets" / "statistics.json")


@dataclass(frozen=True, eq=False)
class DecodingRows:
    """Rows to be decoded: `tokens` int32 [N, S], 0 where `predict` bool [N, S]; `start` is the first such position.

    `state_positions` are int32 [N, T], `columns` is the number of codes per line."""

    tokens: np.ndarray
    predict: np.ndarray
    state_positions: np.ndarray
    start: int
    columns: int

    def rows(self, index: np.ndarray) -> "DecodingRows":
        """Some of the rows, for the same program as all of them."""
        own = {k: getattr(self, k)[index] for k in ("tokens", "predict", "state_positions")}
        return dataclasses.replace(self, **own)


def lay_out(model: Model, texts: Sequence[str], first: Codes, frames: int) -> DecodingRows:
    """`frames` frames per row, of which the first is given as codes [N, h, w] by view."""
    vocabulary = model.tokenizer.vocabulary
    sequence = dataclasses.replace(model.config.sequence, num_frames=frames)
    # Later frames: any code, to be predicted over.
    given = {v: np.pad(c[:, None], ((0, 0), (0, frames - 1), (0, 0), (0, 0))) for v, c in first.items()}
    rows = [
        compose(model.tokenizer.encode(text), {v: codes[i] for v, codes in given.items()}, vocabulary, sequence)
        for i, text in enumerate(texts)
    ]
    masks = [code_positions(row.tokens, vocabulary.image_tokens, vocabulary.begin_image) for row in rows]
    length = max(int(np.flatnonzero(mask)[-1]) for mask in masks) + 3  # line end and frame end follow the last code
    tokens, predict = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        n = min(length, len(row.tokens))
        tokens[i, :n], predict[i, :n] = row.tokens[:n], mask[:n]
    positions = np.stack([row.state_positions for row in rows])
    start, columns = int(predict.argmax(axis=1).min()), first["front"].shape[-1]
    return DecodingRows(np.where(predict, 0, tokens), predict, positions, start, columns)


@dataclass(frozen=True, eq=False)
class Imagination:
    """A model with its weights on the first device."""

    model: Model
    graphdef: nnx.GraphDef
    params: dict
    codec: FrameCodec

    def predict(
        self,
        layout: DecodingRows,
        states: np.ndarray | None,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Codes:
        """Codes int32 [N, T, h, w] by view: frame 0 as given, the later ones decoded one token after another.

        Args:
          states: raw, [N, T, S]: that of frame t is at its end; None for a model without states.
          progress: see `generate`.
        """
        model, vocabulary = self.model, self.model.tokenizer.vocabulary
        positions = layout.state_positions if states is not None else None
        decoded = generate(
            self.graphdef,
            self.params,
            layout.tokens,
            layout.predict,
            layout.start,
            image_tokens=vocabulary.image_tokens,
            state=None if states is None else normalize_state(states, cast(Statistics, model.statistics)),
            state_positions=positions,
            sampling=sampling,
            key=jax.random.key(seed),
            progress=progress,
        )
        table, rows = vocabulary.token_to_code(), np.asarray(decoded)
        ends = {v: vocabulary.delimiters(v, model.config.sequence.extra_views) for v in model.views}
        return {v: np.stack([frames_of(row, table, *ends[v], layout.columns) for row in rows]) for v in model.views}


def load(model: Model) -> Imagination:
    """Reads the weights, matrices in the compute dtype. Raises CheckpointError when they do not fit the model."""
    config = model.config
    built = nnx.eval_shape(lambda: build_vla(config, nnx.Rngs(0)))
    graphdef, shapes = model_params.split(built)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def wanted(x, axes):
        dtype = jnp.dtype(config.compute_dtype) if "embed" in axes else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=device)

    abstract = jax.tree.map(wanted, shapes, model_params.axes(built))
    params, _ = model_dir.load_params(model.directory, abstract, step=model.step, weights=model.weights)
    return Imagination(model, graphdef, params, FrameCodec.load(model.directory))


def check_frames(model: Model, texts: Sequence[str], size: tuple[int, int], frames: int) -> None:
    """Raises ConfigError when `frames` frames, the given one included, are more than the model has positions for."""
    most = model.most_frames(texts, size)
    if frames > most:
        length = model.config.sequence.length // model.config.sequence.clips
        raise ConfigError(
            f"{model.directory} was trained on sequences of {length} tokens, which fit the given frame and "
            f"{most - 1} more of {size[0]} x {size[1]} pixels; use --frames {most - 1} at most"
            if most > 1
            else f"{model.directory} was trained on sequences of {length} tokens, too few for two frames of "
            f"{size[0]} x {size[1]} pixels; give smaller images or a shorter text"
        )


def announce(model: Model, what: str, sampling: Sampling, out: Path) -> None:
    """Prints the settings before the prediction starts."""
    config, device = model.config, jax.devices()[0]
    c = config.vla.transformer
    how = (
        "greedy"
        if not sampling.temperature
        else (f"temperature {sampling.temperature:g}, top_k {sampling.top_k or 'all'}, top_p {sampling.top_p:g}")
    )
    average = ", average of the weights" if model.weights == "ema" else ""
    settings = "; imported: sequence and image settings are the defaults" if model.imported else ""
    print(
        f"Predicting {what}, {how}\n"
        f"  model      {model.directory}, stage {config.stage}, step {model.step}{average}: {c.num_layers} layers of "
        f"width {c.width}, {config.compute_dtype}{settings}\n"
        f"  device     {device.device_kind}, the first of {jax.local_device_count()}\n"
        f"  writes     {out}",
        flush=True,
    )
