"""Records the code, configuration, package versions and data of a run.

    WORKDIR/assets/run.json             {"attempts": [...]}: one entry per start of `rynnvla train`, oldest first
    DIR/checkpoints/<step>/run/         JSON: the entry of the attempt that saved it; no `started`, `step`, `sources`

An entry:

    started, step    time (UTC), and the checkpoint it continued from; 0 is a fresh start
    code             version of rynnvla_jax; in a git checkout also the revision and whether tracked files had changed
    config           SHA-256 of the resolved configuration (keys sorted)
    python, packages versions
    data             SHA-256 of the manifest: number, lengths and instructions of the episodes of every source, their
                     unit, widths and frame sizes. No frame is read, and the location of the data does not matter
    sources          the manifest itself; `exclude`: the file of episodes that were left out
    hub              commits of the names on the Hugging Face Hub that the command gave without one; absent without any
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rynnvla_jax
from rynnvla_jax.checkpoint import reader
from rynnvla_jax.columns import Columns, difference
from rynnvla_jax.config import ConfigError, TrainConfig, to_dict
from rynnvla_jax.recording import Recording
from rynnvla_jax.storage import files

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorstore", "ml-dtypes"),
    *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "av", "pyarrow", "h5py", "array-record"),
)
NUMERICAL = ("jax", "jaxlib", "libtpu", "flax", "optax")  # of PACKAGES: those that may change the last bits of a step
GIT_SECONDS = 20  # for one question to git, on a slow shared file system
FILE = Path("assets") / "run.json"


def revision(folder: Path) -> dict[str, Any] | None:
    """{"revision", "dirty": tracked files differ from it} of the git checkout that tracks `folder`.

    None without such a checkout or without git, also for a package installed inside an unrelated checkout.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # a hook's point elsewhere
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # only looks

    def ask(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
        return done.stdout.strip()

    try:
        ask("ls-files", "--error-unmatch", "__init__.py")
        return {
            "revision": ask("rev-parse", "HEAD"),
            "dirty": bool(ask("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of the `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest(content: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest(sources: Sequence[Any]) -> list[dict[str, Any]]:
    """Metadata of sources (`data_pipelines.episode.Episodes`) without reading an episode, ready for JSON."""
    return [
        {
            "source": source.source,
            "episodes": len(source),
            "steps": int(source.lengths.sum(dtype=np.int64)),
            "lengths": hashlib.sha256(np.ascontiguousarray(source.lengths, "<i8").tobytes()).hexdigest(),
            "seconds": round(float(source.seconds), 3),
            "texts": digest(list(source.texts)),
            "columns": _stated(source.columns),
            "rates": list(source.rates),
            "frame_sizes": sorted([int(height), int(width)] for height, width in source.frame_sizes),
        }
        for source in sources
    ]


def describe_run(config: TrainConfig, sources: Sequence[Any], commits: Mapping[str, str]) -> dict[str, Any]:
    """The entry of a run that starts now, without `started` and `step`. `config` is the resolved one; `commits` of
    names on the Hub that had none."""
    listed = manifest(sources)
    # Without the rates: what older versions noted has none, and lengths and seconds already tell.
    contents = [{k: v for k, v in one.items() if k not in ("source", "rates")} for one in listed]
    return {
        "code": {"version": rynnvla_jax.__version__, **(revision(Path(rynnvla_jax.__file__).parent) or {})},
        "config": digest(to_dict(config)),
        "python": platform.python_version(),
        "packages": versions(),
        "data": digest(contents),
        "exclude": config.data.exclude,
        "sources": listed,
        **({"hub": dict(commits)} if commits else {}),
    }


def of_checkpoint(entry: dict[str, Any]) -> dict[str, Any]:
    """The part of an entry that a checkpoint stores."""
    return {k: entry[k] for k in ("code", "config", "python", "packages", "data", "hub") if k in entry}


def attempts(workdir: Path) -> list[dict[str, Any]]:
    """The entries of a work dir, oldest first; empty if an older version trained it. A damaged file is set aside."""
    return files.read_status(files.place(workdir) / FILE, {"attempts": []}, is_history)["attempts"]


def commits(workdir: Path) -> dict[str, str]:
    """The commits of names on the Hub that the attempts of a work dir began with; the first one of a name counts."""
    found: dict[str, str] = {}
    for entry in reversed(attempts(workdir)):
        found |= entry.get("hub", {})
    return found


def recording(directory: Path) -> Recording:
    """How the data of a work dir's last attempt were recorded; nothing where it is not noted, as in imported models."""
    sources = (attempts(directory) or [{}])[-1].get("sources", [])
    rates = {float(rate) for source in sources for rate in source.get("rates", [])}
    frames = {(int(height), int(width)) for source in sources for height, width in source.get("frame_sizes", [])}
    return Recording(tuple(sorted(rates)), tuple(sorted(frames)))


def is_history(content: Any) -> bool:
    """Whether the content of a run.json has its form."""
    if not isinstance(content, dict) or not isinstance(content.get("attempts"), list):
        return False
    return all(
        isinstance(entry, dict) and {"packages", "data"} <= entry.keys() and isinstance(entry.get("hub", {}), dict)
        for entry in content["attempts"]
    )


def changes(workdir: Path, entry: dict[str, Any]) -> list[str]:
    """Compares an attempt that starts now with the one before it, if that has saved something. For process 0.

    If the files of the data changed after a checkpoint was saved, this is an error: the order of examples is a function
    of seed, step *and* data. If the command names different data than before, the change is intended and only reported.

    Returns:
      Messages to print, one per line.

    Raises:
      ConfigError: the data changed, see above.
    """
    before, saved = attempts(workdir), reader.steps(workdir)
    said: list[str] = []
    if not before or not saved:
        return said
    old, new = before[-1]["packages"], entry["packages"]
    if other := [f"{name} {old.get(name)} -> {new.get(name)}" for name in NUMERICAL if old.get(name) != new.get(name)]:
        said.append(f"{workdir.name} continues with other versions, whose results may differ: {', '.join(other)}")
    if phrases := differences(before[-1], entry):
        text = f"the data of {workdir.name} changed since step {saved[-1]}: {'; '.join(phrases)}"
        if _named(before[-1]) == _named(entry):
            raise ConfigError(
                f"{text}. Restore the data; or start from these weights with config.init_from.path in another "
                "--workdir; or, to continue here with other data, give it another path in config.data.source, mixture "
                "or exclude"
            )
        said.append(
            f"{text}. The run continues with it; its order of examples differs from that of an uninterrupted run"
        )
    return said


def record_attempt(workdir: Path, entry: dict[str, Any]) -> None:
    """Adds an attempt to the work dir's `assets/run.json`. For process 0."""
    before, saved = attempts(workdir), reader.steps(workdir)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    step = saved[-1] if saved else 0
    file = workdir / FILE
    content = {"attempts": [*before, {"started": started, "step": step, **entry}]}
    files.write_json(file, content)


def _named(entry: dict[str, Any]) -> tuple:
    return entry["exclude"], [one["source"] for one in entry["sources"]]


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two manifests, one phrase for each source that differs."""
    old, new = before["sources"], now["sources"]
    if len(old) != len(new):
        return [f"{len(old)} sources -> {len(new)}"]
    phrases = []
    for a, b in zip(old, new, strict=True):
        changed = [
            # a hash means nothing to a reader
            f"different {k}" if k in ("lengths", "texts") else f"{k} {a.get(k)} -> {b[k]}"
            for k in b
            if k not in ("source", "columns", "rates") and a.get(k) != b[k]
        ]
        if differ := difference(_columns_of(a), _columns_of(b)):
            changed.append(f"meaning of columns: {differ}")
        if changed:
            phrases.append(f"{b['source']}: {', '.join(changed)}")
    return phrases


def _stated(columns: Columns) -> dict[str, Any]:
    """Columns in JSON's types, without the reasons of guesses, which do not matter to a run."""
    values = json.loads(json.dumps(columns.to_json()))
    for column in (*values["state"], *values["action"]):
        del column["why"]
    return values


def _columns_of(one: dict[str, Any]) -> Columns:
    """Of a manifest; those of version 0.1 have `unit`, `absolute` and two widths."""
    if "columns" in one:
        return Columns.from_json(one["columns"], f"{FILE}: columns of {one['source']}")
    return Columns.unstated(one["unit"], one["state_width"], one["action_width"], one["absolute"])


def code_line(code: dict[str, Any]) -> str:
    """`rynnvla_jax 0.5.0, revision 0123456789ab and uncommitted changes`."""
    text = f"rynnvla_jax {code['version']}"
    if "revision" not in code:
        return f"{text}, no git checkout"
    return f"{text}, revision {code['revision'][:12]}{' and uncommitted changes' if code['dirty'] else ''}"


def versions_line(entry: dict[str, Any]) -> str:
    """`Python 3.11.2, jax 0.10.2, ...`."""
    return ", ".join([f"Python {entry['python']}", *(f"{k} {v}" for k, v in entry["packages"].items())])
