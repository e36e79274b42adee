"""The layout of an export folder: `config.json` and the files of its tensors. Needs neither torch nor jax.

    EXPORT/config.json             HF Chameleon fields, RynnVLA's three, and the group "rynnvla"
    EXPORT/model*.safetensors      transformer, HF-style keys; with model.safetensors.index.json when sharded
    EXPORT/tokenizer.json, EXPORT/statistics.json
    EXPORT/vqgan/{config.json, model.safetensors}         VQGANConfig fields, taming keys
    EXPORT/action_vae/{config.json, model.safetensors}    ActionVAEConfig fields, public ActionVAE keys;
                                                          absent if the model predicts raw actions
    EXPORT/policy_{pre,post}processor.json                LeRobot's processors around the policy (plugins/)
    EXPORT/sha256.json             SHA-256 of every other file that was written, by relative path

The writer (convert/) and the reader (policy.py) both use this module, so that they agree.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from rynnvla_jax import metadata
from rynnvla_jax.config import ConfigError, ImageConfig, SequenceConfig, VLAConfig, check_size, from_dict, to_dict
from rynnvla_jax.errors import brief
from rynnvla_jax.recording import Recording
from rynnvla_jax.storage import bucket_cache, files, hub

FORMAT_VERSION = 2  # 1 had `rynnvla.unit`; since 2 the columns of statistics.json say more
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
STATISTICS = "statistics.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
VQGAN = "vqgan"
ACTION_VAE = "action_vae"
SUMS = "sha256.json"

T = TypeVar("T")

# LeRobot 0.4's pipelines: rename cameras, make a batch, move tensors. They normalise nothing: the policy does.
PROCESSORS = {
    "policy_preprocessor.json": {
        "name": "policy_preprocessor",
        "steps": [
            {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
            {"registry_name": "to_batch_processor", "config": {}},
            {"registry_name": "device_processor", "config": {"device": "cpu"}},
        ],
    },
    "policy_postprocessor.json": {
        "name": "policy_postprocessor",
        "steps": [{"registry_name": "device_processor", "config": {"device": "cpu"}}],
    },
}

# What config.json says of every model.
CHAMELEON = {
    "architectures": ["ChameleonForConditionalGeneration"],
    "model_type": "chameleon",
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}

# HF field -> TransformerConfig field, where the two mean the same.
HF_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "feed_forward",
    "rms_norm_eps": "norm_eps",
    "swin_norm": "swin_norm",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "mask_image_logits": "mask_image_logits",
    "initializer_range": "init_std",
    "dropout": "dropout",
}
_TRANSFORMER = {
    **HF_FIELDS,
    "rope_theta": "rope_theta",
    "image_tokens": "image_tokens",  # ours: [first, last) id of the image codes; HF derives it from vocabulary_map
    "q_norm_rows": "q_norm_rows",  # ours: HF has only model_parallel_size, which cannot tell q from k
    "k_norm_rows": "k_norm_rows",
}
_HEAD = {"state_dim": "state_dim", "action_head_type": "action_head", "action_latent_dim": "action_outputs"}
_VLA = {**_HEAD, "actions": "actions", "stateless": "stateless"}  # older exports predict embeddings, from a state
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", *_HEAD)


@dataclass(frozen=True)
class _Index:
    """Of sharded weights: tensor -> file."""

    weight_map: dict[str, Annotated[str, metadata.FileName()]]


class PolicyError(ValueError):
    """No motion was produced; the message says what is wrong and how to correct it."""


class ConnectionLost(PolicyError):
    """The policy's server cannot be reached, disconnected or did not answer in time; the observation may be valid."""


class ExportError(PolicyError):
    """An export folder that cannot be used; the message names the file, the key and the remedy."""


@dataclass(frozen=True)
class Cameras:
    """LeRobot's keys of the cameras, so that a robot's driver knows which is which."""

    front: str
    wrist: str = ""  # "" where the policy reads no wrist frame

    def by_view(self, layout: SequenceConfig) -> dict[str, str]:
        """The key of every view; an extra view is named by its key, with or without "observation.images."."""
        extra = {v: v if v.startswith("observation.") else f"observation.images.{v}" for v in layout.extra_views}
        return {view: extra.get(view) or getattr(self, view) for view in layout.views}


