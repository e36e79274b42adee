"""The PyTorch side: parity with the public code, the export folder, and a policy that never moves on an error."""

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rynnvla_jax import actions
from rynnvla_jax.actions import Statistics
from rynnvla_jax.cli import main as cli
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import (
    ActionVAEConfig,
    ImageConfig,
    SequenceConfig,
    TransformerConfig,
    VLAConfig,
    VQGANConfig,
)
from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.check import check
from rynnvla_jax.deploy.export_format import Cameras, ExportConfig, ExportError, PolicyError
from rynnvla_jax.deploy.observation import Observation
from rynnvla_jax.deploy.policy import Policy, state_range
from rynnvla_jax.deploy.torch_action_vae import ActionVAE
from rynnvla_jax.deploy.torch_transformer import VLA
from rynnvla_jax.deploy.torch_vqgan import VQGAN, to_uint8
from rynnvla_jax.deploy.torch_weights import load_module
from rynnvla_jax.recording import Recording
from tests import GOLDEN, ROOT, exports

torch.set_num_threads(1)  # the models are tiny and the machine may be busy

CASES = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"]
KEYS = ("rel_min_action", "rel_max_action", "rel_mean_action", "rel_std_action", "mean_state", "std_state")
GOLDEN_COLUMNS = Columns.unstated("golden", 6, 6, (5,))


def close(actual, expected, atol, rtol=0.0):
    np.testing.assert_allclose(actual.detach().numpy(), expected.detach().numpy(), atol=atol, rtol=rtol)


def golden(case):
    """(weights with the synthetic ones rebuilt, inputs and outputs) of one case."""
    weights, io = {}, {}
    for file in CASES[case]["files"]:
        (weights if "weights" in file else io).update(load_file(GOLDEN / file))
    for key, rule in (CASES[case].get("synthetic_weights") or {}).items():
        draw = np.random.RandomState(rule["randomstate_seed"]).uniform(-1, 1, size=rule["shape"]) * rule["scale"]
        weights[key] = torch.from_numpy(draw.astype(np.float32))
    return weights, io


def transformer_config(foreign, **more):
    return TransformerConfig(
        vocab_size=foreign["vocab_size"],
        width=foreign["hidden_size"],
        num_layers=foreign["num_hidden_layers"],
        num_heads=foreign["num_attention_heads"],
        num_kv_heads=foreign["num_key_value_heads"],
        feed_forward=foreign["intermediate_size"],
        **more,
    )


def vla_config(case):
    foreign, image = CASES[case]["config"], CASES[case]["image_token_ids"]
    transformer = transformer_config(
        foreign, mask_image_logits=foreign["mask_image_logits"], image_tokens=(image[0], image[-1] + 1)
    )
    return VLAConfig(transformer=transformer, action_head=foreign["action_head_type"])


def vqgan_config(case):
    dd = CASES[case]["ddconfig"]
    return VQGANConfig(
        channels=dd["ch"],
        multipliers=tuple(dd["ch_mult"]),
        num_res_blocks=dd["num_res_blocks"],
        attention_resolutions=tuple(dd["attn_resolutions"]),
        resolution=dd["resolution"],
        z_channels=dd["z_channels"],
        num_codes=CASES[case]["n_embed"],
        code_width=CASES[case]["embed_dim"],
    )


def vae_config(foreign):
    return ActionVAEConfig(
        chunk=foreign["num_queries"],
        width=foreign["hidden_dim"],
        feed_forward=foreign["dim_feedforward"],
        num_heads=foreign["nheads"],
        encoder_layers=foreign["enc_layers"],
        decoder_layers=foreign["dec_layers"],
    )


def built(module, weights):
    module.load_state_dict(weights, strict=True)
    return module.eval()


# Parity with the public code


@pytest.mark.parametrize("case", ["vla_one_layer", "vla_gqa_mlp_head", "vla_true_ids"])
def test_transformer_matches_public_code(case):
    weights, io = golden(case)
    model = built(VLA(vla_config(case)), weights)
    first_block = []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: first_block.append(output))
    output = model(io["input_ids"], io["state_embeds"])
    close(model.embed(io["input_ids"], io["state_embeds"]), io["embeds_in"], 3e-5)
    close(first_block[0], io["hidden_after_layer0"], 3e-5)
    close(output.hidden, io["hidden_final"], 3e-5)
    close(output.action, io["action_pred"], 3e-5)
    if "logits" in io:
        close(output.logits, io["logits"], 3e-5)
    else:
        close(output.logits[..., io["logit_cols"]], io["logits_at_cols"], 3e-5)
        close(output.logits.logsumexp(-1), io["logits_logsumexp"], 3e-5)
        assert torch.equal(output.logits.argmax(-1), io["logits_argmax"])


