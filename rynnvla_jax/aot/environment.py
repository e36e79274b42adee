"""Sets environment variables so that JAX's compilers work without the devices; before JAX is imported."""

import os


def prepare_compiler(topology: str) -> None:
    """Makes libtpu compile on a machine without TPU; call it before JAX is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    name, _, count = topology.partition(":")
    if count.isdigit():  # GPUs: their places are taken by virtual devices
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # it would ask a cloud's metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several compilations at a time
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{name}-1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
