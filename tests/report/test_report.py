"""The report page: what is on it, that its numbers are right, and what it says when something is missing."""

import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from data_pipelines.episode import Episodes
from data_pipelines.loader import Loader
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import (
    ActionVAEConfig,
    DataConfig,
    ImageConfig,
    SequenceConfig,
    TrainConfig,
    TransformerConfig,
    VLAConfig,
    VQGANConfig,
    to_dict,
)
from rynnvla_jax.models.params import split
from rynnvla_jax.report import examples
from rynnvla_jax.report import figures as figures_lib
from rynnvla_jax.report import page as page_lib
from rynnvla_jax.stage import STAGES
from rynnvla_jax.train.stages import OBJECTIVES
from rynnvla_jax.vocabulary import TextTokenizer, train_tokenizer
from tests import ROOT
from tests.data_pipelines.test_loader import make_episodes

DEMO = ROOT / "data_pipelines" / "demo"
CODES, CHUNK = 32, 4
VQGAN = VQGANConfig(
    channels=32, multipliers=(1, 1, 1, 1, 1), num_res_blocks=1, z_channels=4, code_width=4, num_codes=CODES
)
VAE = ActionVAEConfig(chunk=CHUNK, width=16, feed_forward=16, num_heads=2, encoder_layers=1, decoder_layers=1, latent=4)


def make_config(stage: str, source: str, vocabulary=None) -> TrainConfig:
    wrist, acts = source.startswith("lerobot"), stage in ("trajectory", "robot")
    transformer = TransformerConfig(width=32, num_layers=1, num_heads=2, num_kv_heads=2, feed_forward=32)
    if vocabulary:
        transformer = dataclasses.replace(transformer, vocab_size=vocabulary.size, image_tokens=vocabulary.image_tokens)
    return TrainConfig(
        stage=stage,
        total_steps=20,
        batch_size=2,
        compute_dtype="float32",
        remat="full",
        vla=VLAConfig(transformer=transformer, state_dim=6 if acts else 0),
        action_vae_model=VAE,
        vqgan_model=VQGAN,
        sequence=SequenceConfig(length=256, num_frames=2 if acts else 3, use_wrist_frame=wrist),
        data=DataConfig(source=source, chunk=CHUNK, image=ImageConfig(shortest_edge=32)),
    )


