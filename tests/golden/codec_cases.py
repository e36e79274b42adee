"""`vqgan` and `actionvae` cases, and `infer_step`: from two camera frames to absolute actions."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rynnvla_jax import images, sequence
from rynnvla_jax.actions import Statistics, decode_chunk, normalize_state
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ActionVAEConfig, SequenceConfig, VQGANConfig
from rynnvla_jax.convert import action_vae as convert_vae
from rynnvla_jax.convert import vqgan as convert_vqgan
from rynnvla_jax.convert.table import to_foreign, to_params
from rynnvla_jax.models.action_vae import UNTRAINED, ActionVAE
from rynnvla_jax.models.params import split
from rynnvla_jax.models.vqgan import VQGAN, to_uint8
from tests.golden import folder, vla_cases
from tests.golden.data_cases import chameleon_vocabulary
from tests.golden.folder import Case, CaseReport, GoldenError

STATISTICS = ("rel_min_action", "rel_max_action", "rel_mean_action", "rel_std_action", "mean_state", "std_state")


def load_vqgan(case: Case) -> tuple[VQGANConfig, VQGAN, bool]:
    """(configuration, model with the case's weights, whether it has a decoder)."""
    config = convert_vqgan.config_from_foreign({k: case.need(k) for k in ("ddconfig", "n_embed", "embed_dim")})
    found = re.search(r"\+([0-9.]+)\*mean\(\(z_q-sg\(z\)\)", case.entry.get("emb_loss_rule", ""))
    if found and float(found[1]) != config.commitment:
        raise GoldenError(f"case {case.name}: emb_loss_rule says {found[1]}, the converter {config.commitment}")
    weights = case.tensors("weights")
    decoder = any(key.startswith("decoder.") for key in weights)
    graphdef, template = split(nnx.eval_shape(lambda: VQGAN(config, rngs=nnx.Rngs(0), decoder=decoder)))
    ignored = convert_vqgan.IGNORED + (() if decoder else ("post_quant_conv.",))
    params = to_params(convert_vqgan.table(config, decoder), weights, template, ignored)
    return config, nnx.merge(graphdef, jax.tree.map(jnp.asarray, params)), decoder


def run_vqgan(case: Case) -> CaseReport:
    """Latents, codes, quantised, decoded, embedding loss."""
    report, io = CaseReport(case.name, case.kind), case.recorded()
    _, model, decoder = load_vqgan(case)
    pixels = io["image"].transpose(0, 2, 3, 1)

    @jax.jit
    def encode(pixels):
        z = model.encode(pixels)
        codes, quantised, loss = model.quantize(z)
        out = {"encoder_out": model.encoder(pixels), "z": z, "quant": quantised, "emb_loss": loss}
        return out, codes, model.codes(pixels)

    out, codes, codes_again = encode(pixels)
    codes = np.asarray(codes)
    report.compare("codes", codes_again, codes, folder.EXACT)
    for key in ("encoder_out", "z", "quant"):
        if key in io:
            report.compare(key, out[key].transpose(0, 3, 1, 2), io[key], folder.VQGAN)
    if "emb_loss" in io:
        report.compare("emb_loss", out["emb_loss"], io["emb_loss"], folder.LOSSES, relative=True)
    report.compare("indices", codes.ravel(), io["indices"].ravel(), folder.EXACT)
    if "codebook_latents" in io:
        latents = np.asarray(model.codebook[...])[codes]
        report.compare("codebook_latents", latents.transpose(0, 3, 1, 2), io["codebook_latents"], folder.VQGAN)
    if "image_u8" in io:
        normalised = images.normalize(io["image_u8"])
        report.compare("image", normalised.transpose(0, 3, 1, 2), io["image"], folder.ACTIONS)
        if "pil_path_indices_0" in io:
            first = np.asarray(encode(normalised)[2])[0]
            report.compare("pil_path_indices_0", first.ravel(), io["pil_path_indices_0"], folder.EXACT)
    if decoder and "decoded" in io:
        both = jax.jit(lambda quantised, codes: (model.decode(quantised), model.decode_codes(codes)))
        decoded, from_codes = both(out["quant"], codes)
        report.compare("decoded", decoded.transpose(0, 3, 1, 2), io["decoded"], folder.VQGAN)
        report.compare("decoded_from_codes", from_codes.transpose(0, 3, 1, 2), io["decoded"], folder.VQGAN)
        if "decoded_u8_0" in io:
            # Truncation turns 1e-7 into a whole step at an integer: the rule is exact on the golden floats, and
            # our own floats may differ by one step.
            golden = to_uint8(io["decoded"][0].transpose(1, 2, 0))
            report.compare("decoded_u8_0", golden, io["decoded_u8_0"], folder.EXACT)
            report.compare("decoded_u8_0_ours", to_uint8(decoded[0]), io["decoded_u8_0"], 1.0)
    report.not_compared = io.unread()
    return report


def load_action_vae(
    settings: Mapping[str, Any], weights: Mapping[str, np.ndarray], latent: int, kl_weight: float = 1e-4
) -> tuple[ActionVAEConfig, nnx.GraphDef, dict[str, Any]]:
    """The public constructor's arguments and weights -> (configuration, graph definition, parameters)."""
    config = convert_vae.config_from_foreign(settings, latent=latent, kl_weight=kl_weight)
    graphdef, template = split(nnx.eval_shape(lambda: ActionVAE(config, settings["state_dim"], rngs=nnx.Rngs(0))))
    params = to_params(convert_vae.table(config), weights, template, ignored=tuple(convert_vae.constants(config)))
    return config, graphdef, jax.tree.map(jnp.asarray, params)


def run_action_vae(case: Case) -> CaseReport:
    """Encoding, decoding with the given noise, losses, gradients, six steps."""
    report, io = CaseReport(case.name, case.kind), case.recorded()
    weights = case.tensors("weights")
    config, graphdef, params = load_action_vae(
        case.need("config"), weights, case.entry.get("latent_dim", 32), case.entry.get("kl_weight", 1e-4)
    )
    for key, value in convert_vae.constants(config).items():
        if key in weights:
            report.compare(key, value, weights[key], folder.ACTION_VAE)
    model = nnx.merge(graphdef, params)
    encode, decode = jax.jit(model.encode), jax.jit(model.decode)
    actions, is_pad, noise = io["actions"], io["is_pad"], io["eps"]

    latent_info = np.asarray(encode(actions, is_pad))
    mean, log_variance = np.split(latent_info, 2, axis=-1)
    kl = -0.5 * (1 + log_variance - mean**2 - np.exp(log_variance))
    deviation = np.exp(log_variance / 2)
    decoded = dict.fromkeys(("decode", "fwd"), decode(mean + deviation * noise[0]))
    if "ext_latent_info" in io:  # an input: an embedding from elsewhere, as the VLA predicts it
        outer_mean, outer_log_variance = np.split(io["ext_latent_info"], 2, axis=-1)
        decoded["ext"] = decode(outer_mean + np.exp(outer_log_variance / 2) * noise[1])
        decoded["ext_mean"] = decode(outer_mean)
    ours = {
        "latent_info": latent_info,
        "no_pad_latent_info": encode(actions, np.zeros_like(is_pad)),
        "mu": mean,
        "logvar": log_variance,
        "kl_per_dim": kl.mean(0),
        "kl_mean": kl.mean().reshape(1),
    }
    for name, (chunk, is_pad_logit) in decoded.items():
        ours |= {f"{name}_a_hat": chunk, f"{name}_is_pad_hat": is_pad_logit}
    for key, value in ours.items():
        if key in io:
            report.compare(key, value, io[key], folder.ACTION_VAE)

    @jax.jit
    def gradient(params, noise):
        def loss(params):
            return nnx.merge(graphdef, params).loss(actions, is_pad, noise)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (total, parts), gradients = gradient(params, noise[0])
    for key, value in {"loss_total": total, "loss_l1": parts["l1"], "loss_kl": parts["kl"]}.items():
        if key in io:
            report.compare(key, value, io[key], folder.LOSSES, relative=True)
    foreign = to_foreign(convert_vae.table(config), gradients)
    norms = dict(case.entry.get("grad_norms") or {}) | dict.fromkeys(case.entry.get("unused_parameters", ()))
    vla_cases.compare_gradients(report, foreign, io, norms)
    if rule := case.entry.get("train6"):
        first = len(noise) - len(rule["rows"])

        def step(params, index):
            (total, parts), gradients = gradient(params, noise[first + index])
            return {"total": total, **parts}, gradients

        vla_cases.train_six(report, rule, params, step, UNTRAINED)
    report.not_compared = io.unread()
    return report


def run_infer_step(case: Case) -> CaseReport:
    """Frames and state -> codes -> prompt -> latent -> chunk -> absolute actions.

    Not reproduced: `actions_out_no_action_token`, what the public code returns when the token it samples is not
    <action>. We sample no token (tests/test_reference_differences.py).
    """
    report, io = CaseReport(case.name, case.kind), case.recorded()
    settings = case.need("vla_config")
    _, vqgan, _ = load_vqgan(case.other(case.need("vqgan_case")))
    code_to_token = np.asarray(case.need("code_to_token"), np.int32)
    vocabulary = chameleon_vocabulary(code_to_token, settings["vocab_size"] - 4)

    tensors = case.tensors(".vla.weights")
    embed, head = (np.zeros((settings["vocab_size"], settings["hidden_size"]), np.float32) for _ in range(2))
    # Only the rows in use are shipped.
    embed[tensors.pop("embed_row_ids")] = tensors.pop("embed_rows")
    head[vocabulary.action] = tensors.pop("lm_head_action_row")
    tensors |= {"model.embed_tokens.weight": embed, "lm_head.weight": head}
    config = vla_cases.config_of(settings, tensors, vocabulary.image_tokens)
    vla = nnx.merge(*vla_cases.load_model(config, tensors))
    vae_weights = case.tensors(".vae.weights")
    latent = vae_weights["latent_out_proj.weight"].shape[1]
    vae_config, *vae = load_action_vae(case.need("actionvae_config"), vae_weights, latent)
    vae = nnx.merge(*vae)
    report.compare("chunk_size", vae_config.chunk, case.need("chunk_size"), folder.EXACT)

    arrays = {name: np.asarray(case.need("statistics")[name], np.float64) for name in STATISTICS}
    for name in STATISTICS:
        if f"{name}_f64" in io:
            report.compare(f"{name}_f64", arrays[name], io[f"{name}_f64"], folder.EXACT)
    statistics = Statistics(
        **arrays, columns=Columns.unstated("", 6, vae_config.action_dim, (vae_config.action_dim - 1,))
    )

    codes_of = jax.jit(vqgan.codes)
    views = {}
    for name in ("front", "wrist"):
        if f"{name}_u8" in io:
            pixels = images.normalize(io[f"{name}_u8"])[None]
            views[name] = np.asarray(codes_of(pixels))[0]
            report.compare(f"{name}_codes", views[name].ravel(), io[f"{name}_codes"], folder.EXACT)
    layout = SequenceConfig(use_wrist_frame="wrist" in views)
    tokens = sequence.prompt(np.asarray(case.need("text_tokens")), views, vocabulary, layout)[None]
    report.compare("prompt", tokens, io["prompt"], folder.EXACT)
    report.compare("prompt_length", tokens.shape[1], case.need("prompt_length"), folder.EXACT)

    state = normalize_state(io["state"], statistics)
    report.compare("state_normalised", state, io["state_normalised"], folder.ACTIONS)
    if "state_normalised_bf16" in io:
        rounded = jnp.asarray(state).astype(jnp.bfloat16).astype(jnp.float32)
        report.compare("state_normalised_bf16", rounded, io["state_normalised_bf16"], folder.ACTIONS)
    positions = sequence.find_positions(tokens, vocabulary.state, 1)
    batch = {"tokens": tokens, "state": state[None, None], "state_positions": positions}
    if "action_pred_all" in io:
        everywhere = jax.jit(lambda batch: vla.predict_action(vla.hidden(batch)))(batch)
        report.compare("action_pred_all", everywhere, io["action_pred_all"], folder.ACTIVATIONS)
    lengths = np.array([tokens.shape[1]], np.int32)
    latent_info = jax.jit(vla.action_latent)(tokens, lengths, batch["state"], positions)
    report.compare("action_latent", latent_info, io["action_latent"], folder.ACTIVATIONS)

    mean, log_variance = np.split(np.asarray(latent_info), 2, axis=-1)
    decode = jax.jit(vae.decode)
    chunk = np.asarray(decode(mean + np.exp(log_variance / 2) * io["eps"])[0])
    report.compare("chunk_normalised", chunk, io["chunk_normalised"], folder.ACTION_VAE)
    given = decode_chunk(io["chunk_normalised"][0], io["state"], statistics)
    report.compare("actions_of_golden_chunk", given, io["actions_out"], folder.ACTIONS)
    # From our own chunk: its tolerance, un-normalised and summed over the chunk.
    carried = folder.ACTION_VAE * vae_config.chunk * float(statistics.rel_std_action.max())
    report.compare("actions_out", decode_chunk(chunk[0], io["state"], statistics), io["actions_out"], carried)
    if "actions_out_mean_latent" in io:
        of_mean = decode_chunk(np.asarray(decode(mean)[0])[0], io["state"], statistics)
        report.compare("actions_out_mean_latent", of_mean, io["actions_out_mean_latent"], carried)
    report.not_compared = io.unread()
    return report
