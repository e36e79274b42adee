"""`rynnvla data inspect`: what a data set holds, what its columns are taken for, and the commands that train on it."""

import json
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from rynnvla_jax.cli.data_source import data_config, parse_with_data
from rynnvla_jax.config import EXTRA_VIEWS, ConfigError, TrainConfig

_TEXT = 64  # tokens of an instruction, where the tokenizer is not known; the data sets seen so far have fewer
_LENGTHS = 256  # a proposed sequence length is a multiple of it
# Stage, its config, its work dir, and what else its command needs.
_STAGES = {
    "action_vae": ("configs/action_vae.py:full", "vae", ()),
    "robot": ("configs/robot.py:7b", "policy", ("--config.action_vae=vae", "--config.init_from.path=MODEL")),
    "trajectory": ("configs/trajectory.py:7b", "hands", ("--config.action_vae=vae", "--config.init_from.path=MODEL")),
    "video": ("configs/video.py:7b", "video", ("--config.init_from.path=MODEL",)),
}


@dataclass(frozen=True)
class Inspect:
    """Prints what a folder is, what its columns are taken for and why, and the commands that check it and train on it.

    The format is recognized by the files. Features, cameras, rates and lengths are listed; what the guess of a column's
    meaning leaves open is marked with a question mark. The commands name every key that this data set needs; MODEL is
    an imported model or an earlier stage.

      rynnvla data inspect DATA
      rynnvla data inspect DATA --config.data.columns.unit=degrees
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Data set as KIND:PATH, or only PATH when its files show the kind."""
    size: str = "7b"
    """Size of the models in the commands: tiny, 1b, 7b or 34b."""
    json: bool = False
    """Print JSON: what was found, and the keys of each stage."""


def main(argv: list[str]) -> int:
    """`rynnvla data inspect`. Returns the exit status."""
    arguments, config = parse_with_data(Inspect, "rynnvla data inspect", argv)
    given = [word for word in argv if word.startswith("--config.data.")]
    from data_pipelines.columns import questions, suspicions
    from data_pipelines.episode import DataError
    from data_pipelines.inspect import features, summary
    from data_pipelines.sources import open_source
    from data_pipelines.sources.recognize import source_of

    progress = not arguments.json
    source = source_of(arguments.source)
    found = features.find(source, config, progress)
    keys = [*(f"--config.data.{k}={v}" for k, v in found.keys.items()), *given]  # what was given comes last and wins
    room = max((len(name) for name, _, _ in found.rows), default=0)
    lines = [f"{source}: {found.what}"]
    lines += [f"  {name:<{room}}  {kind:<22} {names}".rstrip() for name, kind, names in found.rows]
    try:
        episodes = open_source(source, data_config(keys), None, progress=progress)
    except (ConfigError, DataError):
        print("\n".join(lines), file=sys.stderr)  # what there is to choose from, before the remedy
        raise
    check = _command(["rynnvla", "data", "validate", source], keys)
    keys = [f"--config.data.source={source}", *keys]
    stages = {stage: _keys(stage, arguments.size, keys, episodes) for stage in _wanted(source, episodes)}
    asked = [*questions(episodes.columns, episodes.corpus is not None), *suspicions(episodes)]
    if arguments.json:
        about = {"source": source, "format": found.what, "features": found.rows, "keys": found.keys}
        about["unused_cameras"] = found.cameras
        columns = {"columns": episodes.columns.to_json(), "questions": asked}
        print(json.dumps({**about, **columns, "stages": {s: k for s, (k, _) in stages.items()}}))
        return 0
    steps = int(episodes.lengths.sum())
    rates = summary.rates(episodes.rates) if episodes.rates else "rate not known"
    lines += [
        f"  {len(episodes):,} episodes of {episodes.lengths.min():,} to {episodes.lengths.max():,} steps, "
        f"{steps:,} in all, {summary.duration(episodes.seconds)}, {rates}",
        f"  views {', '.join(episodes.views) or 'none'}"
        + "".join(f"; {width} x {height} pixels ({where})" for (height, width), where in episodes.frame_sizes.items()),
    ]
    if found.cameras:
        names = tuple(camera.removeprefix("observation.images.") for camera in found.cameras)
        some = (*config.extra_views, *names)[:EXTRA_VIEWS]
        lines.append(f'  not used: {", ".join(names)}; to use such cameras, set --config.data.extra_views="{some}"')
    if episodes.columns.action or episodes.columns.state:
        lines += ["", *summary.meaning(episodes.columns), *(f"  ? {question}" for question in asked)]
    lines += ["", "every fault", check]
    for stage, (own, notes) in stages.items():
        config_name, workdir, more = _STAGES[stage]
        words = ["rynnvla", "train", "--config", _sized(config_name, arguments.size), "--workdir", workdir]
        lines += ["", f"stage {stage}", *(f"  ? {note}" for note in notes), _command(words, [*own, *more])]
    print("\n".join(lines))
    return 0


