"""Success rates of a policy on the simulated arm, videos and a page. Same seed, same episodes."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mujoco

from rynnvla_jax.config import ConfigError
from rynnvla_jax.deploy.export_format import STATISTICS, ConnectionLost, PolicyError
from rynnvla_jax.intervals import mean, share
from rynnvla_jax.pages import templates
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.sim import arm, gl, lerobot_process
from rynnvla_jax.sim.drive import ADDRESSES, BUILT_IN, Driver, OpenWorkdir, check_policy, driver
from rynnvla_jax.sim.env import FIRST_SEED, TableTop
from rynnvla_jax.sim.film import Film
from rynnvla_jax.sim.worker_pool import lock, processes
from rynnvla_jax.storage import bucket_cache, files

_RETURN = 45  # steps from where a try ended to the arm's rest
_CHECK = 3  # steps between two looks at whether the task is done
_WHOLE = ("commit_success.txt", "verified.json")  # in a bucket a step without either is not whole


@dataclass(frozen=True)
class Evaluation:
    """The settings that the results depend on, without the number of episodes and the policy's weights."""

    policy: str
    seed: int
    tries: int
    try_seconds: float
    replan: int
    ensemble: bool
    size: int
    held_out: bool
    fixed_look: bool
    averaged: bool = False  # of a work dir's weights, their average
    step: int | None = None  # of a work dir; None: the newest
    mujoco: str = mujoco.__version__


@dataclass(frozen=True)
class Case:
    """One episode: `number` counts those of its task and scenario."""

    task: str
    scenario: str
    number: int

    @property
    def name(self) -> str:
        return f"{self.task}_{self.scenario}_{self.number:04d}"


def evaluate(
    evaluation: Evaluation,
    cases: Sequence[Case],
    out: Path,
    workers: int,
    videos: int,
    lerobot_python: str | None = None,
    open_workdir: OpenWorkdir | None = None,
) -> list[dict]:
    """Runs the episodes that `out/episodes.jsonl` lacks, films `videos` per task and scenario, and writes the page.

    `lerobot_python` serves policies named lerobot:FOLDER, `open_workdir` opens those that are work dirs of training.

    Raises:
      ConfigError: `out` contains another evaluation.
      PolicyError: the policy cannot be loaded or its server is lost.
      WorkError: another process evaluates into `out`, or a worker was killed.
    """
    if not evaluation.policy.startswith(lerobot_process.PREFIX):
        check_policy(evaluation.policy)
    policy = _here(evaluation.policy)
    arm.spec()
    gl.check()
    out.mkdir(parents=True, exist_ok=True)
    settings, lines = out / "evaluation.json", out / "episodes.jsonl"
    with lines.open("a", encoding="utf-8") as file:
        lock(file, f"evaluating into {out}")
        wanted = {**dataclasses.asdict(evaluation), "weights": weights(policy, evaluation.step)}
        if not evaluation.averaged:  # older versions did not note it
            del wanted["averaged"]
        del wanted["step"]  # `weights` has it
        done = {result["name"]: result for result in files.read_log(lines)}
        if done or settings.exists():
            _same(wanted, settings)
        todo = [case for case in cases if case.name not in done]
        print(
            f"Evaluating {evaluation.policy}: {len(cases)} episodes, up to {evaluation.tries} tries of "
            f"{evaluation.try_seconds:g} s per target, seed {evaluation.seed}, {workers} worker(s), rendered with "
            f"{gl.backend()}; {out}"
            + (f"; {len(cases) - len(todo)} are already done" if len(todo) < len(cases) else ""),
            flush=True,
        )
        with contextlib.closing(
            _results(evaluation, policy, todo, out, workers, videos, lerobot_python, open_workdir)
        ) as found:
            for result in found:
                if not settings.exists():  # only now: a policy that cannot be run leaves the folder to another
                    files.write_json(settings, wanted)
                files.append_lines(lines, [result])
                done[result["name"]] = result
    results = [done[case.name] for case in cases]
    rows = table(results, evaluation.tries)
    write_page(evaluation, rows, results, out)
    refused = sum(len(result["errors"]) for result in results)
    said = f"\n{refused} tries ended with an error of the policy, see {lines}" if refused else ""
    print(f"{_text(rows)}\n{said}\n{out / 'index.html'}", flush=True)
    return results


