"""Export folders for tests, in the form that the converter writes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from rynnvla_jax.actions import Statistics
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ActionVAEConfig, ImageConfig, SequenceConfig, TransformerConfig, VLAConfig, VQGANConfig
from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.export_format import Cameras, ExportConfig
from rynnvla_jax.deploy.torch_action_vae import ActionVAE
from rynnvla_jax.deploy.torch_transformer import VLA
from rynnvla_jax.deploy.torch_vqgan import VQGAN
from rynnvla_jax.vocabulary import train_tokenizer

_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
COLUMNS = Columns.of_joints("tiny", _JOINTS, "degrees", "0..100")
TINY = ExportConfig(
    vla=VLAConfig(
        transformer=TransformerConfig(
            width=32, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward=48, k_norm_rows=2, image_tokens=(4, 36),
            attention_bias=True, swin_norm=True,
        ),
        action_head="MLP",
        action_outputs=16,
    ),
    sequence=SequenceConfig(use_wrist_frame=False),
    image=ImageConfig(shortest_edge=32),
    chunk=4,
    action_dim=6,
    normalization="min_max",
    cameras=Cameras("observation.images.front"),
)  # fmt: skip


def write(folder, config, vqgan, vae, vla_weights, vqgan_weights, vae_weights, tokenizer, statistics):
    """Writes one folder from configs, state dicts, the text of tokenizer.json and statistics."""
    for name in (export_format.VQGAN, export_format.ACTION_VAE):
        (folder / name).mkdir(parents=True)
    export_format.write_config(folder, config)
    export_format.write_model_config(folder / export_format.VQGAN, vqgan)
    export_format.write_model_config(folder / export_format.ACTION_VAE, vae)
    save_file(vla_weights, folder / "model.safetensors")
    save_file(vqgan_weights, folder / export_format.VQGAN / "model.safetensors")
    save_file(vae_weights, folder / export_format.ACTION_VAE / "model.safetensors")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    statistics.to_json(folder / "statistics.json")


def write_tiny(folder: Path) -> Path:
    """Random weights: whole VQGAN and ActionVAE, 32-pixel frames, no wrist camera, chunks of 4, joints in degrees."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["pick up the block"] * 4, num_codes=32, num_text=20, max_edge=128)
    size = len(json.loads(tokenizer)["model"]["vocab"]) + 4
    config = replace(TINY, vla=replace(TINY.vla, transformer=replace(TINY.vla.transformer, vocab_size=size)))
    vqgan = VQGANConfig(channels=32, multipliers=(1,) * 5, num_res_blocks=1, z_channels=8, num_codes=32, code_width=8)
    vae = ActionVAEConfig(chunk=4, width=16, feed_forward=32, num_heads=2, encoder_layers=1, decoder_layers=2, latent=8)
    spread = np.linspace(0.5, 1.0, 6)
    statistics = Statistics(-spread, spread, spread / 9, spread, spread, spread, columns=COLUMNS)
    weights = VLA(config.vla).state_dict(), VQGAN(vqgan).state_dict(), ActionVAE(vae, state_dim=9).state_dict()
    write(folder, config, vqgan, vae, *weights, tokenizer, statistics)
    return folder
