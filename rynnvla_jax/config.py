"""Typed, frozen configuration. `from_dict` checks it: errors name unknown keys and wrong types.

A file in `configs/` defines `get_config(arg) -> ml_collections.ConfigDict`; `main` turns that
into one `TrainConfig` and nothing below `main` sees a ConfigDict.
"""

import dataclasses
import fnmatch
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rynnvla_jax.errors import brief, did_you_mean, shorten
from rynnvla_jax.metric import EVAL
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files

T = TypeVar("T")

# Fields that a `TrainConfig` derives; they are not keys of a config. Old files set them, and `from_dict` compares.
PERCENTILES = (1.0, 99.0)  # of the published statistics
# Keys and groups that say what trained weights mean. They are stored with every checkpoint and read from there; a run
# that has saved cannot change them.
MEANING = (
    *("data.front", "data.wrist", "data.extra_views", "data.lerobot", "data.rlds", "data.columns", "data.chunk"),
    *("data.normalization", "data.percentile_range"),
    *("data.image.shortest_edge", "data.image.fit", "sequence.frame_interval", "sequence.use_wrist_frame"),
    *("sequence.language_first", "sequence.language_instruction_per_frame", "sequence.repeat_lang_tokens"),
    *("vla", "action_vae_model", "vqgan_model"),
)
# Keys of these groups that matter to training only.
_OF_TRAINING = ("dropout", "init_std", "kl_weight", "masked_mean", "commitment")
DERIVED = (
    "sequence.use_state",
    "sequence.extra_views",
    "action_vae_model.chunk",
    "vla.action_outputs",
    "vla.stateless",
)

# Keys that old files and commands may still name, and the keys that replace them; `from_dict` leaves them out.
REPLACED = {"checkpoint.retries": "checkpoint.patience_minutes", "data.state_unit": "data.columns.robot"}


# The remedy where a data set has no wrist camera.
ONE_CAMERA = "set --config.sequence.use_wrist_frame=False to use one camera"

# Of a checkpoint: those that were trained, or their average (optimizer.ema).
WEIGHTS = ("raw", "ema")
# Steps of a work dir by what they are: the newest, and the best by checkpoint.keep_best.
NEWEST, BEST = -1, -2
# Of the learning rate; those after the first two are optax's, with a warm-up.
SCHEDULES = ("vla", "action_vae", "cosine", "linear", "constant", "wsd", "rsqrt")

# Matrices of a transformer layer that may have a low-rank adapter.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")

EXTRA_VIEWS = 4  # cameras beside front and wrist that have delimiters
VIEW = r"[^/\x00-\x1f]{1,100}"  # a name of a camera is part of keys of messages and of names of files

# Of one axis of a weight, and layers: more is a damaged file, and a program would build it for ever.
_WIDEST, _DEEPEST = 2**24, 1000


