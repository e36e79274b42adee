"""Runs a trained stage on a few fixed examples of its own data; returns arrays and numbers, not images.

Examples are spread over the episodes by a fixed rule, so that two reports of one run show the same ones. They come
from the training data, so they do not measure generalisation.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from rynnvla_jax.actions import Statistics, decode_chunk, normalize_actions, normalize_state
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.columns import UNKNOWN, labels
from rynnvla_jax.config import NEWEST, TrainConfig
from rynnvla_jax.images import preprocess
from rynnvla_jax.inference import codec as codec_lib
from rynnvla_jax.inference import imagine
from rynnvla_jax.inference.codec import FrameCodec
from rynnvla_jax.inference.image_metrics import psnr
from rynnvla_jax.inference.imagine import Codes, Imagination, lay_out
from rynnvla_jax.models.frozen import Frozen, action_vae_graph, predicted_actions
from rynnvla_jax.sequence import find_positions, prompt
from rynnvla_jax.stage import STAGES
from rynnvla_jax.vocabulary import TextTokenizer

VLA_EXAMPLES = 8
VAE_EXAMPLES = 64
VQ_EXAMPLES = 2 * codec_lib.BATCH  # a view
SHOWN = 4
SHOWN_CHUNKS = 3
UPPER_BOUND = "VQ codes (upper bound)"
GOLDEN = 0.618034  # its multiples spread evenly over [0, 1)


@dataclass(frozen=True)
class Cell:
    """One image of a table: uint8 [h, w, 3] or None (nothing to show), and a short text under it."""

    image: np.ndarray | None
    note: str = ""


@dataclass(frozen=True)
class FrameTable:
    """Images in rows (camera, reconstruction, prediction) and columns (times, cameras)."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Chunk:
    """One action chunk: a name and lines [C, A] in the data's unit by label; "true" is the recording."""

    caption: str
    lines: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evidence:
    """The results of one stage. `tiles` are (value, label), `errors` rows (dimension, one number per label).

    `headline` is the result in one line; `warnings` are reasons to distrust the other numbers.
    """

    weights_of_step: int = 0
    weights: str = "raw"  # or "ema", their average
    headline: str = ""
    tiles: list[tuple[str, str]] = field(default_factory=list)
    tables: list[FrameTable] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    dimensions: list[str] = field(default_factory=list)
    unit: str = ""
    quantity: str = ""  # what a chunk's lines are
    error_labels: list[str] = field(default_factory=list)
    errors: list[tuple[str, list[float]]] = field(default_factory=list)
    examples: str = ""  # what errors and numbers were taken from
    numbers: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def open_loader(directory: Path, config: TrainConfig):
    """The run's data, opened as training opened it. Raises DataError, ConfigError, ValueError for missing assets."""
    from data_pipelines.loader import Loader

    assets = directory / "assets"
    tokenizer = TextTokenizer(assets / "tokenizer.json") if STAGES[config.stage].tokens else None
    file = assets / "statistics.json"
    statistics = Statistics.from_json(file) if file.exists() else None
    return Loader(config, tokenizer=tokenizer, statistics=statistics, progress=False)


def evaluate(directory: Path, config: TrainConfig, loader, weights: str = "raw", step: int = NEWEST) -> Evidence:
    """Loads weights of a work dir, or with "ema" their average, and runs them on its examples.

    Raises:
      CheckpointError: no checkpoint yet, or a frozen model is missing.
      DataError: a frame cannot be decoded.
    """
    step = reader.find_step(directory, step)
    stage = STAGES[config.stage]
    if stage.tokens:
        evidence = _vla(directory, config, loader, imagine.load(imagine.find(directory, weights, step)))
    else:
        params, _ = model_dir.load_params(directory, step=step, weights=weights)
        evidence = (_vqgan if stage.single_frames else _action_vae)(directory, config, loader, params)
    return dataclasses.replace(evidence, weights_of_step=step, weights=weights)


