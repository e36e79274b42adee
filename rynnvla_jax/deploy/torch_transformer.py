"""The Chameleon decoder with RynnVLA's state projection and action head, in PyTorch.

Parameter names are the Hugging Face ones, so `state_dict()` is the checkpoint.
Source: Chameleon (arXiv 2405.09818), RynnVLA-001 (arXiv 2509.15212), section 3.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rynnvla_jax.config import TransformerConfig, VLAConfig

MLP_HEAD_WIDTHS = (2048, 1024, 512, 256)
QK_NORM_EPS = 1e-5


class Output(NamedTuple):
    """The outputs of one teacher-forced pass."""

    hidden: Tensor  # [B, S, D] after the final norm
    logits: Tensor  # [B, S, V]; the most negative number where image logits are masked
    action: Tensor  # [B, S, outputs] of the action head at every position


class Losses(NamedTuple):
    """Scalars; `total` is cross_entropy + action + z_loss_weight * z."""

    total: Tensor
    cross_entropy: Tensor
    action: Tensor
    z: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; statistics in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class HeadNorm(nn.Module):
    """LayerNorm over the head size; each of `rows` scales serves heads // rows neighbouring heads."""

    def __init__(self, rows: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rows, head_dim))
        self.bias = nn.Parameter(torch.zeros(rows, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, H, E]"""
        groups = x.shape[-2] // self.weight.shape[0]
        y = F.layer_norm(x, x.shape[-1:], eps=QK_NORM_EPS)
        return y * self.weight.repeat_interleave(groups, 0) + self.bias.repeat_interleave(groups, 0)


class Attention(nn.Module):
    """Causal attention; q and k are normalised per head, then rotated."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_heads // config.num_kv_heads
        kv_width, bias = config.num_kv_heads * config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.width, config.width, bias=bias)
        self.k_proj = nn.Linear(config.width, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.width, kv_width, bias=bias)
        self.o_proj = nn.Linear(config.width, config.width, bias=bias)
        self.q_norm = HeadNorm(config.q_norm_rows, config.head_dim)
        self.k_norm = HeadNorm(config.k_norm_rows, config.head_dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], last_only: bool) -> Tensor:
        """x [B, S, D] -> [B, S, D], or [B, 1, D] when only the last position asks."""
        cos, sin = rotary
        asking = x[:, -1:] if last_only else x
        q = self.q_norm(self.q_proj(asking).unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k = apply_rope(q, cos[-q.shape[1] :], sin[-q.shape[1] :]), apply_rope(k, cos, sin)
        q, k, v = (
            t.transpose(1, 2) for t in (q, k.repeat_interleave(self.groups, 2), v.repeat_interleave(self.groups, 2))
        )
        # A single last query sees every key; is_causal would align it with the first one.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=not last_only)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.feed_forward, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.width, config.feed_forward, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.feed_forward, config.width, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and MLP on the residual stream; `swin_norm` (34B) norms their outputs instead of their inputs."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.swin_norm = config.swin_norm
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], last_only: bool = False) -> Tensor:
        """x [B, S, D] -> [B, S, D], or [B, 1, D] with `last_only`."""
        residual = x[:, -1:] if last_only else x
        if self.swin_norm:
            x = residual + self.input_layernorm(self.self_attn(x, rotary, last_only))
            return x + self.post_attention_layernorm(self.mlp(x))
        x = residual + self.self_attn(self.input_layernorm(x), rotary, last_only)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what HF calls `model`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, embeds: Tensor, last_only: bool = False) -> Tensor:
        """embeds [B, S, D] -> hidden [B, S, D], or [B, 1, D] with `last_only`.

        With `last_only` the last block computes keys and values everywhere but the rest at one
        position: nothing else reaches the action head.
        """
        rotary = rotary_tables(embeds.shape[1], self.config, embeds.device, embeds.dtype)
        x = embeds
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, last_only and i == len(self.layers) - 1)
        return self.norm(x[:, -1:] if last_only else x)