@pytest.mark.parametrize("case", ["vla_one_layer", "vla_gqa_mlp_head", "vla_true_ids"])
def test_losses_and_gradients_match_public_code(case):
    weights, io = golden(case)
    model = built(VLA(vla_config(case)), weights)
    losses = model.losses(io["input_ids"], io["labels"], io["state_embeds"], io["action_embeds"])
    for ours, name in zip(losses, ("loss_total", "loss_ce", "loss_action", "loss_z"), strict=True):
        close(ours, io[name], 0, rtol=1e-5)
    losses.total.backward()
    for name, parameter in model.named_parameters():
        norm = CASES[case]["grad_norms"][name]
        assert abs(parameter.grad.norm().item() - norm) <= 1e-5 + 1e-4 * norm, name


def test_action_loss_stands_without_z_loss():
    weights, io = golden("vla_one_layer")
    model = built(VLA(vla_config("vla_one_layer")), weights)
    batch = io["input_ids"], io["labels"], io["state_embeds"], io["action_embeds"]
    losses = model.losses(*batch, z_loss_weight=0.0)
    close(losses.total, losses.cross_entropy + losses.action, 1e-6)
    close(losses.action, io["loss_action"], 0, rtol=1e-5)


@pytest.mark.parametrize("case", ["vla_one_layer", "vla_gqa_mlp_head", "vla_true_ids"])
def test_action_latent_is_the_last_position(case):
    weights, io = golden(case)
    model = built(VLA(vla_config(case)), weights)
    prompt = io["gen.prompt"]
    state = io["state_embeds"][: int((prompt == model.state_token).sum())]
    close(model.action_latent(prompt, state), io["gen.action_pred"][:, -1], 3e-5)


