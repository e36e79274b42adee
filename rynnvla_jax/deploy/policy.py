"""The policy a robot runs: camera frames, joint state and an instruction in, absolute joint targets out.

PyTorch and numpy only. One forward pass a chunk: the model reads the prompt, its action head gives the
ActionVAE embedding, the ActionVAE decodes it, the statistics turn it into joint targets.

Departs from the public inference code on purpose: no next token is sampled, so nothing hangs on that
token being `<action>`, and a failure is a `PolicyError`, never the all-zeros chunk that un-normalises
to a real motion; the embedding's mean is decoded, it is sampled only on request.

Source: RynnVLA-001 (arXiv 2509.15212), section 3.
"""

import argparse
import json
import statistics as stats_of
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rynnvla_jax import actions, images, sequence
from rynnvla_jax.actions import Statistics
from rynnvla_jax.config import ActionVAEConfig, VQGANConfig
from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.export_format import ExportConfig, ExportError, PolicyError
from rynnvla_jax.deploy.torch_action_vae import ENCODER_KEYS, ActionVAE
from rynnvla_jax.deploy.torch_transformer import VLA
from rynnvla_jax.deploy.torch_vqgan import DECODER_KEYS, VQGAN
from rynnvla_jax.deploy.torch_weights import load_module
from rynnvla_jax.vocabulary import TextTokenizer


