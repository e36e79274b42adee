"""Speed of reading data, compared with a baseline in the same run. Prints one JSON object per part.

    python -m benchmarks.data [corpus|sequences|lerobot|memory|curate ...] [--lerobot_python PYTHON]

corpus     12 million records in 1200 shards: time to open, first batch, memory, resuming, order
sequences  tokenized stage 1 sequences of 4096 tokens per minute and core, and the time the loop waits for data
lerobot    windows of 4 frames of 2 cameras, random access, compared with LeRobot's LeRobotDataset + DataLoader
memory     resident memory over 200 thousand batches
curate     clips per second and core for each step, and the core-hours for 12 million clips
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RECORDS, SHARDS = 12_000_000, 1200
TASKS = ("put the green block on the plate", "put the pen into the holder", "open the drawer and take the cup out")
CODES = 8192


def resident() -> float:
    """Resident memory of this process, in MB."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def say(part: str, **values) -> None:
    print(json.dumps({"part": part, **values}), flush=True)


def write_tokenizer(path: Path) -> None:
    from rynnvla_jax.vocabulary import train_tokenizer

    path.write_text(train_tokenizer(TASKS, num_codes=CODES, num_text=200), encoding="utf-8")


def small_records(first: int, count: int):
    """Records of two tiny frames, so that access is measured and not decoding."""
    for i in range(first, first + count):
        yield {
            "clip_id": str(i),
            "captions": [TASKS[i % len(TASKS)]],
            "caption_of": np.zeros(2, np.int32),
            "fps": 30.0,
            "front_codes": np.full((2, 2, 2), i % CODES, np.uint16),
        }


IMAGE_KEY = '{"shortest_edge": 32, "fit": "square"}'


def config(source: str, length: int, **sequence):
    from rynnvla_jax.config import DataConfig, ImageConfig, SequenceConfig, TrainConfig

    edge = sequence.pop("edge")
    return TrainConfig(
        stage="video",
        batch_size=sequence.pop("batch_size", 64),
        data=DataConfig(
            source=source,
            frame_codes="ahead",
            num_threads=sequence.pop("num_threads", 2),
            image=ImageConfig(shortest_edge=edge, fit="square"),
        ),
        sequence=SequenceConfig(length=length, use_wrist_frame=False, **sequence),
    )


def corpus(directory: Path) -> None:
    """The streaming figures. Twelve shards are written and the others are copies of them, kept in `directory`."""
    from data_pipelines.corpus import records

    out, count = directory / "corpus12m", RECORDS // SHARDS
    layout = records.CorpusLayout(grid=(2, 2), vqgan="abc", image=IMAGE_KEY)
    if not (out / "corpus.json").exists():
        for shard in range(SHARDS):
            if shard < 12:
                records.write_shard(out, shard, SHARDS, small_records(shard * count, count), layout)
                continue
            for path in (
                lambda s: out / records.shard_name(s, SHARDS),
                lambda s: records.manifest_path(out, s, SHARDS),
            ):
                shutil.copyfile(path(shard % 12), path(shard))
        records.finish(out, SHARDS, {}, layout)
    write_tokenizer(directory / "tokenizer.json")
    for step in (0, 0, 1_000_000):  # each in its own process; the first makes the plan
        subprocess.run([sys.executable, "-m", "benchmarks.data", "_open", str(directory), str(step)], check=True)


def open_once(directory: Path, step: int) -> None:
    from data_pipelines.loader import Loader
    from rynnvla_jax.vocabulary import TextTokenizer

    before, started = resident(), time.monotonic()
    tokenizer = TextTokenizer(directory / "tokenizer.json")
    c = config(f"records:{directory / 'corpus12m'}", 64, edge=32, num_frames=2)
    planned = not (directory / "corpus12m" / "plans").exists()
    loader = Loader(c, tokenizer=tokenizer, progress=False)
    opened = time.monotonic() - started
    batches = loader.batches(step)
    next(batches)
    first = time.monotonic() - started
    rate_started = time.monotonic()
    for _ in range(100):
        next(batches)
    rate = 100 * c.batch_size / (time.monotonic() - rate_started)
    values = {}
    if step == 0:  # example numbers at random positions of an epoch, by the stream's own shuffle
        import grain

        order = grain.MapDataset.range(len(loader.sources[0])).seed(c.seed).shuffle()
        positions = np.random.default_rng(0).choice(RECORDS, 200_000, replace=False)
        drawn = {int(order[int(p)]) for p in positions}
        values = {"sampled_positions": len(positions), "different_records": len(drawn), "largest": max(drawn)}
    batches.close()
    say(
        "corpus", step=step, made_plan=planned, open_seconds=opened, first_batch_seconds=first,
        resident_mb=resident(), before_mb=before, records_per_second=rate, **values,
    )  # fmt: skip