@pytest.mark.parametrize("changes", [{"swin_norm": True}, {"attention_bias": True, "mlp_bias": True}])
def test_last_position_alone_equals_full_pass(changes):
    """Variants without golden data: the shortcut of `action_latent` against the whole forward pass."""
    torch.manual_seed(0)
    transformer = TransformerConfig(
        vocab_size=64, width=32, num_layers=2, num_heads=4, num_kv_heads=2, q_norm_rows=4, k_norm_rows=2,
        feed_forward=48, rope_theta=500.0, **changes,
    )  # fmt: skip
    model = VLA(VLAConfig(transformer=transformer)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, state = torch.randint(0, 60, (2, 9)), torch.randn(2, 6)
    tokens[:, -2] = model.state_token
    close(model.action_latent(tokens, state), model(tokens, state).action[:, -1], 1e-4)


@pytest.mark.parametrize("swin_norm", [False, True])
def test_transformer_matches_hugging_face(swin_norm):
    """An independent implementation, for what the golden data lacks: swin_norm, biases, one norm row a head."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"vocab_size": 64, "rope_theta": 500.0, "attention_bias": True, "mlp_bias": True, "swin_norm": swin_norm}
    theirs = transformers.ChameleonForConditionalGeneration(
        transformers.ChameleonConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": shared["rope_theta"]},
            vocabulary_map={"<image>": 7, "IMGIMGAZ": 8, "IMGIMGBZ": 9},
            vq_config={"embed_dim": 8, "num_embeddings": 2, "latent_channels": 8, "base_channels": 32,
                       "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 32},
            **{k: v for k, v in shared.items() if k != "rope_theta"},
        )
    ).eval()  # fmt: skip
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = VLA(
        VLAConfig(
            TransformerConfig(
                width=32, num_layers=2, num_heads=4, num_kv_heads=2, q_norm_rows=4, k_norm_rows=2, feed_forward=48,
                mask_image_logits=True, image_tokens=(8, 10), **shared,
            )
        )
    )  # fmt: skip
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith("model.vqmodel.")}
    fit = ours.load_state_dict(weights, strict=False)
    assert not fit.unexpected_keys and {k.split(".")[0] for k in fit.missing_keys} == {
        "state_projection",
        "action_head",
    }
    tokens = torch.randint(10, 60, (2, 9))
    close(ours(tokens, torch.zeros(0, 6)).logits, theirs(input_ids=tokens).logits, 3e-5)


def test_stored_norm_rows_are_repeated_over_heads():
    torch.manual_seed(0)
    transformer = TransformerConfig(vocab_size=64, width=32, num_layers=1, num_heads=4, num_kv_heads=4, feed_forward=48)
    few = VLA(VLAConfig(transformer=replace(transformer, q_norm_rows=2, k_norm_rows=2)))
    many = VLA(VLAConfig(transformer=replace(transformer, q_norm_rows=4, k_norm_rows=4)))
    weights = few.state_dict()
    for key in [k for k in weights if "_norm." in k and "self_attn" in k]:
        weights[key] = torch.randn(2, 8)
    few.load_state_dict(weights)
    many.load_state_dict(
        {k: v.repeat_interleave(2, 0) if k.split(".")[-2] in ("q_norm", "k_norm") else v for k, v in weights.items()}
    )
    tokens = torch.randint(0, 60, (1, 7))
    close(few(tokens, torch.zeros(0, 6)).hidden, many(tokens, torch.zeros(0, 6)).hidden, 1e-6)


def test_states_and_state_tokens_must_agree():
    model = VLA(vla_config("vla_one_layer"))
    with pytest.raises(ValueError, match="have 1 state tokens .* but 2 states"):
        model.embed(torch.tensor([[1, model.state_token]]), torch.zeros(2, 6))


@pytest.mark.parametrize("case", ["vqgan_noattn", "vqgan_attn", "vqgan_f16"])
def test_vqgan_matches_public_code(case):
    weights, io = golden(case)
    with_decoder = not CASES[case]["encoder_only"]
    model = built(VQGAN(vqgan_config(case), with_decoder), weights)
    z = model.encode(io["image"])
    close(z, io["z"], 1e-4)
    codes = model.codes(io["image"])
    assert torch.equal(codes.flatten(), io["indices"])
    if with_decoder:
        close(model.decode(io["quant"]), io["decoded"], 1e-4)
        close(model.decode_codes(codes.clone()), io["decoded"], 1e-4)
        assert torch.equal(to_uint8(io["decoded"])[0].movedim(0, -1), io["decoded_u8_0"])


def test_action_vae_matches_public_code():
    weights, io = golden("actionvae_post")
    model = built(ActionVAE(vae_config(CASES["actionvae_post"]["config"])), weights)
    info = model.encode(io["actions"], io["is_pad"])
    close(info, io["latent_info"], 2e-5)
    close(model.encode(io["actions"], torch.zeros_like(io["is_pad"])), io["no_pad_latent_info"], 2e-5)
    mean, log_var = info.chunk(2, -1)
    predicted, is_pad = model.decode(mean + (log_var / 2).exp() * io["eps"][0])
    close(predicted, io["decode_a_hat"], 2e-5)
    close(is_pad, io["decode_is_pad_hat"], 2e-5)
    close(model.decode(io["ext_latent_info"][:, :32])[0], io["ext_mean_a_hat"], 2e-5)
    rows = CASES["actionvae_post"]["train6"]["rows"]  # its first row is computed with eps[2]
    torch.testing.assert_close(
        torch.stack(model.losses(io["actions"], io["is_pad"], io["eps"][2])), torch.tensor(rows[0]), rtol=1e-5, atol=0
    )


def test_action_vae_position_table_is_the_stored_one():
    weights, _ = golden("actionvae_post")
    close(ActionVAE(vae_config(CASES["actionvae_post"]["config"])).pos_table, weights["pos_table"], 1e-6)


# The public inference step, through a real export folder


def words_tokenizer(words, vocab):
    """A tokenizer.json whose ids are given: one word, one id."""
    vocab = {**vocab, **words}
    added = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for name, i in vocab.items() if name not in words
    ]  # fmt: skip
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
            "decoder": None, "added_tokens": sorted(added, key=lambda token: token["id"]),
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def infer_step(tmp_path_factory):
    """The golden case as an export folder that `Policy.load` reads, and its inputs and outputs."""
    folder, case = tmp_path_factory.mktemp("infer_step"), CASES["infer_step"]
    vla = load_file(GOLDEN / "infer_step.vla.weights.safetensors")
    io = load_file(GOLDEN / "infer_step.io.safetensors")
    foreign = case["vla_config"]
    embed = torch.zeros(foreign["vocab_size"], foreign["hidden_size"])
    embed[vla.pop("embed_row_ids")] = vla.pop("embed_rows")
    del vla["lm_head_action_row"]  # the public code needs it to sample `<action>`; we do not
    vla["model.embed_tokens.weight"], vla["lm_head.weight"] = embed, torch.zeros_like(embed)
    transformer = transformer_config(foreign)
    config = ExportConfig(
        vla=VLAConfig(transformer=transformer),
        sequence=SequenceConfig(),
        image=ImageConfig(shortest_edge=64),
        chunk=case["chunk_size"],
        action_dim=6,
        normalization="mean_std",
        cameras=Cameras("front", "wrist"),
    )
    words = {chr(ord("a") + i): token for i, token in enumerate(case["text_tokens"][1:])}
    vocab = {"<s>": 0, "<unk>": 3, "<eoss>": 8196, "<racm3:break>": 8197, "<reserved08799>": 8803, "<last>": 65535}
    vocab.update({f"<reserved{8800 + n:05d}>": 8804 + n for n in range(1, 9)})
    for code, token in enumerate(case["code_to_token"]):
        vocab["IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"] = token
    exports.write(
        folder,
        config,
        vqgan_config("vqgan_f16"),
        vae_config(case["actionvae_config"]),
        vla,
        load_file(GOLDEN / "vqgan_f16.weights.safetensors"),
        load_file(GOLDEN / "infer_step.vae.weights.safetensors"),
        words_tokenizer(words, vocab),
        Statistics(**{k: io[f"{k}_f64"].numpy() for k in KEYS}, columns=GOLDEN_COLUMNS),
    )
    inputs = (io["front_u8"].numpy(), io["wrist_u8"].numpy(), io["state"].numpy(), " ".join(words))
    return SimpleNamespace(folder=folder, io={k: v.numpy() for k, v in io.items()}, inputs=inputs, eps=io["eps"])


@pytest.fixture(scope="module")
def golden_policy(infer_step):
    return Policy.load(infer_step.folder)


def test_policy_matches_public_step(infer_step, golden_policy):
    io = infer_step.io
    (seen,) = golden_policy.observe([Observation(*infer_step.inputs)])
    np.testing.assert_array_equal(seen.codes["front"].ravel(), io["front_codes"])
    np.testing.assert_array_equal(seen.codes["wrist"].ravel(), io["wrist_codes"])
    np.testing.assert_array_equal(seen.prompt, io["prompt"][0])
    np.testing.assert_allclose(seen.state, io["state_normalised"], atol=1e-6)
    latent = golden_policy.latent([seen])
    np.testing.assert_allclose(latent, io["action_latent"], atol=3e-5)
    (sampled,) = golden_policy.decode(latent, seen.raw_state[None], infer_step.eps)
    np.testing.assert_allclose(sampled, io["actions_out"], atol=1e-4)
    chunk = actions.normalize_actions(
        np.diff(sampled, axis=0, prepend=seen.raw_state[None]), golden_policy.statistics
    )  # joints; the gripper is absolute
    np.testing.assert_allclose(chunk[:, :5], io["chunk_normalised"][0][:, :5], atol=1e-4)
    acted = golden_policy.act(*infer_step.inputs)
    assert acted.dtype == np.float32 and acted.shape == (8, 6)
    np.testing.assert_allclose(acted, io["actions_out_mean_latent"], atol=1e-4)


def test_policy_never_falls_back_to_the_zero_chunk(infer_step, golden_policy):
    """The public code samples the next token and, unless it is `<action>`, un-normalises zeros: a real motion.

    Our export's LM head is all zeros here, so that the public code would almost surely take that path.
    """
    fallback = infer_step.io["actions_out_no_action_token"]
    state = infer_step.inputs[2]
    zeros = actions.decode_chunk(np.zeros((8, 6), np.float32), state, golden_policy.statistics)
    np.testing.assert_allclose(zeros, fallback, atol=1e-5)
    assert np.abs(fallback - state)[:, :5].max() > 0.1  # it moves
    assert np.abs(golden_policy.act(*infer_step.inputs) - fallback).max() > 0.1


def test_policy_is_deterministic_unless_asked_to_sample(infer_step, golden_policy):
    def act(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return golden_policy.act(*infer_step.inputs, generator=generator)

    np.testing.assert_array_equal(act(), act())
    np.testing.assert_array_equal(act(1), act(1))
    assert np.abs(act(1) - act()).max() > 1e-3


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_stays_near(infer_step, golden_policy, dtype, atol):
    policy = Policy.load(infer_step.folder, dtype=dtype)
    assert policy.vla.lm_head.weight.dtype == dtype
    assert policy.vqgan.quant_conv.weight.dtype == policy.action_vae.action_head.weight.dtype == torch.float32
    latent, exact = (p.latent(p.observe([Observation(*infer_step.inputs)])) for p in (policy, golden_policy))
    np.testing.assert_allclose(latent, exact, atol=atol)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_policy_agrees(infer_step, golden_policy):
    policy = Policy.load(infer_step.folder, compiled=True)
    np.testing.assert_allclose(policy.act(*infer_step.inputs), golden_policy.act(*infer_step.inputs), atol=1e-4)


def batch_of(inputs):
    """Three observations that differ in frames, state and length of the prompt."""
    front, wrist, state, text = inputs
    return [
        Observation(front, wrist, state, text),
        Observation(255 - front, wrist, state + 0.1, text.split()[0], columns=GOLDEN_COLUMNS),
        Observation(front[:, ::-1].copy(), 255 - wrist, state - 0.1, text),
    ]


def test_batch_equals_one_by_one(infer_step, golden_policy):
    observations = batch_of(infer_step.inputs)
    together = golden_policy.act_batch(observations)
    assert together.shape == (3, 8, 6) and together.dtype == np.float32
    one_by_one = np.stack([golden_policy.act(*o) for o in observations])
    np.testing.assert_allclose(together, one_by_one, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01 < np.abs(together[0] - together[2]).max()


def test_one_bad_observation_refuses_the_batch_and_is_named(infer_step, golden_policy):
    observations = batch_of(infer_step.inputs)
    observations[1] = observations[1]._replace(columns=replace(GOLDEN_COLUMNS, robot="another"))
    with pytest.raises(
        PolicyError,
        match="observation 1 of 3: the policy and the robot differ in what columns mean: robot 'golden' and 'another'",
    ):
        golden_policy.act_batch(observations)
    observations[1] = observations[0]._replace(front=np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(PolicyError, match="front images of one batch become .* send images of one size"):
        golden_policy.act_batch(observations)
    with pytest.raises(PolicyError, match="no observation"):
        golden_policy.act_batch([])


def test_states_out_of_range_are_refused(infer_step, golden_policy):
    front, wrist, state, text = infer_step.inputs
    low, high = golden_policy.state_range
    for bound, outwards in ((low, -np.inf), (high, np.inf)):
        for joint in range(6):
            edge = golden_policy.statistics.mean_state.astype(np.float32)
            edge[joint] = np.nextafter(np.float32(bound[joint]), np.float32(-outwards))
            assert golden_policy.act(front, wrist, edge, text).shape == (8, 6)
            edge[joint] = bound[joint] + np.sign(outwards) * (high - low)[joint] / 1000
            with pytest.raises(PolicyError, match=f"out of the training data's range: .* at index {joint} "):
                golden_policy.act(front, wrist, edge, text)


def test_a_joint_that_never_moved_still_has_play():
    ones = np.ones(3)
    statistics = Statistics(-ones, ones, ones, ones, np.array([10.0, 0.0, 0.0]), np.array([0.0, 1.0, 20.0]), Columns())
    low, high = state_range(statistics)
    np.testing.assert_allclose(low, [10 - 16, -16, -160])
    np.testing.assert_allclose(high, [10 + 16, 16, 160])


def test_any_other_failure_is_a_policy_error_too(infer_step, monkeypatch):
    policy = Policy.load(infer_step.folder)

    def out_of_memory(*arguments):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(policy.vla, "action_latent", out_of_memory)
    with pytest.raises(PolicyError, match="RuntimeError: CUDA out of memory.*no motion"):
        policy.act(*infer_step.inputs)


# Bad inputs: a PolicyError that names the fault, never an action


@pytest.mark.parametrize(
    "change, message",
    [
        ({"state": np.zeros(5)}, r"state has shape \(5,\); give float\[6\]"),
        ({"state": np.zeros((1, 6))}, r"state has shape \(1, 6\)"),
        ({"state": np.array([0, 0, np.nan, 0, 0, np.inf])}, r"not finite at index \[2, 5\]"),
        ({"state": "up"}, "state is not numbers"),
        ({"columns": Columns("degrees")}, "robot 'golden' and 'degrees'"),
        ({"front": np.zeros((64, 96, 3), np.float32)}, "front image is float32, expected .* uint8"),
        ({"front": None}, "front image is NoneType"),
        ({"front": np.zeros((3, 64, 96), np.uint8)}, r"front image has shape \(3, 64, 96\)"),
        ({"front": np.zeros((0, 96, 3), np.uint8)}, r"front image has shape \(0, 96, 3\)"),
        ({"wrist": np.zeros((64, 96), np.uint8)}, r"wrist image has shape \(64, 96\)"),
        ({"wrist": None}, "wrist image is missing"),
        ({"instruction": "  "}, "instruction is '  '"),
        ({"instruction": None}, "instruction is None"),
        ({"instruction": "a <racm3:break> b"}, "special token '<racm3:break>'"),
        ({"front": np.zeros((64, 640, 3), np.uint8)}, "tokenizer has no <reserved08820>"),
    ],
)
def test_bad_input_is_a_policy_error(infer_step, golden_policy, change, message):
    inputs = dict(zip(("front", "wrist", "state", "instruction"), infer_step.inputs, strict=True))
    with pytest.raises(PolicyError, match=message):
        golden_policy.act(**{**inputs, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"front": np.zeros((8, 256, 3), np.uint8)}, r"front image has shape \(8, 256, 3\): tokenizer has no"),
        ({"wrist": np.zeros((256, 8, 3), np.uint8)}, r"wrist image has shape \(256, 8, 3\): tokenizer has no"),
        ({"instruction": "a " * 4096}, r"instruction's 4097 tokens and .* wrist .* but the policy was trained on 4096"),
    ],
)
def test_what_is_too_long_is_refused_before_any_work(infer_step, golden_policy, monkeypatch, change, message):
    monkeypatch.setattr(golden_policy.vqgan, "codes", lambda pixels: pytest.fail("frames were encoded"))
    seen = Observation(*infer_step.inputs)._replace(**change)
    with pytest.raises(PolicyError, match=message):
        golden_policy.act(*seen)


def test_wrist_image_for_a_policy_without_one(infer_step, golden_policy):
    config = golden_policy.config
    policy = Policy(
        replace(config, sequence=replace(config.sequence, use_wrist_frame=False)),
        vla=golden_policy.vla,
        vqgan=golden_policy.vqgan,
        action_vae=golden_policy.action_vae,
        tokenizer=golden_policy.tokenizer,
        statistics=golden_policy.statistics,
    )
    front, wrist, state, text = infer_step.inputs
    with pytest.raises(PolicyError, match="has no wrist camera"):
        policy.act(front, wrist, state, text)
    assert policy.act(front, None, state, text).shape == (8, 6)


@pytest.mark.parametrize("part, key", [("vla", "action_head.bias"), ("action_vae", "action_head.bias")])
def test_numbers_that_are_not_finite_give_no_motion(infer_step, part, key):
    policy = Policy.load(infer_step.folder)
    getattr(policy, part).get_parameter(key).data[0] = torch.nan
    with pytest.raises(PolicyError, match="not finite"):
        policy.act(*infer_step.inputs)


# The export folder


@pytest.fixture
def tiny_export(tmp_path):
    return exports.write_tiny(tmp_path / "export")


def test_config_round_trip():
    values = json.loads(json.dumps(export_format.config_to_json(exports.TINY)))
    assert export_format.config_from_json(values) == exports.TINY
    assert values["hidden_size"] == 32 and values["action_latent_dim"] == 16
    assert set(values["rynnvla"]) == {
        "format_version", "sequence", "image", "chunk", "action_dim", "normalization", "cameras", "recording",
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["rynnvla"].update(format_version=3), "format_version is 3, this program reads up to 2"),
        (lambda v: v["rynnvla"].update(format_version="1"), "format_version is '1'"),
        (lambda v: v["rynnvla"].update(chunks=4), "unknown key rynnvla.chunks. Did you mean rynnvla.chunk"),
        (lambda v: v["rynnvla"].pop("cameras"), "rynnvla lacks cameras"),
        (lambda v: v["rynnvla"]["image"].update(fit="stretch"), "image.fit is 'stretch'"),
        (lambda v: v["rynnvla"].update(normalization="none"), "normalization is 'none'"),
        (lambda v: v.pop("rynnvla"), "not an export of rynnvla_jax"),
        (lambda v: v.pop("action_head_type"), "lacks action_head_type"),
        (lambda v: v.update(hidden_size="32"), "width must be int"),
    ],
)
def test_config_faults_are_named(change, message):
    values = json.loads(json.dumps(export_format.config_to_json(exports.TINY)))
    change(values)
    with pytest.raises(ExportError, match=message) as error:
        export_format.config_from_json(values, "somewhere/config.json")
    assert "somewhere/config.json" in str(error.value)


def test_exported_policy_runs_without_jax(tiny_export):
    """In a process where importing jax, flax or data_pipelines fails, as on a robot."""
    program = f"""
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "grain", "tensorflow", "ml_collections", "data_pipelines"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy as np
from rynnvla_jax.deploy.check import check
from rynnvla_jax.deploy.policy import Policy
policy = Policy.load({str(tiny_export)!r})
out = policy.act(np.full((48, 64, 3), 90, np.uint8), None, np.zeros(6), "pick up the block")
assert out.shape == (4, 6) and out.dtype == np.float32 and np.isfinite(out).all(), out
print(check({str(tiny_export)!r}, repeats=1)["prompt_tokens"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_a_policy_keeps_the_memory_of_its_activations_where_it_is_asked_to(tiny_export):
    """Page faults of 64 MiB that come and go: with a policy, with one that keeps memory, and in a server's thread."""
    program = f"""
import resource, torch
from concurrent.futures import ThreadPoolExecutor
from rynnvla_jax.deploy.policy import Policy
def faults():
    for i in range(20):
        if i == 10:  # the first ones find their place
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
Policy.load({str(tiny_export)!r})
taken = faults()
Policy.load({str(tiny_export)!r}, keep_memory=True)
with ThreadPoolExecutor(1) as thread:
    print(taken, faults(), thread.submit(faults).result())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    taken, kept, kept_in_thread = map(int, done.stdout.split())
    assert kept < taken / 10 and kept_in_thread < taken / 10


def test_check_reports_ranges(tiny_export):
    report = json.loads(json.dumps(check(tiny_export, repeats=1)))
    assert report["columns"]["robot"] == "tiny" and report["chunk"] == 4 and report["action_dim"] == 6
    assert len(report["action_min"]) == len(report["action_max"]) == len(report["state"]) == 6
    for what in ("action", "state"):
        assert all(low <= high for low, high in zip(report[f"{what}_min"], report[f"{what}_max"], strict=True))
    assert report["parameters"] == sum(v.numel() for v in load_file(tiny_export / "model.safetensors").values())
    assert report["asynchronous"] == []  # the rate is not known


def test_check_says_whether_answers_come_in_time(tiny_export):
    config = export_format.read_config(tiny_export)
    export_format.write_config(tiny_export, replace(config, recording=Recording(rates=(0.01, 1e6))))
    slow, fast = check(tiny_export, repeats=1)["asynchronous"]
    assert slow["fits"] and slow["delay_steps"] == 1 and slow["largest_replan_every"] == 3
    assert not fast["fits"] and fast["largest_replan_every"] is None and "--compile" in fast["says"]


def test_check_command(tiny_export, capsys):
    export_format.write_sums(tiny_export)
    assert cli.main(["deploy", "check", str(tiny_export), "--repeats", "1", "--dtype", "bfloat16"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "bfloat16"
    (tiny_export / "statistics.json").unlink()
    assert cli.main(["deploy", "check", str(tiny_export)]) == 1
    output = capsys.readouterr()
    assert not output.out and output.err.count("\n") == 1 and "statistics.json is missing" in output.err
    assert cli.main(["deploy", "check", str(tiny_export), "--device", "foo"]) == 1
    error = capsys.readouterr().err
    assert "PyTorch cannot use device 'foo'" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "vqgan/model.safetensors", "statistics.json", "config.json"])
def test_one_changed_bit_of_an_export_is_refused(tiny_export, name):
    export_format.write_sums(tiny_export)
    assert Policy.load(tiny_export)
    content = bytearray((tiny_export / name).read_bytes())
    content[-2] ^= 1
    (tiny_export / name).write_bytes(content)
    with pytest.raises(PolicyError, match=f"{name} is not the file that was exported"):
        Policy.load(tiny_export)


def test_an_export_without_sums_is_used_and_said(tiny_export, capsys):
    assert Policy.load(tiny_export)
    assert "has no sha256.json" in capsys.readouterr().err


def test_check_with_the_cameras_frames(tiny_export):
    square, wide = (check(tiny_export, repeats=1, frame=frame)["prompt_tokens"] for frame in (None, (48, 96)))
    assert wide == square + 4
    with pytest.raises(PolicyError, match=r"front image has shape \(8, 256, 3\)"):
        check(tiny_export, frame=(8, 256))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named(tiny_export):
    with pytest.raises(PolicyError, match="cannot use device 'cuda'.*choose cpu"):
        Policy.load(tiny_export, "cuda")


def test_sharded_weights_load_the_same(tiny_export):
    frame, state = np.full((40, 32, 3), 7, np.uint8), np.ones(6)
    whole = Policy.load(tiny_export).act(frame, None, state, "pick up the block")
    weights = load_file(tiny_export / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: weights[k] for k in keys}, tiny_export / file)
    (tiny_export / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (tiny_export / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    np.testing.assert_array_equal(Policy.load(tiny_export).act(frame, None, state, "pick up the block"), whole)
    (tiny_export / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ExportError, match="lists model-00002-of-00002.safetensors, which .*export does not contain"):
        Policy.load(tiny_export)


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "model.safetensors", "tokenizer.json", "statistics.json", "vqgan/config.json",
        "vqgan/model.safetensors", "action_vae/config.json", "action_vae/model.safetensors",
    ],
)  # fmt: skip
def test_missing_and_broken_files_are_named(tiny_export, name):
    file = tiny_export / name
    file.write_bytes(b"broken")
    with pytest.raises(ExportError, match=name.split("/")[-1]):
        Policy.load(tiny_export)
    file.unlink()
    with pytest.raises(ExportError, match=name.split("/")[-1]):
        Policy.load(tiny_export)
    file.mkdir()
    with pytest.raises(ExportError, match=name.split("/")[-1]):
        Policy.load(tiny_export)


def test_every_weight_that_does_not_fit_is_listed(tiny_export):
    weights = load_file(tiny_export / "model.safetensors")
    del weights["model.norm.weight"], weights["action_head.8.bias"]
    weights["model.extra"] = torch.zeros(1)
    weights["model.vqmodel.quantize.embedding.weight"] = torch.zeros(1)  # HF checkpoints may carry it
    weights["lm_head.weight"] = torch.zeros(3, 32)
    save_file(weights, tiny_export / "model.safetensors")
    with pytest.raises(ExportError) as error:
        Policy.load(tiny_export)
    message = str(error.value)
    assert "missing: model.norm.weight, action_head.8.bias;" in message
    assert "unexpected: model.extra;" in message
    assert "wrong shape: lm_head.weight is [3, 32]" in message
    assert "vqmodel" not in message


def test_parts_that_do_not_belong_together_are_refused(tiny_export):
    path = tiny_export / "statistics.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    stage_1 = replace(exports.TINY, sequence=replace(exports.TINY.sequence, use_state=False))
    config = export_format.read_config(tiny_export)
    export_format.write_config(tiny_export, replace(stage_1, vla=config.vla))
    with pytest.raises(ExportError, match="a model of stage 1 predicts no action"):
        Policy.load(tiny_export)
    export_format.write_config(tiny_export, config)
    path.write_text(json.dumps({**values, "columns": {"robot": "tiny"}}), encoding="utf-8")
    with pytest.raises(ExportError, match="columns describes 0 columns of state but mean_state has 6"):
        Policy.load(tiny_export)
    path.write_text(json.dumps({**values, "mean_state": [0.0] * 7, "std_state": [1.0] * 7}), encoding="utf-8")
    with pytest.raises(ExportError, match="columns describes 6 columns of state but mean_state has 7"):
        Policy.load(tiny_export)


def test_loading_holds_one_copy_in_the_asked_dtype(tmp_path):
    weights = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    save_file(weights, tmp_path / "model.safetensors")
    module = load_module(lambda: torch.nn.Linear(4, 3), tmp_path, dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16 and not module.weight.requires_grad
    assert not any(p.is_meta for p in module.parameters())