def spread(sources: Sequence, length: int, count: int) -> list[tuple]:
    """`count` (episode, start) over all episodes that hold `length` frames: a fixed, evenly spread choice.

    A start is a step that has a frame (in a tokenized corpus not every step has one). Raises DataError if no episode is
    long enough.
    """
    fitting = [np.flatnonzero(source.lengths >= length) for source in sources]
    ends = np.cumsum([len(f) for f in fitting])
    if not ends[-1]:
        from data_pipelines.episode import DataError

        longest = max(int(source.lengths.max()) for source in sources)
        raise DataError(
            f"no episode of {sources[0].source} has {length} steps (longest {longest}); ask for fewer frames"
        )
    windows = []
    for i in range(count):
        number = i * int(ends[-1]) // count
        which = int(np.searchsorted(ends, number, side="right"))
        episode = sources[which][int(fitting[which][number - ends[which]])]
        start = int((len(episode) - length) * ((0.5 + i * GOLDEN) % 1))
        windows.append((episode, start - start % episode.stride))
    return windows


def _shown(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` examples, evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()


def _window_name(episode, start: int) -> str:
    return f"{episode.name.replace('_', ' ')}, {start / episode.fps:.1f} s"


def _collapse(used: set[int], total: int) -> list[str]:
    """Warns when the frames use very few codes: predicting them is then trivial."""
    if len(used) > max(4, 0.01 * total):
        return []
    codes = "a single code" if len(used) == 1 else f"{len(used)} codes"
    return [
        f"These frames use only {codes} of {total}: the VQGAN's codebook has collapsed, so the images contain almost "
        "no information and predicting codes is trivial. Train the VQGAN longer before you interpret these results."
    ]


# --- frames ---------------------------------------------------------------------------------------------------------


def _frames(episode, view: str, steps, config: TrainConfig) -> np.ndarray:
    return np.stack([preprocess(frame, config.data.image) for frame in episode.frames(view, list(steps))])


def _vqgan(directory: Path, config: TrainConfig, loader, params) -> Evidence:
    """Real against reconstructed frames, PSNR, codes in use."""
    codec = FrameCodec(config.vqgan_model, params)
    windows = spread(loader.sources, 1, VQ_EXAMPLES)
    columns, real_cells, rebuilt_cells, numbers, used, quality = [], [], [], [], set(), []
    count = 0
    for view in dict.fromkeys(view for e, _ in windows for view in e.views):
        own = [(e, t) for e, t in windows if view in e.views]  # the data sets of a mixture may have other cameras
        count, shown = count + len(own), _shown(len(own), min(SHOWN, len(own)))
        real = np.concatenate([_frames(e, view, [t], config) for e, t in own])
        codes = codec.encode(real)
        rebuilt = codec.decode(codes)
        used |= set(codes.reshape(-1).tolist())
        quality.append(psnr(real, rebuilt))
        numbers.append((f"PSNR, {view} camera", f"{quality[-1]:.1f} dB"))
        columns += [f"{view}, {_window_name(*own[i])}" for i in shown]
        real_cells += [Cell(real[i]) for i in shown]
        rebuilt_cells += [Cell(rebuilt[i], f"{psnr(real[i : i + 1], rebuilt[i : i + 1]):.1f} dB") for i in shown]
    total = config.vqgan_model.num_codes
    numbers.append(("Codes in use", f"{len(used)} of {total} ({len(used) / total:.0%})"))
    tiles = [(f"{np.mean(quality):.1f} dB", "PSNR of rebuilt frames"), (f"{len(used)} of {total}", "codes in use")]
    return Evidence(
        headline=f"PSNR {np.mean(quality):.1f} dB, {len(used)} of {total} codes in use",
        tiles=tiles,
        tables=[FrameTable("", columns, [("camera", real_cells), ("rebuilt from codes", rebuilt_cells)])],
        examples=f"{count} frames, spread over all episodes",
        numbers=numbers,
        warnings=_collapse(used, total),
    )


# --- action chunks --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _rebuild(graphdef, params, actions):
    vae = nnx.merge(graphdef, params)
    mean = vae.encode(actions, None)[:, : vae.config.latent]
    return vae.decode(mean)[0]


def _moves(episode) -> bool:
    """True if a chunk is a path relative to its start (hands in the camera's frame), not joint targets."""
    return episode.world_to_camera is not None


def _origin(episode, start: int) -> np.ndarray:
    """The start that relative actions are added to, [A]: the joint state, or zero for paths."""
    return np.zeros(episode.action.shape[1]) if _moves(episode) else episode.state[start]


def _normalized(windows: list[tuple], loader) -> np.ndarray:
    """True chunks as the models receive them, [N, C, A]."""
    data = loader.config.data
    chunks = [normalize_actions(e.chunk(t, data.chunk), loader.statistics, data.normalization) for e, t in windows]
    return np.stack(chunks)


def _absolute(normalized: np.ndarray | jax.Array, windows: list[tuple], loader) -> np.ndarray:
    """Normalised chunks [N, C, A] -> targets (or paths) in the data's unit, [N, C, A]."""
    mode = loader.config.data.normalization
    return np.stack(
        [
            decode_chunk(x, _origin(e, t), loader.statistics, mode)
            for x, (e, t) in zip(np.asarray(normalized), windows, strict=True)
        ]
    )


def _chunk_evidence(lines: dict[str, np.ndarray], windows: list[tuple], shown: list[int], loader) -> Evidence:
    """`lines` are [N, C, A] by label, "true" first; adds "hold still" and the mean absolute errors of all."""
    still = np.stack([np.broadcast_to(_origin(e, t), lines["true"].shape[1:]) for e, t in windows])
    lines = {**lines, "hold still": still}
    error = {k: np.abs(v - lines["true"]).mean(axis=(0, 1)) for k, v in lines.items() if k != "true"}
    names = labels(loader.statistics.columns.action)
    episode, units = windows[0][0], {c.unit or UNKNOWN for c in loader.statistics.columns.action}
    rows = [(name, [float(e[i]) for e in error.values()]) for i, name in enumerate(names)]
    return Evidence(
        chunks=[
            Chunk(_window_name(*windows[i]).replace(", ", "\n"), {k: v[i] for k, v in lines.items()}) for i in shown
        ],
        dimensions=names,
        unit=" and ".join(sorted(units)),
        quantity="displacement since the chunk began" if _moves(episode) else "target position",
        error_labels=list(error),
        errors=[*rows, ("mean of all", [float(e.mean()) for e in error.values()])],
        examples=f"{len(windows)} chunks, spread over all episodes",
    )


def _action_vae(directory: Path, config: TrainConfig, loader, params) -> Evidence:
    """True against rebuilt chunks."""
    windows = spread(loader.sources, config.data.chunk, VAE_EXAMPLES)
    normalized = _normalized(windows, loader)
    rebuilt = _rebuild(action_vae_graph(config), params, normalized)
    lines = {"true": _absolute(normalized, windows, loader), "rebuilt": _absolute(rebuilt, windows, loader)}
    evidence = _chunk_evidence(lines, windows, _shown(VAE_EXAMPLES, SHOWN_CHUNKS), loader)
    return _with_error(evidence, "error", "mean error of rebuilt chunks")


def _with_error(evidence: Evidence, name: str, tile: str) -> Evidence:
    """Adds the first line's error over whole chunks, and that of holding still, to headline and tiles."""
    ours, *_, still = evidence.errors[-1][1]
    return dataclasses.replace(
        evidence,
        headline=f"{name} {ours:.3g} {evidence.unit} (holding still: {still:.3g})",
        tiles=[
            (f"{ours:.3g}", f"{evidence.unit}: {tile}"),
            (f"{still:.3g}", f"{evidence.unit}: error of holding still"),
        ],
    )


# --- the decoder: future frames and actions --------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _act(graphdef, params, tokens, lengths, state, positions):
    return nnx.merge(graphdef, params).action_latent(tokens, lengths, state, positions)


@dataclass(frozen=True)
class Recorded:
    """Examples of the data: their start and the following steps. `frames` uint8 [N, T, h, w, 3] and `codes` int32
    [N, T, h/16, w/16] by view, raw `states` [N, T, S] or None, `seconds` [N] between two frames.

    Where `decoded` bool [N], the example is from a tokenized corpus: its frames are what its codes show, no camera's.
    """

    windows: list[tuple]
    frames: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    states: np.ndarray | None
    seconds: np.ndarray
    decoded: np.ndarray

    @property
    def texts(self) -> list[str]:
        return [episode.text(start) for episode, start in self.windows]


def record(imagination: Imagination, loader, count: int, frames: int) -> Recorded:
    """`count` examples of the loader's data, spread over all episodes, with `frames` frames each.

    Raises DataError: a frame cannot be decoded, or no episode is long enough.
    """
    model, config = imagination.model, loader.config
    interval = config.sequence.frame_interval
    span = max(source[0].stride for source in loader.sources) * interval * (frames - 1) + 1
    windows = spread(loader.sources, span + (config.data.chunk if model.acts else 0), count)
    # A mixture may have tokenized corpora beside data sets with frames, each with its own stride.
    steps = [t + e.stride * interval * np.arange(frames) for e, t in windows]
    decoded = np.array([bool(e.codes) for e, _ in windows])
    pixels, codes = {}, {}
    for view in model.views:
        each = list(zip(windows, steps, strict=True))
        filmed = [_frames(e, view, at, config) for (e, _), at in each if not e.codes]
        stored = [e.codes[view][at // e.stride].astype(np.int32) for (e, _), at in each if e.codes]
        shown: Iterable[np.ndarray] = imagination.codec.decode(np.stack(stored)) if stored else []
        pixels[view] = _merged(decoded, shown, filmed)
        codes[view] = _merged(decoded, stored, imagination.codec.encode(np.stack(filmed)) if filmed else [])
    states = None
    if model.statistics is not None:
        states = np.stack([e.state[at] for (e, _), at in zip(windows, steps, strict=True)])
    seconds = np.array([e.stride * interval / e.fps for e, _ in windows])
    return Recorded(windows, pixels, codes, states, seconds, decoded)


def _merged(which: np.ndarray, yes: Iterable[np.ndarray], no: Iterable[np.ndarray]) -> np.ndarray:
    """The next of `yes` where `which`, else the next of `no`, stacked."""
    parts = {True: iter(yes), False: iter(no)}
    return np.stack([next(parts[bool(w)]) for w in which])


def _vla(directory: Path, config: TrainConfig, loader, imagination: Imagination) -> Evidence:
    """Predicted frames, and with actions the predicted chunk at frame 0."""
    model, T = imagination.model, config.sequence.num_frames
    recorded = record(imagination, loader, VLA_EXAMPLES, T)
    shown = _shown(VLA_EXAMPLES, SHOWN)
    evidence = Evidence(examples=f"{VLA_EXAMPLES} starts, spread over all episodes")
    if model.acts:
        evidence = _actions(directory, loader, imagination, recorded, shown)
    if T == 1:
        return evidence
    layout = lay_out(model, recorded.texts, {v: c[:, 0] for v, c in recorded.codes.items()}, T)
    predicted = imagination.predict(layout, recorded.states)
    evidence = _frame_evidence(evidence, imagination.codec, recorded, predicted, shown)
    used = set(np.concatenate([c.reshape(-1) for c in recorded.codes.values()]).tolist())
    total = model.tokenizer.vocabulary.num_codes
    numbers = [*evidence.numbers, ("Different codes in these recordings", f"{len(used)} of {total}")]
    return dataclasses.replace(evidence, numbers=numbers, warnings=_collapse(used, total))


def _frame_evidence(evidence, codec: FrameCodec, recorded: Recorded, predicted: Codes, shown: list[int]) -> Evidence:
    """Tables camera / VQ / predicted, and the code accuracy."""
    frames, codes = recorded.frames, recorded.codes
    rebuilt = {v: codec.decode(c) for v, c in codes.items()}
    predicted_frames = {v: codec.decode(c) for v, c in predicted.items()}
    later = np.s_[:, 1:]
    right = np.mean([(predicted[v][later] == codes[v][later]).mean() for v in codes])
    copied = np.mean([(codes[v][:, :1] == codes[v][later]).mean() for v in codes])
    # Compared with a camera, where there is one: codes that are decoded twice differ by nothing.
    filmed = np.flatnonzero(~recorded.decoded) if not recorded.decoded.all() else np.arange(len(recorded.windows))
    flat = {v: x[filmed][later].reshape(-1, *x.shape[2:]) for v, x in frames.items()}
    quality = np.mean([psnr(flat[v], predicted_frames[v][filmed][later].reshape(flat[v].shape)) for v in flat])
    rows = {UPPER_BOUND: rebuilt, "predicted": predicted_frames}
    tables = [frame_table(number, i, recorded, rows, predicted) for number, i in enumerate(shown, 1)]
    numbers = [
        ("Code accuracy of later frames", f"{right:.1%}"),
        ("Code accuracy when frame 0 is repeated", f"{copied:.1%}"),
    ]
    if recorded.decoded.all():
        numbers.append(("PSNR of predicted frames, compared with the corpus's decoded codes", f"{quality:.1f} dB"))
    else:
        ceiling = np.mean([psnr(flat[v], rebuilt[v][filmed][later].reshape(flat[v].shape)) for v in flat])
        numbers.append(("PSNR of predicted frames", f"{quality:.1f} dB"))
        numbers.append(("PSNR of the VQ reconstruction (upper bound)", f"{ceiling:.1f} dB"))
    tiles = [(f"{right:.0%}", "code accuracy of later frames"), (f"{copied:.0%}", "when frame 0 is repeated")]
    headline = f"code accuracy {right:.0%} (frame 0 repeated: {copied:.0%})"
    return dataclasses.replace(
        evidence,
        headline="; ".join(filter(None, [evidence.headline, headline])),
        tables=tables,
        numbers=numbers,
        tiles=[*evidence.tiles, *tiles],
    )


def frame_table(
    number: int, i: int, recorded: Recorded, rows: dict[str, dict[str, np.ndarray]], predicted
) -> FrameTable:
    """Example `i`: the camera, then `rows` of images [N, T, h, w, 3] by view, "predicted" with the share of right
    codes. Of a tokenized corpus there is no camera's frame: its decoded codes are both recording and upper bound."""
    (episode, start), codes = recorded.windows[i], recorded.codes
    cells = [(v, t) for v, x in codes.items() for t in range(x.shape[1])]

    def cell(name: str, pictures: dict[str, np.ndarray], v: str, t: int) -> Cell:
        if name != "predicted":
            return Cell(pictures[v][i, t])
        if t == 0:
            return Cell(None, "given")
        return Cell(pictures[v][i, t], f"{(predicted[v][i, t] == codes[v][i, t]).mean():.0%} of codes")

    shown = {"camera": recorded.frames, **rows}
    if recorded.decoded[i]:
        shown = {"decoded codes of the corpus": recorded.frames, **{k: x for k, x in rows.items() if k != UPPER_BOUND}}
    return FrameTable(
        f"{number}. “{episode.text(start)}” ({_window_name(episode, start)})",
        [f"{v}, now" if t == 0 else f"{v}, +{1000 * recorded.seconds[i] * t:.0f} ms" for v, t in cells],
        [(name, [cell(name, x, v, t) for v, t in cells]) for name, x in shown.items()],
    )


def _actions(directory: Path, loader, imagination: Imagination, recorded: Recorded, shown: list[int]) -> Evidence:
    """The chunk that the model would start at frame 0, against the recorded one."""
    model, windows, codes = imagination.model, recorded.windows, recorded.codes
    tokenizer, sequence = model.tokenizer, model.config.sequence
    prompts = [
        prompt(tokenizer.encode(e.text(t)), {v: own[i, 0] for v, own in codes.items()}, tokenizer.vocabulary, sequence)
        for i, (e, t) in enumerate(windows)
    ]
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    state = None if recorded.states is None else normalize_state(recorded.states[:, :1], loader.statistics)
    positions = find_positions(tokens, tokenizer.vocabulary.state, 1)
    lengths = np.array([len(p) for p in prompts])
    predicted = _act(imagination.graphdef, imagination.params, tokens, lengths, state, positions)

    own, config, vae_params = directory / "assets" / "action_vae", model.config, None
    if config.vla.actions == "embedding":
        config = dataclasses.replace(config, action_vae_model=model_dir.read_model_config(own, "action_vae"))
        vae_params, _ = model_dir.load_params(own)
    normalized = _normalized(windows, loader)
    lines = {
        "true": _absolute(normalized, windows, loader),
        "predicted": _absolute(predicted_actions(predicted, Frozen(action_vae=vae_params), config), windows, loader),
    }
    if vae_params is not None:
        rebuilt = _rebuild(action_vae_graph(config), vae_params, normalized)
        lines["ActionVAE (upper bound)"] = _absolute(rebuilt, windows, loader)
    evidence = _chunk_evidence(lines, windows, shown[:SHOWN_CHUNKS], loader)
    return _with_error(evidence, "action error", "mean action error")
