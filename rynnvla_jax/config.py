"""Typed, frozen configuration. `from_dict` is the only door: unknown keys and wrong types fail by name.

A file in `configs/` defines `get_config(arg) -> ml_collections.ConfigDict`; `main` turns that
into one `TrainConfig` and nothing below `main` sees a ConfigDict.
"""

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rynnvla_jax.errors import did_you_mean
from rynnvla_jax.storage import files

T = TypeVar("T")


@dataclass(frozen=True)
class TransformerConfig:
    """Chameleon decoder. Source: Chameleon-7B/34B `config.json` (Hugging Face)."""

    vocab_size: int = 65540  # rows that mean something, the four RynnVLA rows included; 0 takes the tokenizer's
    vocab_multiple: int = 128  # embedding and head rows are padded up to a multiple of this; pads are masked
    width: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    feed_forward: int = 11008
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5  # of RMSNorm; the q/k LayerNorm always uses 1e-5
    q_norm_rows: int = 1  # rows of the q LayerNorm scale and bias: 1, model_parallel_size or num_heads
    k_norm_rows: int = 1
    swin_norm: bool = False  # 34B: norm after attention and MLP instead of before
    attention_bias: bool = False
    mlp_bias: bool = False
    dropout: float = 0.05  # on both residual branches, in training
    mask_image_logits: bool = False
    image_tokens: tuple[int, int] = (4, 8196)  # [first, last) id of the image codes
    init_std: float = 0.02

    def __post_init__(self):
        group = "vla.transformer"
        check_at_least(1, group, self, "vocab_multiple", "width", "num_layers", "num_heads", "num_kv_heads")
        check_at_least(1, group, self, "feed_forward", "q_norm_rows", "k_norm_rows")
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
    state_dim: int = 6  # 0: a video model (stage 1) without state projection and action head
    action_head: str = "one_layer"  # or "MLP": width -> 2048 -> 1024 -> 512 -> 256 -> outputs, ReLU between
    actions: str = "embedding"  # what the head predicts: of the ActionVAE, or the chunk itself: "raw"
    action_outputs: int = 64  # ActionVAE mean and log-variance; of raw actions chunk x width

    def __post_init__(self):
        check_choice("vla.action_head", self.action_head, ("one_layer", "MLP"))
        check_choice("vla.actions", self.actions, ("embedding", "raw"))
        check_at_least(0, "vla", self, "state_dim")
        check_at_least(1, "vla", self, "action_outputs")


@dataclass(frozen=True)
class ActionVAEConfig:
    """ACT-style transformer VAE over action chunks. Source: reference implementation, published sizes."""

    chunk: int = 20
    action_dim: int = 6
    width: int = 512
    feed_forward: int = 3200
    num_heads: int = 8
    encoder_layers: int = 4  # also of the small encoder over the memory token
    decoder_layers: int = 7
    latent: int = 32
    dropout: float = 0.1
    pre_norm: bool = False
    kl_weight: float = 1e-4
    masked_mean: bool = False  # False: the published L1 mean runs over padded elements too

    def __post_init__(self):
        group = "action_vae_model"
        check_at_least(1, group, self, "chunk", "action_dim", "width", "feed_forward", "num_heads")
        check_at_least(1, group, self, "encoder_layers", "decoder_layers", "latent")
        check_at_least(0, group, self, "kl_weight")
        check_share(group, self, "dropout")
        if self.width % self.num_heads:
            raise ConfigError(f"action_vae_model.width {self.width} is not a multiple of num_heads {self.num_heads}")


