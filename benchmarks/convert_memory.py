"""Peak memory of `rynnvla convert import` and `export` on a random checkpoint of a few GB.

    python benchmarks/convert_memory.py DIR [--layers 9] [--dtype float32]

Makes the checkpoint, the model directory and the export in a new folder in DIR and deletes them afterwards.
Prints JSON; the exit status is 1 when a peak exceeds twice the largest foreign tensor plus 1 GB. The export
is measured with its verification, which holds one layer's weights of both models, and without.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# This process stays small on purpose: a child's peak begins at its parent's size.

_MAKE = """
import json, sys
from pathlib import Path
import numpy as np
from rynnvla_jax.config import TransformerConfig, VLAConfig
from rynnvla_jax.convert import exporter, importer, vla
from rynnvla_jax.convert.foreign import create_safetensors, map_tensor, safetensors_header
folder, layers, dtype = Path(sys.argv[1]), int(sys.argv[2]), exporter.DTYPES[sys.argv[3]]
config = VLAConfig(transformer=TransformerConfig(
    width=2048, num_layers=layers, num_heads=16, num_kv_heads=16, feed_forward=5504))
shapes = importer.model_shapes(config)
tensors = {e.foreign: (dtype, importer.foreign_shape(e, shapes[e.ours])) for e in vla.table(config)}
folder.mkdir()
(folder / "config.json").write_text(json.dumps(vla.config_to_foreign(config)))
file = folder / "model.safetensors"
create_safetensors(file, tensors)
rng = np.random.default_rng(0)
for key, location in safetensors_header(file)[0].items():
    scale, shift = (0.02, 1.0) if "norm.weight" in key else (0.02, 0.0)
    map_tensor(file, location)[...] = rng.standard_normal(location[1], np.float32) * scale + shift
sizes = {k: int(np.prod(s)) * dtype.itemsize for k, (_, s) in tensors.items()}
print(json.dumps({"bytes": sum(sizes.values()), "largest": max(sizes.values())}))
"""
_CLI = "import sys; from rynnvla_jax.cli.convert import main; sys.exit(main(sys.argv[1:]))"
_EXPORT_ONLY = """
import sys
from pathlib import Path
from rynnvla_jax.convert.exporter import write_export
Path(sys.argv[2]).mkdir()
write_export(sys.argv[1], Path(sys.argv[2]), dtype=sys.argv[3])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a folder with space for three copies of the checkpoint")
    parser.add_argument(
        "--layers", type=int, default=9, help="number of layers, 0.2 GB each in float32, in addition to 1.1 GB"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the foreign checkpoint's weights"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=arguments.directory))
    source, model, out = (folder / name for name in ("source", "model", "out"))
    try:
        made = subprocess.run(
            [sys.executable, "-c", _MAKE, source, str(arguments.layers), arguments.dtype],
            env=_environment(),
            check=True,
            stdout=subprocess.PIPE,
        )
        size = json.loads(made.stdout)
        limit = 2 * size["largest"] + 10**9
        result = {
            "dtype": arguments.dtype,
            "checkpoint_bytes": size["bytes"],
            "largest_tensor_bytes": size["largest"],
            "limit_bytes": limit,
            "import": _measure([_CLI, "import", source, model], limit),
            "export": _measure([_EXPORT_ONLY, model, out, arguments.dtype], limit),
        }
        shutil.rmtree(out, ignore_errors=True)
        result["export_and_verify"] = _measure([_CLI, "export", model, out, "--dtype", arguments.dtype], limit)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=2))
    return 0 if all(r["within_limit"] for r in result.values() if isinstance(r, dict)) else 1


def _measure(command: list, limit: int) -> dict:
    """Runs python -c COMMAND... and returns its peak resident memory."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", *map(str, command)], env=_environment(), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise SystemExit(f"{command[1:3]} failed with status {code}")
    peak = usage.ru_maxrss * 1024
    return {"peak_bytes": peak, "seconds": round(time.monotonic() - start, 1), "within_limit": peak <= limit}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "JAX_PLATFORMS": "cpu"}


if __name__ == "__main__":
    sys.exit(main())
