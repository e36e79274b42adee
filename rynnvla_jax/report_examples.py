"""What a trained stage does on a few fixed examples of its own data: arrays and numbers, no pictures yet.

Examples are spread over the episodes by a fixed rule, so that two reports of one run show the same ones. They come
from the training data: nothing here measures generalisation.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from rynnvla_jax import checkpoint
from rynnvla_jax.actions import Statistics, decode_chunk, normalize_actions, normalize_state
from rynnvla_jax.config import TrainConfig
from rynnvla_jax.generate import code_positions, frames_of, generate
from rynnvla_jax.images import preprocess
from rynnvla_jax.models.vqgan import to_uint8
from rynnvla_jax.sequence import compose, find_positions, prompt
from rynnvla_jax.stages import STAGES, action_vae_graph, to_unit_range, vqgan_graph
from rynnvla_jax.vocabulary import TextTokenizer

FRAME_BATCH = 8  # frames that go through the VQGAN at once: one shape for all stages, so one compilation
VLA_EXAMPLES = 8
VAE_EXAMPLES = 64
VQ_EXAMPLES = 16  # a view; a multiple of FRAME_BATCH wastes nothing
SHOWN = 4
SHOWN_CHUNKS = 3
GOLDEN = 0.618034  # its multiples spread evenly over [0, 1)


@dataclass(frozen=True)
class Cell:
    """One picture of a table: uint8 [h, w, 3] or None (nothing to show), and a short text under it."""

    image: np.ndarray | None
    note: str = ""


@dataclass(frozen=True)
class FrameTable:
    """Pictures in rows (camera, reconstruction, prediction) and columns (moments, cameras)."""

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
    """All that is shown of one stage. `tiles` are (value, label), `errors` rows (dimension, one number a label).

    `headline` says the result in one line; `warnings` what makes the other numbers worth less.
    """

    weights_of_step: int = 0
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
    tokens = config.stage in ("video", "trajectory", "robot")
    tokenizer = TextTokenizer(assets / "tokenizer.json") if tokens else None
    file = assets / "statistics.json"
    statistics = Statistics.from_json(file) if file.exists() else None
    return Loader(config, tokenizer=tokenizer, statistics=statistics, progress=False)


def evaluate(directory: Path, config: TrainConfig, loader) -> Evidence:
    """Loads the newest weights of a work dir and runs them on its examples.

    Raises:
      CheckpointError: no checkpoint yet, or a frozen model is missing.
      DataError: a frame cannot be decoded.
    """
    step = checkpoint.find_step(directory)
    params, _ = checkpoint.load_params(directory, step=step)
    run = {"vqgan": _vqgan, "action_vae": _action_vae}.get(config.stage, _vla)
    return dataclasses.replace(run(directory, config, loader, params), weights_of_step=step)


def spread(sources: Sequence, length: int, count: int) -> list[tuple]:
    """`count` (episode, start) over all episodes that hold `length` frames: a fixed, evenly spread choice.

    A start is a step that has a frame (in a tokenized corpus not every step has).
    """
    fitting = [np.flatnonzero(source.lengths >= length) for source in sources]
    ends = np.cumsum([len(f) for f in fitting])
    places = []
    for i in range(count):
        number = i * int(ends[-1]) // count
        which = int(np.searchsorted(ends, number, side="right"))
        episode = sources[which][int(fitting[which][number - ends[which]])]
        start = int((len(episode) - length) * ((0.5 + i * GOLDEN) % 1))
        places.append((episode, start - start % episode.stride))
    return places


def psnr(real: np.ndarray, other: np.ndarray) -> float:
    """Decibels, the mean over frames uint8 [N, h, w, 3]."""
    square = ((real.astype(np.float64) - other) ** 2).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(square, 1e-3))))


def _shown(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` examples, evenly spread, the first and the last among them."""
    return np.linspace(0, count - 1, wanted).round().astype(int).tolist()


def _place(episode, start: int) -> str:
    return f"{episode.name.replace('_', ' ')}, {start / episode.fps:.1f} s"


def _collapse(used: set[int], total: int) -> list[str]:
    """Says so when frames are written with next to no codes: they are then easy to predict and show nothing."""
    if len(used) > max(4, 0.01 * total):
        return []
    codes = "a single code" if len(used) == 1 else f"{len(used)} codes"
    return [
        f"These frames are written with {codes} of {total}: the VQGAN's codebook has collapsed, so pictures carry "
        "almost nothing and predicting codes is trivial. Train the VQGAN longer before reading anything into them."
    ]


