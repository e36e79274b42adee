"""Comparing runs: which keys differ, who won, means over seeds, and what the page says of runs that did not finish."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rynnvla_jax import intervals
from rynnvla_jax.checkpoint import provenance
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import InitFromConfig, OptimizerConfig, TrainConfig, to_dict
from rynnvla_jax.report import compare, compare_keys, compare_page, pairs

STEPS = 40


def make(directory: Path, loss: float, steps: int = STEPS, slope: float = 1.0, **changes) -> Path:
    """A work dir as training leaves it: the loss falls in a line to `loss`, its lines come every step."""
    rate = changes.pop("peak_lr", 1e-4)
    config = TrainConfig(stage="robot", total_steps=STEPS, optimizer=OptimizerConfig(peak_lr=rate), **changes)
    (directory / "assets").mkdir(parents=True)
    (directory / "assets/config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    lines = [
        {
            "step": s,
            "loss": loss + slope * (steps - s),
            "token_accuracy": 1 / (1 + loss + steps - s),
            "learning_rate": rate,
            "skipped": 0.0,
        }
        for s in range(1, steps + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    timing = [{"step": s, "steps_per_second": 2.0, "data_wait_share": 0.0} for s in range(1, steps + 1)]
    (directory / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing), encoding="utf-8")
    return directory


def entry(revision: str = "a" * 40, data: str = "d") -> dict:
    return {
        **{
            "started": "2026-01-01T00:00:00+00:00",
            "step": 0,
            "config": "c",
            "data": data,
            "exclude": "",
            "sources": [],
        },
        **{
            "code": {"version": "1.0", "revision": revision, "dirty": False},
            "python": "3.11",
            "packages": {"jax": "9.9"},
        },
    }


def sign(directory: Path, **changes) -> None:
    (directory / provenance.FILE).write_text(json.dumps({"attempts": [entry(**changes)]}), encoding="utf-8")


def sweep(root: Path) -> Path:
    """Two rates by three seeds; one run failed half way, one point never got a work dir."""
    names = []
    for rate, losses in ((1e-5, (3.0, 3.5, 4.0)), (1e-3, (1.0, 1.5, 0.1))):
        for seed, loss in enumerate(losses):
            steps = 20 if loss == 0.1 else STEPS
            names.append(f"{len(names):03d}_peak_lr={rate:g},seed={seed}")
            sign(make(root / names[-1], loss, steps, peak_lr=rate, seed=seed))
    events = ["finished"] * 5 + ["failed", "failed"]
    names.append("006_peak_lr=0.1,seed=0")
    (root / "sweep.json").write_text(
        json.dumps({"metric": "token_accuracy", "points": [{"name": name, "keys": {}} for name in names]}),
        encoding="utf-8",
    )
    lines = [{"time": 0, "point": name, "event": e} for name, e in zip(names, events, strict=True)]
    (root / "status.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


@pytest.fixture
def swept(tmp_path) -> Path:
    return sweep(tmp_path / "rates")


def final(loss: float) -> float:
    """Of the last four of forty lines."""
    return loss + 1.5


def test_only_keys_that_differ_are_columns(swept):
    rows, _ = compare.read([swept])
    assert compare.differing(rows) == ["seed", "optimizer.peak_lr"]
    assert compare.differing(rows[:1]) == []


def test_final_is_the_mean_of_the_last_tenth_and_best_a_single_value(swept):
    row = compare.read([swept])[0][3]
    assert row.final["loss"] == pytest.approx(final(1.0))
    assert row.best["loss"] == (1.0, STEPS)
    assert row.best["token_accuracy"] == (pytest.approx(0.5), STEPS)  # more is better
    assert "learning_rate" not in row.best


def test_values_that_are_not_finite_do_not_win():
    lines = [{"step": s, "loss": float("nan") if s == 20 else float(20 - s)} for s in range(1, 21)]
    found, best = compare.results(lines)
    assert found["loss"] == 1.0 and best["loss"] == (1.0, 19)
    assert np.isnan(compare.results([{"step": 1, "loss": float("inf")}])[0]["loss"])


def test_the_best_is_among_those_that_finished(swept, tmp_path):
    rows, _ = compare.read([swept])
    assert compare.winners(rows, ["loss", "token_accuracy"]) == {"loss": 3, "token_accuracy": 3}
    under_way = [make(tmp_path / f"run{i}", loss, 10) for i, loss in enumerate((2.0, 1.0))]
    assert compare.winners(compare.read(under_way)[0], ["loss"]) == {"loss": 1}


def test_states_come_from_the_steps_and_the_sweep(swept):
    rows, missing = compare.read([swept])
    assert [row.state for row in rows] == ["finished"] * 5 + ["failed, step 20 of 40"]
    assert missing == ["006_peak_lr=0.1,seed=0 (failed)"]


def test_seed_means_have_the_interval_of_student(swept):
    rows, _ = compare.read([swept])
    slow, fast = compare.groups(rows, compare.differing(rows))
    assert slow.label == "optimizer.peak_lr=1e-05" and [len(slow.rows), len(fast.rows)] == [3, 3]
    values = slow.finals("loss")
    assert values == pytest.approx([final(x) for x in (3.0, 3.5, 4.0)])
    found = intervals.mean(values)
    test = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((test.low, test.high))
    assert fast.finals("loss") == pytest.approx([final(1.0), final(1.5)])  # the third has not finished
    assert intervals.mean([2.0]) == intervals.Estimate(2.0, 2.0, 2.0)


def test_a_directory_stands_for_the_work_dirs_in_it_once(swept, tmp_path):
    alone = make(tmp_path / "alone", 2.0)
    rows, _ = compare.read([alone, swept, next(swept.glob("000*")), alone])
    assert [row.name for row in rows] == ["alone", *sorted(p.name for p in swept.iterdir() if p.is_dir())]


def test_runs_of_one_name_are_told_apart(tmp_path):
    rows, _ = compare.read([make(tmp_path / "a" / "run", 1.0), make(tmp_path / "b" / "run", 2.0)])
    assert [row.name for row in rows] == ["a/run", "b/run"]


def test_runs_of_sweeps_of_one_name_are_told_apart(tmp_path):
    folders = [tmp_path / day / "rates" for day in ("monday", "tuesday")]
    for folder, loss in zip(folders, (1.0, 3.0), strict=True):
        make(folder / "000_base", loss)
    make(folders[1] / "001_other", 2.0, seed=1)
    rows, _ = compare.read(folders)
    assert [row.name for row in rows] == ["monday/rates/000_base", "tuesday/rates/000_base", "001_other"]


def test_a_seed_that_is_there_again_is_no_sample_of_its_mean(tmp_path):
    folders = [tmp_path / name for name in ("before", "after")]
    for folder, loss in zip(folders, (1.0, 3.0), strict=True):
        for seed in (0, 1):
            make(folder / f"{seed}", loss, seed=seed)
    rows, _ = compare.read(folders)
    groups = compare.groups(rows, compare.differing(rows))
    assert [(g.label, [r.name for r in g.rows]) for g in groups] == [
        ("all runs", ["before/0", "before/1"]),
        ("all runs (again, 2)", ["after/0", "after/1"]),
    ]
    assert any(
        text.endswith(
            "Not included in a mean, because another run has the same configuration and seed: after/0, after/1."
        )
        for text in compare_page.problems(rows)
    )


def test_a_mixture_is_shown_by_sources_and_shares():
    assert compare.text([["lerobot:a", 0.5], ["egodex:b", 0.5]]) == "lerobot:a 0.5, egodex:b 0.5"
    assert compare.text(["a", "b"]) == "a, b"


def test_long_paths_are_shown_by_what_differs(tmp_path):
    paths = ["/bucket/experiments/stage2/base", "/bucket/experiments/stage2/more/base", ""]
    runs = [make(tmp_path / str(i), 1.0, init_from=InitFromConfig(path=path)) for i, path in enumerate(paths)]
    rows, _ = compare.read(runs)
    texts = compare.table_texts(rows, compare.differing(rows))
    assert [t["init_from.path"] for t in texts] == ["…/base", "…/more/base", "–"]


def test_keys_are_called_by_as_little_as_tells_them_apart():
    keys = ["seed", "optimizer.peak_lr", "vla.transformer.width", "other.transformer.width"]
    assert [compare.short(key, keys) for key in keys] == [
        *("seed", "optimizer.peak_lr", "vla.transformer.width", "other.transformer.width")
    ]
    assert compare.short("vla.transformer.width", keys[:3]) == "transformer.width"


def command(capsys, *arguments) -> tuple[int, str]:
    status = cli.main(["compare", *map(str, arguments)])
    return status, capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("page")
    out = root / "new" / "page.html"
    assert cli.main(["compare", str(sweep(root / "rates")), "--out", str(out), "--title", "Rates <1>"]) == 0
    return out.read_text(encoding="utf-8")


def rows_of(page: str, table: int) -> list[list[str]]:
    """Text of the cells of the n-th sortable table."""
    body = page.split('<table class="numbers sortable">')[table + 1].split("<tbody>")[1].split("</tbody>")[0]
    lines = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [
        [" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in re.findall(r"<t[dh].*?</t[dh]>", line, re.DOTALL)]
        for line in lines
    ]


def test_the_page_has_every_run_and_the_best_is_first(page):
    assert "<h1>Rates &lt;1&gt;</h1>" in page and "6 runs, 5 finished" in page
    assert "token_accuracy decides (higher is better), as the sweep has it" in page
    runs = rows_of(page, 0)
    assert [run[0][:3] for run in runs] == ["003", "004", "000", "001", "002", "005"]  # the last one has not finished
    assert runs[0][1:3] == ["0", "0.001"]
    assert runs[0][4] == "2.5 1 @ 40" and "failed, step 20 of 40" in runs[5][0]
    first = re.findall(r'<td class="n first" data-sort="([^"]*)"', page)
    assert [float(x) for x in first] == [pytest.approx(np.mean(1 / (np.arange(4) + 2))), pytest.approx(final(1.0))]
    assert "006_peak_lr=0.1,seed=0 (failed)" in page


def test_the_page_has_the_means_over_seeds(page):
    """Two runs have no interval, and two seeds in common separate nothing: no mean is marked as the best."""
    fast, slow = rows_of(page, 1)
    assert slow[:3] + slow[4:5] == ["1e-05", "3", "0, 1, 2", "5 ± 1.242"]
    assert fast[:3] == ["0.001", "2", "0, 1"] and "±" not in "".join(fast)
    assert '<td class="n won"' not in page
    assert "No configuration is separated from optimizer.peak_lr=0.001, which has the best mean: none has 3" in page


def seeded(tmp_path, losses: dict[float, list[float]]) -> list[Path]:
    """Work dirs of runs with these rates and losses, by seed."""
    return [
        make(tmp_path / f"rate_{rate:g}_{seed}", loss, peak_lr=rate, seed=seed)
        for rate, found in losses.items()
        for seed, loss in enumerate(found)
    ]


def test_runs_of_one_seed_are_paired(tmp_path, capsys):
    """Seeds differ by more than configurations: means with intervals of their own overlap, the differences do not."""
    losses = {1e-3: [1.0, 3.0, 5.1], 1e-4: [1.2, 3.1, 5.25], 1e-5: [0.9, 3.5, 5.4]}
    directories = seeded(tmp_path, losses)
    rows, _ = compare.read(directories)
    groups = compare.groups(rows, compare.differing(rows))
    second, third = pairs.pairs(groups, "loss")
    test = stats.ttest_rel(losses[1e-4], losses[1e-3]).confidence_interval(0.95)
    assert (second.difference.low, second.difference.high) == pytest.approx((test.low, test.high))
    assert second.separated and not third.separated
    best, other = "optimizer.peak_lr=0.001", "optimizer.peak_lr=0.0001"
    assert str(second) == f"{best} beats {other} by 0.15 ± 0.12 over 3 seeds"
    assert str(third) == f"{best} and optimizer.peak_lr=1e-05 are not separated: 0.233 ± 0.76 over 3 seeds"
    assert pairs.best(groups, "loss") is None and pairs.best(groups[:2], "loss").label == best
    own = [intervals.mean(group.finals("loss")) for group in groups[:2]]
    assert own[0].high > own[1].low  # which says nothing
    code, _ = command(capsys, *directories[:6], "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert code == 0 and f"{best} beats {other} by 0.15 ± 0.12 over 3 seeds." in page
    assert [float(x) for x in re.findall(r'<td class="n won" data-sort="([^"]*)"', page)][0] == pytest.approx(
        final(9.1 / 3)
    )


def test_better_is_higher_where_it_is_so_and_unfinished_runs_do_not_count(tmp_path):
    directories = seeded(tmp_path, {1e-3: [1.0, 1.1, 1.2], 1e-4: [2.0, 2.1, 2.2]})
    rows, _ = compare.read(directories)
    groups = compare.groups(rows, compare.differing(rows))
    (pair,) = pairs.pairs(groups, "token_accuracy")
    assert pair.best is groups[0] and pair.separated and pair.difference.value > 0
    assert pairs.pairs(groups, "learning_rate") == []
    half = [make(tmp_path / f"half_{seed}", 0.1, 20, peak_lr=1e-5, seed=seed) for seed in range(3)]
    rows, _ = compare.read([*directories, *half])
    assert len(pairs.pairs(compare.groups(rows, compare.differing(rows)), "loss")) == 1


def test_keys_are_drawn_with_few_digits_and_logarithmic_where_they_are_spread_so(tmp_path):
    rates = [1.2345678901234567e-5 * 1.7**i for i in range(12)]
    for i, rate in enumerate(rates):
        make(
            tmp_path / "search" / f"{i:03d}_peak_lr={rate:g}", abs(i - 5.0), 20 if i in (8, 9) else STEPS, peak_lr=rate
        )
    names = sorted(path.name for path in (tmp_path / "search").iterdir())
    content = {"metric": "loss", "search": {"engine": "optuna", "metric": "loss"}}
    content["points"] = [{"name": name, "keys": {}} for name in names]
    (tmp_path / "search" / "sweep.json").write_text(json.dumps(content), encoding="utf-8")
    events = [{"time": 0, "point": names[8], "event": "pruned"}, {"time": 0, "point": names[9], "event": "failed"}]
    (tmp_path / "search" / "status.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    assert cli.main(["compare", str(tmp_path / "search"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert rows_of(page, 0)[0][1] == "0.000175" and "…" not in rows_of(page, 0)[0][0]
    found = figures(page)
    (points,) = found["against"]
    assert values(points["x"]) == rates and values(points["y"])[5] == pytest.approx(1.5)
    assert [points["marker"]["symbol"][i] for i in (7, 8, 9)] == ["circle", "triangle-down-open", "x"]
    assert '"type":"log"' in page.split('id="against"')[1].split('id="best_so_far"')[0]
    trials, line = found["best_so_far"]
    assert values(trials["x"]) == list(range(12))
    best = [abs(i - 5.0) + 1.5 for i in range(6)]
    assert values(line["y"]) == pytest.approx(best + [best[-1]] * 6)
    (parallel,) = found["parallel"]
    assert parallel["dimensions"][0]["ticktext"] == ["1e-05", "0.0001", "0.001", "0.01"]


def test_importances_come_from_the_study(tmp_path):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/optuna.db"
    study = optuna.create_study(storage=storage, study_name="sweep", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(lambda t: t.suggest_float("lr", 0, 1) + 1e-3 * t.suggest_float("decay", 0, 1), n_trials=9)
    content = {"metric": "loss", "points": [], "search": {"engine": "optuna", "metric": "loss"}}
    (tmp_path / "sweep.json").write_text(json.dumps(content), encoding="utf-8")
    assert compare.importances([tmp_path], "loss") == {}  # too few trials
    study.optimize(lambda t: t.suggest_float("lr", 0, 1) + 1e-3 * t.suggest_float("decay", 0, 1), n_trials=20)
    found = compare.importances([tmp_path], "loss")
    assert list(found) == ["lr", "decay"] and found["lr"] > 0.6 and sum(found.values()) == pytest.approx(1)
    assert compare.importances([tmp_path], "eval/loss") == {}
    assert "lr" in compare_keys.importances(found) and compare_keys.importances({}) == ""


def test_the_page_needs_nothing_from_outside(page):
    rest = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "http" not in rest and "url(" not in rest and "<link" not in rest
    assert not re.search(r"<(script|img)[^>]* src=", page)
    assert "plotly.js v" in page


def figures(page: str) -> dict[str, list[dict]]:
    """Traces by the name of the drawing."""
    found = {}
    for match in re.finditer(r'Plotly\.newPlot\(\s*"(\w+)",\s*', page):
        found[match[1]] = json.JSONDecoder().raw_decode(page[match.end() :])[0]
    return found


def test_curves_have_every_run_and_the_mean_with_its_band(page):
    traces = figures(page)["curves"]
    loss = [t for t in traces if t["xaxis"] == "x"]
    assert [t["meta"] for t in loss] == [0] * 5 + [1] * 4  # a band, three runs, a mean; two finished runs have no band
    band, *runs, mean = loss[:5]
    assert band["fill"] == "toself" and len(values(band["x"])) == 2 * STEPS
    *runs, mean = loss[5:]
    assert "peak_lr=0.001,seed=0" in runs[0]["hovertemplate"] and len(values(runs[2]["x"])) == 20
    assert len(values(mean["x"])) == STEPS and values(mean["y"])[-1] == pytest.approx(1.25)


def values(field) -> list[float]:
    """plotly writes lists as they are, and arrays in base 64."""
    assert isinstance(field, list)
    return field


def test_parallel_coordinates_end_with_the_metric_of_the_sweep(page):
    (trace,) = figures(page)["parallel"]
    assert [d["label"] for d in trace["dimensions"]] == ["seed", "optimizer.peak_lr", "Loss", "Token accuracy"]
    assert trace["dimensions"][1]["ticktext"] == ["1e-05", "0.001"]
    assert len(trace["line"]["color"]) == 6 and trace["line"]["reversescale"] is True  # blue is good: more is better


def test_code_and_data_of_runs_are_compared(swept, tmp_path):
    runs = sorted(path for path in swept.iterdir() if path.is_dir())
    sign(runs[0], revision="b" * 40)
    sign(runs[1], data="other")
    assert cli.main(["compare", str(swept), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "revision bbbbbbbbbbbb; Python 3.11, jax 9.9" in page and "revision aaaaaaaaaaaa" in page
    assert "differs between runs: 2 different manifests" in page


def test_runs_that_logged_nothing_are_shown(tmp_path):
    make(tmp_path / "run", 1.0, 0)
    assert cli.main(["compare", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "step 0 of 40" in page and "Nothing is logged yet" in page


def test_the_table_as_csv(swept, tmp_path):
    out = ["--out", str(tmp_path / "p.html"), "--csv", str(tmp_path / "t" / "t.csv")]
    assert cli.main(["compare", str(swept), *out]) == 0
    with (tmp_path / "t" / "t.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["config.optimizer.peak_lr"] for line in lines] == ["0.001"] * 2 + ["1e-05"] * 3 + ["0.001"]
    assert [float(line["loss_best"]) for line in lines] == [1.0, 1.5, 3.0, 3.5, 4.0, 0.1]
    assert float(lines[0]["loss"]) == pytest.approx(final(1.0)) and lines[0]["revision"] == "a" * 40
    assert lines[5]["state"] == "failed, step 20 of 40" and lines[0]["seconds"] == "20.0"


def test_held_out_data_decide_where_all_runs_have_them(tmp_path, capsys):
    """The run that remembers its data best is the worse one on held-out data."""
    for name, loss, errors in (("first", 1.0, (4.0, 3.0, 5.0)), ("second", 2.0, (4.0, 3.5, 2.5))):
        directory = make(tmp_path / name, loss)
        lines = [{"step": 10 * i, "action_error": e, "hold_still_error": 9.0} for i, e in enumerate(errors, 1)]
        lines = [{**line, "action_error/gripper": 1.0} for line in lines]
        (directory / "eval.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines), encoding="utf-8")
    directories = [tmp_path / "first", tmp_path / "second"]
    rows, _ = compare.read(directories)
    assert [row.final["eval/action_error"] for row in rows] == [5.0, 2.5] and rows[0].run.step == STEPS
    assert rows[0].best["eval/action_error"] == (3.0, 20) and "eval/hold_still_error" not in rows[0].best
    metric, why = compare.main_metric(directories, rows)
    assert metric == "eval/action_error"
    assert why == "eval/action_error decides (lower is better): it is of data that the runs do not train on"
    assert compare.main_metric(directories, rows, "loss")[1] == "loss decides (lower is better), as --metric says"
    code, said = command(capsys, *directories, "--out", tmp_path / "page.html", "--csv", tmp_path / "table.csv")
    assert code == 0 and why in said
    assert why in (tmp_path / "page.html").read_text(encoding="utf-8")
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        header = next(csv.reader(file))
    assert "eval/action_error_best" in header and "eval/action_error/gripper" not in header

    directories.append(make(tmp_path / "third", 3.0))  # without held-out data
    rows, _ = compare.read(directories)
    metric, why = compare.main_metric(directories, rows)
    assert metric == "loss" and "of training data, because not all runs have held-out data" in why


def test_errors_name_the_directory_and_the_remedy(swept, tmp_path, capsys):
    out = tmp_path / "page.html"
    (tmp_path / "empty").mkdir()
    for directory, message in (
        (tmp_path / "nowhere", "nowhere is not a directory; pass"),
        (tmp_path / "empty", "and contains none"),
    ):
        status, said = command(capsys, directory, "--out", out)
        assert status == 1 and said.startswith("rynnvla compare: ") and message in said
    status, said = command(capsys, swept, "--out", out, "--metric", "los")
    assert status == 1 and "Did you mean loss?" in said
    status, said = command(capsys, swept, "--out", tmp_path)
    assert status == 1 and "is a directory; give the path of a file" in said
    assert not out.exists()
