"""`rynnvla convert import | export | verify`."""

import argparse
import sys
from pathlib import Path

_IMPORT = """\
Turns a public checkpoint into a model directory that training starts from (config.init_from.path).

SOURCE is a folder or file: safetensors (one or sharded), pytorch_model*.bin, a single .pt/.pth/.ckpt, Meta's own
consolidated*.pth with params.json; of Chameleon, RynnVLA-001, an ActionVAE or a VQGAN. Pickles are read with
weights_only, so no code in them runs. Every tensor must find its place: what is missing, left over or of another
shape is listed and nothing is written. Memory stays under twice the largest tensor plus 1 GB.

A base Chameleon checkpoint gets RynnVLA's four vocabulary rows (normal, the config's initializer_range) and two
projections (normal, 1/sqrt(inputs); biases zero), all drawn from --seed and listed in the report.
"""
_EXPORT = """\
Turns a model directory (a training run's work directory, or an import) into a folder for PyTorch.

--format rynnvla is what a robot runs: transformer, tokenizer, statistics, VQGAN and ActionVAE.
--format transformers loads with transformers' ChameleonForConditionalGeneration; it leaves out state_projection
and action_head, which transformers does not know.

Writing keeps memory under twice the largest tensor plus 1 GB; `verify`, which follows, needs about four layers in
float32 (7B: 4 GB, 34B: 14 GB). The folder appears only when it passes; otherwise nothing is left behind and the
exit status is 1.
"""
_VERIFY = """\
Runs the JAX model and the exported PyTorch modules on the same random input and prints the largest differences:
embeddings, hidden states, logits, action latent, and where they are part of it the VQGAN and the ActionVAE.
The transformer is compared layer by layer: memory is about four layers in float32 (7B: 4 GB, 34B: 14 GB).
Differences count as a share of max(1, largest value). Limits: 1e-4 for float32, 1e-2 float16, 5e-2 bfloat16.
"""


def main(argv: list[str]) -> int:
    """Runs one sub-command. Returns the exit status; expected errors are one line on stderr."""
    arguments = _parser().parse_args(argv)
    from rynnvla_jax.checkpoint.reader import CheckpointError
    from rynnvla_jax.config import ConfigError
    from rynnvla_jax.convert import ConversionError
    from rynnvla_jax.deploy.export_format import ExportError

    try:
        return arguments.run(arguments)
    except (ConversionError, CheckpointError, ConfigError, ExportError, OSError) as error:
        print(f"rynnvla convert {arguments.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rynnvla convert", description="Public checkpoints <-> model directories <-> PyTorch export folders."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    one = commands.add_parser(
        "import", help="public checkpoint -> model directory", description=_IMPORT, formatter_class=raw
    )
    one.set_defaults(run=_import)
    one.add_argument("source", type=Path, metavar="SOURCE")
    one.add_argument("out", metavar="OUT", help="model directory to create; must not exist")
    one.add_argument("--kind", choices=("auto", "vla", "action_vae", "vqgan"), default="auto")
    one.add_argument(
        "--config",
        type=Path,
        help="JSON or YAML in place of the checkpoint's own: config.json; of an ActionVAE the constructor's arguments "
        "(nheads, ...); of a VQGAN vqgan.yaml",
    )
    one.add_argument("--tokenizer", type=Path, help="tokenizer.json; by default looked for beside the weights")
    one.add_argument("--vqgan", type=Path, help="vqgan.ckpt (vqgan.yaml beside it): becomes assets/vqgan")
    one.add_argument(
        "--vq", action="store_true", help="import the checkpoint's own model.vqmodel.* (no decoder) as assets/vqgan"
    )
    one.add_argument("--action-vae", type=Path, help="ActionVAE weights: become assets/action_vae")
    one.add_argument("--statistics", type=Path, help="statistics.json of the robot's data; the ActionVAE gets it too")
    one.add_argument(
        "--ignore", action="append", default=[], metavar="PREFIX", help="leave these keys out (repeatable)"
    )
    one.add_argument("--seed", type=int, default=0, help="of the new weights")

    two = commands.add_parser(
        "export", help="model directory -> PyTorch folder", description=_EXPORT, formatter_class=raw
    )
    two.set_defaults(run=_export)
    two.add_argument("model", metavar="MODEL", help="model directory")
    two.add_argument("out", type=Path, metavar="OUT", help="folder to create; must not exist")
    two.add_argument("--step", type=int, default=-1, help="checkpoint step; the newest by default")
    two.add_argument("--format", choices=("rynnvla", "transformers"), default="rynnvla")
    two.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the transformer"
    )
    two.add_argument("--shard-gb", type=float, default=4.0, help="split files larger than this (10^9 bytes)")
    _verify_flags(two)

    three = commands.add_parser(
        "verify", help="compare a model directory with an export", description=_VERIFY, formatter_class=raw
    )
    three.set_defaults(run=_verify)
    three.add_argument("model", metavar="MODEL", help="model directory")
    three.add_argument("export", type=Path, metavar="EXPORT", help="export folder")
    three.add_argument("--step", type=int, default=-1, help="checkpoint step; the newest by default")
    three.add_argument("--json", action="store_true", help="print JSON")
    _verify_flags(three)
    return parser


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=16, help="length of the random prompt that is compared")
    parser.add_argument("--seed", type=int, default=0, help="of the random input")
    parser.add_argument(
        "--tolerance", type=float, help="on the transformer; default 1e-4 (float32), 1e-2 (float16), 5e-2 (bfloat16)"
    )


