"""Compiler options of the train step, each with its reason, and the cache of compiled programs."""

from collections.abc import Mapping

import jax
from etils import epath

OPTIONS: Mapping[str, Mapping[str, str | bool]] = {
    # Measured with `rynnvla aot` (docs/performance.md): libtpu's own choices already turn the weight gathers of the
    # layer scan into overlapped rings on 16 chips. A lower scheduler memory limit with asynchronous fusion of
    # reduce-scatters raised the synchronous share there from 4 % to more than half.
    "tpu": {},
    # Off by default on GPU; without it every weight gather waits for the layer before.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "cpu": {},
}


def use_compilation_cache(setting: str) -> None:
    """Caches compiled programs on disk; JAX_COMPILATION_CACHE_DIR takes precedence over "auto".

    "auto" leaves CPUs out: XLA's programs for a CPU are bound to its exact features, and they compile fast.
    """
    if setting == "auto":
        kept = jax.config.values["jax_compilation_cache_dir"]
        if kept or jax.default_backend() == "cpu":
            return
        setting = "~/.cache/rynnvla_jax/xla"
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(setting).expanduser()) if setting else None)
