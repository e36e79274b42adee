"""Eight virtual devices in every test process, and full float32 precision, so that comparisons are meaningful.

A test run compiles each program once: its workers, and the commands that they start, share a cache of compiled
programs. The cache is removed at the end, because XLA's programs for a CPU only fit that type of CPU.
"""

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from tests import XLA_FLAGS

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import filelock
import jax
import pytest

from tests import hostile, stores, tiny

jax.config.update("jax_default_matmul_precision", "highest")
WORTH_KEEPING = 0.2  # seconds of compiling; keeping a program costs something too
# With `--dist loadfile` a worker takes a file at a time: the files that take longest come first, and none is alone at
# the end. Files that are not named come after them, in their own order.
LONGEST = (
    *("distributed/test_multihost.py", "train/test_train.py", "train/test_alive.py", "aot/test_aot.py"),
    *("train/test_buckets.py", "data_pipelines/test_buckets.py", "cli/test_buckets.py"),
    *("inference/test_tokenize.py", "train/test_end_to_end.py", "sweep/test_sweep.py", "test_golden.py"),
    *(
        "checkpoint/test_provenance.py",
        "repository/test_compatibility.py",
        "train/test_wandb.py",
        "report/test_report.py",
    ),
    *("distributed/test_sharding.py", "models/test_transformer.py", "checkpoint/test_checkpoint.py"),
    *("models/test_vqgan.py", "sim/test_record.py", "convert/test_convert.py", "sim/test_evaluate.py"),
)
SHARED = "RYNNVLA_TESTS_SHARED"  # environment variable: the directory that all workers of a run share


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # workers inherit the environment
        shared = config.shared = Path(tempfile.mkdtemp(prefix="rynnvla-tests-"))
        os.environ[SHARED] = str(shared)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(shared / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(WORTH_KEEPING)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)


def pytest_collection_modifyitems(items):
    order = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_terminal_summary(terminalreporter):
    if sum(hostile.tried.values()):
        counts = ", ".join(f"{n:,} {what}" for what, n in sorted(hostile.tried.items()))
        terminalreporter.write_line(f"hostile inputs: {sum(hostile.tried.values()):,} ({counts})")


def pytest_unconfigure(config):
    if hasattr(config, "shared"):
        shutil.rmtree(config.shared, ignore_errors=True)


@pytest.fixture(scope="session")
def assets():
    """The result of `tiny.assets`, shared by all workers of a run; copy it to change it."""
    return tiny.paths(once("assets", tiny.assets))


@pytest.fixture(scope="session")
def curriculum(assets):
    """The models that `tiny.curriculum` trains, shared by all workers of a run; copy them to change them."""
    return once("curriculum", lambda directory: tiny.curriculum(directory, assets))


@pytest.fixture(scope="session")
def _store():
    """The gs:// store of a worker; from here on its clients, in this process and those it starts, use it."""
    with stores.gcs() as port:
        proxy = stores.Proxy(port)
        os.environ.update(stores.environment(proxy.port))
        yield proxy
        proxy.close()


@pytest.fixture(scope="session")
def _s3():
    """The s3:// store of a worker; from here on its clients, in this process and those it starts, use it."""
    with stores.s3() as environment:
        os.environ.update(environment)
        yield


@pytest.fixture
def store(_store):
    """A `stores.Proxy`, whose settings last for one test."""
    yield _store
    _store.refuse, _store.cut, _store.delay, _store.down = 0, 0, 0.0, False


@pytest.fixture
def bucket(store, request):
    """An empty folder of the store, as text: gs://..."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"gs://{stores.BUCKET}/{name}-{secrets.token_hex(3)}"


def once(name, make):
    """The directory that `make(directory)` fills once per test run. Nothing else writes into it."""
    directory = Path(os.environ[SHARED]) / name
    finished = directory.with_name(f"{name}.finished")
    with filelock.FileLock(f"{directory}.lock"):
        if not finished.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a worker that failed
            directory.mkdir()
            make(directory)
            finished.touch()
    return directory
