"""The golden runner: the shipped folder agrees, another one of other shapes too, and what is wrong is said."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rynnvla_jax.config import ActionVAEConfig, TransformerConfig, VLAConfig, VQGANConfig
from rynnvla_jax.deploy import torch_action_vae, torch_transformer, torch_vqgan
from tests import GOLDEN, XLA_FLAGS
from tests.golden.__main__ import RUNNERS, main

MANIFEST = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))
# Recorded on purpose but not ours: what the public step returns after sampling another token than <action>.
NOT_OURS = {"infer_step": ["actions_out_no_action_token"]}
IMAGE_TOKENS = (4, 20)


def run_cli(folder):
    """(exit code, one parsed line a case). Unoptimised machine code: compiling is most of a tiny case's time."""
    environment = os.environ | {"XLA_FLAGS": XLA_FLAGS}
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden", str(folder)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return done.returncode, {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def shipped():
    return run_cli(GOLDEN)


@pytest.mark.parametrize("name", MANIFEST["cases"])
def test_shipped_case(shipped, name):
    line, kind = shipped[1][name], MANIFEST["cases"][name]["kind"]
    if kind == "note":
        assert line["skipped"] and "pass" not in line
        return
    assert line["pass"], {q: (line["differences"][q], line["tolerances"][q]) for q in line.get("failures", ())} or line
    assert line.get("not_compared", []) == NOT_OURS.get(name, [])
    assert line["kind"] == kind and set(line["differences"]) == set(line["tolerances"])


def test_shipped_folder_as_a_whole(shipped):
    assert shipped[0] == 0 and list(shipped[1]) == list(MANIFEST["cases"])
    assert {c["kind"] for c in MANIFEST["cases"].values()} == set(RUNNERS) | {"note"}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A golden folder of other shapes, options and seeds, from the PyTorch modules of `deploy/`."""
    folder = Folder(tmp_path_factory.mktemp("other_golden"))
    vla_case(folder)
    vqgan_case(folder)
    action_vae_case(folder)
    folder.manifest["cases"]["from_the_future"] = {"kind": "robot_dance"}
    folder.write_manifest()
    return folder.path, run_cli(folder.path)


def test_other_folder_agrees(other):
    _, (code, lines) = other
    assert lines.pop("from_the_future")["skipped"].startswith("kind 'robot_dance' is not known")
    for name, line in lines.items():
        assert line["pass"], (name, line)
        assert "not_compared" not in line
    assert code == 0 and set(lines) == {"shards", "codes", "pre_norm"}
    assert {"hidden_after_layer0", "grad_norms", "trunc.loss_ce", "gen.sequences", "train6"} <= set(
        lines["shards"]["differences"]
    )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_wrong_output_fails(tmp_path, capsys, sign):
    folder = copied(tmp_path, "preprocess")
    file = folder / "preprocess.safetensors"
    tensors = {k: v.copy() for k, v in load_file(file).items()}
    tensors["infer1"][0, 3, 4] += sign * 2e-2
    save_file(tensors, file)
    declare(folder, "preprocess.safetensors")
    assert main([str(folder)]) == 1
    line = json.loads(capsys.readouterr().out)
    assert line["pass"] is False and line["failures"] == ["infer1", "infer1_u8"]
    assert line["differences"]["infer1"] == pytest.approx(2e-2, rel=1e-3)


def test_not_a_number_and_wrong_shape_fail(tmp_path, capsys):
    folder = copied(tmp_path, "preprocess")
    file = folder / "preprocess.safetensors"
    tensors = {k: v.copy() for k, v in load_file(file).items()}
    tensors["infer0"] = tensors["infer0"][:, :, :-1]
    tensors["train1"][0, 0, 0] = np.nan
    save_file(tensors, file)
    declare(folder, "preprocess.safetensors")
    assert main([str(folder)]) == 1
    line = json.loads(capsys.readouterr().out)
    assert {"infer0", "train1"} <= set(line["failures"])
    assert line["differences"]["infer0"] == line["differences"]["train1"] == "inf"


def test_a_file_that_is_not_the_manifests_fails_by_name(tmp_path, capsys):
    folder = copied(tmp_path, "preprocess", "lr_schedules")
    with (folder / "lr_schedules.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert main([str(folder)]) == 1
    lines = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert lines["preprocess"]["pass"]
    assert "lr_schedules.json has sha256" in lines["lr_schedules"]["error"] and not lines["lr_schedules"]["pass"]


def test_synthetic_weights_are_checked(other, tmp_path, capsys):
    folder = tmp_path / "golden"
    shutil.copytree(other[0], folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["cases"]["shards"]["synthetic_weights"]["action_head.2.weight"]["randomstate_seed"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main([str(folder), "--case", "shards"]) == 1
    assert "action_head.2.weight rebuilt from seed" in json.loads(capsys.readouterr().out)["error"]


def test_unusable_folder_and_unknown_case(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "manifest.json does not exist" in capsys.readouterr().err
    assert main([str(GOLDEN), "--case", "nonsense"]) == 2
    assert "has no case nonsense; it has vla_one_layer" in capsys.readouterr().err


def test_one_case_can_be_chosen(capsys):
    assert main([str(GOLDEN), "--case", "layout", "--case", "vqgan_true_config"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == ["layout", "vqgan_true_config"]
    assert lines[0]["pass"] and lines[0]["differences"]["input_ids"] == 0
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0


def copied(tmp_path, *names):
    """A folder with only these cases."""
    folder = tmp_path / "golden"
    folder.mkdir()
    cases = {name: MANIFEST["cases"][name] for name in names}
    for case in cases.values():
        for file in case.get("files") or ():
            shutil.copyfile(GOLDEN / file, folder / file)
    for name in names:
        if not cases[name].get("files"):
            shutil.copyfile(GOLDEN / f"{name}.json", folder / f"{name}.json")
    files = {f: v for f, v in MANIFEST["files"].items() if (folder / f).exists()}
    (folder / "manifest.json").write_text(json.dumps({"cases": cases, "files": files}), encoding="utf-8")
    return folder


def test_a_z_loss_that_the_public_code_did_not_compute_is_not_compared(tmp_path, capsys):
    """With a weight of 0 it reports a z-loss of 0 and a total without the action loss."""
    folder = copied(tmp_path, "vla_one_layer")
    file, name = folder / "vla_one_layer.io.safetensors", "vla_one_layer.io.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith(("grad", "trunc", "single", "gen"))}
    save_file(kept | {"loss_z": np.zeros_like(kept["loss_z"]), "loss_total": kept["loss_ce"]}, file)
    declare(folder, name)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    case = manifest["cases"]["vla_one_layer"]
    case["config"]["z_loss_weight"] = 0.0
    for key in ("grad_norms", "train6", "truncation"):
        case.pop(key, None)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert main([str(folder)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["pass"] and "loss_total" in line["differences"] and line["not_compared"] == ["loss_z"]


def declare(folder, file):
    """Writes the file's own sha256 into the manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["files"][file]["sha256"] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest), encoding="utf-8")


