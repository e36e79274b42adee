"""Compiles a train step only as far as its schedule: seconds, where generating code for a 7B step takes minutes.

libtpu writes down the scheduled program before it generates code (`xla_dump_to`), but cannot be told to stop there. So
it runs in a process of its own, `python -m rynnvla_jax.aot.schedule`, which is killed as soon as the files are whole.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rynnvla_jax import children
from rynnvla_jax.config import ConfigError, TrainConfig, from_dict, to_dict

# In the order in which libtpu 0.0.42 writes them: where one exists, those before it are whole.
PROGRAM, MEMORY, LAST = (
    "*.after_optimizations.txt",
    "*.after_optimizations-memory-usage-report.txt",
    "*.after_optimizations_after_buffer_assignment.txt",
)

FULL = 2**16  # bytes: with less left, a file of the compiler may have been cut off


@dataclass(frozen=True)
class Scheduled:
    """`text` is the scheduled program, which `hlo` reads; unlike that of a whole compilation it has no cycles.

    `peak_bytes` is all that the program reserves in the device's main memory for its values. The peak that a whole
    compilation reports leaves out gaps in it and has what is added later: it was 0.2 to 0.3 GiB lower for the 7B model,
    and 0.06 GiB higher for a small one.
    """

    text: str
    peak_bytes: int


def schedule(
    config: TrainConfig, topology: str, slices: int = 1, options: Mapping[str, str | bool] | None = None
) -> Scheduled:
    """The train step of a completed config, scheduled for a pod; arguments as for `compile.compile_report`.

    Raises:
      ConfigError: unknown topology or option, or a mesh or batch that does not fit the pod.
      OSError: no room for the compiler's files in the folder for temporary files.
      RuntimeError: the compiler failed, or the step does not fit; the message is the compiler's.
    """
    with tempfile.TemporaryDirectory(prefix="rynnvla-") as name:
        directory = Path(name)
        question = {
            "config": to_dict(config),
            "topology": topology,
            "slices": slices,
            "options": dict(options or {}),
            "directory": name,
        }
        with (directory / "answer").open("w+", encoding="utf-8") as answer:
            compiler = subprocess.Popen(
                children.module("rynnvla_jax.aot.schedule"), stdin=subprocess.PIPE, stdout=answer, text=True
            )
            try:
                assert compiler.stdin is not None
                with compiler.stdin as stdin:
                    stdin.write(json.dumps(question))
                while compiler.poll() is None and not any(directory.glob(LAST)):
                    time.sleep(0.1)
            finally:
                compiler.kill()
                compiler.wait()
            if shutil.disk_usage(directory).free < FULL:  # the compiler goes on without a word
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            if any(directory.glob(LAST)):
                (program,), (memory,) = directory.glob(PROGRAM), directory.glob(MEMORY)
                return Scheduled(program.read_text(encoding="utf-8"), reserved(memory.read_text(encoding="utf-8")))
            answer.seek(0)
            said = answer.read().strip()
    if not said:
        raise RuntimeError(f"the compiler's process ended with status {compiler.returncode}; its error is above")
    error = json.loads(said)
    raise (ConfigError if error["ours"] else RuntimeError)(error["message"])


def reserved(report: str) -> int:
    """Bytes that a program reserves in the device's main memory, from the compiler's report of its memory.

    Raises:
      ValueError: the report does not say it.
    """
    found = re.search(r"^Memory Space: default .*\nTotal bytes: (\d+)", report, re.MULTILINE)
    if not found:
        raise ValueError(f"not a report of the use of memory: {report[:200]!r}")
    return int(found[1])


def main() -> None:
    """Reads the request of `schedule` from stdin; says on stdout why there is no schedule."""
    question = json.loads(sys.stdin.read())
    import jax

    from rynnvla_jax.aot import pods
    from rynnvla_jax.distributed import mesh as mesh_lib
    from rynnvla_jax.train import lowering

    config = from_dict(TrainConfig, question["config"])
    try:
        mesh = mesh_lib.make_mesh(config.mesh, pods.pod(question["topology"], question["slices"]))
        dump = {"xla_dump_to": question["directory"], "xla_dump_hlo_as_text": True}
        lowering.lower(config, mesh).compile(compiler_options={**question["options"], **dump})
    except (ConfigError, jax.errors.JaxRuntimeError) as error:
        print(json.dumps({"ours": isinstance(error, ConfigError), "message": str(error)}))


if __name__ == "__main__":
    main()
