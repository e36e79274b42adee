"""`rynnvla data tokenize`: VQ codes of every frame of a data set."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rynnvla_jax.cli.arguments import OR_BUCKET
from rynnvla_jax.cli.data_source import parse_with_data
from rynnvla_jax.cli.main import UsageError, expected_error
from rynnvla_jax.config import ONE_CAMERA, ConfigError, ImageConfig

PROGRAM = "rynnvla data tokenize"


@dataclass(frozen=True)
class Tokenize:
    """Writes the VQ codes of every frame of a data set to ArrayRecord shards, which any stage trains from.

    It uses all local devices. With several processes (`rynnvla launch`), each writes its share of the shards. The same
    command continues after an interruption, and prints the keys that training from the corpus needs. An episode whose
    frames cannot be read is skipped, counted, and listed in OUT/left_out/SHARD.json.

    SOURCE, MODEL_DIR and DIR may be in gs:// and s3:// buckets. Nothing keeps a second command from writing into one
    DIR of s3:// at the same time.

      rynnvla data tokenize --source lerobot:DATA --vqgan base/assets/vqgan --out corpus
    """

    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")]
    """Data set as KIND:PATH, or only PATH when its files show the kind."""
    vqgan: Annotated[Path, tyro.conf.arg(metavar="MODEL_DIR"), OR_BUCKET]
    """Model directory of the VQGAN, or of a model that contains one."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR"), OR_BUCKET]
    """The corpus to write."""
    stride: int = 1
    """Encode every N-th frame."""
    views: str | None = None
    """Cameras, such as front,wrist: of front, wrist and data.extra_views; by default those that the data set has."""
    batch: int = 32
    """Frames per batch of the encoder."""
    shard_mb: int = 256
    """Size of a shard, in 2^20 bytes."""


def training_keys(out: Path, views: tuple[str, ...], image: ImageConfig, vqgan: Path) -> list[str]:
    """What a run's command needs to read the corpus `out`: training compares these with those it was made with."""
    keys = {
        "data.source": f"records:{out}",
        "data.frame_codes": "ahead",
        "data.image.shortest_edge": image.shortest_edge,
        "data.image.fit": image.fit,
        "vqgan": vqgan,
    }
    if "wrist" not in views:
        keys["sequence.use_wrist_frame"] = False
    if extra := tuple(view for view in views if view not in ("front", "wrist")):
        keys["data.extra_views"] = extra
    return [shlex.quote(f"--config.{key}={value}") for key, value in keys.items()]


def main(argv: list[str]) -> int:
    """Returns the exit status; one of several processes may instead end immediately."""
    a, data = parse_with_data(Tokenize, PROGRAM, argv, {"--in": "--source", "--vq": "--vqgan"})
    if min(a.stride, a.batch, a.shard_mb) < 1:
        raise UsageError("--stride, --batch and --shard-mb must be at least 1")
    views = tuple(view.strip() for view in a.views.split(",")) if a.views else None
    known = ("front", "wrist", *data.extra_views)
    if views is not None and (len(set(views)) < len(views) or not set(views) <= set(known)):
        raise UsageError(f"--views is {a.views!r}; give some of {','.join(known)} (data.extra_views adds cameras)")
    if views is not None and "front" not in views:
        raise UsageError(f"--views is {a.views!r}; front must be among them, since every stage reads it")
    import jax

    from data_pipelines.corpus import records
    from data_pipelines.sources import open_source
    from data_pipelines.sources.recognize import source_of
    from rynnvla_jax.distributed import initialize, multihost
    from rynnvla_jax.inference.codec import FrameCodec
    from rynnvla_jax.inference.tokenize import tokenize
    from rynnvla_jax.storage import files

    try:
        initialize.initialize()
        files.check(a.out, write=True)
        image = data.image
        try:
            source = open_source(source_of(a.source), data, views)
        except ConfigError as error:  # readers name the key of a run, which this command has not
            raise ConfigError(str(error).replace(ONE_CAMERA, "leave wrist out of --views")) from None
        codec = FrameCodec.load(a.vqgan, batch=a.batch, devices=jax.local_devices())
        multihost.say(
            f"tokenizing {source.source}: {len(source)} episodes, {source.seconds / 3600:.2f} hours, views "
            f"{', '.join(source.views)}\n  devices    {jax.device_count()} x {jax.devices()[0].device_kind}, "
            f"{jax.process_count()} process(es), batches of {codec.batch} frames\n"
            f"  frames     every {a.stride}. frame, shortest edge {image.shortest_edge} pixels, fit {image.fit}"
        )
        done = tokenize(source, codec, image, a.stride, a.out, a.shard_mb * 2**20)
        if multihost.primary():
            corpus = records.read_corpus(a.out)[0]
            print(
                f"{corpus['records']} clips, {corpus['seconds'] / 3600:.2f} hours, {corpus['bytes'] / 2**20:.1f} MiB "
                f"({corpus['bytes'] / corpus['records']:.0f} bytes/clip); this process: {done['frames']} frames, "
                f"{done['frames'] / max(done['seconds'], 1e-9):.1f} frames/s"
                + (f"; {done['left_out']} episodes skipped, see {a.out}/left_out" if done["left_out"] else "")
            )
            print(f"to train from it:\n  {' '.join(training_keys(a.out, source.views, image, a.vqgan))}")
    except Exception as error:
        if jax.distributed.is_initialized() and (text := expected_error(error)) is not None:
            multihost.leave(f"{PROGRAM}: {text}")
        raise
    return 0
