"""Compiler options of the train step, each with its reason, and the cache of compiled programs."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import jax

from rynnvla_jax.config import TrainConfig
from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files

# Weights are gathered inside the kernels of products ("async collective fusion", as MaxText has it on for these chips),
# and gradients are summed by the SparseCores, which the schedule puts beside products. A report of NaN with the first,
# on v6e with another splash kernel that cuts the sequence: github.com/AI-Hypercomputer/maxdiffusion, issue 429.
_WITH_SPARSE_CORES: Mapping[str, str | bool | int] = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
}
# By kind of device; of others, libtpu's own choices. Effects, by `rynnvla aot`: docs/performance.md. v5e, without
# SparseCores, has none: with sums inside the kernels of products (xla_enable_async_reduce_scatter_fusion and
# xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter) libtpu 0.0.42 fails to compile the ActionVAE's step.
TPU = dict.fromkeys(("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e"), _WITH_SPARSE_CORES)


def options(config: TrainConfig, device: jax.Device) -> dict[str, str | bool | int]:
    """The compiler options of a train step for a device; empty with config.compiler_options "none"."""
    if config.compiler_options == "none":
        return {}
    if device.platform == "gpu":
        return _of_gpus(config)
    return dict(TPU.get(device.device_kind, {})) if device.platform == "tpu" else {}


def describe(config: TrainConfig, device: jax.Device) -> list[str]:
    """At most one line for the start-up message."""
    found = options(config, device)
    named = ", ".join(f"{name}={value}" for name, value in found.items())
    return [f"{named}; config.compiler_options=none leaves them out"] if found else []


def _of_gpus(config: TrainConfig) -> dict[str, str | bool | int]:
    """Sources: docs.nvidia.com/jax-toolbox, "Tips for High-Performance LLMs with JAX and XLA"; docs.jax.dev, "GPU
    performance tips". Not measured here on several GPUs."""
    c = config.vla.transformer
    layer = 2 * c.width * (2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.feed_forward)  # bytes in bfloat16
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,  # off by default: every gather would wait for the layer before
        # The gathers of a layer run beside the layer before it, and the sums of its gradients beside the one after.
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
        # One message for all matrices of a layer, none for several layers.
        "xla_gpu_all_gather_combine_threshold_bytes": layer,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": layer,
        "xla_gpu_all_reduce_combine_threshold_bytes": layer,
        "xla_gpu_enable_triton_gemm": False,  # cuBLAS: NVIDIA's choice for large products
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
