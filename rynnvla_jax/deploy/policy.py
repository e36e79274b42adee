"""The policy a robot runs: camera frames, joint state and an instruction in, absolute joint targets out.

PyTorch and numpy only. One forward pass per chunk: the model reads the prompt, its action head predicts the
ActionVAE embedding, the ActionVAE decodes it, and the statistics turn it into joint targets.

Differs from the public inference code on purpose: no next token is sampled, so the result does not depend on
that token being `<action>`, and a failure is a `PolicyError`, never the all-zeros chunk that un-normalises
to a real motion; the mean of the embedding is decoded, and it is sampled only on request.

Source: RynnVLA-001 (arXiv 2509.15212), section 3.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from rynnvla_jax import actions, images, sequence
from rynnvla_jax.actions import Statistics
from rynnvla_jax.columns import Columns, describe
from rynnvla_jax.config import ActionVAEConfig, ConfigError, VQGANConfig
from rynnvla_jax.deploy import export_format, memory
from rynnvla_jax.deploy.export_format import ExportConfig, ExportError, PolicyError
from rynnvla_jax.deploy.observation import NO_VIEWS, Observation, check_columns, check_views, checked_state
from rynnvla_jax.deploy.torch_action_vae import ENCODER_KEYS, ActionVAE
from rynnvla_jax.deploy.torch_transformer import VLA
from rynnvla_jax.deploy.torch_vqgan import DECODER_KEYS, VQGAN
from rynnvla_jax.deploy.torch_weights import load_module
from rynnvla_jax.errors import shorten
from rynnvla_jax.vocabulary import TextTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A state this many deviations of the training data from their mean is refused. Joints move between stops: states of
# the demo data lie within 3.1. A broken encoder or a larger unit lies outside; a smaller unit (radians for degrees)
# does not, which only the unit's name tells.
STATE_DEVIATIONS = 8.0
# A joint that hardly moved in the data still has play: its deviation counts as this share of the widest joint's.
LEAST_SPREAD = 0.1


class ModelInput(NamedTuple):
    """The inputs of the model, prepared from one observation."""

    prompt: np.ndarray  # int32[P], everything before `<action>`
    state: np.ndarray  # float32[state_dim], normalised
    raw_state: np.ndarray  # float32[state_dim], in the policy's unit
    codes: dict[str, np.ndarray]  # by view int32[h, w]


class Policy:
    """See the module docstring. `Policy.load` is the usual way in; the constructor takes the parts.

    Not thread-safe: one call at a time.
    """

    def __init__(
        self,
        config: ExportConfig,
        *,
        vla: VLA,
        vqgan: VQGAN,
        action_vae: ActionVAE | None,
        tokenizer: TextTokenizer,
        statistics: Statistics,
    ):
        """`action_vae` is None for a model that predicts raw actions.

        Raises ExportError if the parts do not fit together, before anything runs.
        """
        self.config = config
        self.vla, self.action_vae = vla.eval(), action_vae and action_vae.eval()
        self.vqgan = cast(Any, vqgan.eval()).to(
            memory_format=torch.channels_last
        )  # as frames lie: half the time on a CPU
        self.tokenizer, self.statistics = tokenizer, statistics
        self.device = vla.lm_head.weight.device
        self.state_range = state_range(statistics)
        self.recording = config.recording
        _check_parts(config, vqgan.config, action_vae.config if action_vae else None, tokenizer, statistics)

    @classmethod
    def load(
        cls,
        export_dir: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        keep_memory: bool = False,
    ) -> "Policy":
        """Reads an export: a folder, gs://BUCKET/FOLDER, or hf://USER/NAME[@REV].

        `dtype` is the transformer's, one of DTYPES; the VQGAN and the ActionVAE stay float32, since codes flip and
        joints shift for little saving. `compiled` runs transformer and VQ encoder through torch.compile: the first
        calls take a minute or more, and the machine needs a C++ compiler (on a GPU, Triton). `keep_memory` lets the
        whole process keep the memory that it frees (`memory.keep`): answers on a CPU then take less time.

        Raises:
          ExportError: a missing file or key, weights that do not fit, parts that do not fit together.
          PolicyError: PyTorch cannot use `device`.
          HubError, BucketError, CacheError: an export that cannot be copied to this machine.
        """
        try:  # before gigabytes are read
            torch.zeros(1, device=device)
        except Exception as error:  # its type depends on how PyTorch was built
            raise PolicyError(
                f"PyTorch cannot use device {str(device)!r} ({shorten(error)}); choose cpu, or install a driver and a "
                "PyTorch for it"
            ) from error
        if keep_memory and torch.device(device).type == "cpu":
            memory.keep()
        folder = export_format.local(export_dir)
        if not os.path.isdir(folder):  # without an error where it may not be looked at
            raise ExportError(f"{folder} is not a folder; give the folder that was exported")
        export_format.check_sums(folder)
        config = export_format.read_config(folder)
        vqgan_config = export_format.read_model_config(folder / export_format.VQGAN, VQGANConfig)
        vae_folder, vae_config = folder / export_format.ACTION_VAE, None
        if config.vla.actions == "embedding":
            vae_config = export_format.read_model_config(vae_folder, ActionVAEConfig)
        tokenizer = _read(TextTokenizer, folder / export_format.TOKENIZER)
        statistics = _read(Statistics.from_json, folder / export_format.STATISTICS)
        _check_parts(config, vqgan_config, vae_config, tokenizer, statistics)  # before gigabytes are read
        policy = cls(
            config,
            vla=load_module(lambda: VLA(config.vla), folder, device, dtype, ignored=("model.vqmodel.",)),
            vqgan=load_module(
                lambda: VQGAN(vqgan_config, with_decoder=False),
                folder / export_format.VQGAN,
                device,
                ignored=DECODER_KEYS,
            ),
            action_vae=load_module(
                partial(ActionVAE, vae_config, with_encoder=False), vae_folder, device, ignored=ENCODER_KEYS
            )
            if vae_config
            else None,
            tokenizer=tokenizer,
            statistics=statistics,
        )
        if compiled:
            policy.vla.model.compile(dynamic=True)  # one program for prompts of any length
            policy.vqgan.encoder.compile()
        return policy

    def act(
        self,
        front: np.ndarray,
        wrist: np.ndarray | None,
        state: np.ndarray | None,
        instruction: str,
        columns: Columns | None = None,
        extra_views: Mapping[str, np.ndarray] = NO_VIEWS,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """Joint targets for the next C steps: absolute float32[C, A], as the policy's `statistics.columns` say.

        Args:
          front, wrist: uint8[H, W, 3] RGB of any size; wrist is None for a policy without a wrist camera.
          state: float[state_dim], the joints now, raw, within `state_range`; None for a policy without a state.
          instruction: the task, worded as in training.
          extra_views: frames of further cameras, by the names of `config.sequence.extra_views`.
          columns: what the robot's state and targets mean; given, it must be what the policy learnt. None: not checked.
          generator: CPU generator; given, the embedding is sampled instead of its mean taken.

        Raises:
          PolicyError: an input cannot be used, a number is not finite, or anything else failed. There is no motion.
        """
        return self.act_batch([Observation(front, wrist, state, instruction, columns, extra_views)], generator)[0]

    def act_batch(self, observations: Sequence[Observation], generator: torch.Generator | None = None) -> np.ndarray:
        """`act` for B observations at once: float32[B, C, A].

        The frames of a camera, which must have one size, form one VQ batch (not on a CPU); prompts of equal length
        share one forward pass.

        Raises:
          PolicyError: as `act`; a single invalid observation, which the message names, fails all.
        """
        try:
            inputs = self.observe(observations)
            noise = None
            if generator is not None:
                if self.action_vae is None:
                    raise PolicyError(
                        "this policy predicts raw actions, which cannot be sampled; call it without a generator"
                    )
                # On the CPU, where a seed gives the same numbers whatever the policy's device is.
                noise = torch.randn(len(inputs), self.action_vae.config.latent, generator=generator)
            return self.decode(self.latent(inputs), np.stack([i.raw_state for i in inputs]), noise)
        except PolicyError:
            raise
        except ConfigError as error:
            raise PolicyError(str(error)) from error
        except Exception as error:  # whatever it was: a robot's loop has one type to stop for
            raise PolicyError(
                f"the policy failed ({type(error).__name__}: {error}); no motion was produced. Run "
                "`rynnvla deploy check` on this machine"
            ) from error

    def observe(self, observations: Sequence[Observation]) -> list[ModelInput]:
        """Checks and prepares observations. Raises PolicyError."""
        if not observations:
            raise PolicyError("there is no observation; give at least one")
        raw, texts = [], []
        for i, observation in enumerate(observations):
            try:
                self._check(observation)
                raw.append(self._checked_state(observation.state, observation.columns))
                texts.append(self.tokenizer.encode(observation.instruction))
                self._check_length(observation, len(texts[-1]))
            except ValueError as error:
                where = f"observation {i} of {len(observations)}: " if len(observations) > 1 else ""
                raise PolicyError(f"{where}{error}") from error
        vocabulary, layout = self.tokenizer.vocabulary, self.config.sequence
        encoded = {view: self._codes(view, [o.frames[view] for o in observations]) for view in layout.views}
        inputs = []
        for i, (text, state) in enumerate(zip(texts, raw, strict=True)):
            codes = {view: own[i] for view, own in encoded.items()}
            prompt = sequence.prompt(text, codes, vocabulary, layout)
            normalised = np.asarray(actions.normalize_state(state, self.statistics), np.float32)
            inputs.append(ModelInput(prompt, normalised, state, codes))
        return inputs

    def latent(self, inputs: Sequence[ModelInput]) -> np.ndarray:
        """What the action head says, float32[B, outputs], in one forward pass a prompt length.

        ActionVAE embeddings, mean then log-variance, or raw normalised chunks.
        """
        lengths = np.array([len(i.prompt) for i in inputs])
        latents = np.empty((len(inputs), self.config.vla.action_outputs), np.float32)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length).tolist()
            tokens = torch.from_numpy(np.stack([inputs[r].prompt for r in rows]).astype(np.int64))
            state = torch.from_numpy(np.stack([inputs[r].state for r in rows]))
            latents[rows] = self.vla.action_latent(tokens.to(self.device), state.to(self.device)).cpu().numpy()
        return latents

    @torch.inference_mode()
    def decode(self, latents: np.ndarray, raw_states: np.ndarray, noise: torch.Tensor | None = None) -> np.ndarray:
        """What `latent` gives -> absolute float32[B, C, A]; of embeddings the mean, or with standard normal `noise`
        [B, latent] a sample.

        Raises:
          PolicyError: a number is not finite.
        """
        if not np.isfinite(latents).all():
            raise PolicyError("the model's action embedding is not finite; check the weights, or load them in float32")
        if self.action_vae is None:
            chunks = latents.reshape(len(latents), self.config.chunk, self.config.action_dim)
        else:
            mean, log_var = torch.from_numpy(latents).chunk(2, -1)
            chosen = mean if noise is None else mean + (log_var / 2).exp() * noise
            chunks = self.action_vae.decode(chosen.to(self.device))[0].float().cpu().numpy()
        mode = self.config.normalization
        targets = np.stack(
            [
                actions.decode_chunk(chunk, state, self.statistics, mode)
                for chunk, state in zip(chunks, raw_states, strict=True)
            ]
        )
        if not np.isfinite(targets).all():
            raise PolicyError("the decoded actions are not finite; check statistics.json and the ActionVAE's weights")
        return targets

    def example(self, frame: tuple[int, int] | None = None) -> Observation:
        """A synthetic observation that this policy can answer, for warming up and for checks.

        `frame`: (height, width) of the cameras, for whose shape a compiled encoder then is ready; None: as recorded,
        or a small square where that is not known.
        """
        height, width = frame or (*self.recording.frames, (self.config.image.shortest_edge,) * 2)[0]
        across, down = (np.linspace(0, 255, edge, dtype=np.uint8) for edge in (width, height))
        front = np.stack(np.broadcast_arrays(across, down[:, None], np.uint8(128)), -1)
        layout = self.config.sequence
        wrist = front[::-1].copy() if layout.use_wrist_frame else None
        extra = {view: front[:, ::-1].copy() for view in layout.extra_views}
        state = np.asarray(self.statistics.mean_state, np.float32) if self.config.vla.state_dim else None
        return Observation(front, wrist, state, "pick up the block", self.statistics.columns, extra)

    def _check(self, observation: Observation) -> None:
        """Raises PolicyError for an empty instruction and for frames that are missing, superfluous or not RGB."""
        text = observation.instruction
        if not isinstance(text, str) or not text.strip():
            raise PolicyError(f"instruction is {text!r}; describe the task, worded as in the training data")
        check_views(self.config.sequence.views, observation.frames)
        for camera, image in observation.frames.items():
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
                got = getattr(image, "dtype", type(image).__name__)
                raise PolicyError(f"{camera} image is {got}, expected a numpy array of uint8 (RGB, 0..255)")
            if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
                raise PolicyError(f"{camera} image has shape {image.shape}, expected (height, width, 3)")
            if fault := self.recording.frame_fault(camera, *image.shape[:2]):
                raise PolicyError(fault)

    def _check_length(self, observation: Observation, text: int) -> None:
        """Raises PolicyError where frames of these shapes have no tokens, or all are more than it was trained on."""
        layout, frames = self.config.sequence, observation.frames
        needed = layout.repeat_lang_tokens * text + 2  # state and <action>
        for camera, image in frames.items():
            try:
                size = images.frame_size(image.shape[0], image.shape[1], self.config.image)
                height, width = (edge // sequence.PATCH * sequence.PATCH for edge in size)  # of the codes
                needed += sequence.frame_length(height, width)
                for edge in (height, width):
                    self.tokenizer.vocabulary.grid_token(edge // images.BLOCK)
            except ConfigError as error:
                raise PolicyError(f"{camera} image has shape {image.shape}: {error}") from error
        if needed > (most := layout.length // layout.clips):
            shapes = " and ".join(f"{camera} {image.shape}" for camera, image in frames.items())
            raise PolicyError(
                f"the instruction's {text} tokens and the images ({shapes}) make {needed} tokens, but the policy was "
                f"trained on {most}; shorten the instruction or send frames as in training"
            )

    def _checked_state(self, state: np.ndarray | None, columns: Columns | None) -> np.ndarray:
        check_columns(self.statistics.columns, columns)
        raw = checked_state(state, self.statistics.columns.state)
        low, high = self.state_range
        if outside := np.flatnonzero((raw < low) | (raw > high)).tolist():
            ranges = ", ".join(f"{raw[i]:.4g} at index {i} (range {low[i]:.4g}..{high[i]:.4g})" for i in outside)
            raise PolicyError(
                f"state is out of the training data's range: {ranges}; the policy's state is "
                f"{describe(self.statistics.columns.state)}; check the unit, the calibration and the order of the "
                "columns, or move the robot near the recorded poses"
            )
        return raw

    def _codes(self, camera: str, frames: Sequence[np.ndarray]) -> np.ndarray:
        """B frames uint8[H, W, 3] -> VQ codes int32[B, h, w]."""
        pixels = [images.normalize(images.preprocess(frame, self.config.image)) for frame in frames]
        if len(shapes := {p.shape for p in pixels}) > 1:
            raise PolicyError(
                f"{camera} images of one batch become {sorted(shapes)}; send images of one size per batch"
            )
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(self.device)
        # A CPU is faster with one frame at a time: its caches hold the activations.
        parts = batch.split(1 if self.device.type == "cpu" else len(batch))
        return torch.cat([self.vqgan.codes(part) for part in parts]).cpu().numpy().astype(np.int32)


def state_range(statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest raw state [S] that a policy accepts: STATE_DEVIATIONS around the training data's mean.

    The statistics hold no smallest and largest state; see LEAST_SPREAD for joints that hardly moved.
    """
    spread = np.maximum(statistics.std_state, LEAST_SPREAD * np.max(statistics.std_state, initial=0.0))
    return statistics.mean_state - STATE_DEVIATIONS * spread, statistics.mean_state + STATE_DEVIATIONS * spread