@dataclass(frozen=True)
class VQGANConfig:
    """taming-transformers VQGAN; defaults are Chameleon's tokenizer. Source: `vqgan.yaml`."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = ()
    resolution: int = 512  # nominal: decides at which level attention_resolutions apply
    z_channels: int = 256
    num_codes: int = 8192
    code_width: int = 256
    in_channels: int = 3
    out_channels: int = 3
    commitment: float = 0.25
    dropout: float = 0.0

    def __post_init__(self):
        group = "vqgan_model"
        check_at_least(1, group, self, "channels", "z_channels", "num_codes", "code_width")
        check_at_least(1, group, self, "in_channels", "out_channels")
        check_at_least(0, group, self, "num_res_blocks", "commitment")
        check_share(group, self, "dropout")

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.multipliers) - 1)


@dataclass(frozen=True)
class SequenceConfig:
    """Layout of one training sequence. Source: reference.md of the method, section 4."""

    length: int = 4096  # tokens; shorter sequences are padded with id 0
    num_frames: int = 4
    frame_interval: int = 1  # steps between two frames; the public code has the option but always takes 1
    language_first: bool = True
    language_instruction_per_frame: bool = True
    repeat_lang_tokens: int = 1
    condition_frame_num: int = 1
    train_later_text: bool = True  # text before later frames is trained, as published
    use_wrist_frame: bool = True
    use_state: bool = True  # False in stage 1: no state, no <action>
    clips: int = 1  # examples packed in one sequence; each has its own positions and sees only itself

    def __post_init__(self):
        check_at_least(1, "sequence", self, "length", "num_frames", "frame_interval", "clips")


@dataclass(frozen=True)
class ImageConfig:
    """From camera pixels to what the VQGAN sees."""

    shortest_edge: int = 384
    fit: str = "crop"  # the long edge: "crop" or "pad" to a multiple of 32, "square", "reference_train"/"_infer"
    jitter: float = 0.0  # brightness/contrast/saturation range, drawn once a clip

    def __post_init__(self):
        check_choice("data.image.fit", self.fit, ("crop", "pad", "square", "reference_train", "reference_infer"))
        check_at_least(1, "data.image", self, "shortest_edge")
        check_at_least(0, "data.image", self, "jitter")
        if self.shortest_edge % 32 and not self.fit.startswith("reference"):
            raise ConfigError(f"data.image.shortest_edge {self.shortest_edge} is not a multiple of 32")


@dataclass(frozen=True)
class RLDSConfig:
    """Keys of an RLDS or Open-X data set, which every one of them chooses anew."""

    front: str = "image"  # in observation; so are wrist and state
    wrist: str = "wrist_image"
    state: str = "state"  # "": none
    action: str = ""  # key of the action where it is a dictionary
    split: str = "train"
    fps: float = 10.0  # the data does not tell; Open-X sets run at 3 to 20

    def __post_init__(self):
        if not self.fps > 0:
            raise ConfigError(f"data.rlds.fps is {self.fps}; give the steps a second of the recording")


@dataclass(frozen=True)
class DataConfig:
    """What a stage reads."""

    source: str = ""  # KIND:PATH, for example "lerobot:DIR"; `rynnvla data --help` lists the kinds
    mixture: tuple[tuple[str, float], ...] = ()  # (source, weight) pairs instead of one source
    exclude: str = ""  # JSON file of `rynnvla data validate --fix`: episodes to leave out
    max_damaged: float = 0.01  # share of the examples drawn that may be unreadable before the run stops
    front: str = "observation.images.front"  # LeRobot camera keys
    wrist: str = "observation.images.wrist"
    rlds: RLDSConfig = field(default_factory=RLDSConfig)
    state_unit: str = ""  # expected unit of state and action; "" takes the source's own
    chunk: int = 20
    normalization: str = "mean_std"  # or "min_max": 1st/99th percentile to [-1, 1]
    frame_codes: str = "step"  # "step": VQ-encode on the device in the step; "ahead": once, before training
    num_threads: int = 2
    num_workers: int = 0  # processes that read and decode; 0: threads only
    image: ImageConfig = field(default_factory=ImageConfig)

    def __post_init__(self):
        check_choice("data.frame_codes", self.frame_codes, ("step", "ahead"))
        check_choice("data.normalization", self.normalization, ("mean_std", "min_max"))
        if self.source and self.mixture:
            raise ConfigError("data.source and data.mixture are both set; put the source into the mixture")
        if not all(weight > 0 for _, weight in self.mixture):
            raise ConfigError(f"data.mixture has a weight that is not positive: {self.mixture}")
        check_share("data", self, "max_damaged")
        check_at_least(1, "data", self, "chunk")
        check_at_least(0, "data", self, "num_threads", "num_workers")
        if self.frame_codes == "ahead" and self.image.jitter:
            raise ConfigError("data.image.jitter needs data.frame_codes='step': codes made ahead cannot be jittered")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Source: published fine-tuning recipe."""

    peak_lr: float = 2e-5
    min_lr: float = 2e-5
    schedule: str = (
        "vla"  # "vla": linear warm-up from 0, then cosine to min_lr; "action_vae": timm-like, lagging one step
    )
    warmup_steps: float = 50.0
    warmup_lr: float = 1e-6  # first rate of the action_vae schedule
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 4.0  # global norm; 0 is off
    accumulation: int = 1  # micro-batches per update
    offload: bool = False  # moments wait in the host's memory between updates (TPU and GPU)

    def __post_init__(self):
        check_choice("optimizer.schedule", self.schedule, ("vla", "action_vae"))
        check_at_least(0, "optimizer", self, "peak_lr", "min_lr", "warmup_steps", "warmup_lr", "eps", "weight_decay")
        check_at_least(0, "optimizer", self, "clip_norm")
        check_at_least(1, "optimizer", self, "accumulation")
        check_share("optimizer", self, "beta1", "beta2")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what is left."""

    replica: int = 0  # weights copied, gradients summed over the slow network; 0: the number of TPU slices
    data: int = 1  # weights copied
    fsdp: int = -1  # weights, optimizer state and batch cut
    sequence: int = 1  # tokens of one sequence cut (context parallel)
    tensor: int = 1  # heads, feed-forward and vocabulary cut

    def __post_init__(self):
        for axis, size in vars(self).items():
            if size < 1 and size != -1 and (axis, size) != ("replica", 0):
                raise ConfigError(f"mesh.{axis} is {size}; it must be at least 1, or -1 for what is left")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep; a save is made when either interval has passed, and at the end."""

    every_steps: int = 1000  # 0: by time only
    every_minutes: float = 15.0  # since the last save; 0: by steps only
    keep: int = 2  # newest steps; the one before is what a damaged one falls back to
    keep_every: int = 0  # also keep every such step for good; 0: none
    retries: int = 3  # saves that may fail in a row before the run stops

    def __post_init__(self):
        check_at_least(0, "checkpoint", self, "every_steps", "every_minutes", "keep_every")
        check_at_least(1, "checkpoint", self, "retries")
        if not self.every_steps and not self.every_minutes:
            raise ConfigError("checkpoint.every_steps and checkpoint.every_minutes are both off; set at least one")
        if self.keep < 2:
            raise ConfigError(f"checkpoint.keep {self.keep} leaves nothing to fall back to; use at least 2")


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases beside TensorBoard. Entity, group and tags are its own: WANDB_ENTITY, WANDB_RUN_GROUP, ..."""

    project: str = ""  # "": not used
    mode: str = "online"  # or "offline": files in the work dir, for `wandb sync`

    def __post_init__(self):
        check_choice("wandb.mode", self.mode, ("online", "offline"))


@dataclass(frozen=True)
class InitFromConfig:
    """Weights and assets of an earlier stage or an imported model directory."""

    path: str = ""
    step: int = -1  # -1: newest
    new: tuple[str, ...] = ()  # parameter paths (globs) that may start fresh; anything else missing is an error


@dataclass(frozen=True)
class TrainConfig:
    """One run of one stage."""

    stage: str  # action_vae | vqgan | video | trajectory | robot
    seed: int = 0
    total_steps: int = 1000
    batch_size: int = 8  # global, per update
    log_every: int = 10
    compute_dtype: str = "bfloat16"
    remat: str = "full"  # none | projections | attention | full | offload: what a layer keeps for its gradient
    codes_like_codebook: bool = (
        False  # from scratch: image tokens' embeddings start as projections of the VQGAN's codes
    )
    attention: str = "auto"  # auto | xla | splash | splash_interpreted | cudnn
    loss_chunk: int = 8192  # columns of the vocabulary whose logits exist at once
    z_loss_weight: float = 1e-5
    action_loss_weight: float = 1.0
    peak_flops: float = 0.0  # of one device, for the utilisation metric; 0 leaves the metric out
    max_skipped_in_a_row: int = 5  # updates not applied (loss or gradient not finite) before their batches are left out
    watchdog_seconds: float = 300.0  # a step this long, and 10 times the median, ends the process with stacks; 0: off
    profile_steps: tuple[int, ...] = ()  # (first, last) step to trace into WORKDIR/profile
    compilation_cache: str = "auto"  # directory; auto: ~/.cache/rynnvla_jax/xla, and none on CPU; "": none
    tokenizer: str = ""  # tokenizer.json; "" inherits from init_from
    vqgan: str = ""  # model directory; "" inherits from init_from
    action_vae: str = ""  # model directory
    vla: VLAConfig = field(default_factory=VLAConfig)
    action_vae_model: ActionVAEConfig = field(default_factory=ActionVAEConfig)
    vqgan_model: VQGANConfig = field(default_factory=VQGANConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self):
        check_choice("config.stage", self.stage, ("action_vae", "vqgan", "video", "trajectory", "robot"))
        check_choice("config.remat", self.remat, ("none", "projections", "attention", "full", "offload"))
        check_choice("config.attention", self.attention, ("auto", "xla", "splash", "splash_interpreted", "cudnn"))
        check_choice("config.compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        if self.codes_like_codebook and (self.init_from.path or self.stage not in ("video", "trajectory", "robot")):
            raise ConfigError(
                "config.codes_like_codebook is for stages 1 to 3 from scratch; leave it out with init_from.path"
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


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key in full, then, after "; ", the remedy."""


