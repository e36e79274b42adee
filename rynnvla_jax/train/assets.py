"""The assets of a run: tokenizer, statistics and frozen models, copied into its work dir; the loader that uses them.

Process 0 copies; all processes read the copies, so the work dir must be on a file system that they share.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from data_pipelines.episode import Episodes
from data_pipelines.loader import CodesOf, Loader
from data_pipelines.sources import mixture
from data_pipelines.sources.exclude import kind_and_path
from rynnvla_jax.actions import Statistics
from rynnvla_jax.checkpoint import model_dir, provenance, reader
from rynnvla_jax.config import ActionVAEConfig, ConfigError, TrainConfig, means, to_dict
from rynnvla_jax.convert import ConversionError, starting_point
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import listing
from rynnvla_jax.recording import hertz
from rynnvla_jax.sequence import PATCH
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import buckets, files, hub
from rynnvla_jax.vocabulary import TextTokenizer, Vocabulary

# What a run puts into its work dir, and the logs of launchers and shells, as patterns of names.
_CONTENT = (
    *("assets", "checkpoints", "codes", "compiled", "profile", "wandb", "tensorboard", "pictures"),
    *("*.json", "*.jsonl", "*.damaged"),
    *(".*", "*.log", "*.log.*", "*.out", "*.err", "*.txt", "logs"),
)
_ASSETS = (
    *("tokenizer.json", "statistics.json", "config.json", "model.json", "run.json", "machine.json", "base.json"),
    *("vqgan", "action_vae"),
)
_MODEL = ("assets", "checkpoints")


@dataclass(frozen=True)
class Assets:
    """The assets of a run, already copied into its work dir."""

    tokenizer: TextTokenizer | None
    statistics: Statistics | None
    frozen: dict[str, Path]  # model directories


def prepare(config: TrainConfig, workdir: Path) -> tuple[TrainConfig, Assets]:
    """Finds tokenizer, statistics and frozen models, copies them into the work dir, completes the config.

    Raises:
      ConfigError: an asset is neither configured nor inherited, or does not fit the model.
      PeerError: one of these errors on process 0.
    """
    multihost.first(lambda: collect(config, workdir))
    return multihost.together(lambda: load(config, workdir))


def collect(config: TrainConfig, workdir: Path) -> None:
    """Fills `workdir/assets`, unless the run has saved something and everything is there already."""
    own = workdir / "assets"
    if reader.steps(workdir):
        check_same_run(config, own / "config.json")
        return
    found = find(config)
    own.mkdir(parents=True, exist_ok=True)
    for name, path in found.items():
        if name == "tokenizer":
            files.write_bytes(own / "tokenizer.json", path.read_bytes())
        else:
            files.remove(own / name)  # an attempt that never saved may have left another model
            model_dir.copy_model(path, own / name)


def check_buckets(config: TrainConfig, workdir: Path) -> None:
    """Raises BucketError, within seconds, when a bucket that the run names cannot be used; ConfigError for s3:// as the
    work dir."""
    if files.is_bucket(workdir):
        if buckets.scheme(workdir) != "gs":
            raise ConfigError(
                f"--workdir {workdir}: checkpoints cannot be saved in s3:// buckets (Orbax); use a gs:// bucket or a "
                "directory of a file system that all processes share. Data and models can be read from s3://"
            )
        buckets.check(workdir, write=True)
    sources = [source for source, _ in mixture(config.data)] if config.data.source or config.data.mixture else []
    paths = [source.partition(":")[2] for source in sources]
    paths += [source.partition(":")[2] for source in config.evaluation.sources]
    paths += [config.init_from.path, config.tokenizer, config.vqgan, config.action_vae, config.data.exclude]
    for path in {buckets.name(path): path for path in paths if files.is_bucket(path)}.values():
        buckets.check(path)


def check_workdir(workdir: Path, cache: str = "") -> None:
    """Raises ConfigError when nothing can be saved in a directory, or it contains what no run puts there.

    Logs and `cache`, the run's own cache of compiled programs, may lie there.
    """
    model_dir.check_path(workdir)
    if (workdir / "assets" / "config.json").exists() or not workdir.is_dir():
        return
    own = Path(cache).expanduser().absolute()
    content = [path for path in files.contents(workdir) if not (cache and own.is_relative_to(path))]
    foreign = [path for path in content if not any(path.match(p) for p in _CONTENT)]
    for folder, names in (("assets", _ASSETS), ("assets/vqgan", _MODEL), ("assets/action_vae", _MODEL)):
        if (workdir / folder).is_dir():
            foreign += [path for path in files.contents(workdir / folder) if path.name not in names]
    if foreign:
        raise ConfigError(
            f"--workdir {workdir} is not empty and not a work dir: it contains "
            f"{listing([str(path.relative_to(workdir)) for path in foreign], 3)}; use another directory"
        )


def find(config: TrainConfig) -> dict[str, Path]:
    """Where the tokenizer and the frozen models of a stage come from, by name; {} where it needs none.

    Raises:
      ConfigError: one of them, or `init_from.path`, does not exist or is no model; or weights would be random and never
        train.
      HubError, BucketError.
    """
    if config.finetune.on and not config.init_from.path:
        raise ConfigError(
            "config.finetune leaves weights as they are, and config.init_from.path is empty, so they would be random; "
            "set it to the model to fine-tune, or train all weights: finetune.train=() and finetune.lora.rank=0"
        )
    start = config.init_from
    with _about("init_from.path"):
        inherited = starting_point.model_dir(start.path, start.step, start.weights) / "assets" if start.path else None

    def locate(name: str) -> Path:
        if configured := getattr(config, name):
            with _about(name):
                path = starting_point.file(configured) if name == "tokenizer" else starting_point.model_dir(configured)
            if not path.exists():
                raise ConfigError(f"config.{name} {configured} does not exist; correct the path")
            if name == "tokenizer" and path.is_dir():
                raise ConfigError(f"config.tokenizer {configured} is a directory; give the tokenizer.json itself")
            if name == "tokenizer":
                Vocabulary.from_tokenizer(path)  # raises before a file that is not a tokenizer is copied
            return path
        file = "tokenizer.json" if name == "tokenizer" else name
        if inherited is None or not (inherited / file).exists():
            where = f" and {inherited} does not contain it" if inherited else " and config.init_from.path is empty"
            raise ConfigError(f"stage {config.stage} needs config.{name}; the key is empty{where}; set it")
        return inherited / file

    stage = STAGES[config.stage]
    return {name: locate(name) for name in (*(("tokenizer",) if stage.tokens else ()), *stage.frozen(config))}


@contextlib.contextmanager
def _about(key: str) -> Iterator[None]:
    """Names the key of the config in errors about what it leads to."""
    try:
        yield
    except (ConfigError, ConversionError) as error:
        raise ConfigError(f"config.{key}: {error}") from error


def load(config: TrainConfig, workdir: Path) -> tuple[TrainConfig, Assets]:
    """Reads what `collect` has put into the work dir."""
    own, stage = workdir / "assets", STAGES[config.stage]
    if not files.is_bucket(own) and not own.is_dir():
        raise ConfigError(f"{workdir} is not shared: process 0 wrote {own}, and it is not here; use a shared --workdir")
    tokenizer = statistics = None
    frozen = {}
    if stage.tokens:
        tokenizer = TextTokenizer(own / "tokenizer.json")
        frozen = {name: own / name for name in stage.frozen(config)}
        config = fit_models(config, tokenizer, frozen)
        if "action_vae" in frozen:
            file = frozen["action_vae"] / "assets" / "statistics.json"
            if not file.exists():
                raise ConfigError(f"{file} is missing: the action VAE must come with the statistics it was trained on")
            statistics = Statistics.from_json(file)
            if (width := len(statistics.rel_mean_action)) != (decoded := config.action_vae_model.action_dim):
                raise ConfigError(
                    f"{file} describes actions of {width} values, but the action VAE beside it decodes {decoded}; "
                    "replace the file with the statistics of the data that this action VAE was trained on"
                )
    if statistics is None and reader.steps(workdir) and (own / "statistics.json").exists():
        statistics = Statistics.from_json(own / "statistics.json")
    if reader.steps(workdir):
        check_meaning(config, workdir)
    return config, Assets(tokenizer, statistics, frozen)


def check_same_run(config: TrainConfig, file: Path) -> None:
    """Raises ConfigError when a directory is not a work dir, or was started with another stage, seed or assets."""
    if not file.exists():
        raise ConfigError(
            f"{file.parent.parent} contains a model that was not trained there; use another --workdir, and start from "
            "this model with config.init_from.path"
        )
    before = model_dir.read_train_config(file.parent.parent)
    for name in ("stage", "seed", "tokenizer", "vqgan", "action_vae", "init_from", "finetune"):
        old, new = getattr(before, name), getattr(config, name)
        if name == "init_from" and config.finetune.on:  # the base may have moved: it is compared by its fingerprint
            old = dataclasses.replace(old, path=new.path)
        if old != new:
            raise ConfigError(
                f"{file.parent.parent} was started with config.{name} {old!r}, not {new!r}; use another --workdir"
            )
    held, wanted = before.evaluation, config.evaluation
    if (held.share, held.share and held.seed) != (wanted.share, wanted.share and wanted.seed):
        raise ConfigError(
            f"{file.parent.parent} was started with config.evaluation.share {held.share:g} and seed {held.seed}, not "
            f"{wanted.share:g} and {wanted.seed}: it would train on what was held out, or hold out what it has trained "
            "on; leave these keys as they were, or use another --workdir"
        )


def check_meaning(config: TrainConfig, workdir: Path) -> None:
    """Raises ConfigError when the resolved config gives the weights that a run has saved another meaning."""
    lines = model_dir.config_differences(model_dir.read_train_config(workdir), config)
    if changed := [line for line in lines if means(line.partition(":")[0].removeprefix("config."))]:
        raise ConfigError(
            f"{workdir} has saved weights, and this command would change what they mean: {listing(changed, 8, '; ')} "
            "(saved -> this command). Leave these keys as they were; or use another --workdir, and start from these "
            "weights with config.init_from.path"
        )


def fit_models(config: TrainConfig, tokenizer: TextTokenizer, frozen: dict[str, Path]) -> TrainConfig:
    """Takes the frozen models' configs from their directories and checks that everything fits together.

    Raises:
      ConfigError: vocabulary, codes, chunk, action width or latent do not agree; names both sides.
    """
    vocabulary, transformer = tokenizer.vocabulary, config.vla.transformer
    if transformer.vocab_size == 0:
        transformer = dataclasses.replace(transformer, vocab_size=vocabulary.size, image_tokens=vocabulary.image_tokens)
    if transformer.vocab_size != vocabulary.size:
        raise ConfigError(
            f"config.vla.transformer.vocab_size is {transformer.vocab_size} but the tokenizer has "
            f"{vocabulary.base_size} entries, which makes {vocabulary.size} with the four added rows; set the key to "
            "that, "
            "or to 0, which takes it from the tokenizer"
        )
    state_dim = config.vla.state_dim if STAGES[config.stage].state else 0
    vla = dataclasses.replace(config.vla, transformer=transformer, state_dim=state_dim)
    config = dataclasses.replace(config, vla=vla, vqgan_model=model_dir.read_model_config(frozen["vqgan"], "vqgan"))
    if config.vqgan_model.num_codes != vocabulary.num_codes:
        raise ConfigError(
            f"the VQGAN has {config.vqgan_model.num_codes} codes but the tokenizer has {vocabulary.num_codes}; use the "
            "tokenizer that belongs to it, or, without public weights, make one with rynnvla data tokenizer --vqgan"
        )
    if config.vqgan_model.downsampling != PATCH:
        raise ConfigError(
            f"the VQGAN has one code for {config.vqgan_model.downsampling} x {config.vqgan_model.downsampling} pixels, "
            f"but sequences have one for {PATCH} x {PATCH}; use a VQGAN with five vqgan_model.multipliers"
        )
    if "action_vae" in frozen:
        vae = model_dir.read_model_config(frozen["action_vae"], "action_vae")
        if vae.chunk != config.data.chunk:
            raise ConfigError(
                f"config.data.chunk is {config.data.chunk} but the action VAE encodes {vae.chunk} steps; set the key "
                "to "
                "that, or give another config.action_vae"
            )
        if (named := config.action_vae_model.latent) not in (ActionVAEConfig().latent, vae.latent):
            raise ConfigError(
                f"config.action_vae_model.latent is {named}, so config.vla.action_outputs is {2 * named}, but the "
                f"action VAE has {vae.latent} and {2 * vae.latent} (mean and log-variance); leave both keys out"
            )
        check_normalization(config, frozen["action_vae"])
        config = dataclasses.replace(config, action_vae_model=vae)
    return config


def check_normalization(config: TrainConfig, action_vae: Path) -> None:
    """Raises ConfigError when an ActionVAE that was trained here learned actions of another normalisation."""
    if not (action_vae / "assets" / "config.json").exists():  # imported: its files do not say
        return
    learned = model_dir.read_train_config(action_vae).data.normalization
    if learned != config.data.normalization:
        raise ConfigError(
            f"config.data.normalization is {config.data.normalization!r} but the action VAE was trained with "
            f"{learned!r}; set the key to that, or give another config.action_vae"
        )


def rate_warnings(frozen: dict[str, Path], sources: Sequence[Episodes]) -> list[str]:
    """A line for each source at whose rate the ActionVAE has learnt no motion; what is not known is not compared."""
    if "action_vae" not in frozen:
        return []
    learnt = provenance.recording(frozen["action_vae"])
    return [
        f"WARNING: {source.source} is recorded at {hertz((rate,))}, but the action VAE was trained on recordings at "
        f"{hertz(learnt.rates)}: motions per step are of another size; train an action VAE on data of this rate"
        for source in sources
        for rate in source.rates
        if learnt.rate_fault(rate)
    ]


def seen_warnings(config: TrainConfig, frozen: dict[str, Path], fresh: bool = True) -> list[str]:
    """A line for each model that this run builds on and that was trained on episodes which are held out here.

    What is not known, as of imported models, is not compared; nor is what a run that is not `fresh` began from on the
    Hub, which it does not need any more.
    """
    held, lines, start = config.evaluation, [], config.init_from
    models = {"the action VAE and its statistics": frozen.get("action_vae"), "config.init_from": start.path}
    own = {kind_and_path(source) for source, _ in mixture(config.data)}
    for name, path in models.items():
        if not held.share or not path or (hub.is_name(path) and not fresh):
            continue
        at_hand = starting_point.model_dir(start.path, start.step, start.weights) if hub.is_name(path) else path
        if not (files.place(at_hand) / "assets" / "config.json").exists():
            continue
        before = model_dir.read_train_config(files.place(at_hand))
        shared = [source for source, _ in mixture(before.data) if kind_and_path(source) in own]
        # A larger share holds out all that a smaller one of the same seed does.
        if shared and (before.evaluation.share < held.share or before.evaluation.seed != held.seed):
            lines.append(
                f"WARNING: {name} ({path}) learnt from episodes of {shared[0]} that are held out here: its run had "
                f"config.evaluation.share {before.evaluation.share:g} and seed {before.evaluation.seed}, this one has "
                f"{held.share:g} and {held.seed}; train it with the same two keys for a fair held-out loss"
            )
    return lines


def write(config: TrainConfig, workdir: Path, statistics: Statistics | None) -> None:
    """Writes the files that make the work dir self-contained; prints changes since its start. For process 0."""
    assets = workdir / "assets"
    file = assets / "config.json"
    if file.exists():
        before = model_dir.read_train_config(workdir)
        for line in model_dir.config_differences(before, config):
            print(f"config changed since {workdir.name} was started: {line}", file=sys.stderr)
        if (old := before.batch_size) != (new := config.batch_size):
            print(
                f"step s reads the examples from s x {new} on, not from s x {old}: some of the stream are left out, or "
                "read again",
                file=sys.stderr,
            )
    if statistics is not None:
        statistics.to_json(assets / "statistics.json")
    files.write_text(file, json.dumps(to_dict(config), indent=2))
    stage = STAGES[config.stage]
    model_dir.write_model_config(workdir, stage.model, stage.model_config(config))


def make_loader(
    config: TrainConfig,
    assets: Assets,
    mesh: jax.sharding.Mesh,
    sources: list[Episodes] | None = None,
    codes: Sequence[CodesOf | None] | None = None,
    evaluates: bool = False,
) -> Loader:
    """The loader of this process's rows. A collective call.

    `sources` are opened unless they are given, `codes` come from `encode_ahead`; see `Loader`, also for what it raises.
    """
    rows = multihost.batch_rows(mesh_lib.batch_sharding(mesh), config.batch_size)
    return multihost.together(
        lambda: Loader(
            config,
            tokenizer=assets.tokenizer,
            statistics=assets.statistics,
            rows=rows,
            codes=codes,
            sources=sources,
            progress=multihost.primary(),
            evaluates=evaluates,
        )
    )
