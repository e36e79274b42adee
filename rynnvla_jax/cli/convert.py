"""`rynnvla convert import | export | push | verify`."""

import contextlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET, OR_HUB, Step, parse, step_number
from rynnvla_jax.cli.main import Command, UsageError, dispatch, quiet_libraries
from rynnvla_jax.storage import bucket_cache, files, hub

_ABOUT = "Public checkpoints become model directories, and model directories become PyTorch export folders.\n"
COMMANDS = {
    "import": Command("turn a public checkpoint into a model directory", __name__, function="import_model"),
    "export": Command("turn a model directory into a PyTorch folder", __name__, "train", "export"),
    "push": Command("put an export into a repository on the Hugging Face Hub", __name__, "hub", "push"),
    "verify": Command("compare a model directory with an export", __name__, function="verify"),
}
Repository = Annotated[str | None, tyro.conf.arg(metavar="hf://USER/NAME")]
File = Annotated[str | None, tyro.conf.arg(metavar="FILE"), OR_BUCKET, OR_HUB]
_BESIDE = ("config.json", "vqgan.yaml")  # what may describe a file of weights, in its folder


@dataclass(frozen=True)
class Import:
    """Turns a public checkpoint into a model directory that training starts from (config.init_from.path).

    SOURCE is a folder or a file: safetensors (one or sharded), pytorch_model*.bin, a single .pt, .pth or .ckpt, or
    Meta's own consolidated*.pth with params.json; of Chameleon, RynnVLA-001, an ActionVAE or a VQGAN. What lies in a
    bucket is copied first; of hf://USER/NAME[@REV][/PATH] what is needed is downloaded. Pickles are read with
    weights_only, so no code in them runs. Every tensor must have a counterpart: when tensors are missing, unexpected or
    of another shape, their number, what to do and ten of them are shown, and nothing is written. Memory stays under
    twice the largest tensor plus 1 GB.

    A base Chameleon checkpoint gets RynnVLA's four vocabulary rows (normal, with the config's initializer_range) and
    two projections (normal, 1/sqrt(inputs); biases zero), all initialised from --seed and listed in the report.

      rynnvla convert import chameleon-7b/ base/ --tokenizer text_tokenizer.json --vqgan vqgan.ckpt
      rynnvla convert import hf://Alibaba-DAMO-Academy/RynnVLA-001-7B-Trajectory stage2/ --vqgan vqgan.ckpt
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE"), OR_BUCKET, OR_HUB]
    """The public checkpoint: a folder, a file, or a name on the Hugging Face Hub."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL_DIR"), OR_BUCKET]
    """Model directory to create, here or in a gs:// bucket; it must not exist."""
    kind: Literal["auto", "vla", "action_vae", "vqgan"] = "auto"
    """What the checkpoint is; auto recognizes it by its tensors."""
    model_config: File = None
    """JSON or YAML instead of the checkpoint's own config.json, ActionVAE constructor arguments, or vqgan.yaml."""
    tokenizer: File = None
    """The tokenizer.json; by default the one in the folder of the weights."""
    vqgan: File = None
    """A vqgan.ckpt with vqgan.yaml in its folder, or an exported VQGAN; becomes assets/vqgan."""
    vq: bool = False
    """Import the checkpoint's own model.vqmodel.*, which has no decoder, as assets/vqgan."""
    action_vae: File = None
    """Weights of an ActionVAE, which become assets/action_vae."""
    statistics: File = None
    """The statistics.json of the robot's data; the ActionVAE gets it too."""
    ignore: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PREFIX")] = ()
    """Ignore tensors whose names begin with this."""
    seed: int = 0
    """Seed of the new weights."""


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    step: Step = None
    """Checkpoint step; by default the newest; "best": that of checkpoint.keep_best."""
    tokens: int = 16
    """Length of the random prompt for the comparison, in tokens."""
    seed: int = 0
    """Seed of the random input."""
    weights: Literal["raw", "ema"] = "raw"
    """Weights of the model directory: as trained, or their average (optimizer.ema)."""
    tolerance: float | None = None
    """Limit of the transformer's difference; by default 1e-4 for float32, 1e-2 for float16, 5e-2 for bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Export(_Comparison):
    """Turns a model directory (the work dir of a training run, or an import) into a folder for PyTorch.

    --format rynnvla is what a robot runs: transformer, tokenizer, statistics, VQGAN and ActionVAE.
    --format transformers loads with transformers' ChameleonForConditionalGeneration; it leaves out state_projection and
    action_head, which transformers does not know.

    Writing keeps memory under twice the largest tensor plus 1 GB. `verify`, which follows, needs about four layers in
    float32 (7B: 4 GB, 34B: 14 GB). The folder is created only when the verification passes; otherwise nothing is
    written and the exit status is 1.

    --push puts the folder into a repository on the Hugging Face Hub, as `rynnvla convert push` does, with a model card
    of data, config, held-out metrics, licence and base model.

      rynnvla convert export runs/robot EXPORT --dtype bfloat16
      rynnvla convert export runs/robot EXPORT --push hf://USER/NAME --license apache-2.0
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR"), OR_BUCKET]
    """Work dir of a training run, or another model directory, here or in a bucket."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EXPORT"), OR_BUCKET]
    """Folder to create, here or in a bucket; it must not exist."""
    format: Literal["rynnvla", "transformers"] = "rynnvla"
    """For our own PyTorch modules, or for Hugging Face transformers."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the transformer's weights."""
    shard_mb: int = 4000
    """Largest size of a file, in 2^20 bytes; larger weights are split."""
    push: Repository = None
    """Then push it there; a new repository is private, unless --public is given."""
    public: bool = False
    """With --push: everybody may read a repository that is created; one that exists stays as it is."""
    license: str = "other"
    """With --push: licence of the weights in the model card, by the Hub's name, such as apache-2.0."""