# --- frames ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, pixels):
    return nnx.merge(graphdef, params).codes(to_unit_range(pixels))


@functools.partial(jax.jit, static_argnums=0)
def _paint(graphdef, params, codes):
    return to_uint8(nnx.merge(graphdef, params).decode_codes(codes))


@dataclass(frozen=True)
class _Tokenizer:
    """The VQGAN: frames uint8 [N, h, w, 3] <-> codes int32 [N, h/16, w/16]."""

    graphdef: nnx.GraphDef
    params: dict

    def encode(self, frames: np.ndarray) -> np.ndarray:
        return self._batched(_encode, frames)

    def paint(self, codes: np.ndarray) -> np.ndarray:
        return self._batched(_paint, codes)

    def _batched(self, function, x: np.ndarray) -> np.ndarray:
        parts = []
        for i in range(0, len(x), FRAME_BATCH):
            part = x[i : i + FRAME_BATCH]
            padded = np.pad(part, ((0, FRAME_BATCH - len(part)), *[(0, 0)] * (x.ndim - 1)))
            parts.append(np.asarray(function(self.graphdef, self.params, padded))[: len(part)])
        return np.concatenate(parts)


def _load_vqgan(directory: Path, config: TrainConfig) -> _Tokenizer:
    own = dataclasses.replace(config, vqgan_model=checkpoint.read_model_config(directory, "vqgan"))
    return _Tokenizer(vqgan_graph(own), checkpoint.load_params(directory)[0])


def _frames(episode, view: str, steps, config: TrainConfig) -> np.ndarray:
    return np.stack([preprocess(frame, config.data.image) for frame in episode.frames(view, list(steps))])


def _vqgan(directory: Path, config: TrainConfig, loader, params) -> Evidence:
    """Real against reconstructed frames, PSNR, codes in use."""
    vqgan = _Tokenizer(vqgan_graph(config), params)
    places = spread(loader.sources, 1, VQ_EXAMPLES)
    shown = _shown(VQ_EXAMPLES, SHOWN)
    columns, real_cells, painted_cells, numbers, used, quality = [], [], [], [], set(), []
    for view in loader.sources[0].views:
        real = np.concatenate([_frames(e, view, [t], config) for e, t in places])
        codes = vqgan.encode(real)
        painted = vqgan.paint(codes)
        used |= set(codes.reshape(-1).tolist())
        quality.append(psnr(real, painted))
        numbers.append((f"PSNR, {view} camera", f"{quality[-1]:.1f} dB"))
        columns += [f"{view}, {_place(*places[i])}" for i in shown]
        real_cells += [Cell(real[i]) for i in shown]
        painted_cells += [Cell(painted[i], f"{psnr(real[i : i + 1], painted[i : i + 1]):.1f} dB") for i in shown]
    total = config.vqgan_model.num_codes
    numbers.append(("Codes in use", f"{len(used)} of {total} ({len(used) / total:.0%})"))
    tiles = [(f"{np.mean(quality):.1f} dB", "PSNR of rebuilt frames"), (f"{len(used)} of {total}", "codes in use")]
    return Evidence(
        headline=f"PSNR {np.mean(quality):.1f} dB, {len(used)} of {total} codes in use",
        tiles=tiles,
        tables=[FrameTable("", columns, [("camera", real_cells), ("rebuilt from codes", painted_cells)])],
        examples=f"{len(places) * len(quality)} frames, spread over all episodes",
        numbers=numbers,
        warnings=_collapse(used, total),
    )


# --- action chunks --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _rebuild(graphdef, params, actions):
    vae = nnx.merge(graphdef, params)
    mean = vae.encode(actions, None)[:, : vae.config.latent]
    return vae.decode(mean)[0]


@functools.partial(jax.jit, static_argnums=0)
def _unfold(graphdef, params, latent):
    vae = nnx.merge(graphdef, params)
    return vae.decode(latent[:, : vae.config.latent])[0]


def _moves(episode) -> bool:
    """True where a chunk is a path from here (hands in the camera's frame), not targets of joints."""
    return episode.world_to_camera is not None


def _origin(episode, start: int) -> np.ndarray:
    """What relative actions add up from, [A]: the joints' state, or zero for paths."""
    return np.zeros(episode.action.shape[1]) if _moves(episode) else episode.state[start]


def _normalized(places: list[tuple], loader) -> np.ndarray:
    """True chunks as the models see them, [N, C, A]."""
    data = loader.config.data
    chunks = [normalize_actions(e.chunk(t, data.chunk), loader.statistics, data.normalization) for e, t in places]
    return np.stack(chunks)