def sequences(directory: Path) -> None:
    """Stage 1 sequences of 4096 tokens with frames of 384 x 384 pixels: six frames per clip."""
    from data_pipelines.corpus import records
    from data_pipelines.loader import Loader
    from rynnvla_jax.vocabulary import TextTokenizer

    out = directory / "clips384"
    image = '{"shortest_edge": 384, "fit": "square"}'
    layout = records.CorpusLayout(grid=(24, 24), vqgan="abc", image=image)
    if not (out / "corpus.json").exists():
        rng = np.random.default_rng(0)
        for shard in range(4):
            records.write_shard(
                out, shard, 4,
                (
                    {
                        "clip_id": f"{shard}-{i}",
                        "captions": [TASKS[i % 3]],
                        "caption_of": np.zeros(24, np.int32),
                        "fps": 30.0,
                        "front_codes": rng.integers(0, CODES, (24, 24, 24)).astype(np.uint16),
                    }
                    for i in range(1000)
                ),
                layout,
            )  # fmt: skip
        records.finish(out, 4, {}, layout)
    write_tokenizer(directory / "tokenizer.json")
    c = config(f"records:{out}", 4096, edge=384, num_frames=6, frame_interval=4, batch_size=16)
    loader = Loader(c, tokenizer=TextTokenizer(directory / "tokenizer.json"), progress=False)
    batches = loader.batches()
    next(batches)
    cpu, wall = time.process_time(), time.monotonic()
    for _ in range(150):
        next(batches)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    batches.close()
    plan = loader._examples[0].plan
    assert plan is not None  # of a corpus
    say(
        "sequences", tokens=4096, per_minute_and_core=60 * 150 * 16 / cpu, per_minute=60 * 150 * 16 / wall,
        asked_per_minute_and_core=2000, padding=plan.padding,
    )  # fmt: skip


