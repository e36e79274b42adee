"""One commit for each name on the Hugging Face Hub, for as long as a run lives.

A name without a commit (hf://USER/NAME, hf://USER/NAME@main) means another one whenever somebody pushes. Process 0 asks
once, at the first start; `assets/run.json` keeps the answer, and a continued run reads the same files.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rynnvla_jax.checkpoint import provenance
from rynnvla_jax.config import TrainConfig
from rynnvla_jax.distributed import multihost
from rynnvla_jax.storage import hub

Commits = dict[str, str]  # hf://KIND/USER/NAME[@REV] -> commit


def pin(config: TrainConfig, workdir: Path) -> tuple[TrainConfig, Commits]:
    """The config with a commit in all of its names, and the commits of those that had none. A collective call.

    Raises HubError, PeerError.
    """
    wanted: list[hub.Name] = []

    def note(text: str, kind: str) -> str:
        if not (name := hub.parse(text)).pinned:
            wanted.append(name.of(kind))
        return text

    _renamed(config, note)
    if not wanted:
        return config, {}

    def ask() -> str:
        known = provenance.commits(workdir)
        return json.dumps({text: known.get(text) or hub.commit(text) for text in map(str, wanted)})

    commits: Commits = json.loads(multihost.told(ask))
    for text, commit in commits.items():
        multihost.say(f"{text} is read at commit {commit}, also when this run is continued")

    def pinned(text: str, kind: str) -> str:
        name = hub.parse(text)
        return text if name.pinned else hub.at(text, commits[str(name.of(kind))])

    return _renamed(config, pinned), commits


def _renamed(config: TrainConfig, change: Any) -> TrainConfig:
    """The config with `change(text, kind)` of every name on the Hub in it."""

    def source(text: str) -> str:
        kind, _, path = text.partition(":")
        return f"{kind}:{change(path, 'dataset')}" if hub.is_name(path) else text

    def model(text: str) -> str:
        return change(text, "model") if hub.is_name(text) else text

    data = dataclasses.replace(
        config.data,
        source=source(config.data.source),
        mixture=tuple((source(text), weight) for text, weight in config.data.mixture),
    )
    evaluation = dataclasses.replace(config.evaluation, sources=tuple(map(source, config.evaluation.sources)))
    init_from = dataclasses.replace(config.init_from, path=model(config.init_from.path))
    return dataclasses.replace(
        config,
        data=data,
        evaluation=evaluation,
        init_from=init_from,
        tokenizer=model(config.tokenizer),
        vqgan=model(config.vqgan),
        action_vae=model(config.action_vae),
    )