def _here(policy: str) -> str:
    """What to open: `policy`; of an export or LeRobot policy in a bucket a copy, so that not every worker makes one."""
    kind = lerobot_process.PREFIX if policy.startswith(lerobot_process.PREFIX) else ""
    folder = policy.removeprefix(kind)
    if policy.startswith(ADDRESSES) or not files.is_bucket(folder):
        return policy
    path = files.place(folder)
    if not kind and (path / "checkpoints").is_dir():  # a work dir: what is needed of it is read in place
        return policy
    return f"{kind}{bucket_cache.copy(path)}"


def _results(
    evaluation: Evaluation,
    policy: str,
    cases: Sequence[Case],
    out: Path,
    workers: int,
    videos: int,
    lerobot_python: str | None,
    open_workdir: OpenWorkdir | None,
) -> Generator[dict, None, None]:
    """One result per episode, in order: the file is the same for any number of workers."""
    with contextlib.ExitStack() as stack:
        served_policies = []
        if cases and policy.startswith(lerobot_process.PREFIX):
            served_policies = [
                stack.enter_context(lerobot_process.serving(policy, lerobot_python, out / "lerobot.log"))
            ]
            policy = served_policies[0].url
        pool = stack.enter_context(processes(workers))
        running = [
            pool.submit(_episode, evaluation, policy, open_workdir, c, out if c.number < videos else None)
            for c in cases
        ]
        bar = progress_bar(running, desc="episodes", unit="episode")
        good = 0
        for future in bar:
            try:
                result = future.result()
            except ConnectionLost as error:
                for served in served_policies:
                    served.check()  # it says why
                raise PolicyError(f"{error}; after that the same command continues") from None
            good += result["success"]
            bar.set_postfix(success=good, refresh=False)
            yield result


def weights(policy: str, step: int | None = None) -> str:
    """Identifies the policy in a folder: a work dir's checkpoint (None: the newest), or the SHA-256 of another folder's
    files.

    "" if it is not a folder.
    """
    if policy in BUILT_IN or policy.startswith(ADDRESSES):
        return ""
    folder = files.place(policy.removeprefix(lerobot_process.PREFIX))
    if not folder.is_dir():
        return ""
    if (saved := folder / "checkpoints").is_dir():
        found = (p for p in saved.iterdir() if p.name.isdigit())
        newest = max(
            (int(p.name) for p in found if not files.is_bucket(p) or any((p / name).exists() for name in _WHOLE)),
            default=0,
        )
        step = newest if step is None else step
        name, hashed = f"step {step}, fingerprints", [saved / str(step) / "fingerprints" / "metadata"]
    else:
        name, hashed = "SHA-256", [*folder.rglob("*.safetensors"), folder / STATISTICS]
    digest = hashlib.sha256()
    for file in sorted(path for path in hashed if path.is_file()):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"{name} {digest.hexdigest()[:16]}"


def table(results: Iterable[dict], tries: int) -> list[dict]:
    """One row per task and scenario, and one for all: episodes, success, SR@1, mean tries (`tries` for a failure)."""
    results = list(results)
    groups: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        groups.setdefault((result["task"], result["scenario"]), []).append(result)
    if len(groups) > 1:
        groups["all", "all"] = results
    return [
        {
            "task": task,
            "scenario": scenario,
            "episodes": len(group),
            "success": share(sum(r["success"] for r in group), len(group)),
            "first": share(sum(r["success"] and r["tries"] == 1 for r in group), len(group)),
            "tries": mean([r["tries"] if r["success"] else tries for r in group]),
        }
        for (task, scenario), group in groups.items()
    ]


