"""The tables of `benchmarks.pods` from recorded reports, without a compiler."""

import json
import subprocess
import sys

import pytest

from benchmarks import pods
from tests import ROOT
from tests.aot.test_hlo import HEADER, REDUCE, SUM, entry

REPORT = {
    "mesh": {"replica": 2, "fsdp": 256, "tensor": 1}, "capacity_bytes": 16 * 2**30, "peak_bytes": 8 * 2**30,
    "argument_bytes": 4 * 2**30, "fits": True, "collective_bytes": 50e9, "synchronous_collective_bytes": 5e9,
    "dcn_bytes": 1.5e9, "estimate": {"seconds": [2.0, 2.5], "mfu": [0.3, 0.375]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "changes", "ends"),
    [
        (
            pods.Row("video:7b", "v5e:16x16", 1, "full", 2),
            {},
            "2 x v5e:16x16 | replica=2 fsdp=256 | 1 | full | 8.00 of 16.00 | 50.0 + 1.5 between slices | 10.0% | "
            "2.00 to 2.50 | 30.0 to 37.5",
        ),
        (pods.Row("video:7b", "v5e:8x8", 1, "full"), {"fits": False}, "full | 8.00 of 16.00, does not fit |  |  |  | "),
        (pods.Row("video:7b", "h100:8", 1, "full"), {"fits": None}, "4.00 of 16.00 before activations (lowered only)"),
        (pods.Row("robot:7b", "v5e:8x8", 1, "full", more=pods.AHEAD), {"error": "out of disk"}, "failed"),
    ],
)
def test_a_row_of_the_table(row, changes, ends):
    text = " | ".join(pods.cells(row, {**REPORT, **changes}))
    assert ends in text and text.startswith(row.config.replace(":", ", "))
    assert text.count("|") == len(pods.HEADER)


def test_rows_are_commands():
    row = pods.Row("video:7b", "v5e:16x16", 1, "full", 2)
    assert row.command(True)[-2:] == ["--slices=2", "--quick"] and "--config.data.frame_codes=ahead" in row.command(
        False
    )
    assert "--quick" not in pods.Row("video:7b", "h100:8", 1, "full").command(True)  # it is only lowered anyway


def test_known_rows_are_not_compiled_again(tmp_path):
    """All rows of a table are in the file: no compiler runs."""
    rows = [row for row in pods.TABLES["pods"] if row.config == "robot:34b"]
    out = tmp_path / "pods.jsonl"
    lines = [json.dumps({"command": "rynnvla aot " + " ".join(row.command(False)), **REPORT}) for row in rows]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.pods", "--table=pods", "--only=robot:34b", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.count("| robot, 34b | v") == 2, done.stderr


def test_a_program_of_another_source_is_read_by_the_same_rules(tmp_path):
    file = tmp_path / "program.txt"
    file.write_text(HEADER + SUM + entry(f"ROOT %y = f32[16,16] {REDUCE}"), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.pods", "--table=program", f"--program={file}", "--topology=v6e:8x8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "| total | 0.0 | 100.0% |" in done.stdout and "not measured on a TPU" in done.stdout, done.stderr