def _import(arguments: argparse.Namespace) -> int:
    from rynnvla_jax.convert.importer import import_checkpoint

    print(
        import_checkpoint(
            arguments.source,
            arguments.out,
            kind=arguments.kind,
            tokenizer=arguments.tokenizer,
            vqgan_source=arguments.vqgan,
            action_vae_source=arguments.action_vae,
            statistics=arguments.statistics,
            model_config=_read_config(arguments.config),
            ignore=tuple(arguments.ignore),
            vq=arguments.vq,
            seed=arguments.seed,
        )
    )
    print(f"wrote {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from rynnvla_jax.convert import ConversionError, stream
    from rynnvla_jax.convert.exporter import write_export

    with stream.finished(arguments.out) as partial:
        report = write_export(
            arguments.model,
            Path(partial),
            step=arguments.step,
            layout=arguments.format,
            dtype=arguments.dtype,
            shard_bytes=int(arguments.shard_gb * 10**9),
        )
        print(report)
        from rynnvla_jax.convert import verify

        found = verify.verify(
            arguments.model,
            Path(partial),
            step=report.step,
            tokens=arguments.tokens,
            seed=arguments.seed,
            tolerance=arguments.tolerance,
        )
        print(verify.table(found))
        if failed := verify.failures(found):
            raise ConversionError(f"{arguments.out} was not written: PyTorch and JAX disagree on {failed}")
    print(f"wrote {arguments.out}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from rynnvla_jax.convert import verify

    found = verify.verify(
        arguments.model,
        arguments.export,
        step=arguments.step,
        tokens=arguments.tokens,
        seed=arguments.seed,
        tolerance=arguments.tolerance,
    )
    print(verify.to_json(found) if arguments.json else verify.table(found))
    failed = verify.failures(found)
    if failed:
        print(f"rynnvla convert verify: PyTorch and JAX disagree on {failed}", file=sys.stderr)
    return 1 if failed else 0


def _read_config(path: Path | None) -> dict | None:
    if path is None:
        return None
    if path.suffix in (".yaml", ".yml"):
        from rynnvla_jax.convert.frozen import read_vqgan_yaml

        return read_vqgan_yaml(path)
    from rynnvla_jax.convert.foreign import read_json

    return read_json(path)