def _absolute(normalized: np.ndarray, places: list[tuple], loader) -> np.ndarray:
    """Normalised chunks [N, C, A] -> targets (or paths) in the data's unit, [N, C, A]."""
    mode = loader.config.data.normalization
    return np.stack(
        [
            decode_chunk(x, _origin(e, t), loader.statistics, mode)
            for x, (e, t) in zip(np.asarray(normalized), places, strict=True)
        ]
    )


def _chunk_evidence(lines: dict[str, np.ndarray], places: list[tuple], shown: list[int], loader) -> Evidence:
    """`lines` are [N, C, A] by label, "true" first; adds "hold still" and the mean absolute errors of all."""
    still = np.stack([np.broadcast_to(_origin(e, t), lines["true"].shape[1:]) for e, t in places])
    lines = {**lines, "hold still": still}
    error = {k: np.abs(v - lines["true"]).mean(axis=(0, 1)) for k, v in lines.items() if k != "true"}
    names = action_names(loader.config, len(loader.statistics.rel_mean_action))
    episode, unit = places[0][0], loader.statistics.unit
    rows = [(name, [float(e[i]) for e in error.values()]) for i, name in enumerate(names)]
    return Evidence(
        chunks=[Chunk(_place(*places[i]).replace(", ", "\n"), {k: v[i] for k, v in lines.items()}) for i in shown],
        dimensions=names,
        unit="motor units" if unit.startswith("lerobot:") else unit,
        quantity="displacement since the chunk began" if _moves(episode) else "target position",
        error_labels=list(error),
        errors=[*rows, ("mean of all", [float(e.mean()) for e in error.values()])],
        examples=f"{len(places)} chunks, spread over all episodes",
    )


def sources(config: TrainConfig) -> list[str]:
    """The run's data, "KIND:PATH" each."""
    return [source for source, _ in config.data.mixture] or [config.data.source]


def action_names(config: TrainConfig, width: int) -> list[str]:
    """What each of `width` action numbers is: LeRobot's own names, the hands' axes, else numbers."""
    kind, _, root = sources(config)[0].partition(":")
    names = []
    if kind == "egodex":
        names = [f"{hand} wrist {axis}" for hand in ("left", "right") for axis in "xyz"]
    elif kind == "lerobot":
        info = json.loads((Path(root).expanduser() / "meta" / "info.json").read_text(encoding="utf-8"))
        names = info["features"]["action"].get("names") or []
        names = next(iter(names.values())) if isinstance(names, dict) else names
        names = [str(name).removesuffix(".pos").replace("_", " ") for name in names]
    return names if len(names) == width else [f"action {i}" for i in range(width)]


def _action_vae(directory: Path, config: TrainConfig, loader, params) -> Evidence:
    """True against rebuilt chunks."""
    places = spread(loader.sources, config.data.chunk, VAE_EXAMPLES)
    normalized = _normalized(places, loader)
    rebuilt = _rebuild(action_vae_graph(config), params, normalized)
    lines = {"true": _absolute(normalized, places, loader), "rebuilt": _absolute(rebuilt, places, loader)}
    evidence = _chunk_evidence(lines, places, _shown(VAE_EXAMPLES, SHOWN_CHUNKS), loader)
    ours, still = evidence.errors[-1][1]
    return dataclasses.replace(
        evidence,
        headline=f"error {ours:.3g} {evidence.unit} (holding still: {still:.3g})",
        tiles=[
            (f"{ours:.3g}", f"{evidence.unit}: mean error of rebuilt chunks"),
            (f"{still:.3g}", f"{evidence.unit}: error of holding still"),
        ],
    )


# --- the decoder: future frames and actions --------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("graphdef", "start", "image_tokens"))
def _continue(graphdef, params, tokens, predict, state, positions, *, start, image_tokens):
    """`generate` for rows whose layouts differ (texts are not of one length): one `predict` mask a row."""

    def one(tokens, predict, state, positions):
        return generate(
            graphdef,
            params,
            tokens[None],
            predict,
            start,
            image_tokens=image_tokens,
            state=None if state is None else state[None],
            state_positions=None if positions is None else positions[None],
        )[0]

    return jax.vmap(one)(tokens, predict, state, positions)


@functools.partial(jax.jit, static_argnums=0)
def _act(graphdef, params, tokens, lengths, state, positions):
    return nnx.merge(graphdef, params).action_latent(tokens, lengths, state, positions)


