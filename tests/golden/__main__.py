"""`python -m tests.golden DIR`: one JSON line a case; exit code 1 when any fails."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from tests.golden import codec_cases, data_cases, vla_cases
from tests.golden.folder import Case, CaseReport, GoldenError, cases, read_manifest

RUNNERS: dict[str, Callable[[Case], CaseReport]] = {
    "vla_transformer": vla_cases.run,
    "vqgan": codec_cases.run_vqgan,
    "actionvae": codec_cases.run_action_vae,
    "infer_step": codec_cases.run_infer_step,
    "layout": data_cases.run_layout,
    "data": data_cases.run_data,
    "optim": data_cases.run_schedules,
}


def run_case(case: Case) -> CaseReport:
    """Checks the case's files, then compares. A case that cannot be run is a failed one, with the reason."""
    if case.kind not in RUNNERS:
        reason = case.entry.get("note") if case.kind == "note" else None
        known = ", ".join(RUNNERS)
        return CaseReport(case.name, case.kind, skipped=reason or f"kind {case.kind!r} is not known; known: {known}")
    try:
        case.check_files()
        with jax.default_matmul_precision("highest"):
            return RUNNERS[case.kind](case)
    except Exception as error:  # one unusable case must not hide the others; it is reported and fails the run
        return CaseReport(case.name, case.kind, error=f"{type(error).__name__}: {error}")


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 all agree, 1 a case fails, 2 the folder cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description="Compares rynnvla_jax with a folder of golden data, case by case."
    )
    parser.add_argument("folder", type=Path, help="holds manifest.json and the files it names")
    parser.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    options = parser.parse_args(arguments)
    try:
        selected = cases(options.folder, read_manifest(options.folder), options.case)
    except GoldenError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for case in selected:
        report = run_case(case)
        print(json.dumps(report.to_dict()), flush=True)
        failed += not (report.skipped or report.passed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
