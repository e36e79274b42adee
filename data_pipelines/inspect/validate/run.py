"""Finds every fault of a data set; training stops at the first one."""

from pathlib import Path

from data_pipelines.inspect.validate import egodex, episodes, lerobot
from data_pipelines.inspect.validate.findings import Enough, Findings
from data_pipelines.inspect.validate.opening import open_rest
from data_pipelines.sources import copies
from data_pipelines.sources.exclude import kind_and_path, left_out
from rynnvla_jax.config import DataConfig
from rynnvla_jax.storage import files

_DATA = DataConfig()


def validate(source: str, findings: Findings, config: DataConfig = _DATA, progress: bool = True) -> bool:
    """Adds every fault of "KIND:PATH" to `findings`; True when it stopped early at `findings.stop_after`.

    Episodes that `config.exclude` names are ignored.

    Raises DataError, ConfigError or OSError when nothing can be read.
    """
    kind, _, path = source.partition(":")
    copies.check(path, f"{source}: {path} does not exist; correct the path")
    findings.left_out = left_out(source, config.exclude) if config.exclude else set()
    root = copies.whole(kind, path, progress)
    _foreign(root, findings)
    try:
        if kind == "lerobot":
            lerobot.check(root, config, findings, progress)
        elif kind == "egodex":
            egodex.check(root, config, findings, progress)
        else:
            opened = open_rest(source, root, config, findings, progress)
            if opened is not None:
                episodes.check(opened, root, config, findings, progress)
    except Enough:
        return True
    return False


def _foreign(root: Path, findings: Findings) -> None:
    """Files that macOS writes beside the real ones on foreign disks; no reader takes them for data."""
    if found := sorted(root.rglob("._*")) if root.is_dir() else []:
        message = (
            f"{len(found)} files of this kind are macOS's, not data, and are not read; find {root} -name '._*' -delete"
        )
        findings.warn("file reference", found[0], None, f"{message} removes them")


def closing(source: str, summary: dict, stopped: bool, stop_after: int) -> str:
    """The last line for a terminal."""
    looked = ", ".join(f"{n:,} {what}" for what, n in summary["looked_at"].items())
    found = f"{summary['errors']} error{'s' * (summary['errors'] != 1)}"
    found += f", {summary['warnings']} warning{'s' * (summary['warnings'] != 1)}"
    head = "\n" if summary["checks"] else ""
    if stopped:
        return f"{head}{source}: stopped at error {stop_after}; found so far: {found} (checked: {looked})"
    figures = "".join(f"; {name} {value:.0%}" for name, value in summary["figures"].items())
    return f"{head}{source}: {found} (checked: {looked}){figures}"


def write_exclude(out: Path, source: str, findings: Findings) -> list[str]:
    """Writes the exclude file; returns lines that say what it does and which faults remain."""
    kind, path = kind_and_path(source)  # the file must also work from another folder
    content, rest = findings.exclude(f"{kind}:{path}")
    files.write_json(out, content)
    bad = len(content["episodes"][f"{kind}:{path}"]) - len(findings.left_out)
    total = findings.looked_at["episodes"]
    lines = [f"{out}: {bad} of {total} episodes have errors; train with --config.data.exclude={out}"]
    if total and bad >= total:
        lines.append("  these are all episodes, so no episode remains to train on")
    excluded = content["episodes"][f"{kind}:{path}"]
    if warned := {name for f in findings.found for name in f.episodes}.difference(excluded):
        lines.append(
            f"  {len(warned)} other episodes have warnings and stay in; look at them (rynnvla data show {source}), and "
            f"add the names of those to leave out to {out}"
        )
    lines += [f"  leaving episodes out does not remove this fault: {f.line()}" for f in rest]
    return lines