@dataclass(frozen=True)
class Push:
    """Puts an export into a repository on the Hugging Face Hub, as one commit; a new repository is private.

    It needs a login with the right to write (`hf auth login`, or HF_TOKEN). A model card (README.md) is written into
    the export, unless there is one. Files of an earlier export that this one has not are deleted from the repository.
    Where no file differs there is no new commit.

      rynnvla convert push EXPORT hf://USER/NAME
    """

    export: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EXPORT")]
    """Folder made by `rynnvla convert export`."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="hf://USER/NAME")]
    """Repository of a model; it is created if needed."""
    public: bool = False
    """Everybody may read a repository that is created; one that exists stays as it is."""
    license: str = "other"
    """Licence of the weights in the model card, by the Hub's name, such as apache-2.0."""


@dataclass(frozen=True, kw_only=True)
class Verify(_Comparison):
    """Runs the JAX model and the exported PyTorch modules on the same random input and prints the largest differences.

    It compares embeddings, hidden states, logits, the action latent, and the VQGAN and ActionVAE where they are part of
    the export. The transformer is compared layer by layer: memory is about four layers in float32 (7B: 4 GB, 34B: 14
    GB). Differences are relative to max(1, largest value). The limits are 1e-4 for float32, 1e-2 for float16 and 5e-2
    for bfloat16.
    """

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKDIR"), OR_BUCKET]
    """Work dir of a training run, or another model directory, here or in a bucket."""
    export: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EXPORT"), OR_BUCKET]
    """Export folder, here or in a bucket."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    return dispatch("rynnvla convert", COMMANDS, argv, _ABOUT)


def import_model(argv: list[str]) -> int:
    """`rynnvla convert import`. Returns the exit status."""
    arguments = parse(Import, "rynnvla convert import", argv, {"--config": "--model-config"})
    from rynnvla_jax.convert.importer import import_checkpoint

    quiet_libraries()

    report = import_checkpoint(
        _here(arguments.source),
        arguments.out,
        kind=arguments.kind,
        tokenizer=_here(arguments.tokenizer),
        vqgan_source=_here(arguments.vqgan),
        action_vae_source=_here(arguments.action_vae),
        statistics=_here(arguments.statistics),
        model_config=_read_config(_here(arguments.model_config)),
        ignore=arguments.ignore,
        vq=arguments.vq,
        seed=arguments.seed,
    )
    print(bucket_cache.named(str(report)))
    print(f"wrote {arguments.out}")
    return 0


def export(argv: list[str]) -> int:
    """`rynnvla convert export`. Returns the exit status."""
    arguments = parse(
        Export, "rynnvla convert export", argv, {"--shard-gb": "give --shard-mb; 4 GB are --shard-mb 4000"}
    )
    from rynnvla_jax.convert import ConversionError, stream
    from rynnvla_jax.convert.exporter import write_export

    quiet_libraries()
    if arguments.push:
        from rynnvla_jax.storage import hub_push

        if files.is_bucket(arguments.out):
            raise UsageError(f"--push needs EXPORT on this machine, not {arguments.out}")
        hub_push.check(arguments.push)
    elif arguments.public or arguments.license != "other":
        raise UsageError("--public and --license are for --push hf://USER/NAME")

    with stream.finished_export(arguments.out) as partial:
        report = write_export(
            arguments.model,
            partial,
            step=step_number(arguments.step),
            layout=arguments.format,
            dtype=arguments.dtype,
            shard_bytes=arguments.shard_mb * 2**20,
            weights=arguments.weights,
        )
        print(report)
        from rynnvla_jax.convert import verify

        found = verify.verify(
            arguments.model,
            partial,
            step=report.step,
            tokens=arguments.tokens,
            seed=arguments.seed,
            tolerance=arguments.tolerance,
            weights=arguments.weights,
        )
        print(verify.table(found))
        if failed := verify.failures(found):
            raise ConversionError(f"{arguments.out} was not written: PyTorch and JAX disagree on {failed}")
        if arguments.push:
            _write_card(partial, arguments.push, arguments.license, arguments.model, report.step)
    print(f"wrote {arguments.out}", flush=True)
    if arguments.push:
        _push(arguments.out, arguments.push, arguments.public)
    return 0


def push(argv: list[str]) -> int:
    """`rynnvla convert push`. Returns the exit status."""
    arguments = parse(Push, "rynnvla convert push", argv)
    from rynnvla_jax.deploy import export_format
    from rynnvla_jax.storage import hub_push

    hub_push.check(arguments.name)
    export_format.check_sums(arguments.export)
    _write_card(arguments.export, arguments.name, arguments.license)
    _push(arguments.export, arguments.name, arguments.public)
    return 0


def _write_card(folder: Path, name: str, licence: str, model: Path | None = None, step: int = 0) -> None:
    """README.md of the export; with the config and metrics of the work dir that it was made from, where it is one."""
    from rynnvla_jax.checkpoint import model_dir
    from rynnvla_jax.convert import model_card

    trained = model is not None and (model / "assets" / "config.json").exists()
    config = model_dir.read_train_config(model) if model is not None and trained else None
    metrics = model_card.metrics_of(model, step) if model is not None and trained else None
    model_card.write(folder, licence, name, config, metrics)


def _push(folder: Path, name: str, public: bool) -> None:
    from rynnvla_jax.storage import hub_push

    try:
        print(f"pushed to {hub_push.push(folder, name, private=not public)}")
    except hub.HubError as error:
        again = f"rynnvla convert push {shlex.quote(str(folder))} {name}{' --public' if public else ''}"
        raise hub.HubError(f"{error}; the export is in {folder}, push it again with: {again}") from error


def verify(argv: list[str]) -> int:
    """`rynnvla convert verify`. Returns the exit status."""
    arguments = parse(Verify, "rynnvla convert verify", argv)
    from rynnvla_jax.convert import ConversionError, verify

    quiet_libraries()

    found = verify.verify(
        arguments.model,
        bucket_cache.copy(arguments.export),
        step=step_number(arguments.step),
        tokens=arguments.tokens,
        seed=arguments.seed,
        tolerance=arguments.tolerance,
        weights=arguments.weights,
    )
    print(verify.to_json(found) if arguments.json else verify.table(found))
    if failed := verify.failures(found):
        raise ConversionError(f"PyTorch and JAX disagree on {failed}")
    return 0


def _here(text: str | None) -> Any:
    """The path on this machine; beside the copy of a file what describes it."""
    if text is None:
        return None
    if hub.is_name(text):
        from rynnvla_jax.convert.starting_point import of_weights

        copy = hub.here(text, choose=of_weights)
        if copy.is_file():
            hub.here(hub.folder_of(text), choose=lambda names: [n for n in names if n in _BESIDE])
        return copy
    path = files.place(text)
    if not files.is_bucket(path):
        return path
    copy = bucket_cache.copy(path)
    for name in _BESIDE if copy.is_file() else ():
        (copy.parent / name).unlink(missing_ok=True)  # of an earlier copy
        with contextlib.suppress(FileNotFoundError):
            files.copy(bucket_cache.copy(path.parent / name), copy.parent / name)
    return copy


def _read_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    if path.suffix in (".yaml", ".yml"):
        from rynnvla_jax.convert.frozen import read_vqgan_yaml

        return read_vqgan_yaml(path)
    from rynnvla_jax.convert.foreign import read_json

    return read_json(path)
