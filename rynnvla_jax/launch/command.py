"""The command that every launcher runs, `rynnvla train ...` or `rynnvla data tokenize ...`, checked and quoted."""

import re
import shlex

from rynnvla_jax.config import ConfigError

EXAMPLE = "-- train --config configs/robot.py:7b --workdir gs://BUCKET/run"
SHARED = (
    "/mnt/",
    "/gcs/",
    "/lustre/",
    "/nfs/",
    "/shared/",
)  # where a file system that all hosts see is usually mounted


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """(options of the launcher, words after `--`)."""
    where = argv.index("--") if "--" in argv else len(argv)
    return argv[:where], argv[where + 1 :]


def check(arguments: list[str]) -> None:
    """Raises ConfigError unless `arguments` are a `train` or `data tokenize` command with the flags it needs."""
    tokenizes = arguments[:2] == ["data", "tokenize"]
    if not tokenizes and arguments[:1] != ["train"]:
        found = f"got {shlex.join(arguments)!r}" if arguments else "got nothing"
        raise ConfigError(f"the command train or data tokenize must come after `--`, {found}; for example: {EXAMPLE}")
    for flag in ("--source", "--vqgan", "--out") if tokenizes else ("--config", "--workdir"):
        if value(arguments, flag) is None:
            name = "data tokenize" if tokenizes else "train"
            raise ConfigError(f"the {name} command lacks {flag}; see `rynnvla {name} --help`")
    workdir = value(arguments, "--workdir") or ""
    if workdir.startswith("s3://"):
        raise ConfigError(f"--workdir {workdir}: checkpoints cannot be saved in s3:// (Orbax); use a gs:// bucket")


def written(arguments: list[str]) -> tuple[str, str]:
    """(flag, directory) that all processes write to and must share."""
    flag = "--out" if arguments[0] == "data" else "--workdir"
    directory = value(arguments, flag)
    assert directory is not None  # `check` asks for the flag
    return flag, directory


def value(arguments: list[str], flag: str) -> str | None:
    """The value of `--flag VALUE` or `--flag=VALUE`, None without one."""
    for this, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, rest = this.partition("=")
        if name == flag:
            return (rest if equals else following) or None
    return None


def buckets(arguments: list[str]) -> list[str]:
    """The buckets that a command names, as gs://BUCKET or s3://BUCKET."""
    return sorted({name for word in arguments for name in re.findall(r"(?:gs|s3)://[a-z0-9][-._a-z0-9]*", word)})


def needs_of_buckets(arguments: list[str], environment: str, account: str) -> list[str]:
    """Lines for a job file that say what the command's buckets need; [] when it names none.

    Args:
      environment: where the package is installed.
      account: who must be allowed to use the buckets.
    """
    found = buckets(arguments)
    if not found:
        return []
    extras = " and ".join(sorted({"gcs" if name.startswith("gs") else "s3" for name in found}))
    return [
        f"{environment} needs the extra {extras} of this package, and {account} access to {', '.join(found)};",
        f"`rynnvla doctor {' '.join(f'--bucket {name}' for name in found)}` there shows whether it has.",
    ]


def local_workdir(arguments: list[str]) -> str | None:
    """A warning if each host of a pod would write its own work dir; None if the directory looks shared."""
    flag, workdir = written(arguments)
    if workdir.startswith((*SHARED, "gs://")):
        return None
    return (
        f"warning: {flag} {workdir} looks local to one host; all hosts need the same shared directory: a bucket "
        f"(gs://...) or a mounted file system (such as {', '.join(SHARED)})"
    )


def shell(arguments: list[str]) -> str:
    """The whole command, quoted for a POSIX shell."""
    return shlex.join(["rynnvla", *arguments])
