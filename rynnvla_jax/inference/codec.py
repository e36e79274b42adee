"""Frames <-> VQ codes: encodes and decodes with a VQGAN, outside of the train step."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.config import MeshConfig, VQGANConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.frozen import vqgan_graph
from rynnvla_jax.storage import files

BATCH = 8  # frames


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef: nnx.GraphDef, params: Any, frames: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).frames_to_codes(frames)


@functools.partial(jax.jit, static_argnums=0)
def _decode(graphdef: nnx.GraphDef, params: Any, codes: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).codes_to_frames(codes)


class FrameCodec:
    """A VQGAN in float32: frames uint8 [..., h, w, 3] <-> codes int32 [..., h/16, w/16].

    Frames are processed in batches of `batch`, sharded over the devices; the last batch is padded with zeros. So only
    one shape is compiled.
    """

    def __init__(
        self, config: VQGANConfig, params: Any, *, batch: int = BATCH, devices: Sequence[jax.Device] | None = None
    ):
        """`devices`: of this process, by default the first one. `batch` is rounded up to a multiple of their number."""
        mesh = mesh_lib.make_mesh(MeshConfig(), list(devices or jax.local_devices()[:1]))
        self.batch = -(-batch // mesh.size) * mesh.size
        self.params = jax.device_put(params, mesh_lib.replicated(mesh))
        self._graphdef = vqgan_graph(config, decoder="decoder" in params)
        self._sharding = mesh_lib.batch_sharding(mesh)

    @classmethod
    def load(
        cls, directory: str | Path, *, batch: int = BATCH, devices: Sequence[jax.Device] | None = None
    ) -> "FrameCodec":
        """Loads a VQGAN's directory, or a model's that contains one (`DIR/assets/vqgan`). Raises CheckpointError."""
        inside = files.place(directory) / "assets" / "vqgan"
        directory = inside if inside.is_dir() else directory
        config = model_dir.read_model_config(directory, "vqgan")
        return cls(config, model_dir.load_params(directory)[0], batch=batch, devices=devices)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the VQGAN, and so its codes."""
        return params_lib.fingerprint(self.params)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        return self._batched(self.start, frames, 3)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Raises AttributeError for a VQGAN that was stored without its decoder."""
        return self._batched(functools.partial(self._start, _decode), codes, 2)

    def start(self, frames: np.ndarray) -> jax.Array:
        """Starts the encoding of at most `batch` frames [n, h, w, 3]; the codes of a whole batch, without waiting."""
        return self._start(_encode, frames)

    def _start(self, function: Callable, x: np.ndarray) -> jax.Array:
        filled = np.pad(x, ((0, self.batch - len(x)), *[(0, 0)] * (x.ndim - 1)))
        return function(self._graphdef, self.params, jax.device_put(filled, self._sharding))

    def _batched(self, start: Callable[[np.ndarray], jax.Array], x: np.ndarray, axes: int) -> np.ndarray:
        """Of the last `axes` axes; the others are joined to one."""
        flat = x.reshape(-1, *x.shape[-axes:])
        parts = [flat[i : i + self.batch] for i in range(0, len(flat), self.batch)]
        made = np.concatenate([np.asarray(start(part))[: len(part)] for part in parts])
        return made.reshape(*x.shape[:-axes], *made.shape[1:])
