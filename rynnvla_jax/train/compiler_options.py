"""Compiler options of the train step, each with its reason, and the cache of compiled programs."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax

from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files

OPTIONS: Mapping[str, Mapping[str, str | bool]] = {
    # Measured with `rynnvla aot` (docs/performance.md): libtpu's own choices already turn the weight gathers of the
    # layer scan into overlapped rings on 16 chips. A lower scheduler memory limit with asynchronous fusion of
    # reduce-scatters raised the synchronous share there from 4 % to more than half.
    "tpu": {},
    # Off by default on GPU; without it every weight gather waits for the layer before.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "cpu": {},
}


def use_compilation_cache(setting: str, workdir: Path) -> None:
    """Caches compiled programs; JAX_COMPILATION_CACHE_DIR takes precedence over "auto".

    "auto" is the home directory, or WORKDIR/compiled where the work dir is in a bucket: the machine that continues a
    run may be a new one. It leaves CPUs out: XLA's programs for a CPU are bound to its exact features, and they compile
    fast. A cache that cannot be written is said and done without.
    """
    kept = jax.config.values["jax_compilation_cache_dir"]
    if setting == "auto" and (kept or jax.default_backend() == "cpu"):
        setting = kept or ""
    elif setting == "auto":
        setting = str(workdir / "compiled") if files.is_bucket(workdir) else "~/.cache/rynnvla_jax/xla"
    directory = files.place(setting) if setting else None
    if directory is not None and (reason := _refusal(directory)):
        multihost.say(f"compiled programs are not cached: {directory} cannot be written ({reason})")
        directory = None
    jax.config.update("jax_compilation_cache_dir", str(directory) if directory else None)


def _refusal(directory: Path) -> str:
    """Why no file can be written in a directory, which is created if needed; "" when it can."""
    probe = files.partial_path(directory / "probe")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        return shorten(error)
    return ""