def log(directory: Path, names: tuple[str, ...], steps: int = 20) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in (
        ("metrics.jsonl", {n: 0.0 for n in names}),
        ("timing.jsonl", {"steps_per_second": 2.0, "data_wait_share": 0.25}),
    ):
        lines = [
            {"step": s, **{k: v or 1.0 / s for k, v in values.items()}} for s in range(10, steps + 1, 10)
        ]  # fmt: skip
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def save(directory: Path, config: TrainConfig, names: tuple[str, ...]) -> Path:
    """A work dir with random weights, as training leaves it."""
    stage = STAGES[config.stage]
    shapes = split(nnx.eval_shape(lambda: OBJECTIVES[config.stage].build(config, nnx.Rngs(0))))[1]
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    model_dir.save_model(directory, stage.model, stage.model_config(config), params, step=20)
    (directory / "assets" / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    log(directory, names)
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    so100, egodex = f"lerobot:{DEMO / 'so100'}", f"egodex:{DEMO / 'egodex'}"
    texts = ["Pick up the green block and place it on the white plate.", "Take the block off the plate."]
    (root / "tokenizer.json").write_text(
        train_tokenizer(texts, num_codes=CODES, num_text=20, max_edge=64), encoding="utf-8"
    )
    vocabulary = TextTokenizer(root / "tokenizer.json").vocabulary
    made = {
        "vq": save(root / "vq", make_config("vqgan", so100), ("loss", "reconstruction", "perplexity")),
        "vae": save(root / "vae", make_config("action_vae", so100), ("loss", "l1", "kl")),
    }
    for name, stage, source in (("video", "video", egodex), ("robot", "robot", so100)):
        config = make_config(stage, source, vocabulary)
        made[name] = save(root / name, config, ("loss", "cross_entropy", "token_accuracy", "learning_rate"))
        assets = made[name] / "assets"
        (assets / "tokenizer.json").write_text((root / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
        model_dir.copy_model(made["vq"], assets / "vqgan")
        if stage == "robot":
            model_dir.copy_model(made["vae"], assets / "action_vae")
            examples.open_loader(made[name], config).statistics.to_json(assets / "statistics.json")
    return made


@pytest.fixture(scope="module")
def page(runs) -> str:
    out = runs["vq"].parent / "new" / "page.html"
    order = [runs[name] for name in ("robot", "video", "vae", "vq")]
    assert page_lib.write_report(order, out, title="Tiny <models>", notes=[("wall time", "12 s & more")]) == out
    return out.read_text(encoding="utf-8")


def section(page: str, number: int) -> str:
    return page.split(f'<section id="stage-{number}">')[1].split("</section>")[0]


def images(html: str, kind: str) -> list[bytes]:
    return [base64.b64decode(x) for x in re.findall(rf'src="data:image/{kind};base64,([^"]+)"', html)]


def test_stages_stand_in_curriculum_order_with_links_to_them(page):
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "1. Image tokenizer (VQGAN)",
        "2. Action tokenizer (ActionVAE), robot",
        "3. Stage 1: video",
        "4. Stage 3: robot",
    ]
    assert [f'href="#stage-{i}"' in page for i in range(1, 5)] == [True] * 4


def test_the_page_needs_nothing_from_outside(page):
    assert all(address.startswith("data:image/") for address in re.findall(r'src="([^"]*)"', page))
    assert "<script" not in page and "<link" not in page and "url(" not in page and "http" not in page


def test_title_and_notes_are_shown_and_escaped(page):
    assert "<h1>Tiny &lt;models&gt;</h1>" in page
    assert "<td>wall time</td><td>12 s &amp; more</td>" in page


def test_pictures_of_every_stage_are_there(page):
    counts = [(len(images(section(page, i), "png")), len(images(section(page, i), r"svg\+xml"))) for i in range(1, 5)]
    #    VQGAN: 2 cameras x 4 x (real, rebuilt)      video: 4 x (3 + 3 + 2)      robot: 4 x 2 cameras x (2 + 2 + 1)
    assert counts == [(16, 1), (0, 2), (32, 1), (40, 2)]
    assert Image.open(io.BytesIO(images(page, "png")[0])).size == (32, 32)


def test_facts_and_logged_numbers_are_there(page):
    robot = section(page, 4)
    assert "6 episodes, 1853 frames" in robot and "shoulder pan" in robot and "-100..100" in robot
    assert "20 of 20 steps of 2 examples" in robot
    assert "2 steps/s, 25.0% of the time waiting for data; 10 s in total, including compilation" in robot
    accuracy = r'token accuracy, teacher forced</td><td class="n">10.0%</td><td class="n">5.0%</td>'
    assert re.search(accuracy, robot) and "10.0% at step 10" in robot
    assert "not finished" not in page


def test_real_frames_come_first_and_are_the_recording(page, runs):
    loader = examples.open_loader(runs["vq"], make_config("vqgan", f"lerobot:{DEMO / 'so100'}"))
    episode, start = examples.spread(loader.sources, 1, examples.VQ_EXAMPLES)[0]
    expected = examples._frames(episode, "front", [start], loader.config)[0]
    shown = np.asarray(Image.open(io.BytesIO(images(section(page, 1), "png")[0])))
    np.testing.assert_array_equal(shown, expected)


def test_examples_are_fixed_and_fit_their_episodes(runs):
    episodes = [Episodes.of(make_episodes(lengths), "painted:x") for lengths in ((50, 3), (9, 200))]
    windows = examples.spread(episodes, 9, 12)
    assert all(0 <= start <= len(e) - 9 for e, start in windows)
    assert {len(e) for e, _ in windows} == {50, 9, 200}
    assert [s for _, s in windows] == [s for _, s in examples.spread(episodes, 9, 12)]


@pytest.mark.parametrize("source", ["so100", "egodex"])
def test_action_errors_are_those_of_the_recording(source, monkeypatch):
    """A VAE that gives back what it gets has no error; holding still has the recording's own displacement."""
    kind = "lerobot" if source == "so100" else "egodex"
    config = make_config("action_vae", f"{kind}:{DEMO / source}")
    loader = Loader(config, progress=False)
    monkeypatch.setattr(examples, "_rebuild", lambda graphdef, params, actions: actions)
    evidence = examples._action_vae(Path(), config, loader, {})
    rebuilt, still = evidence.errors[-1][1]
    windows = examples.spread(loader.sources, CHUNK, examples.VAE_EXAMPLES)
    true = []
    for episode, start in windows:
        rows = slice(start, start + CHUNK)
        if source == "so100":
            true.append(episode.action[rows] - episode.state[start])
        else:
            moved = (episode.action[rows] - episode.origin[start]).reshape(CHUNK, 2, 3)
            true.append((moved @ episode.world_to_camera[start].T).reshape(CHUNK, 6))
    assert rebuilt < 1e-4
    assert still == pytest.approx(np.abs(true).mean(), rel=1e-4)
    assert evidence.unit == ("-100..100 and 0..100" if source == "so100" else "metres")


def test_a_collapsed_codebook_is_pointed_out():
    assert "a single code of 256" in examples._collapse({7}, 256)[0]
    assert examples._collapse(set(range(100)), 256) == []


def test_curves_choose_their_scale(monkeypatch):
    figures = []
    monkeypatch.setattr(figures_lib, "svg", lambda figure: figures.append(figure) or "")
    metrics = [
        {"step": s, "loss": 100.0 / s, "token_accuracy": 0.01 * s, "learning_rate": 1e-9 * s, "news": 1.0 + s / 99}
        for s in range(1, 80)
    ]
    figures_lib.curves(metrics)
    scales = {axes.get_title(loc="left"): axes.get_yscale() for axes in figures[0].axes}
    assert scales == {"Loss": "log", "Token accuracy": "linear", "news": "linear", "Learning rate": "linear"}


def test_values_of_held_out_data_lie_over_those_of_training(monkeypatch):
    figures = []
    monkeypatch.setattr(figures_lib, "svg", lambda figure: figures.append(figure) or "")
    errors = {"action_error": 1.0, "hold_still_error": 3.0, "repeat_motion_error": 2.0, "action_error/pan": 1.0}
    held_out = [{"step": s, "cross_entropy": 3.0 / s, **errors} for s in (2, 4)]
    figures_lib.curves([{"step": s, "loss": 2.0, "cross_entropy": 1.0 / s} for s in range(1, 5)], held_out)
    lines = {axes.get_title(loc="left"): [line.get_label() for line in axes.get_lines()] for axes in figures[0].axes}
    assert lines["Cross-entropy"][1:] == ["held out"] and len(lines["Loss"]) == 1
    assert lines["Action error, held out, data's units"] == ["the model", "holding still", "repeating the last motion"]
    rows = page_lib.held_out_rows(held_out)
    assert [row[0] for row in rows] == [
        "cross-entropy, held out",
        "action error in the data's units, held out",
        "action error of holding still, held out",
        "action error of repeating the last motion, held out",
    ]


def test_skips_are_shown_where_there_were_any():
    lines = [{"step": s, "loss": 1.0, "skipped": 0.0, "skipped_total": 0.0} for s in (1, 2)]
    assert figures_lib.parts(lines) == ["loss"]
    lines[1]["skipped_total"] = 1.0  # the update between the logged ones
    assert figures_lib.parts(lines) == ["loss", "skipped", "skipped_total"]
    assert [row[:3] for row in page_lib.metric_rows(lines)][2] == ("skipped total", "0", "1")


def test_a_running_run_without_data_and_checkpoint_still_has_curves(tmp_path):
    directory = tmp_path / "running"
    (directory / "assets").mkdir(parents=True)
    config = make_config("video", "egodex:/gone/away")
    (directory / "assets" / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    log(directory, ("loss",), steps=10)
    with (directory / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 20, "lo')  # being written at this moment
    page = page_lib.write_report([directory], tmp_path / "page.html", title="Now").read_text(encoding="utf-8")
    assert "not finished: 10 of 20 steps" in page
    assert "No examples are shown" in page
    assert len(images(page, r"svg\+xml")) == 1 and not images(page, "png")


def test_gone_data_is_named_and_the_curves_remain(runs, tmp_path):
    config = make_config("vqgan", "lerobot:/gone/away")
    directory = save(tmp_path / "vq", config, ("loss", "codebook"))
    page = page_lib.write_report([directory], tmp_path / "page.html", title="Later").read_text(encoding="utf-8")
    assert "/gone/away does not exist" in page
    assert len(images(page, r"svg\+xml")) == 1 and "M parameters" in page


def test_a_tokenized_corpus_has_no_camera_and_may_be_mixed_with_one(runs, tmp_path, capsys):
    """What is decoded from a corpus's codes is called so, and is not compared with itself."""
    egodex = f"egodex:{DEMO / 'egodex'}"
    words = ["data", "tokenize", "--source", egodex, "--vqgan", str(runs["vq"]), "--out", str(tmp_path / "corpus")]
    assert cli.main([*words, "--stride", "2", "--config.data.image.shortest_edge=32"]) == 0
    corpus, alone = f"records:{tmp_path / 'corpus'}", make_config("video", egodex)
    data = dataclasses.replace(alone.data, source="", frame_codes="ahead")
    mixed = dataclasses.replace(alone, data=dataclasses.replace(data, mixture=((corpus, 0.5), (egodex, 0.5))))
    tokenized = dataclasses.replace(alone, data=dataclasses.replace(data, source=corpus))
    evidence = {}
    for name, config in (("mixed", mixed), ("tokenized", tokenized)):
        loader = examples.open_loader(runs["video"], config)
        evidence[name] = examples.evaluate(runs["video"], config, loader)
    rows = [[row for row, _ in table.rows] for table in evidence["tokenized"].tables]
    assert rows == [["decoded codes of the corpus", "predicted"]] * 4
    numbers = dict(evidence["tokenized"].numbers)
    assert "PSNR of predicted frames, compared with the corpus's decoded codes" in numbers
    assert not any("upper bound" in name for name in numbers)
    rows = [[row for row, _ in table.rows] for table in evidence["mixed"].tables]
    assert sorted(map(len, rows)) == [2, 2, 3, 3] and ["camera", "VQ codes (upper bound)", "predicted"] in rows
    ceiling = float(dict(evidence["mixed"].numbers)["PSNR of the VQ reconstruction (upper bound)"].split()[0])
    assert ceiling < 30  # of the camera's frames; codes that are decoded twice give 78
    # Every second frame is in the corpus, so its examples last twice as long.
    spans = {table.columns[-1] for table in evidence["mixed"].tables}
    assert len(spans) == 2 and {table.columns[-1] for table in evidence["tokenized"].tables} < spans

    words = ["imagine", str(runs["video"]), "--source", corpus, "--examples", "2", "--out", str(tmp_path / "page.html")]
    assert cli.main(words) == 0
    assert "has no camera frames: PSNR and SSIM compare with its decoded codes" in capsys.readouterr().out
    assert "those of vqgan mean nothing" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["missing", "foreign", "damaged"])
def test_other_directories_are_one_clear_line(kind, tmp_path, capsys):
    directory = tmp_path / "run"
    if kind != "missing":
        (directory / "assets").mkdir(parents=True)
    if kind == "damaged":
        (directory / "assets" / "config.json").write_text('{"stage": "video", "totl_steps": 3}', encoding="utf-8")
    status = cli.main(["report", str(directory), "--out", str(tmp_path / "page.html")])
    error = capsys.readouterr().err.strip()
    assert status == 1 and error.count("\n") == 0 and str(directory) in error
    expected = {"missing": "is not a directory", "foreign": "assets/config.json is missing", "damaged": "total_steps"}
    assert expected[kind] in error
    assert not (tmp_path / "page.html").exists()


def test_help_says_what_it_makes(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", "--help"])
    assert stop.value.code == 0 and "self-contained HTML page" in capsys.readouterr().out