def _vla(directory: Path, config: TrainConfig, loader, params) -> Evidence:
    """Predicted frames, and with actions the predicted chunk at frame 0."""
    config = dataclasses.replace(config, remat="none")
    graphdef = nnx.split(nnx.eval_shape(lambda: STAGES[config.stage].build(config, nnx.Rngs(0))))[0]
    vqgan = _load_vqgan(directory / "assets" / "vqgan", config)
    tokenizer = TextTokenizer(directory / "assets" / "tokenizer.json")
    T, acts = config.sequence.num_frames, config.stage != "video"
    stride = max(source[0].stride for source in loader.sources)
    steps = stride * config.sequence.frame_interval * np.arange(T)
    places = spread(loader.sources, int(steps[-1]) + 1 + (config.data.chunk if acts else 0), VLA_EXAMPLES)
    views = list(loader.sources[0].views)
    if places[0][0].codes:  # a tokenized corpus has no camera frames; what its codes show stands in for them
        codes = {v: np.stack([e.codes[v][(t + steps) // stride].astype(np.int32) for e, t in places]) for v in views}
        frames = {v: _paint_all(vqgan, c) for v, c in codes.items()}
    else:
        frames = {v: np.stack([_frames(e, v, t + steps, config) for e, t in places]) for v in views}
        codes = {v: vqgan.encode(x.reshape(-1, *x.shape[2:])) for v, x in frames.items()}
        codes = {v: c.reshape(len(places), T, *c.shape[1:]) for v, c in codes.items()}
    shown = _shown(VLA_EXAMPLES, SHOWN)
    evidence = Evidence(examples=f"{len(places)} starts, spread over all episodes")
    if acts:
        evidence = _actions(directory, config, loader, graphdef, params, tokenizer, places, codes, shown)
    if T == 1:
        return evidence
    predicted = _predict_frames(steps, config, loader, graphdef, params, tokenizer, places, codes)
    evidence = _frame_evidence(evidence, vqgan, places, frames, codes, predicted, shown, steps[1])
    used = set(np.concatenate([c.reshape(-1) for c in codes.values()]).tolist())
    numbers = [
        *evidence.numbers,
        ("Different codes in these recordings", f"{len(used)} of {tokenizer.vocabulary.num_codes}"),
    ]
    return dataclasses.replace(evidence, numbers=numbers, warnings=_collapse(used, tokenizer.vocabulary.num_codes))


def _predict_frames(steps, config, loader, graphdef, params, tokenizer, places, codes) -> dict[str, np.ndarray]:
    """Codes [N, T, h, w] by view: frame 0 as given, the later ones decoded one token after another, greedily.

    Besides frame 0 the model is given the layout, the instruction and, at each frame's end, the recorded state.
    """
    vocabulary, sequence = tokenizer.vocabulary, config.sequence
    image_tokens, begin = vocabulary.image_tokens, vocabulary.begin_image
    none = [None] * len(places)
    rows = [
        compose(tokenizer.encode(e.text(t)), front, wrist, vocabulary, sequence)
        for (e, t), front, wrist in zip(places, codes["front"], codes.get("wrist", none), strict=True)
    ]
    masks = [code_positions(r.tokens, image_tokens, begin) for r in rows]
    length = max(int(np.flatnonzero(m)[-1]) for m in masks) + 3  # line end and frame end follow the last code
    tokens, predict = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        n = min(length, len(row.tokens))
        tokens[i, :n], predict[i, :n] = row.tokens[:n], mask[:n]
    state = positions = None
    if sequence.use_state:
        state = np.stack([normalize_state(e.state[t + steps], loader.statistics) for e, t in places])
        positions = np.stack([r.state_positions for r in rows])
    start = int(predict.argmax(axis=1).min())
    given = np.where(predict, 0, tokens)  # so that nothing real can leak into what is predicted
    decoded = _continue(graphdef, params, given, predict, state, positions, start=start, image_tokens=image_tokens)
    table, columns = vocabulary.token_to_code(), codes["front"].shape[-1]
    ends = {"front": (begin, vocabulary.end_image), "wrist": (vocabulary.wrist_start, vocabulary.wrist_end)}
    return {v: np.stack([frames_of(row, table, *ends[v], columns) for row in np.asarray(decoded)]) for v in codes}


def _frame_evidence(evidence, vqgan, places, frames, codes, predicted, shown, interval) -> Evidence:
    """Tables camera / VQ / predicted, and how many codes are right."""
    painted = {v: _paint_all(vqgan, c) for v, c in codes.items()}
    dreamt = {v: _paint_all(vqgan, c) for v, c in predicted.items()}
    later = np.s_[:, 1:]
    right = np.mean([(predicted[v][later] == codes[v][later]).mean() for v in codes])
    copied = np.mean([(codes[v][:, :1] == codes[v][later]).mean() for v in codes])
    flat = {v: frames[v][later].reshape(-1, *frames[v].shape[2:]) for v in frames}
    ceiling = np.mean([psnr(flat[v], painted[v][later].reshape(flat[v].shape)) for v in flat])
    quality = np.mean([psnr(flat[v], dreamt[v][later].reshape(flat[v].shape)) for v in flat])
    tables = []
    for number, i in enumerate(shown, 1):
        (episode, start), cells = places[i], [(v, t) for v in frames for t in range(frames[v].shape[1])]
        notes = {(v, t): f"{(predicted[v][i, t] == codes[v][i, t]).mean():.0%} of codes" for v, t in cells}
        tables.append(
            FrameTable(
                f"{number}. “{episode.text(start)}” ({_place(episode, start)})",
                [f"{v}, now" if t == 0 else f"{v}, +{1000 * interval * t / episode.fps:.0f} ms" for v, t in cells],
                [
                    ("camera", [Cell(frames[v][i, t]) for v, t in cells]),
                    ("VQ codes (the ceiling)", [Cell(painted[v][i, t]) for v, t in cells]),
                    ("predicted", [Cell(dreamt[v][i, t], notes[v, t]) if t else Cell(None, "given") for v, t in cells]),
                ],
            )
        )
    numbers = [
        ("Codes of later frames predicted right", f"{right:.1%}"),
        ("the same when frame 0 is repeated", f"{copied:.1%}"),
        ("PSNR of predicted frames", f"{quality:.1f} dB"),
        ("PSNR of the VQ reconstruction, the ceiling", f"{ceiling:.1f} dB"),
    ]
    tiles = [(f"{right:.0%}", "of later frames' codes right"), (f"{copied:.0%}", "when frame 0 is repeated")]
    headline = f"{right:.0%} of codes right (frame 0 repeated: {copied:.0%})"
    return dataclasses.replace(
        evidence,
        headline="; ".join(filter(None, [evidence.headline, headline])),
        tables=tables,
        numbers=numbers,
        tiles=[*evidence.tiles, *tiles],
    )


def _paint_all(vqgan: _Tokenizer, codes: np.ndarray) -> np.ndarray:
    painted = vqgan.paint(codes.reshape(-1, *codes.shape[2:]))
    return painted.reshape(*codes.shape[:2], *painted.shape[1:])


def _actions(directory, config, loader, graphdef, params, tokenizer, places, codes, shown) -> Evidence:
    """The chunk that the model would start at frame 0, against the recorded one."""
    vocabulary, sequence = tokenizer.vocabulary, config.sequence
    wrist = codes.get("wrist")
    prompts = [
        prompt(
            tokenizer.encode(e.text(t)),
            codes["front"][i, 0],
            None if wrist is None else wrist[i, 0],
            vocabulary,
            sequence,
        )
        for i, (e, t) in enumerate(places)
    ]
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    state = np.stack([normalize_state(e.state[t : t + 1], loader.statistics) for e, t in places])
    positions = find_positions(tokens, vocabulary.state, 1)
    latent = _act(graphdef, params, tokens, np.array([len(p) for p in prompts]), state, positions)

    own = directory / "assets" / "action_vae"
    vae_graph = action_vae_graph(
        dataclasses.replace(config, action_vae_model=checkpoint.read_model_config(own, "action_vae"))
    )
    vae_params, _ = checkpoint.load_params(own)
    normalized = _normalized(places, loader)
    lines = {
        "true": _absolute(normalized, places, loader),
        "predicted": _absolute(_unfold(vae_graph, vae_params, latent), places, loader),
        "ActionVAE (the ceiling)": _absolute(_rebuild(vae_graph, vae_params, normalized), places, loader),
    }
    evidence = _chunk_evidence(lines, places, shown[:SHOWN_CHUNKS], loader)
    ours, _, still = evidence.errors[-1][1]
    return dataclasses.replace(
        evidence,
        headline=f"action error {ours:.3g} {evidence.unit} (holding still: {still:.3g})",
        tiles=[
            (f"{ours:.3g}", f"{evidence.unit}: mean action error"),
            (f"{still:.3g}", f"{evidence.unit}: error of holding still"),
        ],
    )