def write_page(evaluation: Evaluation, rows: list[dict], results: list[dict], out: Path) -> None:
    """Writes `out/index.html` with the table and the videos."""
    page = templates.render(
        Path(__file__).with_name("evaluate.html"), evaluation=evaluation, rows=rows, results=results, unit="-100..100"
    )
    files.write_text(out / "index.html", page)


@functools.cache
def _driver(policy: str, replan: int, ensemble: bool, open_workdir: OpenWorkdir | None) -> Driver:
    """The driver of this worker, loaded once. Raises PolicyError."""
    return driver(policy, replan, ensemble, open_workdir)


def _episode(
    evaluation: Evaluation, policy: str, open_workdir: OpenWorkdir | None, case: Case, out: Path | None
) -> dict:
    """One episode of `policy`, a name or address; a line of episodes.jsonl."""
    drives = _driver(policy, evaluation.replan, evaluation.ensemble, open_workdir)
    seed = FIRST_SEED + evaluation.seed * 10**6 + case.number
    env = TableTop(case.task, case.scenario, size=evaluation.size, fixed_look=evaluation.fixed_look)
    env.reset(seed, held_out=evaluation.held_out)
    rest, errors, steps, success, tries = env.state.copy(), [], 0, False, 0
    limit = round(evaluation.try_seconds * len(env.layout.targets) * env.fps)
    film = Film(env) if out else None
    if film:
        film.look()
    while not success and tries < evaluation.tries:
        tries += 1
        try:
            drives.begin(env, seed, tries)
            for step in range(limit):
                target = drives.target(env)
                if target is None:
                    break
                env.step(target)
                steps += 1
                if film:
                    film.look()
                if step % _CHECK == 0 and env.success():
                    break
        except ConnectionLost:  # says nothing about the policy
            raise
        except PolicyError as error:
            errors.append(f"try {tries}: {error}")
        success = env.success()
        if not success and tries < evaluation.tries:
            start = env.state.copy()
            for k in range(1, _RETURN + 1):
                env.step(start + (rest - start) * k / _RETURN)
    if film and out:
        path = out / "videos" / f"{case.name}.mp4"
        film.write(path, env.instruction, f"success, try {tries}" if success else f"failed, {tries} tries")
    env.close()
    return {
        "name": case.name,
        **dataclasses.asdict(case),
        "seed": seed,
        "instruction": env.instruction,
        "success": bool(success),
        "tries": tries,
        "steps": steps,
        "errors": errors,
        "video": f"videos/{case.name}.mp4" if film else "",
    }


def _same(wanted: dict, settings: Path) -> None:
    """Raises ConfigError when the existing results have other settings."""
    try:
        there = dict(files.read_json(settings))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{settings} is damaged ({error}); choose another --out") from None
    for key, value in wanted.items():
        if there.get(key) != value:
            raise ConfigError(
                f"{settings.parent} was evaluated with {key} {there.get(key)!r}, not {value!r}; choose another --out"
            )


def _text(rows: list[dict]) -> str:
    """The table for a terminal."""
    lines = [f"\n{'task':<12}{'scenario':<12}{'episodes':>8}  {'success':<22}{'SR@1':<22}{'mean tries':<20}"]
    for row in rows:
        shares = (
            f"{100 * r.value:5.1f} % ({100 * r.low:.0f} to {100 * r.high:.0f})" for r in (row["success"], row["first"])
        )
        t = row["tries"]
        success, first = shares
        lines.append(
            f"{row['task']:<12}{row['scenario']:<12}{row['episodes']:>8}  {success:<22}{first:<22}"
            f"{t.value:.2f} ({t.low:.2f} to {t.high:.2f})"
        )
    return "\n".join(lines)