@dataclass(frozen=True)
class ExportConfig:
    """All of EXPORT/config.json."""

    vla: VLAConfig
    sequence: SequenceConfig
    image: ImageConfig
    chunk: int  # steps the policy returns
    action_dim: int
    normalization: str  # "mean_std" or "min_max"
    cameras: Cameras
    recording: Recording = Recording()  # older exports do not say

    def __post_init__(self):
        if self.normalization not in ("mean_std", "min_max"):
            raise ConfigError(f"normalization is {brief(self.normalization)}; choose 'mean_std' or 'min_max'")
        check_size(2**16, "rynnvla", self, "chunk", "action_dim")


def config_to_json(config: ExportConfig) -> dict[str, Any]:
    """`ExportConfig` -> the content of EXPORT/config.json, including `format_version`."""
    group = to_dict(config)
    vla = group.pop("vla")
    transformer = vla["transformer"]
    return {
        **CHAMELEON,
        "max_position_embeddings": config.sequence.length,
        "model_parallel_size": transformer["q_norm_rows"],
        "rope_parameters": {"rope_type": "default", "rope_theta": transformer["rope_theta"]},  # transformers 5
        **{theirs: transformer[ours] for theirs, ours in _TRANSFORMER.items()},
        **{theirs: vla[ours] for theirs, ours in _VLA.items()},
        "rynnvla": {"format_version": FORMAT_VERSION, **group},
    }


def config_from_json(values: Mapping[str, Any], where: str = CONFIG) -> ExportConfig:
    """The inverse of `config_to_json`; `where` names the file in errors.

    HF fields we have no use for (`architectures`, `vocabulary_map`, ...) are left alone; the group
    "rynnvla" is ours and strict.

    Raises:
      ExportError: a missing or unknown key, a wrong type, or a newer format_version.
    """
    group = values.get("rynnvla")
    if not isinstance(group, Mapping):
        raise ExportError(
            f"{where} lacks the group 'rynnvla', so it is not an export of rynnvla_jax; export the model again"
        )
    version = group.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ExportError(
            f"{where}: rynnvla.format_version is {brief(version)}, not {FORMAT_VERSION}; export the model again"
        )
    if version > FORMAT_VERSION:
        raise ExportError(
            f"{where}: rynnvla.format_version is {version}, this program reads up to {FORMAT_VERSION}; "
            "upgrade rynnvla_jax on this machine"
        )
    if missing := [key for key in _REQUIRED if key not in values]:
        raise ExportError(f"{where} lacks {', '.join(missing)}; export the model again")
    transformer = {ours: values[theirs] for theirs, ours in _TRANSFORMER.items() if theirs in values}
    transformer.setdefault("num_kv_heads", values["num_attention_heads"])
    for rows in ("q_norm_rows", "k_norm_rows"):
        transformer.setdefault(rows, values.get("model_parallel_size", 1))
    vla = {"transformer": transformer, **{ours: values[theirs] for theirs, ours in _VLA.items() if theirs in values}}
    robot = {key: value for key, value in group.items() if key not in ("format_version", "unit")}
    try:
        return from_dict(ExportConfig, {"vla": vla, **robot}, "rynnvla")
    except ConfigError as error:
        raise ExportError(f"{where}: {error}") from error


def write_config(folder: str | Path, config: ExportConfig) -> None:
    """Writes EXPORT/config.json, and LeRobot's processor files."""
    write_json(Path(folder) / CONFIG, config_to_json(config))
    for name, pipeline in PROCESSORS.items():
        write_json(Path(folder) / name, pipeline)


