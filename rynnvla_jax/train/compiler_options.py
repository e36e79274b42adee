"""Compiler options of the train step, all in one place, each with its reason."""

from collections.abc import Mapping

OPTIONS: Mapping[str, Mapping[str, str | bool]] = {
    # Measured with `rynnvla aot` (docs/performance.md): libtpu's own choices already turn the weight gathers of the
    # layer scan into overlapped rings on 16 chips. A lower scheduler memory limit with asynchronous fusion of
    # reduce-scatters raised the synchronous share there from 4 % to more than half.
    "tpu": {},
    # Off by default on GPU; without it every weight gather waits for the layer before.
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    "cpu": {},
}
