"""Fills a module from safetensors, tensor by tensor, so that memory never holds two copies of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from rynnvla_jax.deploy.export_format import ExportError, weight_files
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.storage import files

M = TypeVar("M", bound=nn.Module)

_LISTED = 30  # keys of each kind in one message


def load_module(
    build: Callable[[], M],
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    ignored: tuple[str, ...] = (),
) -> M:
    """Builds a module without storage and gives it the tensors of `folder`; in evaluation mode, no gradients.

    Floating tensors become `dtype`. Keys that begin with one of `ignored` are not read.

    Raises:
      ExportError: a missing file, or keys or shapes that do not match, which are listed.
    """
    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise ExportError(
            f"{folder}: config.json describes no model ({shorten(error)}); export the model again"
        ) from error
    wanted = module.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    left_over: list[str] = []
    misshapen: dict[str, str] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    if key.startswith(ignored):
                        continue
                    if key not in wanted:
                        left_over.append(key)
                        continue
                    shape = tuple(opened.get_slice(key).get_shape())
                    if shape != tuple(wanted[key].shape):
                        misshapen[key] = f"{key} is {list(shape)}, expected {list(wanted[key].shape)}"
                        continue
                    # A copy, in PyTorch's own memory: where a file happens to begin its tensors decides the alignment,
                    # and with it the last bits of products on some CPUs.
                    tensors[key] = opened.get_tensor(key).to(dtype, copy=True)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise ExportError(
                files.damage(file, f"is not a readable safetensors file ({shorten(error)}); copy or export it again")
            ) from error
    missing = [key for key in wanted if key not in tensors and key not in misshapen]
    if missing or left_over or misshapen:
        parts = [
            f"{name}: {listing(keys, _LISTED)}"
            for name, keys in (
                ("missing", missing),
                ("unexpected", left_over),
                ("wrong shape", list(misshapen.values())),
            )
            if keys
        ]
        raise ExportError(f"{folder}: weights do not fit config.json ({'; '.join(parts)}); export the model again")
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)
