"""The ActionVAE in PyTorch, with the public parameter names.

Source: ACT (arXiv 2304.13705) as changed by RynnVLA-001: no camera, one embedding for a chunk.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rynnvla_jax.config import ActionVAEConfig

# Key prefixes of the encoding half.
ENCODER_KEYS = ("pos_table", "encoder.", "cls_embed.", "encoder_action_proj.", "encoder_joint_proj.", "latent_proj.")


class EncoderLayer(nn.Module):
    """Self-attention and ReLU MLP; positions are added to q and k only."""

    def __init__(self, config: ActionVAEConfig):
        super().__init__()
        width = config.width
        self.pre_norm = config.pre_norm
        self.self_attn = nn.MultiheadAttention(width, config.num_heads, config.dropout, batch_first=True)
        self.linear1 = nn.Linear(width, config.feed_forward)
        self.linear2 = nn.Linear(config.feed_forward, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position: Tensor, ignore: Tensor | None = None) -> Tensor:
        """x [B, S, D], position broadcastable to it, ignore bool[B, S] true where not to look."""
        if self.pre_norm:
            x = x + self.dropout(self._attend(self.norm1(x), position, ignore))
            return x + self.dropout(self._mlp(self.norm2(x)))
        x = self.norm1(x + self.dropout(self._attend(x, position, ignore)))
        return self.norm2(x + self.dropout(self._mlp(x)))

    def _attend(self, x: Tensor, position: Tensor, ignore: Tensor | None) -> Tensor:
        q = x + position
        return self.self_attn(q, q, x, key_padding_mask=ignore, need_weights=False)[0]

    def _mlp(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    """Self-attention over the targets, attention to the memory, ReLU MLP.

    Post-norm, the targets are attended to beside the memory; pre-norm, the memory alone, as in the public code.
    """

    def __init__(self, config: ActionVAEConfig):
        super().__init__()
        width = config.width
        self.pre_norm = config.pre_norm
        self.self_attn = nn.MultiheadAttention(width, config.num_heads, config.dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(width, config.num_heads, config.dropout, batch_first=True)
        self.linear1 = nn.Linear(width, config.feed_forward)
        self.linear2 = nn.Linear(config.feed_forward, width)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor, query: Tensor, position: Tensor) -> Tensor:
        """x [B, C, D], memory [B, 1, D]; query and position are theirs, learned."""
        if self.pre_norm:
            x = x + self.dropout(self._attend_self(self.norm1(x), query))
            x = x + self.dropout(self._attend(self.norm2(x) + query, memory + position, memory))
            return x + self.dropout(self._mlp(self.norm3(x)))
        x = self.norm1(x + self.dropout(self._attend_self(x, query)))
        keys, values = torch.cat([x + query, memory + position], 1), torch.cat([x, memory], 1)
        x = self.norm2(x + self.dropout(self._attend(x + query, keys, values)))
        return self.norm3(x + self.dropout(self._mlp(x)))

    def _attend_self(self, x: Tensor, query: Tensor) -> Tensor:
        q = x + query
        return self.self_attn(q, q, x, need_weights=False)[0]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.multihead_attn(queries, keys, values, need_weights=False)[0]

    def _mlp(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class Encoder(nn.Module):
    """A stack of encoder layers; pre-norm stacks end with a norm."""

    def __init__(self, config: ActionVAEConfig):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = nn.LayerNorm(config.width) if config.pre_norm else nn.Identity()

    def forward(self, x: Tensor, position: Tensor, ignore: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, position, ignore)
        return self.norm(x)


class Decoder(nn.Module):
    """A stack of decoder layers that always ends with a norm."""

    def __init__(self, config: ActionVAEConfig):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor, memory: Tensor, query: Tensor, position: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory, query, position)
        return self.norm(x)


class Transformer(nn.Module):
    """The decoding half: an encoder over the one memory token and the decoder over the chunk."""

    def __init__(self, config: ActionVAEConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, source: Tensor, query: Tensor, position: Tensor) -> Tensor:
        """source [B, 1, D], query [C, D], position [1, D] -> [B, C, D]"""
        memory = self.encoder(source, position)
        return self.decoder(source.expand(-1, len(query), -1), memory, query, position)


class ActionVAE(nn.Module):
    """Action chunks <-> one embedding. Actions are relative and normalised; see `rynnvla_jax.actions`.

    `is_pad_head` and `encoder_joint_proj` exist because checkpoints contain them. A policy only decodes and
    uses `with_encoder=False`.
    """

    def __init__(self, config: ActionVAEConfig, state_dim: int | None = None, with_encoder: bool = True):
        super().__init__()
        self.config = config
        width = config.width
        self.transformer = Transformer(config)
        self.action_head = nn.Linear(width, config.action_dim)
        self.is_pad_head = nn.Linear(width, 1)
        self.query_embed = nn.Embedding(config.chunk, width)
        self.pos = nn.Embedding(1, width)
        self.latent_out_proj = nn.Linear(config.latent, width)
        if with_encoder:  # a change here changes ENCODER_KEYS
            self.register_buffer("pos_table", torch.from_numpy(position_table(config.chunk + 1, width)))
            self.encoder = Encoder(config)
            self.cls_embed = nn.Embedding(1, width)
            self.encoder_action_proj = nn.Linear(config.action_dim, width)
            self.encoder_joint_proj = nn.Linear(state_dim or config.action_dim, width)
            self.latent_proj = nn.Linear(width, 2 * config.latent)

    def encode(self, actions: Tensor, is_pad: Tensor) -> Tensor:
        """actions [B, C, A], is_pad bool[B, C] -> [B, 2 * latent], mean then log-variance."""
        first = self.cls_embed.weight.expand(len(actions), 1, -1)
        x = torch.cat([first, self.encoder_action_proj(actions)], 1)
        ignore = F.pad(is_pad, (1, 0), value=False)
        return self.latent_proj(self.encoder(x, self.pos_table, ignore)[:, 0])

    def decode(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, latent] -> actions [B, C, A] and the logit of "is padding" [B, C, 1]."""
        source = self.latent_out_proj(latent)[:, None]
        y = self.transformer(source, self.query_embed.weight, self.pos.weight)
        return self.action_head(y), self.is_pad_head(y)

    def losses(self, actions: Tensor, is_pad: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Total, L1 and KL, scalars. noise [B, latent] is standard normal.

        As published the L1 mean runs over padded elements too, unless `masked_mean`.
        """
        mean, log_var = self.encode(actions, is_pad).chunk(2, -1)
        predicted = self.decode(mean + (log_var / 2).exp() * noise)[0]
        kept = ~is_pad[..., None].expand_as(actions)
        error = (actions - predicted).abs() * kept
        l1 = error.sum() / kept.sum() if self.config.masked_mean else error.mean()
        kl = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(-1).mean()
        return l1 + self.config.kl_weight * kl, l1, kl


def position_table(length: int, width: int) -> np.ndarray:
    """Fixed sinusoidal positions float32[1, S, D]: sine on even columns, cosine on odd ones."""
    angles = np.arange(length)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
    angles[:, 0::2] = np.sin(angles[:, 0::2])
    angles[:, 1::2] = np.cos(angles[:, 1::2])
    return angles.astype(np.float32)[None]