class VLA(nn.Module):
    """The whole model. Its last four vocabulary rows are `<action>`, wrist start and end, and the state token."""

    def __init__(self, config: VLAConfig):
        super().__init__()
        self.config = config
        transformer = config.transformer
        self.action_token = transformer.vocab_size - 4
        self.state_token = transformer.vocab_size - 1
        self.model = Decoder(transformer)
        self.lm_head = nn.Linear(transformer.width, transformer.vocab_size, bias=False)
        if config.state_dim:
            self.state_projection = nn.Linear(config.state_dim, transformer.width)
        self.action_head = _action_head(config)

    def embed(self, input_ids: Tensor, state: Tensor) -> Tensor:
        """input_ids int64[B, S], state [N, state_dim] normalised -> [B, S, D].

        N is the number of state tokens in the batch, taken in row-major order: each one's embedding
        is replaced by its projected state. A model without a state (state_dim 0) keeps the tokens' own.

        Raises:
          ValueError: the number of states and of state tokens differ.
        """
        embeds = self.model.embed_tokens(input_ids)
        if not self.config.state_dim:
            return embeds
        at = input_ids == self.state_token
        state = state.reshape(-1, self.config.state_dim).to(embeds.dtype)
        if (count := int(at.sum())) != len(state):
            raise ValueError(
                f"input_ids have {count} state tokens (id {self.state_token}) but {len(state)} states are given"
            )
        return embeds.masked_scatter(at[..., None], self.state_projection(state))

    def forward(self, input_ids: Tensor, state: Tensor) -> Output:
        """One pass over whole sequences, padded on the right. Arguments as `embed`."""
        hidden = self.model(self.embed(input_ids, state))
        logits = self.lm_head(hidden)
        if self.config.transformer.mask_image_logits:
            first, last = self.config.transformer.image_tokens
            logits[..., first:last] = torch.finfo(logits.dtype).min
        return Output(hidden, logits, self.action_head(hidden))

    @torch.inference_mode()
    def action_latent(self, input_ids: Tensor, state: Tensor) -> Tensor:
        """The action head at the last position, in one pass without a LM head: [B, outputs] float32.

        input_ids int64[B, P] are prompts of one length: everything before `<action>`, one state token in each.
        """
        hidden = self.model(self.embed(input_ids, state), last_only=True)
        return self.action_head(hidden[:, -1]).float()

    def losses(
        self, input_ids: Tensor, labels: Tensor, state: Tensor, action: Tensor, z_loss_weight: float = 1e-5
    ) -> Losses:
        """Teacher-forced losses, in float32.

        labels int64[B, S] are the tokens, -100 where not trained. action [M, outputs] are the targets of
        the M action tokens in row-major order; each is predicted one position before its token.

        Departs from the public code: the action loss does not depend on the z-loss weight.

        Raises:
          ValueError: the number of action tokens and targets differ, or nothing is trained.
        """
        output = self(input_ids, state)
        trained = labels[:, 1:] != -100
        at = input_ids[:, 1:] == self.action_token
        action = action.reshape(-1, self.config.action_outputs).float()
        if (count := int(at.sum())) != len(action):
            raise ValueError(
                f"input_ids have {count} action tokens (id {self.action_token}) but {len(action)} targets are given"
            )
        if not trained.any():
            raise ValueError("labels train no token; check condition_frame_num and truncation")
        log_z = output.logits[:, :-1][trained].float().logsumexp(-1)
        target = output.logits[:, :-1][trained].float().gather(-1, labels[:, 1:][trained][:, None])[:, 0]
        cross_entropy = (log_z - target).mean()
        z = log_z.square().mean()
        l1 = F.l1_loss(output.action[:, :-1][at].float(), action) if count else output.action.sum() * 0.0
        return Losses(cross_entropy + l1 + z_loss_weight * z, cross_entropy, l1, z)


def rotary_tables(
    length: int, config: TransformerConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, E] of the half-split rotary positions, computed in float32.

    Frequencies are rounded once, from float64, as `models.transformer` does.
    """
    powers = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim  # not every device has float64
    frequencies = (config.rope_theta**-powers).float().to(device)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, S, H, E] with its two halves as the pair's components (Llama layout)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _action_head(config: VLAConfig) -> nn.Module:
    width = config.transformer.width
    if config.action_head == "one_layer":
        return nn.Linear(width, config.action_outputs)
    widths = (width, *MLP_HEAD_WIDTHS, config.action_outputs)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