def memory(directory: Path, batches_wanted: int = 200_000) -> None:
    """Resident memory after 5 % of the batches and at the end."""
    from data_pipelines.loader import Loader
    from rynnvla_jax.vocabulary import TextTokenizer

    c = config(f"records:{directory / 'corpus12m'}", 64, edge=32, num_frames=2, batch_size=1)
    loader = Loader(c, tokenizer=TextTokenizer(directory / "tokenizer.json"), progress=False)
    marks, batches = [], loader.batches()
    for i in range(batches_wanted):
        next(batches)
        if i + 1 in [batches_wanted * k // 20 for k in range(1, 21)]:
            marks.append(round(resident(), 1))
    batches.close()
    say("memory", batches=batches_wanted, resident_mb=marks, growth=marks[-1] / marks[0] - 1)


LEROBOT = """
import json, sys, time
import torch
torch.library.register_fake = lambda *a, **k: (lambda f: f)  # torchvision's wheel has CUDA operators only
from lerobot.datasets.lerobot_dataset import LeRobotDataset
root, batches, workers = sys.argv[1], int(sys.argv[2]), 0
keys = ["observation.images.front", "observation.images.wrist"]
fps = 30
delta = {k: [i / fps for i in range(4)] for k in keys} | {"action": [i / fps for i in range(20)]}
data = LeRobotDataset("local/data", root=root, delta_timestamps=delta)
loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)
it = iter(loader)
next(it)
cpu, wall = time.process_time(), time.monotonic()
for _ in range(batches):
    next(it)
print(json.dumps({"cpu": time.process_time() - cpu, "wall": time.monotonic() - wall, "samples": batches * 8}))
"""


def lerobot(python: str, root: Path) -> None:
    """CPU seconds, measured in turns; both decode in one process. Frames keep their 256 x 256 pixels, as in LeRobot."""
    from data_pipelines.loader import Loader
    from rynnvla_jax.config import DataConfig, ImageConfig, SequenceConfig, TrainConfig
    from rynnvla_jax.vocabulary import TextTokenizer

    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(Path(directory) / "tokenizer.json")
        tokenizer = TextTokenizer(Path(directory) / "tokenizer.json")
    c = TrainConfig(
        stage="robot",
        batch_size=8,
        data=DataConfig(source=f"lerobot:{root}", num_threads=0, image=ImageConfig(shortest_edge=256)),
        sequence=SequenceConfig(length=7168),
    )
    stream = Loader(c, tokenizer=tokenizer, progress=False).batches()
    next(stream)
    theirs, ours = [], []
    for _ in range(3):
        done = subprocess.run([python, "-c", LEROBOT, str(root), "6"], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"LeRobot failed: {done.stderr.strip().splitlines()[-1]}")
        found = json.loads(done.stdout.splitlines()[-1])
        theirs.append(found["samples"] / found["cpu"])
        cpu = time.process_time()
        for _ in range(6):
            next(stream)
        ours.append(48 / (time.process_time() - cpu))
    ratio = float(np.median(ours) / np.median(theirs))
    say("lerobot", samples_per_cpu_second={"ours": ours, "lerobot": theirs}, ratio=ratio, asked=2.0)


def enlarged(video: Path, out: Path) -> None:
    """A video like those of EgoDex: 1920 x 1080, 30 frames per second, at most 8 s, a key frame every 30 frames."""
    from fractions import Fraction

    from PIL import Image

    from data_pipelines.curate.footage import write_video
    from data_pipelines.video import whole_clip

    clip = whole_clip(video)
    frames = clip.frames(range(min(clip.count, 240)))
    large = (np.asarray(Image.fromarray(f).resize((1920, 1080))) for f in frames)
    out.write_bytes(write_video(large, Fraction(30), 23))


def curate(directory: Path, videos: Path) -> None:
    """CPU seconds per clip for each step, and the time that 12 million clips would take."""
    from data_pipelines.curate.config import CurateConfig
    from data_pipelines.curate.footage import Footage, cut, encode, sample
    from data_pipelines.curate.people import People

    c = CurateConfig()
    people, spent, clips = People(c), {"sample": 0.0, "find_people": 0.0, "encode": 0.0}, 0
    for video in sorted(videos.rglob("*.mp4"))[:4]:
        large = directory / f"large_{video.stem}.mp4"
        if not large.exists():
            enlarged(video, large)
        with Footage(str(large), c.shortest_edge) as footage:
            for span in cut(footage.seconds, c.clip_seconds):
                marks = [time.process_time()]
                frames = sample(footage, span, c.samples)
                marks.append(time.process_time())
                for frame in frames:
                    people.find(frame)
                marks.append(time.process_time())
                encode(footage, span, c.fps, c.quality)
                marks.append(time.process_time())
                for name, seconds in zip(spent, np.diff(marks), strict=True):
                    spent[name] += float(seconds)
                clips += 1
    each = {name: seconds / clips for name, seconds in spent.items()}
    search = each["sample"] + each["find_people"]
    say(
        "curate",
        cpu_seconds_a_clip=each,
        clips=clips,
        dropped_clips_a_second_and_core=1 / search,
        kept_clips_a_second_and_core=1 / (search + each["encode"]),
        core_hours_of_12_million={"search all": RECORDS * search / 3600, "encode all": RECORDS * each["encode"] / 3600},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["corpus", "sequences", "memory"])
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/data_benchmark"), help="folder for the corpora, which are kept"
    )
    parser.add_argument("--lerobot_python", help="the python of an environment with lerobot 0.4.4")
    parser.add_argument("--lerobot_data", type=Path, help="a LeRobot v3.0 data set")
    parser.add_argument("--videos", type=Path, help="folder of ego-centric .mp4, for curate")
    a = parser.parse_args()
    if a.parts[0] == "_open":
        open_once(Path(a.parts[1]), int(a.parts[2]))
        return
    a.dir.mkdir(parents=True, exist_ok=True)
    for part in a.parts:
        if part == "lerobot":
            lerobot(a.lerobot_python, a.lerobot_data)
        elif part == "curate":
            curate(a.dir, a.videos)
        else:
            {"corpus": corpus, "sequences": sequences, "memory": memory}[part](a.dir)


if __name__ == "__main__":
    main()