@dataclass(frozen=True)
class TransformerConfig:
    """Chameleon decoder. Source: Chameleon-7B/34B `config.json` (Hugging Face)."""

    vocab_size: int = 65540
    """Number of token ids, including the four RynnVLA ids; 0 takes it from the tokenizer."""
    vocab_multiple: int = 128
    """Embedding and head are padded up to a multiple of this many rows, which are masked; for even sharding."""
    width: int = 4096
    """Size of the hidden state (the residual stream); a multiple of num_heads."""
    num_layers: int = 32
    """Number of decoder layers."""
    num_heads: int = 32
    """Number of query heads; width / num_heads, the head size, must be even."""
    num_kv_heads: int = 32
    """Number of key/value heads; fewer than num_heads is grouped-query attention."""
    feed_forward: int = 11008
    """Hidden size of the gated MLP (SwiGLU)."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies; change it only to match a checkpoint."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm; the LayerNorm of queries and keys always uses 1e-5."""
    q_norm_rows: int = 1
    """Rows of the query LayerNorm's scale and bias: 1, the checkpoint's model_parallel_size, or num_heads."""
    k_norm_rows: int = 1
    """Rows of the key LayerNorm's scale and bias: 1, the checkpoint's model_parallel_size, or num_kv_heads."""
    swin_norm: bool = False
    """Normalize after attention and MLP instead of before (Chameleon-34B)."""
    attention_bias: bool = False
    """Biases in the attention projections; only to match a checkpoint that has them."""
    mlp_bias: bool = False
    """Biases in the MLP projections; only to match a checkpoint that has them."""
    dropout: float = 0.05
    """Dropout rate on both residual branches during training, from 0 to below 1."""
    mask_image_logits: bool = False
    """Exclude image tokens from the softmax, so that they are never predicted; only for generating text."""
    image_tokens: tuple[int, int] = (4, 8196)
    """(first, end) of the image tokens' ids, end excluded; used by mask_image_logits."""
    init_std: float = 0.02
    """Standard deviation of randomly initialized weights."""

    def __post_init__(self):
        group = "vla.transformer"
        check_size(_WIDEST, group, self, "vocab_multiple", "width", "num_heads", "num_kv_heads", "feed_forward")
        check_size(_WIDEST, group, self, "q_norm_rows", "k_norm_rows")
        check_size(_DEEPEST, group, self, "num_layers")
        check_at_least(0, group, self, "vocab_size")
        check_share(group, self, "dropout")
        if self.width % self.num_heads:
            raise ConfigError(f"vla.transformer.width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(
                f"vla.transformer.width / num_heads: head size {self.head_dim} must be even for rotary positions"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"vla.transformer.num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        for name, rows, heads in (
            ("q_norm_rows", self.q_norm_rows, self.num_heads),
            ("k_norm_rows", self.k_norm_rows, self.num_kv_heads),
        ):
            if heads % rows:
                raise ConfigError(f"vla.transformer.{name} {rows} does not divide {heads} heads")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def padded_vocab(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class VLAConfig:
    """The transformer with a state projection and an action head. Source: arXiv 2509.15212, section 3."""

    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    """The decoder."""
    state_dim: int = 6
    """Size of the robot's state; 0: there is none, as in stage 1 and in data without states."""
    action_head: str = "one_layer"
    """Layers of the head: "one_layer", or "MLP": width -> 2048 -> 1024 -> 512 -> 256 -> outputs, with ReLU."""
    actions: str = "embedding"
    """What the action head predicts: "embedding" is the ActionVAE's latent, "raw" the action chunk itself."""
    action_dim: int = 0
    """Size of one action where `actions` is "raw"; 0: as large as the state."""
    action_outputs: int = 64
    """Derived: outputs of the action head, 2 x the ActionVAE's latent, or for raw actions chunk x action size."""
    stateless: bool = False
    """Derived: predicts actions without a state (state_dim 0 in a stage with actions)."""

    def __post_init__(self):
        check_choice("vla.action_head", self.action_head, ("one_layer", "MLP"))
        check_choice("vla.actions", self.actions, ("embedding", "raw"))
        check_at_least(0, "vla", self, "state_dim", "action_dim")
        check_at_least(1, "vla", self, "action_outputs")

    @property
    def acts(self) -> bool:
        """Whether it has an action head; the video model of stage 1 has none."""
        return self.state_dim > 0 or self.stateless

    @property
    def raw_width(self) -> int:
        """Size of one raw action."""
        return self.action_dim or self.state_dim


@dataclass(frozen=True)
class ActionVAEConfig:
    """ACT-style transformer VAE over action chunks. Source: reference implementation, published sizes."""

    chunk: int = 20
    """Derived: steps in one action chunk, equal to data.chunk."""
    action_dim: int = 6
    """Size of one action vector."""
    width: int = 512
    """Size of the hidden state; a multiple of num_heads."""
    feed_forward: int = 3200
    """Hidden size of the MLPs."""
    num_heads: int = 8
    """Number of attention heads."""
    encoder_layers: int = 4
    """Layers of the encoder, and of the small encoder over the memory token."""
    decoder_layers: int = 7
    """Layers of the decoder."""
    latent: int = 32
    """Size of the latent action embedding; the policy predicts its mean and log-variance."""
    dropout: float = 0.1
    """Dropout rate during training, from 0 to below 1."""
    pre_norm: bool = False
    """Normalize before attention and MLP instead of after."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence in the loss; a larger one makes the latent smoother but less accurate."""
    masked_mean: bool = False
    """Average the L1 loss over valid elements only; False averages over padded ones too, as published."""

    def __post_init__(self):
        group = "action_vae_model"
        check_size(_WIDEST, group, self, "chunk", "action_dim", "width", "feed_forward", "num_heads", "latent")
        check_size(_DEEPEST, group, self, "encoder_layers", "decoder_layers")
        check_at_least(0, group, self, "kl_weight")
        check_share(group, self, "dropout")
        if self.width % self.num_heads:
            raise ConfigError(f"action_vae_model.width {self.width} is not a multiple of num_heads {self.num_heads}")


@dataclass(frozen=True)
class VQGANConfig:
    """taming-transformers VQGAN; defaults are Chameleon's tokenizer. Source: `vqgan.yaml`."""

    channels: int = 128
    """Channels at full resolution, before the multipliers."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Channel multiplier of each level; each level after the first halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = ()
    """Resolutions, in pixels for an image of size `resolution`, whose level gets attention."""
    resolution: int = 512
    """Nominal image size in pixels; only selects the levels that attention_resolutions refers to."""
    z_channels: int = 256
    """Channels of the encoder's output."""
    num_codes: int = 8192
    """Entries in the codebook."""
    code_width: int = 256
    """Size of one codebook entry."""
    in_channels: int = 3
    """Channels of the input image; 3 is RGB."""
    out_channels: int = 3
    """Channels of the reconstructed image; 3 is RGB."""
    commitment: float = 0.25
    """Weight of the loss term that moves codebook entries towards the encoder's output, as published."""
    dropout: float = 0.0
    """Dropout rate in the residual blocks during training, from 0 to below 1."""

    def __post_init__(self):
        group = "vqgan_model"
        check_size(_WIDEST, group, self, "channels", "z_channels", "num_codes", "code_width", "multipliers")
        check_size(_WIDEST, group, self, "in_channels", "out_channels")
        if not 1 <= len(self.multipliers) <= _DEEPEST:
            raise ConfigError(f"{group}.multipliers has {len(self.multipliers)} levels; give 1 to {_DEEPEST}")
        check_at_least(0, group, self, "num_res_blocks", "commitment")
        if len(self.multipliers) * self.num_res_blocks > _DEEPEST:
            blocks = f"{self.num_res_blocks} blocks in each of {len(self.multipliers)} levels"
            raise ConfigError(f"{group}.num_res_blocks gives {blocks}; a model has at most {_DEEPEST} blocks")
        check_share(group, self, "dropout")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class SequenceConfig:
    """Layout of one training sequence. Source: reference.md of the method, section 4."""

    length: int = 4096
    """Tokens of one training sequence; shorter ones are padded with id 0, longer ones are refused."""
    num_frames: int = 4
    """Camera frames in one example."""
    frame_interval: int = 1
    """Recorded steps between two frames; raise it when neighbouring frames look the same."""
    language_first: bool = True
    """Put the instruction before the frames; False puts it after them and the state."""
    language_instruction_per_frame: bool = True
    """Repeat the instruction with every frame; False gives it with the first frame only."""
    repeat_lang_tokens: int = 1
    """How many times each instruction is repeated in a row."""
    condition_frame_num: int = 1
    """Number of leading frames that are given; only later frames are predicted and enter the loss."""
    train_later_text: bool = True
    """Include the instructions of later frames in the loss, as published."""
    use_wrist_frame: bool = True
    """Include the wrist camera's frames."""
    use_state: bool = True
    """Derived: states and <action> tokens in the sequence, which stages 2 and 3 have."""
    extra_views: tuple[str, ...] = ()
    """Derived: cameras after front and wrist, equal to data.extra_views."""
    clips: int = 1
    """Examples packed into one sequence; each has its own positions and attends only to itself."""

    def __post_init__(self):
        check_at_least(1, "sequence", self, "length", "num_frames", "frame_interval", "clips")
        _check_extra_views("sequence.extra_views", self.extra_views)

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the cameras of every frame, in the order of the sequence."""
        return ("front", *(("wrist",) if self.use_wrist_frame else ()), *self.extra_views)


@dataclass(frozen=True)
class ImageConfig:
    """Preprocessing of camera frames for the VQGAN."""

    shortest_edge: int = 384
    """Pixels of the shorter edge after resizing; a multiple of 32. More pixels mean more tokens per frame."""
    fit: str = "crop"
    """How the longer edge becomes a multiple of 32: crop, pad, square, reference_train or reference_infer."""
    jitter: float = 0.0
    """Range of random brightness, contrast and saturation, sampled once per example; 0 turns it off."""

    def __post_init__(self):
        check_choice("data.image.fit", self.fit, ("crop", "pad", "square", "reference_train", "reference_infer"))
        check_size(8192, "data.image", self, "shortest_edge")
        check_at_least(0, "data.image", self, "jitter")
        if self.shortest_edge % 32 and not self.fit.startswith("reference"):
            raise ConfigError(f"data.image.shortest_edge {self.shortest_edge} is not a multiple of 32")


@dataclass(frozen=True)
class LeRobotConfig:
    """Names of features in a LeRobot data set."""

    state: str = "observation.state"
    """Feature with the state; openpi's converters write "state"."""
    action: str = "action"
    """Feature with the action; openpi's converters write "actions"."""


@dataclass(frozen=True)
class RLDSConfig:
    """Keys of an RLDS or Open-X data set; every data set names them differently.

    Where a data set of Open-X lacks a key that has its default value, the key that it has is taken from a table.
    """

    front: str = "image"
    """Key of the front camera in `observation`."""
    wrist: str = "wrist_image"
    """Key of the wrist camera in `observation`."""
    state: str = "state"
    """Key of the state in `observation`; "" if there is no state."""
    action: str = ""
    """Key in the action if it is a dictionary; "" if it is one array, or a known data set's."""
    split: str = "train"
    """Split to read, as TensorFlow Datasets names it."""
    fps: float = 10.0
    """Steps per second of the recording, which the data does not contain; of Open-X the default means its own."""

    def __post_init__(self):
        if not self.fps > 0:
            raise ConfigError(f"data.rlds.fps is {self.fps}; give the steps per second of the recording")


@dataclass(frozen=True)
class ColumnsConfig:
    """What a data set does not say, or says wrongly, about its columns; `rynnvla data stats` shows what is assumed.

    It holds for all sources of a run. For one data set, write `rynnvla_columns.json` beside it.
    """

    robot: str = ""
    """Robot and its calibration, such as "lerobot:so100_follower"; "" as the data set says."""
    unit: str = ""
    """Unit of all joints: "degrees", "radians", "-100..100" or another text; "" as guessed."""
    actions: str = ""
    """How actions are recorded: "targets", or "differences", which are learnt as they are; "" as guessed."""
    grippers: tuple[str, ...] = ()
    """Names or numbers of all action columns that are grippers; () as guessed."""
    state: tuple[str, ...] = ()
    """Names or numbers of the state columns to use, in order; () uses all."""
    action: tuple[str, ...] = ()
    """Names or numbers of the action columns to use, in order; () uses all."""

    def __post_init__(self):
        if self.actions:
            check_choice("data.columns.actions", self.actions, ("targets", "differences"))


@dataclass(frozen=True)
class DataConfig:
    """The data that a stage reads."""

    source: str = ""
    """Data set as KIND:PATH, such as lerobot:DIR or lerobot:hf://USER/SET; `rynnvla data --help` lists the kinds."""
    mixture: tuple[tuple[str, float], ...] = ()
    """(source, weight) pairs to sample from several data sets instead of one source."""
    exclude: str = ""
    """JSON file of episodes to leave out, as `rynnvla data validate --fix` writes it; "" keeps all."""
    max_damaged: float = 0.01
    """Fraction of examples that may be unreadable before the run stops, from 0 to below 1."""
    front: str = "observation.images.front"
    """LeRobot key of the front camera."""
    wrist: str = "observation.images.wrist"
    """LeRobot key of the wrist camera."""
    extra_views: tuple[str, ...] = ()
    """Further cameras by their keys in LeRobot ("observation.images." may be left out) or RLDS; at most 4, in order."""
    lerobot: LeRobotConfig = field(default_factory=LeRobotConfig)
    """Names of features in a LeRobot data set."""
    rlds: RLDSConfig = field(default_factory=RLDSConfig)
    """Keys of an RLDS or Open-X data set."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Meaning of the columns of state and action, where a data set does not state it."""
    chunk: int = 20
    """Steps in one action chunk, the actions predicted at once; must equal that of the ActionVAE."""
    normalization: str = "mean_std"
    """Scaling of actions: "mean_std", or "min_max": `percentile_range` to [-1, 1]; must equal that of the ActionVAE."""
    percentile_range: tuple[float, float] = PERCENTILES
    """Lower and upper percentile of the relative actions, from 0 to 100, which "min_max" takes to -1 and 1."""
    frame_codes: str = "step"
    """When frames are VQ-encoded: "step": on the device in each step; "ahead": once, before training."""
    num_threads: int = 2
    """Threads that read and decode examples; increase it when steps wait for data."""
    num_workers: int = 0
    """Processes that read and decode examples; 0 uses threads only."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Resizing and augmentation of frames."""

    def __post_init__(self):
        _check_extra_views("data.extra_views", self.extra_views)
        check_choice("data.frame_codes", self.frame_codes, ("step", "ahead"))
        check_choice("data.normalization", self.normalization, ("mean_std", "min_max"))
        if len(self.percentile_range) != 2 or not 0 <= self.percentile_range[0] < self.percentile_range[1] <= 100:
            raise ConfigError(
                f"data.percentile_range is {self.percentile_range}; give two percentiles in order, from 0 to 100"
            )
        if self.source and self.mixture:
            raise ConfigError(
                "data.source and data.mixture are both set; add the source to the mixture, and set data.source to ''"
            )
        if not all(weight > 0 for _, weight in self.mixture):
            raise ConfigError(f"data.mixture has a weight that is not positive: {self.mixture}")
        check_share("data", self, "max_damaged")
        check_at_least(1, "data", self, "chunk")
        check_at_least(0, "data", self, "num_threads", "num_workers")
        if self.frame_codes == "ahead" and self.image.jitter:
            raise ConfigError(
                "data.image.jitter needs data.frame_codes='step': codes made ahead cannot be jittered; set one of "
                "data.image.jitter=0 and data.frame_codes='step'"
            )


@dataclass(frozen=True)
class EvaluationConfig:
    """Data that the run does not train on, and when the model is evaluated on them."""

    share: float = 0.0
    """Share of the episodes of every source that is held out of training and statistics, from 0 to below 1."""
    seed: int = 0
    """Seed of the choice of episodes that are held out; not config.seed, so that runs of several seeds agree in it."""
    sources: tuple[str, ...] = ()
    """Other data sets to evaluate on, as KIND:PATH, instead of a share of the training data."""
    every_steps: int = 500
    """Evaluate every this many updates, and at the end; 0: never, though a share is still held out."""
    examples: int = 256
    """Examples of an evaluation, always the same, spread evenly over the held-out data; all if there are fewer."""
    pictures: int = 3
    """Examples of which each evaluation draws predicted frames and action chunks beside recorded ones; 0: none."""

    def __post_init__(self):
        check_share("evaluation", self, "share")
        check_at_least(0, "evaluation", self, "seed", "every_steps", "pictures")
        check_at_least(1, "evaluation", self, "examples")
        if self.share and self.sources:
            raise ConfigError(
                f"evaluation.share {self.share:g} and evaluation.sources are both set; leave one of them out: the "
                "model is evaluated on a share of the training data, or on other data"
            )

    @property
    def on(self) -> bool:
        """Whether the model is evaluated during training."""
        return bool(self.every_steps and (self.share or self.sources))

    def due(self, step: int) -> bool:
        """Whether the weights after `step` updates are evaluated, whether or not they are the last."""
        return self.on and step % self.every_steps == 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or another optimizer, and its learning rate. Source: published fine-tuning recipe."""

    name: str = "adamw"
    """Optimizer: adamw, adafactor (factored second moment, little memory), lion or muon (for stacked layers)."""
    peak_lr: float = 2e-5
    """Learning rate after warm-up."""
    min_lr: float = 2e-5
    """Learning rate at the end of the decay; equal to peak_lr for a constant rate."""
    schedule: str = "vla"
    """Learning rate over the run: vla and action_vae as published; or cosine, linear, constant, wsd or rsqrt."""
    warmup_steps: float = 50.0
    """Updates of linear warm-up; may be a fraction."""
    warmup_lr: float = 1e-6
    """Learning rate at the first update of the "action_vae" schedule; the others start at 0."""
    decay_share: float = 0.2
    """Share of the run, at its end, over which the "wsd" schedule (warm-up, stable, decay) falls to min_lr."""
    beta1: float = 0.9
    """Decay rate of the first moment of AdamW and Lion; Muon has its own for matrices."""
    beta2: float = 0.95
    """Decay rate of AdamW's second moment, or of Lion's moment; Adafactor has its own."""
    eps: float = 1e-8
    """Epsilon of AdamW and Muon."""
    weight_decay: float = 0.1
    """Weight decay, times the learning rate; applied to every parameter, as published, but for no_decay."""
    no_decay: tuple[str, ...] = ()
    """Parameter paths (globs) without weight decay, such as ('*norm*', '*bias', '*embed*'); () decays all."""
    rates: tuple[tuple[str, float], ...] = ()
    """(parameter path (glob), factor) pairs: learning rates relative to the schedule's; the first match counts."""
    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, saved with them; 0: no average."""
    clip_norm: float = 4.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    accumulation: int = 1
    """Micro-batches per update; raise it when batch_size does not fit into memory."""
    offload: bool = False
    """Keep the optimizer's state in host memory between updates (TPU and GPU); saves device memory, but is slower."""

    def __post_init__(self):
        check_choice("optimizer.name", self.name, ("adamw", "adafactor", "lion", "muon"))
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check_at_least(0, "optimizer", self, "peak_lr", "min_lr", "warmup_steps", "warmup_lr", "eps", "weight_decay")
        check_at_least(0, "optimizer", self, "clip_norm")
        check_at_least(1, "optimizer", self, "accumulation")
        check_share("optimizer", self, "beta1", "beta2", "decay_share", "ema")
        for pattern, factor in self.rates:
            if not 0 <= factor < float("inf"):
                raise ConfigError(f"optimizer.rates has {factor} for {pattern!r}; it must be a number from 0 on")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes the remaining devices."""

    replica: int = 0
    """Number of replicas, connected by the slow network; 0 is the number of TPU slices."""
    data: int = 1
    """Devices that have copies of the weights and shard the batch."""
    fsdp: int = -1
    """Devices that shard weights, optimizer state and batch; -1 takes the remaining devices."""
    sequence: int = 1
    """Devices that shard the tokens of a sequence (context parallelism); for long sequences."""
    tensor: int = 1
    """Devices that shard heads, MLP and vocabulary (tensor parallelism)."""

    def __post_init__(self):
        for axis, size in vars(self).items():
            if size < 1 and size != -1 and (axis, size) != ("replica", 0):
                raise ConfigError(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the remaining devices")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint intervals and how many to keep; one is saved when either interval has passed, and at the end."""

    every_steps: int = 1000
    """Save every this many updates; 0: only by time."""
    every_minutes: float = 15.0
    """Save when this many minutes have passed since the last save; 0: only by steps."""
    keep: int = 2
    """Number of newest checkpoints to keep, at least 2: if the newest is damaged, the older one is used."""
    keep_every: int = 0
    """Also keep the checkpoints of multiples of this step permanently; 0: none."""
    keep_best: str = ""
    """Also save and keep the best step by this metric of held-out data, such as "eval/action_error"; "": none."""
    patience_minutes: float = 60.0
    """Minutes during which failed saves are repeated, while the run goes on, before it stops."""

    def __post_init__(self):
        check_at_least(0, "checkpoint", self, "every_steps", "every_minutes", "keep_every", "patience_minutes")
        if not self.every_steps and not self.every_minutes:
            raise ConfigError("checkpoint.every_steps and checkpoint.every_minutes are both off; set at least one")
        if self.keep < 2:
            raise ConfigError(
                f"checkpoint.keep {self.keep} leaves no older checkpoint if the newest is damaged; use at least 2"
            )
        if self.keep_best and not self.keep_best.startswith(EVAL):
            raise ConfigError(
                f"checkpoint.keep_best is {brief(self.keep_best)}; name a metric of held-out data, such as "
                "eval/action_error, or leave it out"
            )


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, in addition to TensorBoard. Set entity, group and tags by WANDB_ENTITY, WANDB_RUN_GROUP, ..."""

    project: str = ""
    """Weights & Biases project to log to; "" turns it off."""
    mode: str = "online"
    """Where logs go: "online", or "offline": files in the work dir, for `wandb sync`."""

    def __post_init__(self):
        check_choice("wandb.mode", self.mode, ("online", "offline"))


@dataclass(frozen=True)
class InitFromConfig:
    """Weights and assets of an earlier stage, an imported model directory, or PyTorch weights."""

    path: str = ""
    """Work dir, imported model or PyTorch weights to start from, also in a bucket or hf://USER/NAME; "" is scratch."""
    step: int = NEWEST
    """Checkpoint step to start from; -1 is the newest, -2 the best by checkpoint.keep_best of that run."""
    weights: str = "raw"
    """Weights to start from: "raw", or "ema", the average that a run with optimizer.ema keeps."""
    new: tuple[str, ...] = ()
    """Parameter paths (globs) that may be randomly initialized; any other missing parameter is an error."""

    def __post_init__(self):
        check_choice("init_from.weights", self.weights, WEIGHTS)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the transformer's matrices, which stay as they are. Source: LoRA, arXiv 2106.09685."""

    rank: int = 0
    """Rank of the adapters, such as 16; 0: none. More learns more, and takes more memory."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ("*",)
    """Matrices with an adapter, as globs over q, k, v, o, gate, up and down."""

    def __post_init__(self):
        check_at_least(0, "finetune.lora", self, "rank", "alpha")
        if self.rank and not self.alpha:
            raise ConfigError("finetune.lora.alpha is 0, so adapters would add nothing; give a number above 0")
        for pattern in self.targets:
            if not fnmatch.filter(LORA_TARGETS, pattern):
                raise ConfigError(
                    f"finetune.lora.targets: {brief(pattern)} matches none of {', '.join(LORA_TARGETS)}; correct it or "
                    f"leave it out.{did_you_mean(pattern, LORA_TARGETS)}".rstrip(".")
                )
        if self.rank and not self.targets:
            raise ConfigError(
                f"finetune.lora.rank is {self.rank}, but finetune.lora.targets is (), so there is nothing to adapt; "
                "name some of its matrices, or set finetune.lora.rank=0"
            )

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of the matrices with an adapter, of `LORA_TARGETS`."""
        chosen = [name for name in LORA_TARGETS if any(fnmatch.fnmatchcase(name, p) for p in self.targets)]
        return tuple(chosen) if self.rank else ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


@dataclass(frozen=True)
class FinetuneConfig:
    """Trains a part of the weights, or adapters; all other weights are those of init_from and stay as they are."""

    train: tuple[str, ...] = ()
    """Parameter paths (globs) that train; (): all, or, with lora.rank, only the adapters."""
    base_dtype: str = "bfloat16"
    """Type of the matrices that do not train: "bfloat16", half the memory, or "float32"."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters beside matrices that do not train."""

    def __post_init__(self):
        check_choice("finetune.base_dtype", self.base_dtype, ("bfloat16", "float32"))

    @property
    def on(self) -> bool:
        """Whether some weights do not train."""
        return bool(self.train or self.lora.rank)


@dataclass(frozen=True)
class TrainConfig:
    """One run of one stage."""

    stage: str
    """What to train: action_vae, vqgan, video (stage 1), trajectory (stage 2) or robot (stage 3)."""
    seed: int = 0
    """Seed of initialization, data order and dropout."""
    total_steps: int = 1000
    """Updates in the whole run."""
    batch_size: int = 8
    """Examples per update, over all devices; a multiple of optimizer.accumulation."""
    log_every: int = 10
    """Updates between two lines of metrics."""
    gradient_norms: bool = False
    """Also log the gradient's norm by group of parameters, and by parts of the stack of layers."""
    compute_dtype: str = "bfloat16"
    """Type of activations and matrix products: "bfloat16" or "float32"; weights stay float32."""
    gradient_sums: str = "float32"
    """Type of gradients' sums on 64 TPU chips and more: "float32", or "bfloat16": half the bytes, 0.4 % error."""
    compiler_options: str = "auto"
    """Compiler options of the train step: "auto" takes those of the chip, "none" leaves the compiler's own choices."""
    remat: str = "full"
    """What a layer keeps for its gradient, from most memory to least: none, projections, attention, full or offload."""
    codes_like_codebook: bool = False
    """From scratch only: initialize image tokens' embeddings as projections of the VQGAN's codebook."""
    attention: str = "auto"
    """Attention kernel: auto, xla, splash (TPU), splash_interpreted (tests) or cudnn (GPU)."""
    loss_chunk: int = 8192
    """Vocabulary columns whose logits are computed at a time; smaller saves memory, but is slower."""
    z_loss_weight: float = 1e-5
    """Weight of the z-loss, which keeps logits small."""
    action_loss_weight: float = 1.0
    """Weight of the action loss relative to the token loss."""
    peak_flops: float = 0.0
    """Peak FLOP/s of one device, for the utilization metric; 0 leaves the metric out."""
    max_skipped_in_a_row: int = 5
    """Consecutive updates with a non-finite loss or gradient before their batches are left out."""
    watchdog_seconds: float = 300.0
    """Seconds; a step longer than this and than 10 times the median ends the process and prints all stacks; 0: off."""
    profile_steps: tuple[int, ...] = ()
    """(first, last) step to trace into WORKDIR/profile; (): no trace."""
    compilation_cache: str = "auto"
    """Cache directory of compiled programs; "auto" is ~/.cache/rynnvla_jax/xla, or no cache on CPU; "": no cache."""
    tokenizer: str = ""
    """Path of tokenizer.json, or hf://USER/NAME/tokenizer.json; "" takes it from init_from."""
    vqgan: str = ""
    """VQGAN, found as init_from.path is; "" takes it from init_from."""
    action_vae: str = ""
    """ActionVAE, found as init_from.path is; for stages 2 and 3."""
    vla: VLAConfig = field(default_factory=VLAConfig)
    """The policy: transformer, state projection and action head."""
    action_vae_model: ActionVAEConfig = field(default_factory=ActionVAEConfig)
    """The ActionVAE that stage action_vae trains."""
    vqgan_model: VQGANConfig = field(default_factory=VQGANConfig)
    """The VQGAN that stage vqgan trains."""
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    """Layout of a training sequence."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data to read."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Data held out of training, and evaluation on them."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The device mesh."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoint intervals and how many to keep."""
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    """Weights and assets to start from."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Which weights train; by default all."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Logging to Weights & Biases."""

    def __post_init__(self):
        check_choice("config.stage", self.stage, STAGES)
        self._derive()
        check_choice("config.remat", self.remat, ("none", "projections", "attention", "full", "offload"))
        check_choice("config.attention", self.attention, ("auto", "xla", "splash", "splash_interpreted", "cudnn"))
        check_choice("config.compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        check_choice("config.compiler_options", self.compiler_options, ("auto", "none"))
        check_choice("config.gradient_sums", self.gradient_sums, ("float32", "bfloat16"))
        if self.codes_like_codebook and (self.init_from.path or not STAGES[self.stage].tokens):
            raise ConfigError(
                "config.codes_like_codebook is for stages 1 to 3 from scratch; leave it out with init_from.path"
            )
        if self.finetune.lora.rank and STAGES[self.stage].model != "vla":
            raise ConfigError(
                f"config.finetune.lora is for the transformer of stages 1 to 3, and stage {self.stage} has none; set "
                "finetune.lora.rank=0, and name what trains in finetune.train"
            )
        check_at_least(1, "config", self, "total_steps", "batch_size", "log_every", "loss_chunk")
        check_at_least(1, "config", self, "max_skipped_in_a_row")
        check_at_least(0, "config", self, "seed", "z_loss_weight", "action_loss_weight", "peak_flops")
        check_at_least(0, "config", self, "watchdog_seconds")
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ConfigError(
                f"config.profile_steps is {steps}; it must be (first, last) with 1 <= first <= last, or ()"
            )
        if self.batch_size % self.optimizer.accumulation:
            raise ConfigError(
                f"config.batch_size {self.batch_size} is not a multiple of "
                f"optimizer.accumulation {self.optimizer.accumulation}"
            )
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Raises ConfigError when the run ends before the schedule's parts do."""
        optimizer = self.optimizer
        decay = optimizer.decay_share * self.total_steps if optimizer.schedule == "wsd" else 0.0
        falls = optimizer.schedule in ("cosine", "linear", "wsd")
        if falls and optimizer.warmup_steps + decay >= self.total_steps:
            parts = f"{decay:g} updates of decay" if decay else "the decay"
            raise ConfigError(
                f"optimizer.warmup_steps {optimizer.warmup_steps:g} and {parts} do not fit in config.total_steps "
                f"{self.total_steps} with optimizer.schedule {optimizer.schedule!r}; reduce optimizer.warmup_steps"
            )

    def _derive(self) -> None:
        """Sets the fields of `DERIVED`, whatever they were."""
        stateless = STAGES[self.stage].state and not self.vla.state_dim
        raw = self.vla.actions == "raw" and (stateless or self.vla.state_dim)
        if raw and not self.vla.raw_width:
            raise ConfigError("vla.actions is 'raw' and vla.state_dim 0; set vla.action_dim to the size of one action")
        outputs = self.data.chunk * self.vla.raw_width if raw else 2 * self.action_vae_model.latent
        for group, changes in (
            ("sequence", {"use_state": STAGES[self.stage].state, "extra_views": self.data.extra_views}),
            ("action_vae_model", {"chunk": self.data.chunk}),
            ("vla", {"action_outputs": outputs, "stateless": stateless}),
        ):
            object.__setattr__(self, group, dataclasses.replace(getattr(self, group), **changes))


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key in full, then, after "; ", the remedy."""


def check_choice(key: str, value: str, known: Collection[str]) -> None:
    """Raises ConfigError when `value` is not one of `known`."""
    if value not in known:
        raise ConfigError(
            f"{key} is {brief(value)}; choose one of {', '.join(known)}.{did_you_mean(value, known)}".rstrip(".")
        )


def _check_extra_views(key: str, views: tuple[str, ...]) -> None:
    if len(views) > EXTRA_VIEWS:
        raise ConfigError(
            f"{key} names {len(views)} cameras; there are delimiters for {EXTRA_VIEWS} beside front and wrist, so "
            "leave some out"
        )
    for view in views:
        if not re.fullmatch(VIEW, view) or view in ("front", "wrist") or views.count(view) > 1:
            raise ConfigError(
                f"{key} has {brief(view)}; give names of other cameras, each once, without slashes. "
                "data.front and data.wrist say which cameras front and wrist are"
            )


def check_at_least(minimum: int, group: str, config: Any, *names: str) -> None:
    """Raises ConfigError when one of the named keys of a group is below `minimum`, or NaN."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise ConfigError(f"{group}.{name} is {value}; it must be at least {minimum}")


def check_size(maximum: int, group: str, config: Any, *names: str) -> None:
    """Raises ConfigError when one of the named keys of a group, or an entry of a list, is not from 1 to `maximum`."""
    for name in names:
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if not 1 <= one <= maximum:
                limit = "at least 1" if not one >= 1 else f"at most {maximum}"
                raise ConfigError(f"{group}.{name} is {value}; it must be {limit}")


def check_share(group: str, config: Any, *names: str) -> None:
    """Raises ConfigError unless the named keys of a group are from 0 to below 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{group}.{name} is {value}; it must be from 0 to below 1")


def means(key: str) -> bool:
    """Whether a dotted key of TrainConfig is part of what trained weights mean (`MEANING`)."""
    return key.rpartition(".")[2] not in _OF_TRAINING and any(f"{key}.".startswith(f"{m}.") for m in MEANING)


def with_meaning(config: "TrainConfig", stored: "TrainConfig") -> "TrainConfig":
    """`config` with the keys of `stored` that say what weights mean."""
    values, source = to_dict(config), to_dict(stored)
    for key in MEANING:
        *groups, last = key.split(".")
        target, origin = values, source
        for group in groups:
            target, origin = target[group], origin[group]
        target[last] = origin[last]
    return from_dict(TrainConfig, values)


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from nested mappings.

    Raises:
      ConfigError: unknown key (with the nearest known one), missing key or wrong type, by dotted path; a key of
        `DERIVED` that contradicts the others.
    """
    if cls is TrainConfig:
        values = without(REPLACED, values)
    fields = _fields(cls)
    hints = typing.get_type_hints(cls)
    for key in values:
        check_key(cls, str(key), path)
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [n for n in required if n not in values]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    built = cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})
    if isinstance(built, TrainConfig):
        return _agreeing(built, values, path)
    return built