class Observation(NamedTuple):
    """What the model reads, made from one call's inputs."""

    prompt: np.ndarray  # int32[P], everything before `<action>`
    state: np.ndarray  # float32[state_dim], normalised
    raw_state: np.ndarray  # float32[state_dim], in the policy's unit
    front_codes: np.ndarray  # int32[h, w]
    wrist_codes: np.ndarray | None


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
        action_vae: ActionVAE,
        tokenizer: TextTokenizer,
        statistics: Statistics,
    ):
        """Raises ExportError where the parts do not fit together, before anything runs."""
        self.config = config
        self.vla, self.vqgan, self.action_vae = vla.eval(), vqgan.eval(), action_vae.eval()
        self.tokenizer, self.statistics = tokenizer, statistics
        self.device = vla.lm_head.weight.device
        _check_parts(config, vqgan.config, action_vae.config, tokenizer, statistics)

    @classmethod
    def load(
        cls, export_dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "Policy":
        """Reads an export folder.

        `dtype` is the transformer's; the VQGAN and the ActionVAE stay float32, since codes flip and joints shift
        for little saving.

        Raises:
          ExportError: a missing file or key, weights that do not fit, parts that do not fit together.
        """
        folder = Path(export_dir)
        if not folder.is_dir():
            raise ExportError(f"{folder} is not a folder; give the folder that was exported")
        config = export_format.read_config(folder)
        vqgan_config = export_format.read_model_config(folder / export_format.VQGAN, VQGANConfig)
        vae_config = export_format.read_model_config(folder / export_format.ACTION_VAE, ActionVAEConfig)
        tokenizer = _read(TextTokenizer, folder / export_format.TOKENIZER)
        statistics = _read(Statistics.from_json, folder / export_format.STATISTICS)
        _check_parts(config, vqgan_config, vae_config, tokenizer, statistics)  # before gigabytes are read
        return cls(
            config,
            vla=load_module(lambda: VLA(config.vla), folder, device, dtype, ignored=("model.vqmodel.",)),
            vqgan=load_module(
                lambda: VQGAN(vqgan_config, with_decoder=False),
                folder / export_format.VQGAN,
                device,
                ignored=DECODER_KEYS,
            ),
            action_vae=load_module(
                lambda: ActionVAE(vae_config, with_encoder=False),
                folder / export_format.ACTION_VAE,
                device,
                ignored=ENCODER_KEYS,
            ),
            tokenizer=tokenizer,
            statistics=statistics,
        )

    def act(
        self,
        front: np.ndarray,
        wrist: np.ndarray | None,
        state: np.ndarray,
        instruction: str,
        unit: str | None = None,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """Joint targets for the next C steps: absolute float32[C, A], in the policy's unit.

        Args:
          front, wrist: uint8[H, W, 3] RGB of any size; wrist is None for a policy without a wrist camera.
          state: float[state_dim], the joints now, raw.
          instruction: what to do, as in training.
          unit: the unit of `state`; given, it must be the policy's. None: the caller vouches for it.
          generator: CPU generator; given, the embedding is sampled instead of its mean taken.

        Raises:
          PolicyError: an input cannot be used or a number is not finite. There is then no motion.
        """
        observation = self.observe(front, wrist, state, instruction, unit)
        noise = None if generator is None else torch.randn(1, self.action_vae.config.latent, generator=generator)
        return self.decode(self.latent(observation), observation.raw_state, noise)

    def observe(
        self, front: np.ndarray, wrist: np.ndarray | None, state: np.ndarray, instruction: str, unit: str | None = None
    ) -> Observation:
        """Checks and prepares the inputs of `act`. Raises PolicyError."""
        raw_state = self._checked_state(state, unit)
        if not isinstance(instruction, str) or not instruction.strip():
            raise PolicyError(f"instruction is {instruction!r}; say what to do, in the words of the training data")
        use_wrist = self.config.sequence.use_wrist_frame
        if use_wrist and wrist is None:
            raise PolicyError("wrist image is missing; this policy was trained with a wrist camera")
        if not use_wrist and wrist is not None:
            raise PolicyError("wrist image is given but this policy has no wrist camera; pass None")
        try:
            text = self.tokenizer.encode(instruction)
            front_codes = self._codes("front", front)
            wrist_codes = self._codes("wrist", wrist) if use_wrist else None
            prompt = sequence.prompt(text, front_codes, wrist_codes, self.tokenizer.vocabulary, self.config.sequence)
        except PolicyError:
            raise
        except ValueError as error:
            raise PolicyError(str(error)) from error
        normalised = np.asarray(actions.normalize_state(raw_state, self.statistics), np.float32)
        return Observation(prompt, normalised, raw_state, front_codes, wrist_codes)

    def latent(self, observation: Observation) -> np.ndarray:
        """One forward pass: the ActionVAE embedding float32[2 * latent], mean then log-variance."""
        tokens = torch.from_numpy(np.asarray(observation.prompt, np.int64))[None].to(self.device)
        state = torch.from_numpy(observation.state)[None].to(self.device)
        return self.vla.action_latent(tokens, state)[0].cpu().numpy()

    @torch.inference_mode()
    def decode(self, latent: np.ndarray, raw_state: np.ndarray, noise: torch.Tensor | None = None) -> np.ndarray:
        """Embedding -> absolute float32[C, A]; its mean, or with standard normal `noise` [1, latent] a sample.

        Raises:
          PolicyError: a number is not finite.
        """
        if not np.isfinite(latent).all():
            raise PolicyError("the model's action embedding is not finite; check the weights, or load them in float32")
        mean, log_var = torch.from_numpy(latent)[None].chunk(2, -1)
        chosen = mean if noise is None else mean + (log_var / 2).exp() * noise
        chunk = self.action_vae.decode(chosen.to(self.device))[0][0].float().cpu().numpy()
        targets = actions.decode_chunk(chunk, raw_state, self.statistics, self.config.normalization)
        targets = np.asarray(targets, np.float32)
        if not np.isfinite(targets).all():
            raise PolicyError("the decoded actions are not finite; check statistics.json and the ActionVAE's weights")
        return targets

    def _checked_state(self, state: np.ndarray, unit: str | None) -> np.ndarray:
        expected = self.statistics.unit
        if unit is not None and unit != expected:
            raise PolicyError(
                f"state is in {unit!r} but the policy was trained in {expected or 'an unnamed unit'!r}; "
                "convert the state (and the returned actions), or use a policy of that unit"
            )
        try:
            raw = np.asarray(state, np.float32)
        except (TypeError, ValueError) as error:
            raise PolicyError(f"state is not numbers ({error}); give float[{self.config.vla.state_dim}]") from error
        if raw.shape != (self.config.vla.state_dim,):
            raise PolicyError(f"state has shape {raw.shape}, expected ({self.config.vla.state_dim},)")
        if not np.isfinite(raw).all():
            raise PolicyError(
                f"state is not finite at index {np.flatnonzero(~np.isfinite(raw)).tolist()}; check the robot"
            )
        return raw

    def _codes(self, camera: str, image: np.ndarray) -> np.ndarray:
        """uint8[H, W, 3] -> VQ codes int32[h, w]."""
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            got = getattr(image, "dtype", type(image).__name__)
            raise PolicyError(f"{camera} image is {got}, expected a numpy array of uint8 (RGB, 0..255)")
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise PolicyError(f"{camera} image has shape {image.shape}, expected (height, width, 3)")
        pixels = images.normalize(images.preprocess(image, self.config.image))
        batch = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
        return self.vqgan.codes(batch.to(self.device))[0].cpu().numpy().astype(np.int32)


def check(
    export_dir: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 3
) -> dict[str, Any]:
    """Loads an export and acts on one synthetic observation: does it run here, how fast, how far would it move.

    Returns JSON-ready values: seconds to load and to act (the first call and the median of `repeats`), the
    prompt's length, and for each action the smallest and largest target, with the mean state it starts from.

    Raises:
      PolicyError: as `Policy.load` and `Policy.act`.
    """
    if repeats < 1:
        raise PolicyError(f"repeats is {repeats}; at least 1 call is needed")
    start = time.perf_counter()
    policy = Policy.load(export_dir, device, dtype)
    load_seconds = time.perf_counter() - start
    edge = policy.config.image.shortest_edge
    ramp = np.linspace(0, 255, edge, dtype=np.uint8)
    frame = np.stack(
        [np.tile(ramp, (edge, 1)), np.tile(ramp[:, None], (1, edge)), np.full((edge, edge), 128, np.uint8)], -1
    )
    wrist = frame[::-1].copy() if policy.config.sequence.use_wrist_frame else None
    state = np.asarray(policy.statistics.mean_state, np.float32)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        targets = policy.act(frame, wrist, state, "pick up the block")
        seconds.append(time.perf_counter() - start)
    observation = policy.observe(frame, wrist, state, "pick up the block")
    return {
        "device": str(policy.device),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in policy.vla.parameters()),
        "load_seconds": load_seconds,
        "first_act_seconds": seconds[0],
        "act_seconds": stats_of.median(seconds[1:]),
        "prompt_tokens": len(observation.prompt),
        "chunk": targets.shape[0],
        "action_dim": targets.shape[1],
        "unit": policy.statistics.unit,
        "state": state.tolist(),
        "action_min": targets.min(0).tolist(),
        "action_max": targets.max(0).tolist(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """`rynnvla check EXPORT`: prints the report of `check` as JSON. Returns 2 and one line when it cannot run."""
    parser = argparse.ArgumentParser(prog="rynnvla check", description="Run an exported policy on one observation.")
    parser.add_argument("export", help="folder made by `rynnvla convert`")
    parser.add_argument("--device", default="cpu", help="torch device, for example cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the transformer")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls after the first one")
    options = parser.parse_args(argv)
    try:
        report = check(options.export, options.device, getattr(torch, options.dtype), options.repeats)
    except PolicyError as error:
        print(f"rynnvla check: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2))
    return 0


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
    config: ExportConfig, vqgan: VQGANConfig, vae: ActionVAEConfig, tokenizer: TextTokenizer, statistics: Statistics
) -> None:
    if not config.sequence.use_state:
        raise ExportError(
            "sequence.use_state of config.json is false: a model of stage 1 predicts no action; export a "
            "model of stage 2 or 3"
        )
    vocabulary = tokenizer.vocabulary
    pairs = (
        ("chunk of config.json and of action_vae/config.json", config.chunk, vae.chunk),
        ("action_dim of config.json and of action_vae/config.json", config.action_dim, vae.action_dim),
        (
            "action_latent_dim of config.json and twice latent of action_vae/config.json",
            config.vla.action_outputs,
            2 * vae.latent,
        ),
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
        ("state_dim and action_dim of config.json", config.vla.state_dim, config.action_dim),
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
        ("unit of config.json and of statistics.json", config.unit, statistics.unit),
    )
    for what, left, right in pairs:
        if left != right:
            raise ExportError(f"{what} differ ({left!r} and {right!r}); export the model again with its own assets")
