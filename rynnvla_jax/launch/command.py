"""The command that every launcher runs, `rynnvla train ...` or `rynnvla data tokenize ...`, checked and quoted."""

import shlex

from rynnvla_jax.config import ConfigError

EXAMPLE = "-- train --config configs/robot.py:7b --workdir /mnt/shared/run"
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


def local_workdir(arguments: list[str]) -> str | None:
    """A warning if each host of a pod would write its own work dir; None if the directory looks shared."""
    flag, workdir = written(arguments)
    if workdir.startswith(SHARED):
        return None
    return (
        f"warning: {flag} {workdir} looks local to one host; all hosts need the same shared directory "
        f"(a mounted file system or bucket, such as {', '.join(SHARED)})"
    )


def shell(arguments: list[str]) -> str:
    """The whole command, quoted for a POSIX shell."""
    return shlex.join(["rynnvla", *arguments])