def _command(words: list[str], options: list[str]) -> str:
    """Ready to paste, each option on a line of its own."""
    return "  " + " \\\n    ".join([shlex.join(words), *map(shlex.quote, options)])


def _wanted(source: str, episodes: Any) -> list[str]:
    """The stages that can train on these episodes."""
    frames, acts = bool(episodes.views), bool(episodes.columns.action)
    last = "trajectory" if source.startswith("egodex:") else "robot"
    return [*(["action_vae"] if acts else []), *([last] if acts and frames else []), *(["video"] if frames else [])]


def _sized(config: str, size: str) -> str:
    if config.endswith(":full"):
        return config if size != "tiny" else config.replace(":full", ":tiny")
    return f"{config.partition(':')[0]}:{size}"


def _keys(stage: str, size: str, keys: list[str], episodes: Any) -> tuple[list[str], list[str]]:
    """(overrides, what else stands in the way) of a stage."""
    from data_pipelines import checks
    from data_pipelines.episode import DataError
    from rynnvla_jax import config_file
    from rynnvla_jax.sequence import frame_length, sequence_length
    from rynnvla_jax.stage import STAGES, start_counts

    name = _sized(_STAGES[stage][0], size)

    def built(extra: list[str]) -> TrainConfig:
        return config_file.load(name, [*keys, *extra]).build()

    own: list[str] = []
    default = built([])
    about = STAGES[stage]
    if about.model == "action_vae" and episodes.action_width != default.action_vae_model.action_dim:
        own.append(f"--config.action_vae_model.action_dim={episodes.action_width}")
    if about.state and episodes.state_width != default.vla.state_dim:
        own.append(f"--config.vla.state_dim={episodes.state_width}")
    if about.tokens and default.sequence.use_wrist_frame and "wrist" not in episodes.views:
        own.append("--config.sequence.use_wrist_frame=False")
    notes: list[str] = []
    config = built(own)
    if about.num_frames(config):
        try:
            checks.common_size([episodes], config)
        except (DataError, ConfigError):
            own.append("--config.data.image.fit=square")
            config = built(own)
        try:
            size_in_pixels = checks.common_size([episodes], config)
        except (DataError, ConfigError) as error:
            notes.append(str(error))
            size_in_pixels = None
        if size_in_pixels and about.tokens:
            needed = config.sequence.clips * sequence_length(_TEXT, frame_length(*size_in_pixels), config.sequence)
            if needed > config.sequence.length:
                own.append(f"--config.sequence.length={-(-needed // _LENGTHS) * _LENGTHS}")
                config = built(own)
    span, after = about.window(config, published=True)
    starts = start_counts(episodes.lengths, span, after)
    if short := int((starts == 0).sum()):
        notes.append(
            f"{short} of {len(episodes)} episodes are shorter than the {span + after} steps that an example needs; "
            f"record longer ones, or reduce {about.long_by(config)}"
        )
    return [*keys, *own], notes
