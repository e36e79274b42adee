"""`rynnvla doctor`: which parts of an installation work here, and how to repair the others.

Every check that starts third-party code (JAX, torch, OpenGL, codecs, compilers) runs in its own process with a time
limit, so that a runtime that hangs or crashes becomes one line. Needs only the base install.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

import rynnvla_jax
from rynnvla_jax import children
from rynnvla_jax.cli import probes
from rynnvla_jax.cli.arguments import OR_BUCKET, parse
from rynnvla_jax.storage import fetch, files

PACKAGE = "rynnvla_jax"
OK, MISSING, FAILED = "ok", "missing", "FAILED"
NOT_USERS = ("dev", "docs", "tpu", "cuda")  # extras: of developers; those that are `train` with another JAX
BUCKET_SECONDS = 60.0  # for a store to answer four requests, and the clients to be imported before
SECONDS = 180.0  # for a runtime to answer: a TPU may take a minute, a first import from a network disk too
SPACE = 10 * 2**30  # bytes below which a disk is called full: a small run's checkpoints


@dataclass(frozen=True)
class Doctor:
    """Checks this installation and says how to repair what does not work.

    The exit status is 1 when something that is installed is broken. A missing optional part does not count.
    """

    workdir: Annotated[Path, tyro.conf.arg(metavar="DIR"), OR_BUCKET] = Path()
    """Directory where runs will be written; checked for free space. A bucket is checked as by --bucket."""
    bucket: Annotated[tuple[str, ...], tyro.conf.arg(metavar="gs://BUCKET[/DIR]")] = ()
    """Bucket to use: an object is written there, read and deleted; also s3://. May be repeated."""
    json: bool = False
    """Print one JSON object instead of lines."""


@dataclass(frozen=True)
class Check:
    """One line of the report. `state`: ok, missing (optional and not installed) or FAILED (installed but broken)."""

    name: str
    state: str
    found: str
    remedy: str = ""

    def line(self) -> str:
        return f"{self.state:<8} {self.name:<13} {self.found}" + (f". {self.remedy}" if self.remedy else "")


class ProbeError(RuntimeError):
    """A probe that ended badly; the message is its reason."""


def examine(workdir: Path, used: Sequence[str] = ()) -> list[Callable[[], Check]]:
    """The checks, in the order of the report; independent of each other."""
    return [
        python,
        *(partial(packages, extra) for extra in ("", *extras())),
        jax_devices,
        tpu_compiler,
        torch_device,
        cpp_compiler,
        renderer,
        video_codecs,
        data_files,
        *(partial(fetched, item) for item in fetch.ITEMS),
        partial(bucket, str(workdir), "work dir")
        if files.is_bucket(workdir)
        else partial(folder, "work dir", workdir, "give another --workdir"),
        partial(folder, "cache", fetch.cache(), "set RYNNVLA_CACHE to a folder that you may write"),
        *(partial(bucket, path) for path in used),
        machine,
    ]


def python() -> Check:
    """For the report only: pip refuses a Python that is too old."""
    return Check(
        "Python", OK, f"{platform.python_version()}, {PACKAGE} {rynnvla_jax.__version__}, {platform.platform()}"
    )


def extras() -> list[str]:
    """The parts that can be installed, by what the installed package says of itself."""
    try:
        known = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # `packages` says so
        return []
    return [extra for extra in known if extra not in NOT_USERS]


def packages(extra: str) -> Check:
    """The versions of the packages of one extra ("": of the base install) against what setup.py asks for."""
    name = extra or "base"
    install = f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install {PACKAGE}"
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return Check(name, FAILED, f"{PACKAGE} is not installed; Python found it in a folder", "pip install -e .")
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return Check(name, FAILED, "packaging is not installed, which compares versions", install)
    asked = [r for r in map(Requirement, lines) if _belongs(r.marker, extra)]
    versions = {r.name: installed(r.name) for r in asked}
    absent = sorted(n for n, v in versions.items() if v is None)
    wrong = [
        f"{r.name} {version} is not {r.specifier}"
        for r in asked
        if (version := versions[r.name]) is not None and not r.specifier.contains(version, prereleases=True)
    ]
    if wrong:
        return Check(name, FAILED, ", ".join(wrong), install.replace("install", "install -U"))
    if absent:
        state = MISSING if extra else FAILED
        return Check(name, state, f"{', '.join(absent)} ({len(absent)} of {len(versions)} packages)", install)
    return Check(name, OK, f"{len(versions)} packages")


def _belongs(marker, extra: str) -> bool:
    """Whether a requirement is the extra's own."""
    base = marker is None or marker.evaluate({"extra": ""})
    return base if not extra else not base and marker.evaluate({"extra": extra})