def write_sums(folder: Path) -> None:
    """Writes `sha256.json` over all files of a finished export."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files.write_json(folder / SUMS, {name: files.sha256(folder / name) for name in names if name != SUMS})


def check_sums(folder: Path) -> None:
    """Raises ExportError for a file that is not as it was written; says so when an old export has no sums."""
    try:
        sums = files.read_json(folder / SUMS)
    except FileNotFoundError:
        print(f"{folder} has no {SUMS}: it cannot be checked for damage; export it again", file=sys.stderr, flush=True)
        return
    except (files.DamagedFileError, OSError) as error:
        raise ExportError(f"{error}; copy the export again") from None
    if not isinstance(sums, dict):
        raise ExportError(f"{folder / SUMS} is not a table of sums; copy the export again")
    for name, expected in sums.items():
        try:
            found = files.sha256(folder / name)
        except FileNotFoundError:
            raise ExportError(f"{folder / name} is missing; export the model again or copy the whole folder") from None
        except OSError as error:
            raise ExportError(f"{folder / name} cannot be read: {error.strerror}; copy the export again") from None
        if found != expected:
            raise ExportError(f"{folder / name} is not the file that was exported (SHA-256); copy the export again")


def local(folder: str | Path) -> Path:
    """The folder on this machine: of an export in a bucket or on the Hugging Face Hub a copy.

    Raises ExportError for a repository that is no export; HubError, BucketError, CacheError.
    """
    if not hub.is_name(folder):
        return bucket_cache.copy(files.place(folder))
    name = str(folder)
    if CONFIG not in (names := hub.contents(name)):
        raise ExportError(f"{name} contains no {CONFIG}, so it is no export; give what `convert export --push` made")
    if SUMS not in names:
        return hub.here(name)
    sums = read_json(hub.here(name, choose=lambda names: [SUMS]) / SUMS)
    return hub.here(name, choose=lambda names: [n for n in names if n in sums or n == SUMS])


def read_config(folder: str | Path) -> ExportConfig:
    """Reads EXPORT/config.json. Raises ExportError as `config_from_json`, and when there is no such file."""
    path = Path(folder) / CONFIG
    return config_from_json(read_json(path), str(path))


def write_model_config(folder: str | Path, config: Any) -> None:
    """Writes FOLDER/config.json of the VQGAN or ActionVAE: the fields of its dataclass."""
    write_json(Path(folder) / CONFIG, to_dict(config))


def read_model_config(folder: str | Path, cls: type[T]) -> T:
    """Reads FOLDER/config.json into `cls` (VQGANConfig or ActionVAEConfig). Raises ExportError."""
    path = Path(folder) / CONFIG
    try:
        return from_dict(cls, read_json(path), cls.__name__)
    except ConfigError as error:
        raise ExportError(f"{path}: {error}") from error


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a folder, in order: those of the index, or the single model.safetensors.

    Raises:
      ExportError: there are no such files, or one that the index lists is missing.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        if not (folder / WEIGHTS).exists():
            raise ExportError(f"{folder} has neither {WEIGHTS} nor {INDEX}; export the model again")
        return [folder / WEIGHTS]
    names = read_index(folder / INDEX)
    paths = [folder / name for name in names]
    if missing := [file.name for file in paths if not file.exists()]:
        raise ExportError(
            f"{folder / INDEX} lists {', '.join(missing)}, which {folder} does not contain; copy the whole folder"
        )
    return paths


def read_index(path: Path) -> list[str]:
    """The files that a `model.safetensors.index.json` lists, sorted; all in its folder. Raises ExportError."""
    try:
        names = sorted(set(metadata.parse(_Index, read_json(path), str(path)).weight_map.values()))
    except metadata.MetadataError as error:
        raise ExportError(f"{error}; export the model again, or copy it again") from None
    if not names:
        raise ExportError(f"{path} lacks 'weight_map'; export the model again")
    return names


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file with one object. Raises ExportError naming the file."""
    path = Path(path)
    try:
        values = files.read_json(path)
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing; export the model again or copy the whole folder") from error
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}); copy or export it again") from error
    except files.DamagedFileError as error:
        raise ExportError(f"{error}; export the model again") from error
    if not isinstance(values, dict):
        raise ExportError(f"{path} contains {type(values).__name__}, not an object; export the model again")
    return values


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Writes one indented JSON object."""
    files.write_json(Path(path), values, indent=2)