def _read(read: Callable[[Path], Any], path: Path) -> Any:
    """Reads one of the export's files with a leaf's own reader, whose message already names the fault."""
    if not path.exists():
        raise ExportError(f"{path} is missing; export the model again or copy the whole folder")
    try:
        return read(path)
    except PolicyError:
        raise
    except Exception as error:  # a tokenizer library raises bare Exception on a broken file
        raise ExportError(f"{path}: {error}; export the model again") from error


def _check_parts(
    config: ExportConfig,
    vqgan: VQGANConfig,
    vae: ActionVAEConfig | None,
    tokenizer: TextTokenizer,
    statistics: Statistics,
) -> None:
    if not config.sequence.use_state:
        raise ExportError(
            "sequence.use_state of config.json is false: a model of stage 1 predicts no actions; export a "
            "model of stage 2 or 3"
        )
    vocabulary = tokenizer.vocabulary
    outputs, raw = config.vla.action_outputs, config.chunk * config.action_dim
    head: tuple[tuple[str, int, int], ...] = (
        ("action_latent_dim of config.json and chunk times action_dim", outputs, raw),
    )
    if vae is not None:
        head = (
            ("chunk of config.json and of action_vae/config.json", config.chunk, vae.chunk),
            ("action_dim of config.json and of action_vae/config.json", config.action_dim, vae.action_dim),
            (
                "action_latent_dim of config.json and twice latent of action_vae/config.json",
                outputs,
                2 * vae.latent,
            ),
        )
    pairs = (
        *head,
        (
            "state_dim of config.json and width of mean_state in statistics.json",
            config.vla.state_dim,
            len(statistics.mean_state),
        ),
        (
            "action_dim of config.json and width of rel_mean_action in statistics.json",
            config.action_dim,
            len(statistics.rel_mean_action),
        ),
        (
            "vocab_size of config.json and of tokenizer.json with RynnVLA's four tokens",
            config.vla.transformer.vocab_size,
            vocabulary.size,
        ),
        (
            "num_codes of vqgan/config.json and image codes of tokenizer.json",
            vqgan.num_codes,
            len(vocabulary.code_to_token),
        ),
        ("downsampling of vqgan/config.json and the 16 pixels a code has", vqgan.downsampling, 16),
    )
    for what, left, right in pairs:
        if left != right:
            raise ExportError(f"{what} differ ({left!r} and {right!r}); export the model again with its own assets")