def installed(package: str) -> str | None:
    """Its version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def jax_devices() -> Check:
    """JAX starts, finds devices and computes on one."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    said = f"JAX_PLATFORMS={asked}" if asked else "JAX_PLATFORMS unset"
    if installed("jax") is None:
        return Check("JAX", MISSING, "not installed", f"pip install '{PACKAGE}[train]', [tpu] or [cuda]")
    try:
        count, kind, name = probe("jax_devices")
    except ProbeError as error:
        remedy = (
            "JAX_PLATFORMS=cpu uses no accelerator; otherwise end the process that holds it (another Python?), and "
            f"install the JAX of this machine: pip install -U '{PACKAGE}[tpu]' or [cuda]"
        )
        return Check("JAX", FAILED, f"{error} ({said})", remedy)
    found = f"{installed('jax')}, {count} x {kind} ({name}; {said})"
    if name == "cpu" and (here := accelerator()):
        remedy = f"pip install '{PACKAGE}[{here[1]}]'" + (" and unset JAX_PLATFORMS" if asked else "")
        return Check("JAX", MISSING, f"{found}, although this machine has {here[0]}", remedy)
    return Check("JAX", OK, found)


def accelerator() -> tuple[str, str] | None:
    """(what it is, the extra that uses it) by the device files of this machine."""
    if Path("/dev/nvidia0").exists():
        return "an NVIDIA GPU", "cuda"
    if Path("/dev/accel0").exists():
        return "a TPU", "tpu"
    return None


def tpu_compiler() -> Check:
    """libtpu describes a pod, for `rynnvla aot`."""
    if installed("libtpu") is None or installed("jax") is None:
        remedy = f"pip install '{PACKAGE}[tpu]' (Linux)"
        return Check("TPU compiler", MISSING, "not installed; `rynnvla aot` needs it to compile for TPU pods", remedy)
    try:
        chips = probe("tpu_compiler")
    except ProbeError as error:
        return Check("TPU compiler", FAILED, str(error), f"pip install -U '{PACKAGE}[tpu]'")
    return Check("TPU compiler", OK, f"libtpu {installed('libtpu')} describes a pod of {chips} chips (v5e:2x2)")


def torch_device() -> Check:
    """torch computes on the device that policies would run on."""
    if installed("torch") is None:
        return Check("torch", MISSING, "not installed; exported policies need it", f"pip install '{PACKAGE}[deploy]'")
    try:
        device, kind = probe("torch_device")
    except ProbeError as error:
        return Check("torch", FAILED, str(error), "Install torch for this machine: https://pytorch.org/get-started")
    found = f"{installed('torch')}, device {device}" + (f" ({kind})" if kind else "")
    if device == "cpu" and (here := accelerator()) and here[1] == "cuda":
        remedy = "Install torch for its driver: https://pytorch.org/get-started"
        return Check("torch", MISSING, f"{found}, although this machine has {here[0]}", remedy)
    return Check("torch", OK, found)