def check_choice(key: str, value: str, known: Collection[str]) -> None:
    """Raises ConfigError when `value` is none of `known`."""
    if value not in known:
        raise ConfigError(
            f"{key} is {value!r}; choose one of {', '.join(known)}.{did_you_mean(value, known)}".rstrip(".")
        )


def check_at_least(minimum: int, group: str, config: Any, *names: str) -> None:
    """Raises ConfigError when one of the named keys of a group is below `minimum`, or NaN."""
    for name in names:
        value = getattr(config, name)
        if not value >= minimum:
            raise ConfigError(f"{group}.{name} is {value}; it must be at least {minimum}")


def check_share(group: str, config: Any, *names: str) -> None:
    """Raises ConfigError unless the named keys of a group are from 0 to below 1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{group}.{name} is {value}; it is a share from 0 to below 1")


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "config") -> T:
    """Builds the frozen dataclass `cls` from nested mappings.

    Raises:
      ConfigError: unknown key (with the nearest known one), missing key or wrong type, by dotted path.
    """
    fields = _fields(cls)
    hints = typing.get_type_hints(cls)
    for key in values:
        check_key(cls, key, path)
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [n for n in required if n not in values]:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    return cls(**{k: _convert(hints[k], v, f"{path}.{k}") for k, v in values.items()})


def check_key(cls: type, key: str, path: str = "config") -> None:
    """Raises ConfigError, with the nearest known key, when the dataclass has no such dotted key."""
    name, _, rest = key.partition(".")
    fields = _fields(cls)
    if name not in fields:
        hint = did_you_mean(name, fields, prefix=f"{path}.", otherwise=f" Known keys: {', '.join(fields)}.")
        raise ConfigError(f"unknown key {path}.{name}.{hint}")
    if rest:
        group = typing.get_type_hints(cls)[name]
        if not (isinstance(group, type) and dataclasses.is_dataclass(group)):
            raise ConfigError(f"unknown key {path}.{key}; {path}.{name} is one value, no group of keys")
        check_key(group, rest, f"{path}.{name}")


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)}


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`, ready for JSON: tuples become lists."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def read_json(file: Path, remedy: str) -> Any:
    """The content of a file that a run has written. Raises ConfigError, with the remedy, when it is damaged."""
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
            raise ConfigError(f"{path} must be a group of keys, got {value!r}")
        return from_dict(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise ConfigError(f"{path} must be a list, got {value!r}")
        args = typing.get_args(hint)
        items = list(value)
        types_ = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(types_) != len(items):
            raise ConfigError(f"{path} needs {len(types_)} values, got {len(items)}")
        return tuple(_convert(t, v, f"{path}[{i}]") for i, (t, v) in enumerate(zip(types_, items, strict=True)))
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{path}: union types are not used in configs")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {hint.__name__}, got {type(value).__name__} {value!r}")
    return value