def _agreeing(config: Any, values: Mapping[str, Any], path: str) -> Any:
    """Returns the config if the `DERIVED` keys of an old file equal the derived values; else raises ConfigError."""
    stage, vla = STAGES[config.stage], config.vla
    embeds = "action_vae" in stage.frozen(config)
    if vla.actions == "raw":
        outputs = f"raw actions are {config.data.chunk} steps of {vla.raw_width} numbers"
    else:
        outputs = f"config.action_vae_model.latent is {config.action_vae_model.latent}"
    reasons = {}  # of what the stage reads; other stages have always been given anything
    if stage.tokens:
        reasons["sequence.use_state"] = f"config.stage is {config.stage!r}"
    if stage.model == "action_vae":
        reasons["action_vae_model.chunk"] = f"config.data.chunk is {config.data.chunk}"
    if stage.tokens and stage.actions:
        reasons["vla.action_outputs"] = outputs
    for key, reason in reasons.items():
        group, name = key.split(".")
        derived = getattr(getattr(config, group), name)
        named = values.get(group, {}).get(name, derived)
        if key == "vla.action_outputs" and embeds and named != derived and not named % 2:
            # The ActionVAE is not known yet: this says what its latent must be (`train.assets.fit_models` checks it).
            vae = dataclasses.replace(config.action_vae_model, latent=named // 2)
            config = dataclasses.replace(config, action_vae_model=vae)
        elif named != derived:
            raise ConfigError(f"{path}.{key} is {named} but {reason}, which makes it {derived}; leave the key out")
    return config


def check_key(cls: type, key: str, path: str = "config") -> None:
    """Raises ConfigError, with the nearest known key, when the dataclass has no such dotted key."""
    name, _, rest = key.partition(".")
    fields = _fields(cls)
    if name not in fields:
        hint = did_you_mean(name, fields, prefix=f"{path}.", otherwise=f" Known keys: {', '.join(fields)}.")
        raise ConfigError(f"unknown key {path}.{shorten(name, 200)}.{hint}")
    if rest:
        group = typing.get_type_hints(cls)[name]
        if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
            raise ConfigError(
                f"unknown key {path}.{shorten(key, 200)}; {path}.{name} is one value, not a group of keys"
            )
        check_key(group, rest, f"{path}.{name}")


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)}


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`, ready for JSON: tuples become lists. For a `TrainConfig`, `DERIVED` is left out."""
    values = {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return without(DERIVED, values) if isinstance(config, TrainConfig) else values


def without(keys: Collection[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings without GROUP.NAME keys."""
    kept = dict(values)
    for key in keys:
        group, name = key.split(".")
        if isinstance(kept.get(group), Mapping):
            kept[group] = {k: v for k, v in kept[group].items() if k != name}
    return kept


def read_json(file: Path, remedy: str) -> Any:
    """The content of a JSON file that a run wrote. Raises ConfigError, with the remedy, when it is damaged."""
    try:
        return files.read_json(file)
    except files.DamagedFileError as error:
        raise ConfigError(f"{file} is damaged ({error.reason}); {remedy}") from None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a group of keys, got {brief(value)}")
        return from_dict(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            one = f"; for one value write {path}=({brief(str(value))},)" if typing.get_args(hint)[0] is str else ""
            raise ConfigError(f"{path} must be a list, got {brief(value)}{one}")
        args = typing.get_args(hint)
        items = list(value)
        types_ = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(types_) != len(items):
            raise ConfigError(f"{path} needs {len(types_)} values, got {len(items)}")
        return tuple(_convert(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(types_, items, strict=True)))
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{path}: union types are not used in configs")
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023:
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        quoted = f"; write {str(value)!r}, in quotes" if hint is str and isinstance(value, int | float) else ""
        raise ConfigError(f"{path} must be {hint.__name__}, got {type(value).__name__} {brief(value)}{quoted}")
    return value
