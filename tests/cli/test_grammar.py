"""One grammar of commands: how they are found, how their arguments are read, how their errors begin."""

import ast
import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import pytest
import tyro

from rynnvla_jax.cli import (
    arguments,
    checkpoint,
    config_help,
    convert,
    data,
    data_inspect,
    data_source,
    deploy,
    launch,
)
from rynnvla_jax.cli import main as cli
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.config import ConfigError
from tests import ROOT

HEAVY = (
    "jax jaxlib flax torch apache_beam tensorflow optuna plotly matplotlib mujoco pyarrow av h5py grain scipy pandas"
)
GROUPS = {module.__name__.rpartition(".")[2]: module.COMMANDS for module in (data, launch, convert, checkpoint, deploy)}
EVERY = [name for name in cli.COMMANDS if name not in GROUPS]
EVERY += [f"{group} {name}" for group, commands in GROUPS.items() for name in commands]


@dataclasses.dataclass(frozen=True)
class Example:
    """Does 95 % of it.

      rynnvla example FILE --kind b

    That is all.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """What it is about."""
    out: Path
    """Where the output goes."""
    kind: Literal["near", "far"] = "near"
    """Which kind."""
    number: int | None = None
    """How many."""
    share: Annotated[float, tyro.conf.arg(metavar="S")] = 0.5
    """How much of it."""
    dry_run: bool = False
    """Only print what would happen."""
    mount: tuple[str, ...] = ()
    """What to mount."""


def parse(*words, renamed=None):
    return arguments.parse(Example, "rynnvla example", words, renamed)


def test_arguments_become_the_dataclass():
    found = parse("a.txt", "--out=b", "--kind", "far", "--number", "3", "--dry-run", "--mount", "x", "--mount=--y")
    assert found == Example(Path("a.txt"), Path("b"), "far", 3, dry_run=True, mount=("x", "--y"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("f", "--out is required"),
        ("--out o", "FILE is required: What it is about."),
        ("f --out o --kind ner", "--kind ner: choose one of near, far. Did you mean near?"),
        ("f --out o --number x", "--number x: this is not a whole number"),
        ("f --out o --share x", "--share x: this is not a number"),
        ("f --out o --number", "Missing value for argument '--number'"),
        ("f --out o --dry-rum", "unknown option --dry-rum. Did you mean --dry-run?"),
        ("f --out o -x", "unknown option -x"),
        ("f --out=", "--out is empty; if it comes from a variable, the variable is not set"),
        ("f g --out o", "Unrecognized options: g"),
        ("f --out o --target t", "--target: give --out"),
    ],
)
def test_what_is_wrong_is_named(words, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse(*words.split(), renamed={"--target": "give --out"})


def test_empty_words_and_home():
    with pytest.raises(UsageError, match="--out is empty"):
        parse("f", "--out", "")
    with pytest.raises(UsageError, match="an argument is empty"):
        parse("", "--out=o")
    assert parse("~/f", "--out=~/o").out == Path.home() / "o"


def test_old_spellings_are_taken_once_more_and_named(capsys):
    found = parse("f", "--output=o", "--dry_run", renamed={"--output": "--out"})
    assert found == Example(Path("f"), Path("o"), dry_run=True)
    assert capsys.readouterr().err.splitlines() == [
        "rynnvla example: --output is now --out",
        "rynnvla example: --dry_run is now --dry-run",
    ]


def test_keys_of_the_data_config_had_another_spelling(capsys):
    words = ["x", "--data", "wrist=none", "--data=image.fit=square", "--config.data.image.jitter=0.1"]
    found, config = data_source.parse_with_data(data_inspect.Stats, "rynnvla data stats", words)
    assert found.sources == ("x",) and config.wrist == "none"
    assert (config.image.fit, config.image.jitter) == ("square", 0.1)
    assert capsys.readouterr().err.splitlines() == [
        "rynnvla data stats: --data wrist=none is now --config.data.wrist=none",
        "rynnvla data stats: --data image.fit=square is now --config.data.image.fit=square",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "imagine --model stage1 --out o.png",
            "--model: give the work dir as the first argument: rynnvla imagine WORKDIR",
        ),
        ("imagine stage1 --out o.png --data egodex:x --samles 2", "--data is now --source"),
        ("data tokenize --in x --vq v", "--vq is now --vqgan"),
        ("convert import a b --config c.json --sed 1", "--config is now --model-config"),
        ("report --out page.html", "give at least one work dir"),
        ("serve --policy e --port 70000", "--port 70000 is not between 0 and 65535"),
        ("fetch peple", "unknown item 'peple'. Did you mean people?"),
    ],
)
def test_old_names_and_wrong_words_of_commands_are_told(words, message, capsys):
    assert cli.main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_help_shows_the_text_as_it_stands(capsys):
    with pytest.raises(SystemExit) as left:
        parse("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "\nDoes 95 % of it.\n\n  rynnvla example FILE --kind b\n\nThat is all.\n" in text
    assert "--no-dry-run" not in text and "None" not in text
    for field in dataclasses.fields(Example):
        assert config_help.descriptions(Example)[field.name] in text


def classes() -> list[type]:
    """The arguments of every command."""
    found = []
    for file in sorted({*(ROOT / "rynnvla_jax" / "cli").glob("[a-z]*.py")} - {Path(arguments.__file__)}):
        names = re.findall(
            r"= pars(?:e|ed|e_with_overrides|e_with_data)\(([A-Z]\w*), ", file.read_text(encoding="utf-8")
        )
        found += [getattr(importlib.import_module(f"rynnvla_jax.cli.{file.stem}"), name) for name in names]
    return found


@pytest.mark.parametrize("cls", classes(), ids=lambda c: c.__name__)
def test_every_option_of_every_command_is_described(cls):
    told = {k: v for parent in reversed(cls.__mro__[:-1]) for k, v in config_help.descriptions(parent).items()}
    for field in dataclasses.fields(cls):
        text = told[field.name]
        assert text and "\n" not in text and text.endswith("."), f"{cls.__name__}.{field.name}: {text!r}"
    assert inspect.getdoc(cls) and not inspect.getdoc(cls).startswith(f"{cls.__name__}(")


@pytest.mark.parametrize("name", EVERY)
def test_help_is_quick_because_it_imports_little(name):
    program = (
        f"import sys\nfrom rynnvla_jax.cli.main import main\ntry: main({[*name.split(), '--help']})\n"
        f"except SystemExit as e: assert not e.code\n"
        f"print([m for m in {HEAVY.split()} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and done.stderr == "[]\n", done.stderr
    assert done.stdout.startswith(f"usage: rynnvla {name}")


def test_dispatchers_name_the_nearest(capsys):
    for words, near in (["trian"], "train"), (["data", "stat"], "stats"), (["launch", "slrum"], "slurm"):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"rynnvla{' ' if words[1:] else ''}{' '.join(words[:-1])}: unknown command")
        assert f"Did you mean {near}?" in err
    for words in [], ["--help"], ["data"], ["data", "--help"], ["launch", "-h"]:
        assert cli.main(words) == 0
        assert "COMMAND --help shows the options of a command." in capsys.readouterr().out


# Errors


def raising(error: BaseException):
    """The exit status of a command that ends with an error."""

    def module_main(argv):
        raise error

    with mock.patch.object(data, "pack", module_main):
        return cli.main(["data", "pack"])


def test_errors_begin_in_one_way(capsys, tmp_path):
    missing = tmp_path / "gone"
    try:
        missing.read_text(encoding="utf-8")
    except OSError as error:
        gone = error
    for error, text, status in (
        (ConfigError("config.seed is wrong"), "config.seed is wrong", 1),
        (UsageError("--x is unknown"), "--x is unknown", 2),
        (gone, f"No such file or directory: {missing}", 1),
        (KeyboardInterrupt(), "stopped", 130),
    ):
        assert raising(error) == status
        assert capsys.readouterr().err.splitlines()[0] == f"rynnvla data pack: {text}"
    for unexpected in (KeyError("x"), ModuleNotFoundError("No module named 'nump'", name="nump"), OSError("odd")):
        with pytest.raises(type(unexpected)):
            raising(unexpected)


def test_a_missing_package_of_ours_names_the_extra():
    program = "import sys\nsys.modules['{}'] = None\nfrom rynnvla_jax.cli.main import main\nsys.exit(main({}))"
    words = ["train", "--config=configs/robot.py:tiny", "--workdir=x"]
    for package, extra in ("flax", "train"), ("ml_collections", "train"):
        command = [sys.executable, "-c", program.format(package, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            f"rynnvla train: this needs {package}: pip install 'rynnvla_jax[{extra}]'"
        )


def error_classes() -> dict[str, str]:
    """{full name: name of its base} of every class in our code whose name ends in Error."""
    found = {}
    for file in (*ROOT.glob("rynnvla_jax/**/*.py"), *ROOT.glob("data_pipelines/**/*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error"):
                found[f"{module}.{node.name}"] = ast.unparse(node.bases[0])
    return found


def test_every_error_of_ours_is_known():
    found = error_classes()
    known = {name for name in cli.KNOWN_ERRORS if not name.startswith("builtins.")}
    assert known <= set(found), "no such class"
    shown = {name.rpartition(".")[2] for name in known} | {"UsageError", "ProbeError"}  # the doctor's own
    assert {name for name, base in found.items() if not {name.rpartition(".")[2], base} & shown} == set()


def test_extras_are_those_of_the_package():
    from tests.documented import setup_arguments

    declared = setup_arguments()["extras_require"]
    distributions = importlib.metadata.packages_distributions()

    def plain(name):
        return re.split(r"[\[<>=~; ]", name)[0].lower().replace("_", "-")

    for extra, packages in cli.EXTRAS.items():
        wanted = {plain(requirement) for requirement in declared[extra]}
        for package in packages.split():
            having = {plain(name) for name in distributions.get(package, [package])}
            indirect = package in ("jaxlib", "etils")  # of jax and of orbax
            assert indirect or having & wanted, f"{package} is not in the extra {extra}"


def test_the_module_of_training_is_the_command():
    command = [sys.executable, "-m", "rynnvla_jax.train", "--help", "mesh.fsdp"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "  --config.mesh.fsdp=-1\n" in done.stdout
    done = subprocess.run([*command[:3], "--config=c"], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("rynnvla train: --workdir is required\n")


def test_who_stops_reading_sees_no_trace():
    command = f"{sys.executable} -m rynnvla_jax.cli train --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.startswith("usage: rynnvla train") and done.stderr == ""


def test_a_terminal_that_cannot_write_a_name_is_no_reason_to_stop(tmp_path):
    from tests.recordings import write_lerobot

    root = write_lerobot(
        tmp_path / "set", lengths=(30, 31), videos=("observation.images.front", "observation.images.手")
    )
    command = [sys.executable, "-m", "rynnvla_jax.cli", "data", "inspect", str(root)]
    latin = os.environ | {"PYTHONIOENCODING": "iso-8859-1"}
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=100, env=latin)
    assert done.returncode == 0 and rb"not used: \u624b" in done.stdout, done.stderr[-500:]
