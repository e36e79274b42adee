"""Reading a corpus from a gs:// bucket, compared with the same corpus on the local disk in the same run.

    python -m benchmarks.buckets [--delay 0.02] [--threads 1 2 4 8 16] [--seconds 10]

Two processes, as the hosts of a run, each read their 32 rows of every batch of 64 sequences of 4096 tokens (six frames
of 384 x 384 pixels) through the loader. The store is an emulator whose answers are delayed; it runs on this machine and
shares its cores with the readers. Prints a JSON object per number of threads (`data.num_threads`; they work at most two
batches ahead), where `ratio` is bucket to local, then the smallest number that gave 32 sequences a second to each
process. Needs the packages of the tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HOSTS, ROWS = 2, 32
CODES, TASKS = 8192, ("put the green block on the plate", "put the pen into the holder", "open the drawer")
GOAL = 32.0  # sequences a second and process
SHARDS, RECORDS = 40, 100  # small: ArrayRecord asks for the rest of a shard, and the proxy reads all of that


def write_corpus(folder: Path) -> None:
    """24 frames of 24 x 24 codes a record: 28 kB."""
    from data_pipelines.corpus import records

    layout = records.CorpusLayout(grid=(24, 24), vqgan="abc", image='{"shortest_edge": 384, "fit": "square"}')
    generator = np.random.default_rng(0)

    def make(shard: int) -> Any:
        for i in range(RECORDS):
            yield {
                "clip_id": f"{shard}-{i}",
                "captions": [TASKS[i % len(TASKS)]],
                "caption_of": np.zeros(24, np.int32),
                "fps": 30.0,
                "front_codes": generator.integers(0, CODES, (24, 24, 24)).astype(np.uint16),
            }

    for shard in range(SHARDS):
        records.write_shard(folder, shard, SHARDS, make(shard), layout)
    records.finish(folder, SHARDS, {}, layout)


def read(source: str, tokenizer: Path, host: int, threads: int, seconds: float) -> None:
    """One host. Prints a line when its first batch is there, waits for one, and prints sequences a second."""
    from data_pipelines.loader import Loader
    from rynnvla_jax.config import DataConfig, ImageConfig, SequenceConfig, TrainConfig
    from rynnvla_jax.vocabulary import TextTokenizer

    image = ImageConfig(shortest_edge=384, fit="square")
    data = DataConfig(source=source, frame_codes="ahead", num_threads=threads, image=image)
    sequence = SequenceConfig(length=4096, use_wrist_frame=False, num_frames=6, frame_interval=4)
    c = TrainConfig(stage="video", batch_size=HOSTS * ROWS, data=data, sequence=sequence)
    rows = np.arange(host * ROWS, (host + 1) * ROWS)
    loader = Loader(c, tokenizer=TextTokenizer(tokenizer), rows=rows, progress=False)
    batches = loader.batches()
    for _ in range(6):  # most shards are open, and what was made ahead is used up
        next(batches)
    print("ready", flush=True)
    sys.stdin.readline()
    began, cpu, count = time.monotonic(), time.process_time(), 0
    while time.monotonic() - began < seconds:
        next(batches)
        count += ROWS
    wall = time.monotonic() - began
    print(json.dumps({"rate": count / wall, "cpu": (time.process_time() - cpu) / wall}), flush=True)
    batches.close()
    sys.stdout.flush()
    os._exit(0)  # readers that still wait for answers


def both(source: str, tokenizer: Path, threads: int, seconds: float) -> list[dict[str, float]]:
    """What each of the two processes measured at the same time."""
    command = [sys.executable, "-m", "benchmarks.buckets", "_read", source, str(tokenizer)]
    streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, str(host), str(threads), str(seconds)], **streams) for host in range(HOSTS)
    ]
    for process in processes:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("a reader ended; see its output above")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    found = [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]
    for process in processes:
        process.wait()
    return found


def main() -> None:
    if sys.argv[1:2] == ["_read"]:
        source, tokenizer, host, threads, seconds = sys.argv[2:]
        read(source, Path(tokenizer), int(host), int(threads), float(seconds))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds before every answer of the store")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=10)
    a = parser.parse_args()
    from rynnvla_jax.vocabulary import train_tokenizer
    from tests import stores

    with tempfile.TemporaryDirectory() as name, stores.gcs() as port:
        folder, proxy = Path(name), stores.Proxy(port)
        os.environ.update(stores.environment(proxy.port))
        os.environ["RYNNVLA_CACHE"] = str(folder / "cache")
        from rynnvla_jax.storage import files

        write_corpus(folder / "corpus")
        tokenizer = train_tokenizer(TASKS, num_codes=CODES, num_text=200)
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        remote = f"gs://{stores.BUCKET}/corpus"
        files.copy_folder(folder / "corpus", files.place(remote), last="corpus.json")
        enough = []
        for threads in a.threads:
            proxy.delay = 0.0
            local = both(f"records:{folder / 'corpus'}", folder / "tokenizer.json", threads, a.seconds)
            proxy.delay = a.delay
            bucket = both(f"records:{remote}", folder / "tokenizer.json", threads, a.seconds)
            rates = [sorted(one["rate"] for one in found) for found in (bucket, local)]
            enough += [threads] if rates[0][0] >= GOAL else []
            values = {"bucket": rates[0], "local": rates[1], "ratio": sum(rates[0]) / sum(rates[1])}
            cores = {"cores_bucket": sum(one["cpu"] for one in bucket), "cores_local": sum(one["cpu"] for one in local)}
            print(json.dumps({"threads": threads, "delay": a.delay, **values, **cores}), flush=True)
        print(json.dumps({"goal_per_process": GOAL, "enough_threads": min(enough, default=None)}))


if __name__ == "__main__":
    main()
