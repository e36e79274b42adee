"""Opens a source that has faults: faulty episodes become findings and are left out until the rest can be opened."""

import io
import json
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_pipelines.corpus import records
from data_pipelines.cut_off import COPY
from data_pipelines.episode import DataError, Episodes
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.sources import calvin, clips, open_source
from data_pipelines.sources.exclude import DamagedEpisodesError
from data_pipelines.sources.index import find_files
from rynnvla_jax.config import DataConfig

_REOPEN = 100  # faults that only opening finds, one at a time


def open_rest(source: str, root: Path, config: DataConfig, findings: Findings, progress: bool) -> Episodes | None:
    """The episodes without those that prevent `source` from being opened; None when no episode remains.

    Raises DataError or ConfigError when it cannot be opened for a reason that does not concern a single episode.
    """
    kind = source.partition(":")[0]
    look = {"calvin": _calvin, "clips": _clips, "records": _records}.get(kind, lambda root, findings: set())
    bad = look(root, findings) | findings.left_out
    with TemporaryDirectory() as folder, ExitStack() as quiet:
        exclude = Path(folder) / "faulty.json"
        for _ in range(_REOPEN):
            exclude.write_text(json.dumps({"episodes": {source: sorted(bad)}}), encoding="utf-8")
            try:
                excluded = str(exclude) if bad > findings.left_out else config.exclude
                return open_source(source, replace(config, exclude=excluded), None, progress)
            except DataError as error:
                if str(exclude) in str(error) and findings.errors:
                    return None  # all episodes are among the findings
                faults = error.faults if isinstance(error, DamagedEpisodesError) else {}
                new = {name: fault for name, fault in faults.items() if name not in bad}
                if not new:
                    if not findings.errors:
                        raise
                    findings.error("file", root, None, str(error))
                    return None
                for name, (file, message) in new.items():
                    findings.looked_at["episodes"] += 1
                    findings.error("file", file, None, message, [name])
                    bad.add(name)
                quiet.enter_context(redirect_stderr(io.StringIO()))  # hides repeated lines
    findings.error(
        "file", root, None, f"more than {_REOPEN} episodes cannot be read; repair these first, or leave them out"
    )
    return None


def names_of(opened: Episodes) -> Sequence[str]:
    """The names of all episodes, where they are known without reading the episodes; () otherwise."""
    if opened.summaries is None:
        return ()
    try:
        return [summary.name for summary in opened.summaries()]
    except DataError:
        return ()  # a manifest, which is a separate finding


def _calvin(root: Path, findings: Findings) -> set[str]:
    """Windows with steps whose file is missing."""
    path = root / "lang_annotations" / "auto_lang_ann.npy"
    texts, bounds = calvin.annotations(path)
    steps = calvin.steps(root)
    bad, annotated = set(), np.zeros(len(steps), bool)
    for i, (text, (start, end)) in enumerate(zip(texts, bounds.tolist(), strict=True)):
        name = f"window_{i:06d}"
        first, last = np.searchsorted(steps, (start, end + 1))
        annotated[first:last] = True
        missing = end - start + 1 - (last - first)
        if missing > 0:
            present = set(steps[first:last].tolist())
            file = root / f"episode_{next(i for i in range(start, end + 1) if i not in present):07d}.npz"
            needed = f"{name} needs it ({missing} of its {end - start + 1} steps are missing)"
            findings.error("file reference", file, None, f"this file is missing, but {needed}; {COPY}", [name])
        if not text:
            findings.error("instruction", path, i, f"{name} has no text", [name])
        if not 0 <= start < end:
            findings.error("metadata", path, i, f"{name} runs from step {start} to {end}", [name])
        if missing > 0 or not text or not 0 <= start < end:
            bad.add(name)
    findings.looked_at["episodes"] += len(bad - findings.left_out)
    findings.looked_at["steps without annotation"] = int((~annotated).sum())
    return bad


def _clips(root: Path, findings: Findings) -> set[str]:
    """Captions without clip, clips without caption."""
    path, captions = clips.captions_of(root)
    files = set(find_files(root, clips.SUFFIXES))
    for name in sorted(captions.keys() - files):
        message = f"this file is missing, but {path.name} lists it; {COPY}, or remove the line"
        findings.error("file reference", root / name, None, message, [name])
    for name in sorted(n for n in files if not captions.get(n)):
        findings.error("instruction", root / name, None, f"has no caption in {path.name}; add one", [name])
    bad = (captions.keys() - files) | {n for n in files if not captions.get(n)}
    findings.looked_at["episodes"] += len(bad - findings.left_out)
    return bad


def _records(root: Path, findings: Findings) -> set[str]:
    """None; whether the manifest, which training plans by, is there and sound."""
    lengths = records.read_corpus(root)[0]["shard_lengths"]
    try:
        for _ in records.read_manifest(root, lengths, ["clip_id"]):
            pass
    except DataError as error:
        findings.error("file reference", root / "manifest", None, str(error))
    return set()