class Folder:
    """Writes golden files and their manifest."""

    def __init__(self, path):
        self.path, self.manifest = path, {"cases": {}, "files": {}}

    def add(self, name, entry, weights, io):
        for part, tensors in (("weights", weights), ("io", io)):
            file = f"{name}.{part}.safetensors"
            save_file({k: np.array(array(v), order="C") for k, v in tensors.items()}, self.path / file)
            digest = hashlib.sha256((self.path / file).read_bytes()).hexdigest()
            self.manifest["files"][file] = {"sha256": digest}
        files = [f"{name}.{part}.safetensors" for part in ("weights", "io")]
        self.manifest["cases"][name] = {"files": files, **entry}

    def write_manifest(self):
        (self.path / "manifest.json").write_text(json.dumps(self.manifest), encoding="utf-8")


def array(value):
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def randomise(module, seed):
    """Every parameter away from its initial value, norms about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            fan_in = p[0].numel() if p.ndim > 1 else 1
            p.copy_(1 + 0.1 * noise if is_norm else 0.1 * noise if p.ndim == 1 else noise * fan_in**-0.5)
    return module


def norms_of(module):
    return {n: None if p.grad is None else float(p.grad.norm()) for n, p in module.named_parameters()}


def vla_case(folder):
    """Grouped queries, swin_norm, two q/k shards, biases, MLP head, masked image logits, narrow state and latent."""
    config = VLAConfig(
        transformer=TransformerConfig(
            vocab_size=60,
            width=24,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            feed_forward=40,
            rope_theta=500.0,
            norm_eps=1e-3,
            q_norm_rows=2,
            k_norm_rows=2,
            swin_norm=True,
            attention_bias=True,
            mlp_bias=True,
            mask_image_logits=True,
            image_tokens=IMAGE_TOKENS,
        ),
        state_dim=3,
        action_head="MLP",
        action_outputs=10,
    )
    state_id, action_id, z_weight = 59, 56, 1e-3
    model = randomise(torch_transformer.VLA(config), 7)
    spec = {"randomstate_seed": 77, "low": -1, "high": 1, "scale": 0.03, "shape": [1024, 2048]}
    drawn = (np.random.RandomState(77).uniform(-1, 1, size=spec["shape"]) * spec["scale"]).astype(np.float32)
    spec["sha256"] = hashlib.sha256(drawn.tobytes()).hexdigest()
    model.action_head[2].weight.data = torch.from_numpy(drawn)

    rng = np.random.default_rng(7)
    sequences, labels = [], []
    for text, frames in ((5, 3), (4, 1)):
        row, label = [], []
        for t in range(frames):
            image = rng.integers(*IMAGE_TOKENS, 6).tolist()
            row += [0, *rng.integers(20, 56, text).tolist(), *image, state_id, action_id]
            label += [-100] * (1 + text) + [-100] * 6 + [state_id, action_id]  # image logits are masked: not trained
            if t:
                label[-(text + 8) : -8] = row[-(text + 8) : -8]
        sequences.append(row)
        labels.append(label)
    width = max(map(len, sequences))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in sequences])
    padded = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    states, targets = (torch.from_numpy(rng.normal(size=(4, n)).astype(np.float32)) for n in (3, 10))

    def losses(tokens, padded, states, targets):
        return model.losses(tokens, padded, states, targets, z_weight)

    with torch.no_grad():
        first = []
        hook = model.model.layers[0].register_forward_hook(lambda module, inputs, out: first.append(out))
        out = model(tokens, states)
        hook.remove()
        single = [losses(tokens[:1], padded[:1], states[:3], targets[:3])]
        single.append(losses(tokens[1:, :14], padded[1:, :14], states[3:], targets[3:]))
        cut = 30  # leaves two frames of the first sequence
        kept = [0, 1, 3]
        short = losses(tokens[:, :cut], padded[:, :cut], states[kept], targets[kept])
        prompt = tokens[:1, :13]
        answer = model(prompt, states[:1])
        last = answer.logits[:, -1]
    total = losses(tokens, padded, states, targets)
    total.total.backward()
    norms = norms_of(model)
    gradient = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    seen_prompt = torch.where(prompt == state_id, 0, prompt)
    io = {
        "input_ids": tokens,
        "labels": padded,
        "lengths": np.array([len(s) for s in sequences]),
        "state_embeds": states,
        "action_embeds": targets,
        "embeds_in": model.embed(tokens, states),
        "hidden_after_layer0": first[0],
        "hidden_final": out.hidden,
        "action_pred": out.action,
        "logits": out.logits,
        "loss_ce": total.cross_entropy,
        "loss_action": total.action,
        "loss_z": total.z,
        "loss_total": total.total,
        "grad_norm_total": gradient,
        "trunc.loss_ce": short.cross_entropy,
        "trunc.loss_action": short.action,
        "trunc.loss_z": short.z,
        "gen.prompt": prompt,
        "gen.sequences": torch.cat([seen_prompt, last.argmax(-1)[:, None]], 1),
        "gen.action_pred": answer.action,
        "gen.last_logits": last,
    }
    for i, each in enumerate(single):
        io |= {f"single{i}.loss_ce": each.cross_entropy, f"single{i}.loss_action": each.action}
    for key in ("model.layers.1.self_attn.k_norm.weight", "model.layers.0.self_attn.o_proj.bias", "lm_head.weight"):
        io[f"grad.{key}"] = model.get_parameter(key).grad.clone()
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "action_head.2.weight"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.05)
    rows = []
    for _ in range(6):
        optimizer.zero_grad()
        step = losses(tokens, padded, states, targets)
        step.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5)
        optimizer.step()
        rows.append([v.item() for v in (step.total, step.cross_entropy, step.action, step.z, norm)])
    entry = {
        "kind": "vla_transformer",
        "seed": 7,
        "config": {
            "vocab_size": 60,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "rope_theta": 500.0,
            "rms_norm_eps": 1e-3,
            "model_parallel_size": 2,
            "swin_norm": True,
            "mask_image_logits": True,
            "action_head_type": "MLP",
            "z_loss_weight": z_weight,
            "state_dim": 3,
        },
        "token_ids": {"action": action_id, "wrist_start": 57, "wrist_end": 58, "state": state_id},
        "image_token_ids": list(range(*IMAGE_TOKENS)),
        "raw_sequences": sequences,
        "raw_labels": labels,
        "synthetic_weights": {"action_head.2.weight": spec},
        "grad_norms": norms,
        "truncation": {"max_position_embeddings": cut, "kept_state_rows": kept, "kept_action_rows": kept},
        "train6": {
            "optimizer": "AdamW lr=2e-3 betas=(0.8,0.9) eps=1e-7 weight_decay=0.05; clip_grad_norm 1.5",
            "columns": ["total", "ce", "action", "z", "grad_norm_before_clip"],
            "rows": rows,
        },
    }
    folder.add("shards", entry, weights, io)


def vqgan_case(folder):
    """Two levels with attention in the lower one, 33 codes, code width unlike z's, an image wider than high."""
    config = VQGANConfig(
        channels=32,
        multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(8,),
        resolution=16,
        z_channels=6,
        num_codes=33,
        code_width=5,
    )
    model = randomise(torch_vqgan.VQGAN(config), 8)
    pixels = np.random.default_rng(8).integers(0, 256, (2, 16, 24, 3), np.uint8)
    image = torch.from_numpy(((pixels.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        z = model.encode(image)
        codes = model.codes(image)
        latents = model.quantize.embedding(codes).movedim(-1, 1)
        decoded = model.decode(latents)
        difference = (latents - z).square().mean()
    io = {
        "image_u8": pixels,
        "image": image,
        "encoder_out": model.encoder(image),
        "z": z,
        "indices": codes.ravel(),
        "quant": z + (latents - z),
        "emb_loss": 1.25 * difference,
        "codebook_latents": latents,
        "decoded": decoded,
        "decoded_u8_0": torch_vqgan.to_uint8(decoded[0]).movedim(0, -1),
        "pil_path_indices_0": codes[0].ravel(),
    }
    ddconfig = {
        "double_z": False,
        "in_channels": 3,
        "out_ch": 3,
        "dropout": 0.0,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "z_channels": 6,
        "resolution": 16,
    }
    entry = {"kind": "vqgan", "ddconfig": ddconfig, "n_embed": 33, "embed_dim": 5}
    folder.add("codes", entry, model.state_dict(), io)


def action_vae_case(folder):
    """pre_norm, a chunk of 4, width 5 actions, latent 3, a heavier KL."""
    config = ActionVAEConfig(
        chunk=4,
        action_dim=5,
        width=12,
        feed_forward=20,
        num_heads=3,
        encoder_layers=1,
        decoder_layers=2,
        latent=3,
        pre_norm=True,
        kl_weight=0.01,
    )
    model = randomise(torch_action_vae.ActionVAE(config, with_encoder=True), 9).eval()
    rng = np.random.default_rng(9)
    actions = torch.from_numpy(rng.normal(size=(3, 4, 5)).astype(np.float32))
    is_pad = torch.arange(4) >= torch.tensor([[4], [2], [1]])
    noise = torch.from_numpy(rng.normal(size=(8, 3, 3)).astype(np.float32))
    with torch.no_grad():
        latent_info = model.encode(actions, is_pad)
        mean, log_var = latent_info.chunk(2, -1)
        chunk, pad_logit = model.decode(mean + (log_var / 2).exp() * noise[0])
        whole = model.encode(actions, torch.zeros_like(is_pad))
    total, l1, kl = model.losses(actions, is_pad, noise[0])
    total.backward()
    norms = norms_of(model)
    io = {
        "actions": actions,
        "is_pad": is_pad,
        "eps": noise,
        "latent_info": latent_info,
        "no_pad_latent_info": whole,
        "decode_a_hat": chunk,
        "decode_is_pad_hat": pad_logit,
        "loss_total": total,
        "loss_l1": l1,
        "loss_kl": kl,
        "grad.cls_embed.weight": model.cls_embed.weight.grad.clone(),
    }
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    rows = []
    for step in range(6):
        optimizer.zero_grad()
        losses = model.losses(actions, is_pad, noise[2 + step])
        losses[0].backward()
        optimizer.step()
        rows.append([v.item() for v in losses])
    entry = {
        "kind": "actionvae",
        "config": {
            "num_queries": 4,
            "state_dim": 5,
            "hidden_dim": 12,
            "dim_feedforward": 20,
            "backbone": "resnet18",
            "enc_layers": 1,
            "dec_layers": 2,
            "nheads": 3,
            "dropout": 0.1,
            "pre_norm": True,
        },
        "kl_weight": 0.01,
        "latent_dim": 3,
        "grad_norms": norms,
        "unused_parameters": [n for n, norm in norms.items() if norm is None],
        "train6": {
            "optimizer": "AdamW lr=1e-3 betas=(0.9,0.999) eps=1e-8 weight_decay=1e-4, no clip",
            "columns": ["total", "l1", "kl"],
            "rows": rows,
        },
    }
    folder.add("pre_norm", entry, weights, io)
