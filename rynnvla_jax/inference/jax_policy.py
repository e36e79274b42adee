"""A trained policy on JAX devices: one observation to a chunk of joint targets, in one compiled call.

Robots use `deploy.policy.Policy` (PyTorch); this is its counterpart for evaluation of work dirs.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from rynnvla_jax import sequence
from rynnvla_jax.actions import Statistics, decode_chunk, normalize_state
from rynnvla_jax.checkpoint import model_dir, provenance
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import TrainConfig
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import NO_VIEWS, Observation, check_columns, check_views, checked_state
from rynnvla_jax.images import preprocess
from rynnvla_jax.models.frozen import Frozen, frames_to_tokens, predicted_actions
from rynnvla_jax.models.vla import build_vla
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.vocabulary import TextTokenizer

PROMPT_MULTIPLE = 64  # prompts are padded to a multiple, so that few lengths are compiled


class JaxPolicy:
    """Loads the work dir of stage `trajectory` or `robot`."""

    def __init__(self, workdir: str | Path, step: int = -1, weights: str = "raw"):
        """`weights`: "raw", or "ema", their average.

        Raises:
          CheckpointError: `workdir` is not a finished or running work dir of a VLA, or keeps no average.
        """
        assets = files.place(workdir) / "assets"
        model_dir.read_model_config(workdir, "vla")
        config = model_dir.read_train_config(workdir)
        self.config = dataclasses.replace(config, compute_dtype="float32", remat="none")
        self.tokenizer = TextTokenizer(assets / "tokenizer.json")
        self.statistics = Statistics.from_json(assets / "statistics.json")
        self.recording = provenance.recording(files.place(workdir))
        self.params, _ = model_dir.load_params(workdir, step=step, weights=weights)
        directories = {name: assets / name for name in STAGES[config.stage].frozen(config)}
        self.frozen = model_dir.load_frozen(directories, self.tokenizer.vocabulary)
        self._decode = jax.jit(functools.partial(_observation_to_chunk, self.config))

    def act(
        self,
        front: np.ndarray,
        wrist: np.ndarray | None,
        state: np.ndarray | None,
        instruction: str,
        columns: Columns | None = None,
        extra_views: Mapping[str, np.ndarray] = NO_VIEWS,
    ) -> np.ndarray:
        """uint8 [H,W,3] frames, raw state [N], instruction -> absolute targets float32 [C, A] as the data's.

        `wrist` and `state` are None for a policy without; `extra_views` are frames of further cameras by name of
        data.extra_views; `columns`, where given, must be the data's (PolicyError).
        """
        check_columns(self.statistics.columns, columns)
        raw = checked_state(state, self.statistics.columns.state)
        vocabulary, config = self.tokenizer.vocabulary, self.config
        given, views = Observation(front, wrist, state, instruction, columns, extra_views).frames, config.sequence.views
        check_views(views, given)
        for camera, frame in given.items():
            if fault := self.recording.frame_fault(camera, *frame.shape[:2]):
                raise PolicyError(fault)
        frames = {view: preprocess(given[view], config.data.image)[None, None] for view in views}
        height, width = frames["front"].shape[2:4]
        placeholders = sequence.code_placeholders(views, 1, height // sequence.PATCH, width // sequence.PATCH)
        text = self.tokenizer.encode(instruction)
        prompt = sequence.prompt(text, {v: p[0] for v, p in placeholders.items()}, vocabulary, config.sequence)
        batch = {
            "tokens": np.pad(prompt, (0, -len(prompt) % PROMPT_MULTIPLE))[None],
            "lengths": np.array([len(prompt)], np.int32),
            **({"state": normalize_state(raw, self.statistics)[None, None]} if len(raw) else {}),
            "state_positions": sequence.find_positions(prompt[None], vocabulary.state, 1),
            **frames,
        }
        chunk = np.asarray(self._decode(self.params, self.frozen, batch))[0]
        return decode_chunk(chunk, raw, self.statistics, config.data.normalization)


def _observation_to_chunk(config: TrainConfig, params, frozen: Frozen, batch) -> jax.Array:
    """Frames to codes, one forward pass, the actions it predicts: normalised relative actions [1, C, A]."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build_vla(config, nnx.Rngs(0))))
    batch = frames_to_tokens(batch, frozen, config)
    model: Any = nnx.merge(graphdef, params)
    latent = model.action_latent(batch["tokens"], batch["lengths"], batch.get("state"), batch["state_positions"])
    return predicted_actions(latent, frozen, config)