def cpp_compiler() -> Check:
    """What torch.compile needs on a CPU: a C++ compiler with OpenMP and Python's headers."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), "")
    if not compiler:
        remedy = "apt-get install g++, or set CXX"
        return Check("C++ compiler", MISSING, "none found; `deploy check --compile` needs one on a CPU", remedy)
    with tempfile.TemporaryDirectory() as aside:
        source = str(Path(probes.__file__).with_name("openmp.cpp"))
        include = f"-I{sysconfig.get_paths()['include']}"
        command = [compiler, include, "-fopenmp", "-shared", "-fPIC", source, "-o", str(Path(aside) / "openmp.so")]
        try:
            _run(command, dict(os.environ))
        except ProbeError as error:
            remedy = f"apt-get install g++ libgomp1 python{sys.version_info[0]}.{sys.version_info[1]}-dev"
            state = MISSING if "Python.h" in str(error) or "omp.h" in str(error) else FAILED
            return Check("C++ compiler", state, f"{compiler}: {error}", f"{remedy} (for --compile on a CPU)")
    return Check("C++ compiler", OK, f"{compiler}, with OpenMP and Python.h")


def renderer() -> Check:
    """MuJoCo renders a frame without a screen."""
    asked = os.environ.get("MUJOCO_GL", "")
    said = f"MUJOCO_GL={asked}" if asked else "MUJOCO_GL unset"
    if installed("mujoco") is None:
        return Check("renderer", MISSING, "MuJoCo is not installed", f"pip install '{PACKAGE}[sim]'")
    try:
        answer = probe("renderer")
    except ProbeError as error:
        return Check("renderer", FAILED, f"{error} ({said})")
    if "none" in answer:
        return Check("renderer", MISSING, f"{answer['none']} ({said})")
    return Check("renderer", OK, f"MuJoCo {installed('mujoco')} renders with {answer['name']} ({said})")


def video_codecs() -> Check:
    """PyAV has the decoders of LeRobot and EgoDex, and writes what `record` and `evaluate` write."""
    if installed("av") is None:
        return Check("video", MISSING, "PyAV is not installed", f"pip install '{PACKAGE}[data]'")
    try:
        lacking = probe("video_codecs")
    except ProbeError as error:
        return Check("video", FAILED, str(error), "pip install --force-reinstall av")
    if lacking:
        remedy = "Its FFmpeg was built without them: pip install --force-reinstall --only-binary=av av"
        return Check("video", FAILED, f"PyAV {installed('av')} lacks {', '.join(lacking)}", remedy)
    return Check("video", OK, f"PyAV {installed('av')} reads AV1, H.264 and HEVC, writes H.264")


def data_files() -> Check:
    """HDF5 and Parquet."""
    if lacking := [name for name in ("h5py", "pyarrow") if installed(name) is None]:
        return Check("HDF5, Parquet", MISSING, f"{', '.join(lacking)} not installed", f"pip install '{PACKAGE}[data]'")
    try:
        probe("data_files")
    except ProbeError as error:
        return Check("HDF5, Parquet", FAILED, str(error), "pip install --force-reinstall h5py pyarrow")
    return Check("HDF5, Parquet", OK, f"h5py {installed('h5py')}, pyarrow {installed('pyarrow')}")


def fetched(item: str) -> Check:
    """Third-party files that `rynnvla fetch` downloads."""
    name = f"fetch {item}"
    try:
        return Check(name, OK, str(fetch.path(item)))
    except fetch.FetchError as error:
        state = FAILED if (fetch.cache() / item).is_dir() else MISSING  # damaged, or never fetched
        return Check(name, state, f"{fetch.ITEMS[item].what}: {error}")


def folder(name: str, path: Path, remedy: str) -> Check:
    """A file can be written, moved and read back in `path` (or where it would be made), and there is space."""
    path = path.expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".doctor-") as aside:
            before, after = Path(aside) / "before", Path(aside) / "after"
            before.write_bytes(b"rynnvla")
            os.replace(before, after)
            if after.read_bytes() != b"rynnvla":
                return Check(name, FAILED, f"{there} returns different bytes than were written", remedy)
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Check(name, FAILED, f"cannot write in {there}: {error.strerror or error}", f"Allow it, or {remedy}")
    found = f"{path}, {free / 2**30:.0f} GiB free"
    if free < SPACE:
        return Check(name, FAILED, found, f"Make space (a checkpoint takes 12 bytes per parameter), or {remedy}")
    return Check(name, OK, found)


def bucket(path: str, name: str = "bucket") -> Check:
    """An object can be written, read and deleted below `path`, by this account and over this network."""
    extra = "s3" if path.startswith("s3://") else "gcs"
    if installed({"s3": "s3fs", "gcs": "gcsfs"}[extra]) is None:
        return Check(name, FAILED, f"{path} needs a client", f"pip install '{PACKAGE}[{extra}]'")
    try:
        answer = probe("bucket", arguments=[path], seconds=BUCKET_SECONDS)
    except ProbeError as error:
        return Check(name, FAILED, f"{path}: {error}", "Check the network, and whether a proxy is needed")
    if "refused" in answer:
        found, _, remedy = answer["refused"].rpartition("; ")
        return Check(name, FAILED, found or remedy, remedy[:1].upper() + remedy[1:] if found else "")
    return Check(name, OK, f"{path}: an object was written, read and deleted in {answer['seconds']:.2f} s")


def machine() -> Check:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
        total = min(total, int(text))
    return Check("machine", OK, f"{cores} cores, {total / 2**30:.0f} GiB of memory")


def probe(name: str, seconds: float = SECONDS, package: str = probes.__name__, arguments: Sequence[str] = ()) -> Any:
    """The answer of a module of `package`, by default of cli/probes/, run in a Python of its own.

    Raises:
      ProbeError: it failed, crashed, or was not done in time.
    """
    said = _run([*children.module(f"{package}.{name}"), *arguments], None, seconds)
    line = next((x for x in reversed(said.splitlines()) if x.startswith(probes.MARK)), None)
    if line is None:
        raise ProbeError("it ended without a result")
    return json.loads(line.removeprefix(probes.MARK))


def _run(command: Sequence[str], environment: dict[str, str] | None = None, seconds: float = SECONDS) -> str:
    """The output of a command. It gets its own session, so that its child processes end with it."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise ProbeError(f"no result within {seconds:g} s") from None
    if process.returncode:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        reason = next((x for x in lines if "error:" in x), lines[-1] if lines else "no output")
        how = f"ended by {signal.Signals(-process.returncode).name}: " if process.returncode < 0 else ""
        raise ProbeError(how + reason)
    return said


def main(argv: list[str]) -> int:
    """Prints the report. Returns 1 when something that is installed is broken."""
    options = parse(Doctor, "rynnvla doctor", argv, ask=False)
    done = []
    with ThreadPoolExecutor(4) as pool:
        for check in pool.map(lambda one: one(), examine(options.workdir, options.bucket)):
            done.append(check)
            if not options.json:
                print(check.line(), flush=True)
    broken = [check.name for check in done if check.state == FAILED]
    if options.json:
        print(json.dumps({"broken": broken, "checks": [dataclasses.asdict(check) for check in done]}, indent=2))
    elif broken:
        print(f"\nBroken: {', '.join(broken)}")
    else:
        print("\nNothing that is installed is broken.")
    return 1 if broken else 0
