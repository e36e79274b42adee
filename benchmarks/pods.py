"""The table of docs/pods.md: one `rynnvla aot` per row, each in its own process.

    python -m benchmarks.pods [--only robot:7b] [--jobs 2] [--out runs/pods.jsonl]

Rows that are already in the file --out are not compiled again. Prints the table; the file holds the JSON of `rynnvla
aot`, one line per row.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

# Tokens: 4 frames of 384 x 384, two cameras in stage 3, which encodes them in the step; the corpora of stages 1 and 2
# are encoded ahead.
LENGTHS = {"video": 4096, "trajectory": 4096, "robot": 5120}
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
ROWS = [
    *[("robot:7b", topology, slices, *long) for topology, slices, long, _ in PODS],
    ("robot:34b", "v5p:4x4x8", 1, 1, "full"),
    ("robot:34b", "v6e:16x16", 1, 1, "full"),
    *[(f"{s}:7b", topology, slices, *short) for s in ("trajectory", "video") for topology, slices, _, short in PODS],
]


def command(row) -> list[str]:
    """The words after `rynnvla aot`."""
    name, topology, slices, batch, remat = row
    stage, size = name.split(":")
    words = [f"--config=configs/{stage}.py:{size}", f"--topology={topology}", f"--sequence={LENGTHS[stage]}"]
    words += [f"--per-chip-batch={batch}", f"--remat={remat}"]
    words += [] if stage == "robot" else ["--config.data.frame_codes=ahead"]
    return words + ([f"--slices={slices}"] if slices > 1 else [])


def compiled(row) -> dict:
    """The report of `rynnvla aot`, or its error message."""
    done = subprocess.run(
        [sys.executable, "-m", "rynnvla_jax.cli", "aot", *command(row), "--json"], capture_output=True, text=True
    )
    report = json.loads(done.stdout) if done.stdout.strip() else {"error": done.stderr.strip()[-500:]}
    return {"command": "rynnvla aot " + " ".join(command(row)), **report}


def table(reports: list[tuple[tuple, dict]]) -> str:
    """Markdown."""
    gib = 2**30
    lines = [
        "| stage, size | pod | mesh | batch per chip | remat | HBM per chip, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for row, r in reports:
        name, topology, slices, batch, remat = row
        pod = f"{slices} x {topology}" if slices > 1 else topology
        if "error" in r:
            lines.append(f"| {name} | {pod} | | {batch} | {remat} | failed |")
            continue
        mesh = " ".join(f"{k}={v}" for k, v in r["mesh"].items() if v > 1)
        hbm = f"{r['capacity_bytes'] / gib:.2f}"
        if r["fits"] is None:
            hbm = f"{r['argument_bytes'] / gib:.2f} of {hbm} before activations (lowered only)"
        else:
            hbm = f"{r['peak_bytes'] / gib:.2f} of {hbm}" + ("" if r["fits"] else ", does not fit")
        lines.append(f"| {name.replace(':', ', ')} | {pod} | {mesh} | {batch} | {remat} | {hbm} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only rows whose config begins with this")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/pods.jsonl"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if row[0].startswith(arguments.only)]
    lines = arguments.out.read_text(encoding="utf-8").splitlines() if arguments.out.exists() else []
    known = {report["command"]: report for report in map(json.loads, lines)}
    missing = [row for row in rows if "rynnvla aot " + " ".join(command(row)) not in known]
    with ThreadPoolExecutor(arguments.jobs) as pool, arguments.out.open("a", encoding="utf-8") as file:
        for report in tqdm(pool.map(compiled, missing), total=len(missing), unit="row"):
            file.write(json.dumps(report) + "\n")
            file.flush()
            known[report["command"]] = report
    print(table([(row, known["rynnvla aot " + " ".join(command(row))]) for row in rows]))


if __name__ == "__main__":
    main()
