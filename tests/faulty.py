"""`rynnvla train` for tests: every process caches its compiled programs, and faults can be requested."""

import os
import sys
import time
from unittest import mock


class WithoutTorch:
    """TensorBoard's writer would import torch where it is installed, which takes seconds."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch":  # and not None in sys.modules, where tyro looks whether it is there
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def keep_programs_of_all_processes() -> None:
    """JAX lets only the first process write the compilation cache, but on CPUs each process uses a different key."""
    from jax._src import compiler
    from jax._src.distributed import global_state

    write = compiler._cache_write

    def write_by_all(*args):
        with mock.patch.object(global_state, "process_id", 0):
            write(*args)

    compiler._cache_write = write_by_all


def spoil_batches() -> None:
    """Environment variables: `BAD_BATCHES` (stream positions, separated by commas) contain NaN; fetching the batch of
    step `HANG_AT` never ends, and fetching any other batch takes `SLOW` seconds."""
    from data_pipelines.loader import Loader
    from data_pipelines.stream import position

    batches = Loader.batches
    bad = {int(p) for p in os.environ.get("BAD_BATCHES", "").split(",") if p}
    hang = int(os.environ.get("HANG_AT", -1))

    def faulty_batches(self, step=0, skipped=(), spans=()):
        for number, batch in enumerate(batches(self, step, skipped, spans), start=step):
            if number == hang:
                time.sleep(3600)
            time.sleep(float(os.environ.get("SLOW", 0)))
            if position(number, skipped) in bad:
                batch = {**batch, "actions": batch["actions"] * float("nan")}
            yield batch

    Loader.batches = faulty_batches


def slow_codes_down() -> None:
    """Environment variable `SLOW_CODES`: seconds before each file of codes made ahead is written."""
    from data_pipelines.corpus import codes

    write = codes._write

    def write_late(*args):
        time.sleep(float(os.environ.get("SLOW_CODES", 0)))
        write(*args)

    codes._write = write_late


def upload_logs_often() -> None:
    """Environment variable `UPLOAD_SECONDS`: between two uploads of the logs of a work dir in a bucket."""
    from rynnvla_jax.storage import logs

    logs.UPLOAD_SECONDS = float(os.environ.get("UPLOAD_SECONDS", logs.UPLOAD_SECONDS))


def hang_in_reading_back() -> None:
    """Environment variable `READ_BACK_HANGS`: a save is never read back to the end."""
    from rynnvla_jax.checkpoint import reader

    if "READ_BACK_HANGS" in os.environ:
        reader.read_back = lambda *_: time.sleep(3600)


if __name__ == "__main__":
    sys.meta_path.insert(0, WithoutTorch())
    keep_programs_of_all_processes()
    spoil_batches()
    slow_codes_down()
    upload_logs_often()
    hang_in_reading_back()
    from rynnvla_jax.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
