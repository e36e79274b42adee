"""Windows of the ActionVAE per second and core, from the array of rows and from recordings. Prints one JSON object.

    python -m benchmarks.rows [--recordings 400] [--hours 100] [--data KIND:PATH]

Examples are chunks of 20 normalised actions of 6 columns in batches of 128, read without threads, so that CPU time is
that of one core. Both ways read the same recordings of 300 steps in the same process, in turns; the batches are equal.
`large` is the array of `--hours` of recording at 30 steps a second, whose windows do not fit into the CPU's caches.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.episode import Episode, Episodes
from data_pipelines.loader import Loader
from data_pipelines.sources import egodex, open_source
from rynnvla_jax.config import DataConfig, TrainConfig

BATCH, STEPS, ASKED = 128, 300, 20_000
SECONDS = 2.0  # of each turn


def write_egodex(root: Path, recordings: int) -> None:
    """Poses of the camera and both wrists, as in EgoDex; the other joints of a hand are not written."""
    generator = np.random.default_rng(0)
    for number in range(recordings):
        path = root / f"part{number % 5}" / "lift" / f"{number}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for name in ("camera", "leftHand", "rightHand"):
                pose = np.tile(np.eye(4, dtype=np.float32), (STEPS + 1, 1, 1))
                pose[:, :3, 3] = np.cumsum(generator.normal(0, 0.01, (STEPS + 1, 3)), 0)
                file[f"transforms/{name}"] = pose
            file.attrs.update(llm_description="lift the cup", which_llm_description="1")


@dataclass(frozen=True)
class Invented:
    """Episodes like those of EgoDex that are in no file."""

    def __call__(self, number: int) -> Episode:
        generator = np.random.default_rng(number)
        world = np.cumsum(generator.normal(0, 0.01, (STEPS + 1, 6)).astype(np.float32), 0)
        camera = np.tile(np.eye(3, dtype=np.float32), (STEPS, 1, 1))
        return Episode(
            name=str(number), texts=("lift",), text_of=np.zeros(STEPS, np.int32), fps=30.0, state=world[:-1],
            action=world[1:], columns=egodex.COLUMNS, origin=world[:-1], world_to_camera=camera,
        )  # fmt: skip


def invented(hours: float, folder: Path) -> Episodes:
    (folder / "file").touch()
    count = int(hours * 3600 * 30 / STEPS)
    kind = Episodes.of([Invented()(0)], "egodex:invented")
    lengths = np.full(count, STEPS, np.int64)
    return replace(kind, lengths=lengths, read=Invented(), files=lambda: [folder / "file"])


def memory() -> dict[str, float]:
    """MB of this process: its own, and those of mapped files, which the system takes back when it needs them."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kept = {line.split(":")[0]: int(line.split()[1]) / 1e3 for line in lines if line.startswith("Rss")}
    return {"own_mb": kept["RssAnon"], "mapped_mb": kept["RssFile"]}


def rate(batches, seconds: float = SECONDS) -> float:
    """Windows per CPU second."""
    cpu, count = time.process_time(), 0
    while time.process_time() - cpu < seconds:
        next(batches)
        count += BATCH
    return count / (time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=400, help="files of 300 steps")
    parser.add_argument("--hours", type=float, default=100.0, help="of the large array; 0 leaves it out")
    parser.add_argument("--data", default="", help="another data set, KIND:PATH, with 6 actions")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RYNNVLA_CACHE"] = os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        root = Path(folder, "egodex")
        if not a.data:
            write_egodex(root, a.recordings)
        config = TrainConfig(
            stage="action_vae", batch_size=BATCH, data=DataConfig(source=a.data or f"egodex:{root}", num_threads=0)
        )
        source = open_source(config.data.source, config.data, (), progress=False)
        alone = replace(source, files=None)
        marks = [time.monotonic()]
        peer = Loader(config, sources=[alone], progress=False)  # with statistics, as at the start of a run
        marks.append(time.monotonic())
        ours = Loader(config, sources=[source], progress=False)
        marks.append(time.monotonic())
        again = Loader(config, sources=[source], statistics=ours.statistics, progress=False)
        marks.append(time.monotonic())
        opened = dict(zip(("recordings", "rows_made", "rows_there"), np.diff(marks).tolist(), strict=True))
        theirs, mine = peer.batches(), again.batches()
        for _ in range(50):
            for key, value in next(theirs).items():
                np.testing.assert_array_equal(value, next(mine)[key] if key == "actions" else value)
        rates = [(rate(mine), rate(theirs)) for _ in range(5)]
        fast, slow = (float(np.median(part)) for part in zip(*rates, strict=True))
        values = {}
        if a.hours:
            large = invented(a.hours, Path(folder))
            began = time.monotonic()
            loader = Loader(config, sources=[large], statistics=ours.statistics, progress=False)
            made = time.monotonic() - began
            batches, kept, speeds = loader.batches(), [], []
            for _ in range(5):
                speeds.append(rate(batches))
                kept.append(memory())
            values["large"] = {
                "hours": a.hours, "made_seconds": made, "gb": Path(loader._rows[0].path).stat().st_size / 1e9,  # type: ignore[union-attr]
                "windows_per_second_and_core": float(np.median(speeds)), "memory": kept,
            }  # fmt: skip
        print(
            json.dumps(
                {
                    "windows_per_second_and_core": fast, "recordings_windows_per_second_and_core": slow,
                    "ratio": fast / slow, "asked": ASKED, "open_seconds": opened,
                    "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, **values,
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
