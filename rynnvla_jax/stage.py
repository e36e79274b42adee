"""The stages of the curriculum: one frozen description each, used by data, training, sweeps and report pages.

A new stage is an entry of `STAGES` and one of `rynnvla_jax.train.stages.OBJECTIVES` (its loss); no other code uses the
name of a stage. The `config` of the methods is a `rynnvla_jax.config.TrainConfig`, which imports this module.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

_MODEL_CONFIGS = {"vla": "vla", "action_vae": "action_vae_model", "vqgan": "vqgan_model"}

BatchSpec = dict[str, tuple[tuple[int, ...], type]]


@dataclass(frozen=True)
class Stage:
    """The inputs and the model of one stage.

    With `tokens` an example is a sequence of text and frames, and frames are encoded by a frozen VQGAN; with `actions`
    it has action chunks, one for each frame of a sequence, else one; with `state` a sequence has states, too. With
    `single_frames` every frame of every camera is an example.
    """

    title: str  # heading on report pages
    learns: str  # what it learns, for readers of report pages
    model: str  # what it trains: "vla", "action_vae" or "vqgan"
    tokens: bool = False
    actions: bool = False
    state: bool = False
    single_frames: bool = False

    def model_config(self, config: Any) -> Any:
        """The config of the model that it trains."""
        return getattr(config, _MODEL_CONFIGS[self.model])

    def frozen(self, config: Any) -> tuple[str, ...]:
        """Names of the frozen models that it uses, equal to their keys in the config."""
        embeds = self.tokens and self.actions and config.vla.actions == "embedding"
        return (*(("vqgan",) if self.tokens else ()), *(("action_vae",) if embeds else ()))

    def views(self, config: Any) -> tuple[str, ...] | None:
        """Cameras whose frames it reads; None: those that a source has."""
        if self.single_frames:
            return None
        return config.sequence.views if self.tokens else ()

    def num_frames(self, config: Any) -> int:
        """Frames of one camera in one example."""
        return config.sequence.num_frames if self.tokens else int(self.single_frames)

    def window(self, config: Any, published: bool) -> tuple[int, int]:
        """(span, after): steps from an example's first frame to its last, and steps that must follow the last.

        With `published` actions are followed by one step more than their chunk has, so that an episode of n steps has
        n - chunk - span starts, as in the public code; this is the rule for episodes that are not in a corpus.
        """
        frames = self.num_frames(config)
        span = (frames - 1) * config.sequence.frame_interval + 1 if frames else 0
        return span, config.data.chunk + published if self.actions else 0

    def long_by(self, config: Any) -> str:
        """The keys that make an example of this stage shorter (`window`), in words."""
        keys = []
        if self.tokens and config.sequence.num_frames > 1:
            keys += ["sequence.num_frames", "sequence.frame_interval"]
        if self.actions:
            keys += ["data.chunk (with an ActionVAE of that chunk)" if self.tokens else "data.chunk"]
        return " or ".join(keys)

    def batch_spec(self, config: Any, frame_size: tuple[int, int] | None = None) -> BatchSpec:
        """{name: (shape, dtype)} of a global batch, as `data_pipelines.loader.Loader` yields it.

        B rows of S tokens; T frames of one camera, those of all packed clips together; chunks of C actions of A
        numbers, normalised like the states. `loss_mask` marks trained tokens, `actions_pad` steps after an episode's
        end; positions are indices into a row's tokens, -1 where absent; `segments` numbers packed clips from 1, 0 is
        padding. Frames are missing where codes were made ahead (`data.frame_codes`). Of a mixture `source` is the
        number of the source that a row is from.

        Args:
          frame_size: (height, width) in pixels after preprocessing; None: squares of data.image.shortest_edge.
        """
        c, B = config, config.batch_size
        T, S = self.num_frames(c) * c.sequence.clips, c.sequence.length
        raw = self.tokens and c.vla.actions == "raw"
        C, A = c.data.chunk, c.vla.raw_width if raw else c.action_vae_model.action_dim
        frame = (*(frame_size or (c.data.image.shortest_edge,) * 2), 3)
        chunks = (B, T, C) if self.tokens else (B, C)
        spec: BatchSpec = {}
        if self.single_frames:
            spec["images"] = ((B, *frame), np.uint8)
        if self.tokens:
            spec |= {"tokens": ((B, S), np.int32), "loss_mask": ((B, S), np.bool_)}
            if c.sequence.clips > 1:
                spec |= {name: ((B, S), np.int32) for name in ("positions", "segments")}
            if c.data.frame_codes == "step":
                spec |= {view: ((B, T, *frame), np.uint8) for view in self.views(c) or ()}
        if self.state and c.vla.state_dim:
            spec["state"] = ((B, T, c.vla.state_dim), np.float32)
        if self.actions:
            spec |= {"actions": ((*chunks, A), np.float32), "actions_pad": (chunks, np.bool_)}
        if self.state:
            spec |= {name: ((B, T), np.int32) for name in ("state_positions", "action_positions")}
        if len(c.data.mixture) > 1:
            spec["source"] = ((B,), np.int32)
        return spec


def start_counts(lengths: np.ndarray | int, span: int, after: int, stride: int = 1) -> np.ndarray:
    """int64, like `lengths`: the number of examples in episodes of these lengths that start at every `stride`-th step.

    An example covers `span` steps and needs `after` further steps (`Stage.window`).
    """
    return np.maximum((np.asarray(lengths, np.int64) - span - after) // stride + 1, 0)


STAGES = {  # in the order of the curriculum
    "vqgan": Stage(
        title="Image tokenizer (VQGAN)",
        learns="Learns to encode a camera frame as a small grid of discrete codes and to reconstruct the frame from "
        "them. All later stages read and predict frames as these codes.",
        model="vqgan",
        single_frames=True,
    ),
    "action_vae": Stage(
        title="Action tokenizer (ActionVAE)",
        learns="Learns to encode a chunk of actions as one small embedding and to decode it again. "
        "A policy then predicts this embedding instead of many numbers.",
        model="action_vae",
        actions=True,
    ),
    "video": Stage(
        title="Stage 1: video",
        learns="Learns to continue a video: from the first frame and an instruction it predicts the later frames' "
        "codes.",
        model="vla",
        tokens=True,
    ),
    "trajectory": Stage(
        title="Stage 2: human trajectories",
        learns="Learns to predict frames and the motion of human wrists together, from a frame, an instruction and "
        "the positions of the wrists.",
        model="vla",
        tokens=True,
        actions=True,
        state=True,
    ),
    "robot": Stage(
        title="Stage 3: robot",
        learns="Learns to predict frames and the robot's actions together, from its camera frames, "
        "an instruction and the joint state.",
        model="vla",
        tokens=True,
        actions=True,
        state=True,
    ),
}
