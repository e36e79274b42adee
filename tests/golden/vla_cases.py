"""`vla_transformer` cases: the decoder with its heads, losses, gradients, generation and training."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from rynnvla_jax.config import OptimizerConfig, TransformerConfig, VLAConfig
from rynnvla_jax.convert import vla as convert
from rynnvla_jax.convert.table import to_foreign, to_params
from rynnvla_jax.models.params import split
from rynnvla_jax.models.transformer import rotary_angles
from rynnvla_jax.models.vla import VLA, loss_counts
from rynnvla_jax.sequence import PAD, find_positions
from rynnvla_jax.train.optimizer import make_optimizer
from tests.golden import folder
from tests.golden.folder import Case, CaseReport, GoldenError, Recorded

# Golden loss columns -> our metrics.
METRICS = {"ce": "cross_entropy", "action": "action_l1", "z": "z_loss"}
INPUTS = ("tokens", "state", "state_positions")  # of a batch, without what losses need
LOSS_CHUNK = 16  # smaller than the sequences, so that chunking is part of what is compared


def config_of(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], image_tokens: tuple[int, int]) -> VLAConfig:
    """The public configuration's fields -> ours; what the fields leave open (biases, q/k rows) the tensors tell.

    Raises GoldenError for an option this model does not have.
    """
    if values.get("replace_inputs_with_action"):
        raise GoldenError("config.replace_inputs_with_action is true; this model has no such input")
    first = "model.layers.0."

    def rows(name: str) -> int:
        norm = tensors[f"{first}self_attn.{name}_norm.weight"]
        return norm.shape[0] if norm.ndim == 2 else 1

    head = "action_head.weight" if "action_head.weight" in tensors else "action_head.8.weight"
    return VLAConfig(
        transformer=TransformerConfig(
            vocab_size=values["vocab_size"],
            width=values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
            feed_forward=values["intermediate_size"],
            rope_theta=values.get("rope_theta", 10000.0),
            norm_eps=values.get("rms_norm_eps", 1e-5),
            q_norm_rows=rows("q"),
            k_norm_rows=rows("k"),
            swin_norm=values.get("swin_norm", False),
            attention_bias=f"{first}self_attn.q_proj.bias" in tensors,
            mlp_bias=f"{first}mlp.gate_proj.bias" in tensors,
            dropout=0.0,
            mask_image_logits=values.get("mask_image_logits", False),
            image_tokens=image_tokens,
        ),
        state_dim=values["state_dim"],
        action_head=values["action_head_type"],
        action_outputs=tensors[head].shape[0],
    )


def load_model(config: VLAConfig, tensors: Mapping[str, np.ndarray]) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """(graph definition, parameters) through the conversion table."""
    graphdef, template = split(nnx.eval_shape(lambda: VLA(config, rngs=nnx.Rngs(0))))
    params = to_params(convert.table(config), tensors, template, ignored=("model.vqmodel.",))
    return graphdef, jax.tree.map(jnp.asarray, params)


def first_layer(model: VLA, x: jax.Array) -> jax.Array:
    """Residual stream [B, S, D] after the first block."""
    c = model.config.transformer
    graphdef, stacked = nnx.split(model.transformer.blocks)
    block = nnx.merge(graphdef, jax.tree.map(lambda weight: weight[0], stacked))
    return block(x, rotary_angles(jnp.arange(x.shape[1]), c.head_dim, c.rope_theta))[0]


def optimizer_of(text: str, untrained: tuple[str, ...] = ()) -> optax.GradientTransformation:
    """The recipe that a case states in words ("AdamW lr=1e-3 betas=(0.9,0.95) ...") -> ours, at a constant rate."""
    number = r"([0-9.]+(?:e-?\d+)?)"

    def find(pattern: str, default: float | None = None) -> float:
        found = re.search(pattern, text)
        if found is None and default is None:
            raise GoldenError(f"train6.optimizer {text!r} does not say {pattern!r}")
        return default if found is None else float(found[1])

    rate = find(rf"lr={number}")
    config = OptimizerConfig(
        peak_lr=rate,
        min_lr=rate,
        schedule="vla",
        warmup_steps=0.0,
        beta1=find(rf"betas=\({number},"),
        beta2=find(rf"betas=\([^,]*, ?{number}\)"),
        eps=find(rf"eps={number}"),
        weight_decay=find(rf"weight_decay={number}"),
        clip_norm=find(rf"clip_grad_norm[ =]{number}", 0.0),
    )
    return make_optimizer(config, 1000, untrained)


def compare_gradients(
    report: CaseReport, ours: Mapping[str, Any], io: Recorded, norms: Mapping[str, float | None]
) -> None:
    """Recorded gradients, and the norm of every one; a norm of None says that nothing may arrive there."""
    for key in (k for k in io if k.startswith("grad.")):
        tolerance = folder.GRADIENT + folder.GRADIENT_SHARE * float(np.linalg.norm(io[key]))
        report.compare(key, ours[key.removeprefix("grad.")], io[key], tolerance)
    for key, norm in norms.items():
        tolerance = folder.EXACT if norm is None else folder.GRADIENT + folder.GRADIENT_SHARE * norm
        report.compare("grad_norms", np.linalg.norm(ours[key]), norm or 0.0, tolerance, member=key)


def train_six(
    report: CaseReport,
    rule: Mapping[str, Any],
    params: Any,
    gradients_of: Any,
    untrained: tuple[str, ...] = (),
    undefined: tuple[str, ...] = (),
) -> None:
    """`gradients_of(params, step)` -> (columns, gradients), applied under the case's optimiser.

    The public code does not compute the columns `undefined`; they are listed and not compared.
    """
    report.not_compared += [f"train6.{name}" for name in rule["columns"] if name in undefined]
    optimizer = optimizer_of(rule["optimizer"], untrained)
    state = optimizer.init(params)

    @jax.jit
    def update(params, gradients, state):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for step, row in enumerate(rule["rows"]):
        columns, gradients = gradients_of(params, step)
        if unknown := [name for name in rule["columns"] if name not in columns]:
            raise GoldenError(f"train6.columns {unknown} are not known; known: {list(columns)}")
        for name, golden in zip(rule["columns"], row, strict=True):
            if name in undefined:
                continue
            report.compare(
                "train6", columns[name], golden, folder.TRAINING, relative=True, member=f"{name} of step {step}"
            )
        params, state = update(params, gradients, state)


class Examples:
    """The recorded batch: ragged states and action targets spread over [B, T]."""

    def __init__(self, case: Case, io: Recorded):
        ids = case.need("token_ids")
        self.tokens = io["input_ids"].astype(np.int32)
        self.labels = io["labels"]
        self.state_id, self.action_id = ids["state"], ids["action"]
        trained = self.labels != -100
        if not (self.labels == self.tokens)[trained].all():
            raise GoldenError(f"case {case.name}: labels differ from tokens where trained; a loss mask cannot say that")
        self.states = io.get("state_embeds")
        self.targets = io.get("action_embeds")

    def batch(self, only: int | None = None, length: int | None = None) -> dict[str, np.ndarray]:
        """The sequences, or losses of row `only`, or all cut to `length` (then without the states and targets behind).

        All have one shape, so that one compilation serves all: what is left out is padding behind what counts.
        """
        width = self.tokens.shape[1]
        used = np.broadcast_to(np.arange(width) < (width if length is None else length), self.tokens.shape)
        counted = used & (True if only is None else np.arange(len(used))[:, None] == only)
        batch = {"tokens": np.where(used, self.tokens, PAD), "loss_mask": counted & (self.labels != -100)}
        if self.states is not None:
            batch["state"], batch["state_positions"] = self._spread(self.states, self.state_id, used)
        if self.targets is not None:
            batch["action_targets"], batch["action_positions"] = self._spread(self.targets, self.action_id, counted)
        return batch

    def kept(self, token_id: int, length: int) -> list[int]:
        """Row-major numbers of the tokens `token_id` that a cut to `length` leaves."""
        columns = np.nonzero(self.tokens == token_id)[1]
        return np.flatnonzero(columns < length).tolist()

    def _spread(self, rows: np.ndarray, token_id: int, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = max(1, int((self.tokens == token_id).sum(1).max()))
        positions = find_positions(self.tokens, token_id, count)
        if (positions >= 0).sum() != len(rows):
            raise GoldenError(f"{(positions >= 0).sum()} tokens {token_id} but {len(rows)} rows for them")
        spread = np.zeros((*positions.shape, rows.shape[1]), np.float32)
        spread[positions >= 0] = rows
        return spread, np.where(np.take_along_axis(used, positions, axis=1), positions, -1).astype(np.int32)


def run(case: Case) -> CaseReport:
    """Compares everything that the case records."""
    report, io = CaseReport(case.name, case.kind), case.recorded()
    tensors, settings = case.tensors("weights"), case.need("config")
    images = case.entry.get("image_token_ids") or [4, 5]
    if settings.get("mask_image_logits") and images != list(range(images[0], images[-1] + 1)):
        raise GoldenError(f"case {case.name}: image_token_ids have gaps; this model masks one range")
    config = config_of(settings, tensors, (images[0], images[-1] + 1))
    graphdef, params = load_model(config, tensors)
    examples = Examples(case, io)
    batch, V = examples.batch(), config.transformer.vocab_size
    # With a z-loss weight of 0 the public code drops the action loss too; our own parts are independent. It then
    # reports a z-loss of 0, which is not a measurement: ours is not compared with it, and the report says so.
    z_weight = settings.get("z_loss_weight", 1e-5)
    undefined = () if z_weight else ("z",)

    if "raw_sequences" in case.entry:
        width = examples.tokens.shape[1]
        for key, rows, fill in (("raw_sequences", examples.tokens, PAD), ("raw_labels", examples.labels, -100)):
            padded = [np.pad(row, (0, width - len(row)), constant_values=fill) for row in case.need(key)]
            report.compare(key, rows, np.stack(padded), folder.EXACT)
        if "lengths" in io:
            report.compare("lengths", [len(row) for row in case.need("raw_sequences")], io["lengths"], folder.EXACT)

    @jax.jit
    def forward(params, inputs):
        model = nnx.merge(graphdef, params)
        embeds = model.embed(inputs["tokens"], inputs.get("state"), inputs.get("state_positions"))
        hidden = model.hidden(inputs)
        return {
            "embeds_in": embeds,
            "hidden_after_layer0": first_layer(model, embeds),
            "hidden_final": hidden,
            "action_pred": model.predict_action(hidden),
            "logits": model.transformer.logits(hidden)[..., :V],
        }

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            return nnx.merge(graphdef, params).loss(
                batch,
                loss_counts(batch),
                chunk=LOSS_CHUNK,
                z_loss_weight=z_weight,
                action_loss_weight=1.0 if z_weight else 0.0,
            )

        return jax.value_and_grad(loss, has_aux=True)(params)

    out = jax.tree.map(np.asarray, forward(params, {k: batch[k] for k in INPUTS if k in batch}))
    for key in ("embeds_in", "hidden_after_layer0", "hidden_final", "action_pred", "logits"):
        if key in io:
            report.compare(key, out[key], io[key], folder.ACTIVATIONS)
    if "logits_at_cols" in io:
        report.compare("logits_at_cols", out["logits"][..., io["logit_cols"]], io["logits_at_cols"], folder.ACTIVATIONS)
    if "logits_logsumexp" in io:
        partition = jax.nn.logsumexp(out["logits"], axis=-1)
        report.compare("logits_logsumexp", partition, io["logits_logsumexp"], folder.ACTIVATIONS)
    if "logits_argmax" in io:
        report.compare("logits_argmax", out["logits"].argmax(-1), io["logits_argmax"], folder.EXACT)

    def compare_losses(prefix: str, total, metrics) -> None:
        for key in (k for k in io if k.startswith(f"{prefix}loss_")):
            name = key.removeprefix(f"{prefix}loss_")
            if name in undefined:
                continue
            ours = total if name == "total" else metrics.get(METRICS[name], 0.0)
            report.compare(key, ours, io[key], folder.LOSSES, relative=True)

    (total, metrics), gradients = gradient(params, batch)
    compare_losses("", total, metrics)
    compare_gradients(report, to_foreign(convert.table(config), gradients), io, case.entry.get("grad_norms") or {})
    if "grad_norm_total" in io:
        norm = float(io["grad_norm_total"])
        tolerance = folder.GRADIENT + folder.GRADIENT_SHARE * norm
        report.compare("grad_norm_total", global_norm(gradients), io["grad_norm_total"], tolerance)

    for row in range(len(examples.tokens)):
        if f"single{row}.loss_ce" in io:
            compare_losses(f"single{row}.", *gradient(params, examples.batch(only=row))[0])

    if cut := case.entry.get("truncation"):
        length = cut["max_position_embeddings"]
        for key, token_id in (("kept_state_rows", examples.state_id), ("kept_action_rows", examples.action_id)):
            report.compare(f"trunc.{key}", examples.kept(token_id, length), cut[key], folder.EXACT)
        compare_losses("trunc.", *gradient(params, examples.batch(length=length))[0])

    if "gen.prompt" in io:
        _generate(report, io, examples, lambda batch: forward(params, batch))

    if rule := case.entry.get("train6"):

        def step(params, _):
            (total, metrics), gradients = gradient(params, batch)
            columns = {name: metrics[ours] for name, ours in METRICS.items() if ours in metrics}
            return columns | {"total": total, "grad_norm_before_clip": global_norm(gradients)}, gradients

        train_six(report, rule, params, step, undefined=undefined)

    report.not_compared += io.unread()
    return report


def _generate(report: CaseReport, io: Recorded, examples: Examples, forward: Any) -> None:
    """The action read over the prompt, and greedy tokens behind it.

    The public code overwrites the prompt's state id with 0 before it returns the sequence.
    """
    prompt, golden = io["gen.prompt"].astype(np.int32), io.get("gen.sequences")
    width = prompt.shape[1]
    length = max(examples.tokens.shape[1], width if golden is None else golden.shape[1])
    source = next((r for r, t in enumerate(examples.tokens) if (t[:width] == prompt[0]).all()), 0)
    # The recorded batch again, the prompt in its first row: its shape is compiled already.
    tokens = np.full((len(examples.tokens), length), PAD, np.int32)
    tokens[0, :width] = prompt[0]
    batch = {"tokens": tokens}
    if examples.states is not None:
        whole = examples.batch()
        state, positions = np.zeros_like(whole["state"]), np.full_like(whole["state_positions"], -1)
        state[0], positions[0] = whole["state"][source], find_positions(prompt, examples.state_id, state.shape[1])[0]
        batch |= {"state": state, "state_positions": positions}
    out = forward(batch)
    if "gen.action_pred" in io:
        report.compare("gen.action_pred", out["action_pred"][:1, :width], io["gen.action_pred"], folder.ACTIVATIONS)
    if "gen.last_logits" in io:
        report.compare("gen.last_logits", out["logits"][:1, width - 1], io["gen.last_logits"], folder.ACTIVATIONS)
    if golden is not None:
        for at in range(width, golden.shape[1]):
            tokens[0, at] = out["logits"][0, at - 1].argmax()
            out = forward(batch) if at + 1 < golden.shape[1] else out
        tokens[0, :width][prompt[0] == examples.state_id] = PAD
        report.compare("gen.sequences", tokens[:1, : golden.shape[1]], golden, folder.EXACT)


def global_norm(gradients: Any) -> float:
    """Of all leaves together."""
    return float(np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in jax.tree.leaves(gradients))))
