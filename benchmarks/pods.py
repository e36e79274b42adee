"""The figures of docs/pods.md and docs/performance.md on pods: one `rynnvla aot` per row, each in its own process.

    python -m benchmarks.pods [--table pods] [--only robot:7b] [--quick] [--jobs 2] [--out runs/pods.jsonl]
    python -m benchmarks.pods --table program --program maxtext.hlo --topology v6e:8x8

Prints Markdown: memory, bytes sent, the share of them that nothing hides, and the compiler's estimate of the step. The
file --out holds the JSON of `rynnvla aot`, one line per row; what is already in it is not compiled again. With
--quick everything is compiled only as far as the schedule (seconds instead of minutes), and kept apart in the file.

The second form reads a scheduled program that something else compiled, for example MaxText's, by the same rules: the
text of `compiled.as_text()`.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# Tokens: 4 frames of 384 x 384, two cameras in stage 3, which encodes them in the step; the corpora of stages 1 and 2
# are encoded ahead.
LENGTHS = {"video": 4096, "trajectory": 4096, "robot": 5120}


@dataclass(frozen=True)
class Row:
    """A setting; `more` are further words of the command."""

    config: str  # stage:size
    topology: str
    batch: int  # per chip
    remat: str
    slices: int = 1
    more: tuple[str, ...] = ()

    def command(self, quick: bool) -> list[str]:
        """The words after `rynnvla aot`."""
        stage, size = self.config.split(":")
        words = [f"--config=configs/{stage}.py:{size}", f"--topology={self.topology}", f"--sequence={LENGTHS[stage]}"]
        words += [f"--per-chip-batch={self.batch}", f"--remat={self.remat}"]
        words += [] if stage == "robot" else ["--config.data.frame_codes=ahead"]
        words += [f"--slices={self.slices}"] if self.slices > 1 else []
        return [*words, *self.more, *(["--quick"] if quick and self.topology[0] == "v" else [])]


# topology, slices, then (batch per chip, remat) of stage 3 and of stages 1 and 2
PODS = (
    ("v5e:8x8", 1, (1, "full"), (1, "full")),
    ("v5e:16x16", 1, (1, "full"), (1, "full")),
    ("v5p:4x4x4", 1, (8, "full"), (4, "projections")),
    ("v5p:4x4x8", 1, (4, "attention"), (4, "projections")),
    ("v6e:8x8", 1, (2, "full"), (4, "full")),
    ("v6e:16x16", 1, (2, "full"), (4, "full")),
    ("v5e:16x16", 2, (1, "full"), (1, "full")),
    ("h100:8", 1, (1, "full"), (1, "full")),
)
AHEAD = ("--config.data.frame_codes=ahead",)
ROUNDED = ("--config.gradient_sums=bfloat16",)
TABLES: dict[str, list[Row]] = {
    # docs/pods.md, "What fits"
    "pods": [
        *(Row("robot:7b", topology, *long, slices) for topology, slices, long, _ in PODS),
        Row("robot:34b", "v5p:4x4x8", 1, "full"),
        Row("robot:34b", "v6e:16x16", 1, "full"),
        *(Row(f"{s}:7b", pod, *short, slices) for s in ("trajectory", "video") for pod, slices, _, short in PODS),
    ],
    # docs/performance.md: the settings that are compared with MaxText's, then what a part of the step costs
    "performance": [
        Row("video:7b", "v5e:4x4", 1, "full"),
        Row("video:7b", "v6e:8x8", 4, "full"),
        Row("video:7b", "v6e:8x8", 4, "full", more=ROUNDED),
        Row("video:7b", "v6e:8x8", 4, "full", more=(*ROUNDED, "--config.compiler_options=none")),
        Row("video:7b", "v6e:16x16", 4, "full", more=ROUNDED),
        Row("video:7b", "v5p:4x4x4", 4, "full"),
        Row("video:7b", "v5p:4x4x4", 4, "projections"),
        Row("video:7b", "v5p:4x4x4", 4, "projections", more=ROUNDED),
        Row("video:7b", "v6e:8x8", 4, "full", more=("--config.vla.transformer.dropout=0.0",)),
        Row("video:7b", "v6e:8x8", 4, "full", more=("--config.loss_chunk=65664",)),
        Row("robot:7b", "v5e:8x8", 1, "full"),
        Row("robot:7b", "v5e:8x8", 1, "full", more=AHEAD),
        Row("robot:7b", "v5p:4x4x4", 8, "full"),
        Row("robot:34b", "v5p:4x4x8", 1, "full"),
    ],
}
HEADER = ("pod", "mesh", "batch per chip", "remat", "HBM per chip, GiB", "sent, GB", "synchronous", "step, s", "MFU, %")


def compiled(words: list[str]) -> dict:
    """The report of `rynnvla aot`, or its error message."""
    done = subprocess.run(
        [sys.executable, "-m", "rynnvla_jax.cli", "aot", *words, "--json"], capture_output=True, text=True
    )
    report = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr.strip()[-500:]}
    return {"command": "rynnvla aot " + " ".join(words), **report}


def cells(row: Row, r: dict) -> list[str]:
    """The values of a row."""
    gib = 2**30
    name = ", ".join([row.config.replace(":", ", "), *(word.removeprefix("--config.") for word in row.more)])
    pod = f"{row.slices} x {row.topology}" if row.slices > 1 else row.topology
    if "error" in r:
        return [name, pod, "", str(row.batch), row.remat, "failed", "", "", "", ""]
    mesh = " ".join(f"{k}={v}" for k, v in r["mesh"].items() if v > 1)
    hbm = f"{r['capacity_bytes'] / gib:.2f}"
    setting = [name, pod, mesh, str(row.batch), row.remat]
    if r["fits"] is None:
        return [*setting, f"{r['argument_bytes'] / gib:.2f} of {hbm} before activations (lowered only)", "", "", "", ""]
    hbm = f"{r['peak_bytes'] / gib:.2f} of {hbm}"
    if not r["fits"]:
        return [*setting, f"{hbm}, does not fit", "", "", "", ""]
    sent, waited, estimate = r["collective_bytes"], r["synchronous_collective_bytes"], r["estimate"]
    between = f" + {r['dcn_bytes'] / 1e9:.1f} between slices" if row.slices > 1 else ""
    mfu = span([100 * share for share in estimate["mfu"]], 1) if estimate["mfu"] else ""
    traffic = [f"{sent / 1e9:.1f}{between}", f"{waited / sent:.1%}" if sent else ""]
    return [*setting, hbm, *traffic, span(estimate["seconds"], 2), mfu]


def span(values: list[float], digits: int) -> str:
    """'2.51 to 2.75'."""
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in values))


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def program(path: Path, topology: str) -> str:
    """A table of one program that something else compiled."""
    from rynnvla_jax.aot.environment import prepare_compiler

    prepare_compiler(topology)
    from rynnvla_jax.aot import estimate, hlo

    text = path.read_text(encoding="utf-8")
    traffic, times = hlo.collectives(text), estimate.estimate(text, topology)
    rows = [["", "GB sent", "synchronous", "seconds"]]
    for kind, sent in sorted(traffic.by_kind.items(), key=lambda item: -item[1]):
        rows.append([kind, f"{sent / 1e9:.1f}", f"{traffic.synchronous.get(kind, 0.0) / sent:.1%}", ""])
    share = f"{traffic.synchronous_total / traffic.total:.1%}" if traffic.total else ""
    rows.append(["total", f"{traffic.total / 1e9:.1f}", share, ""])
    rows += [[part, "", "", span(list(times.parts[part]), 3)] for part in estimate.PARTS if max(times.parts[part])]
    rows.append(["step", "", "", span(list(times.seconds), 2)])
    known = f"{times.by_cycles:.0%} of the products' FLOPs have the compiler's cycles"
    return f"{markdown(rows)}\n\n{times.words}; {known}; from {times.assumed[0]} to {times.assumed[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=[*TABLES, "program"], help="by default all tables")
    parser.add_argument("--only", default="", help="only rows whose config begins with this")
    parser.add_argument("--quick", action="store_true", help="only as far as the schedule")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/pods.jsonl"))
    parser.add_argument("--program", type=Path, help="a compiled program's text, with --topology")
    parser.add_argument("--topology")
    arguments = parser.parse_args()
    if arguments.table == "program":
        if not arguments.program or not arguments.topology:
            parser.error("--table program needs --program and --topology")
        print(program(arguments.program, arguments.topology))
        return
    tables = {arguments.table: TABLES[arguments.table]} if arguments.table else TABLES
    tables = {name: [row for row in rows if row.config.startswith(arguments.only)] for name, rows in tables.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
    known = {report["command"]: report for report in map(json.loads, lines) if "error" not in report}
    commands = {row: row.command(arguments.quick) for rows in tables.values() for row in rows}
    missing = [words for words in commands.values() if "rynnvla aot " + " ".join(words) not in known]
    with ThreadPoolExecutor(arguments.jobs) as pool, arguments.out.open("a", encoding="utf-8") as file:
        for report in tqdm(pool.map(compiled, missing), total=len(missing), unit="row"):
            file.write(json.dumps(report) + "\n")
            file.flush()
            known[report["command"]] = report
    for name, rows in tables.items():
        values = [cells(row, known["rynnvla aot " + " ".join(commands[row])]) for row in rows]
        print(f"{name}\n\n{markdown([['stage, size', *HEADER], *values])}\n")


if __name__ == "__main__":
    main()
