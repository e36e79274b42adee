"""`rynnvla imagine`: what it writes, what it refuses before any weight is read, and that its numbers are right."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ExifTags, Image
from skimage.metrics import structural_similarity

from rynnvla_jax import progress
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.cli import imagine as imagine_lib
from rynnvla_jax.cli import main as cli
from rynnvla_jax.inference import imagine
from rynnvla_jax.inference.image_metrics import psnr, ssim
from rynnvla_jax.report import imagine_quality
from rynnvla_jax.sequence import compose
from rynnvla_jax.vocabulary import TextTokenizer, train_tokenizer
from tests import tiny
from tests.report.test_report import CODES, make_config, save

TEXTS = ["Pick up the green block and place it on the white plate.", "Take the block off the plate."]
STATE = "1,2,3,4,5,6"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Work dirs with random weights: video (3 frames, one camera), robot (2 frames, two cameras, states)."""
    root = tmp_path_factory.mktemp("models")
    (root / "tokenizer.json").write_text(
        train_tokenizer(TEXTS, num_codes=CODES, num_text=20, max_edge=64), encoding="utf-8"
    )
    vocabulary = TextTokenizer(root / "tokenizer.json").vocabulary
    made = {name: save(root / name, make_config(name, tiny.SO100), ("loss",)) for name in ("vqgan", "action_vae")}
    for stage, source in (("video", tiny.EGODEX), ("robot", tiny.SO100)):
        made[stage] = save(root / stage, make_config(stage, source, vocabulary), ("loss",))
        assets = made[stage] / "assets"
        (assets / "tokenizer.json").write_text((root / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
        model_dir.copy_model(made["vqgan"], assets / "vqgan")
    statistics = {k: [0.0] * 6 for k in ("rel_min_action", "rel_mean_action", "mean_state")}
    statistics |= {k: [1.0] * 6 for k in ("rel_max_action", "rel_std_action", "std_state")}
    statistics |= {"unit": "lerobot:so100_follower", "absolute_columns": [5]}
    (made["robot"] / "assets" / "statistics.json").write_text(json.dumps(statistics), encoding="utf-8")
    return made


@pytest.fixture
def picture(tmp_path) -> Path:
    return paint(tmp_path / "front.png")


def paint(path: Path, size=(48, 48), seed=0) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((size[1], size[0])).save(path)
    return path


def run(*arguments) -> int:
    return cli.main(["imagine", *map(str, arguments)])


def test_a_video_plays_the_given_and_the_predicted_frames_at_the_datas_interval(
    models, picture, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "SHORT", 0.0)
    out = tmp_path / "new" / "o.mp4"
    assert run(models["video"], "--image", picture, "--text", TEXTS[0], "--fps", 10, "--out", out) == 0
    with av.open(str(out)) as video:
        assert video.streams.video[0].average_rate == 10
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 3 and frames[0].shape[1] == 192  # 32 pixels, enlarged
    said = capsys.readouterr()
    assert re.search(r"8 tokens in [\d.]+ s: \d+ tokens/s", said.out)  # 2 frames of 4 codes
    assert "1 x 2 frames of 32 x 32 pixels" in said.out and "parameters" in said.out and str(out) in said.out
    assert "8/8" in said.err  # the bar


def test_a_strip_has_a_row_a_sample_and_the_given_frame_first(models, picture, tmp_path):
    wrist, out = paint(tmp_path / "wrist.png", seed=1), tmp_path / "o.png"
    given = [models["robot"], "--image", picture, "--wrist", wrist, "--state", STATE, "--text", TEXTS[1]]
    sampled = [*given, "--samples", 3, "--top-k", 20, "--out", out]
    pictures = []
    for seed in (5, 5, 6):
        assert run(*sampled, "--seed", seed) == 0
        pictures.append(np.asarray(Image.open(out)))
    assert pictures[0].shape == (3 * (2 * (192 + 18) + 18), 2 * 192, 3)
    shown = pictures[0][:192:6, :192:6]
    np.testing.assert_array_equal(shown, np.asarray(Image.open(picture).resize((32, 32), Image.Resampling.BICUBIC)))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()
    rows = np.split(pictures[0][:, 192:], 3)
    assert (rows[0][:192] != rows[1][:192]).any()


def test_pairs_decoded_together_are_those_decoded_alone(models, picture, tmp_path):
    images = [picture, paint(tmp_path / "other.png", seed=1)]
    common = [models["video"], "--out", tmp_path / "o.png"]
    pairs = [(f"--image={image}", f"--text={text}") for image, text in zip(images, TEXTS, strict=True)]
    assert run(*common, *pairs[0], *pairs[1]) == 0
    together = np.split(np.asarray(Image.open(tmp_path / "o.png")), 2)
    for image, text, expected in zip(images, TEXTS, together, strict=True):
        assert run(*common, "--image", image, "--text", text) == 0
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o.png"))[:192], expected[:192])


@pytest.mark.parametrize(
    ("stage", "arguments", "said"),
    [
        ("video", {"--image": "gone.png"}, "gone.png does not exist"),
        ("video", {"--image": "text.png"}, "is not a readable image"),
        ("video", {"--text": []}, "give --image FILE and --text"),
        ("video", {"--text": " "}, "instruction is empty"),
        ("video", {"--image": ["front.png", "wide.png"]}, "the same size"),
        ("video", {"--text": ["a", "b"], "--image": ["front.png"] * 3}, "--text is given 2 times for 3 pairs"),
        ("video", {"--wrist": "front.png"}, "leave --wrist out"),
        ("video", {"--state": STATE}, "leave --state out"),
        ("video", {"--out": "o.gif"}, "give a video"),
        ("video", {"--frames": 0}, "--frames is the number of future frames; it must be at least 1"),
        ("video", {"--frames": 99}, r"trained on sequences of 256 tokens.* --frames \d+ at most"),
        ("video", {"--samples": 2, "--temperature": 0}, "all be identical"),
        ("video", {"--top-k": 2, "--temperature": 0}, "temperature 0 takes the most likely"),
        ("video", {"--temperature": "nan"}, "temperature nan"),
        ("video", {"--fps": "nan"}, "--fps must be between"),
        ("video", {"--fps": 0.0001}, "--fps must be between"),
        ("video", {"--seed": 10**20}, "--seed 1000.* must be between"),
        ("video", {"--source": tiny.EGODEX}, "leave out --image"),
        ("robot", {}, "trained with a wrist camera; give its image with --wrist"),
        (
            "robot",
            {"--wrist": "front.png"},
            r"give --state as 6 comma-separated numbers \(lerobot:so100_follower: 0, 1, ",
        ),
        ("robot", {"--wrist": "front.png", "--state": "1,2"}, r"\[6\], or \[2, 6\]"),
        ("robot", {"--wrist": "front.png", "--state": "left"}, "neither comma-separated numbers"),
        ("robot", {"--wrist": "front.png", "--state": "text.npy"}, "neither comma-separated numbers"),
        ("robot", {"--wrist": "front.png", "--state": "empty.npy"}, "neither comma-separated numbers"),
        ("action_vae", {}, "kind 'action_vae', not 'vla'; pass a work dir of stage video"),
        ("vqgan", {}, "kind 'vqgan', not 'vla'; pass a work dir of stage video"),
        ("nothing", {}, "is not a model directory.*pass a work dir of stage video"),
    ],
)
def test_what_is_wrong_is_said_before_weights_are_read(
    stage, arguments, said, models, picture, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(imagine, "load", lambda model: pytest.fail("weights were read"))
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "wide.png", (48, 96))
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    np.save(tmp_path / "text.npy", np.array(["a"] * 6))
    (tmp_path / "empty.npy").touch()
    (tmp_path / "nothing").mkdir()
    arguments = {"--image": picture, "--text": TEXTS[0], "--out": "o.mp4", **arguments}
    flat = []
    for flag, values in arguments.items():
        for value in values if isinstance(values, list) else [values]:
            flat += [flag, value]
    status = run(models.get(stage, tmp_path / "nothing"), *flat)
    error = capsys.readouterr().err.strip()
    assert status == 1 and error.count("\n") == 0 and re.search(said, error), error
    assert not (tmp_path / "o.mp4").exists()


def test_pictures_are_turned_as_viewers_show_them(tmp_path):
    upright = np.asarray(Image.open(paint(tmp_path / "a.png", (32, 48))))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "b.png", exif=exif)
    np.testing.assert_array_equal(imagine_lib._picture(tmp_path / "b.png"), upright)


@pytest.mark.parametrize(("name", "said"), [("vqgan", "import the model again"), ("decoder", "no decoder")])
def test_a_model_without_a_painter_is_refused(name, said, models, picture, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(models["video"], model)
    vqgan = model / "assets" / "vqgan"
    if name == "decoder":
        params, _ = model_dir.load_params(vqgan)
        config = model_dir.read_model_config(vqgan, "vqgan")
        kept = {k: v for k, v in params.items() if k in ("encoder", "quant_conv", "codebook")}
        shutil.rmtree(vqgan)
        model_dir.save_model(vqgan, "vqgan", config, kept)
    else:
        shutil.rmtree(vqgan)
    assert run(model, "--image", picture, "--text", "a", "--out", tmp_path / "o.png") == 1
    assert said in capsys.readouterr().err


def test_an_imported_model_takes_the_default_layout(models, tmp_path):
    shutil.copytree(models["robot"], tmp_path / "model")
    (tmp_path / "model" / "assets" / "config.json").unlink()
    model = imagine.find(tmp_path / "model")
    assert model.imported and model.config.stage == "robot" and model.views == ("front", "wrist")
    assert model.config.vla == imagine.find(models["robot"]).config.vla
    assert model.config.sequence.num_frames == 4


def test_frames_that_fit_are_those_that_the_sequence_has_room_for(models):
    model = imagine.find(models["robot"])
    most = model.most_frames(TEXTS, (32, 32))
    text = model.tokenizer.encode(TEXTS[0])
    assert len(text) > len(model.tokenizer.encode(TEXTS[1]))

    def tokens(frames: int) -> int:
        config = dataclasses.replace(model.config.sequence, num_frames=frames)
        codes = np.zeros((frames, 2, 2), int)
        return len(compose(text, {"front": codes, "wrist": codes}, model.tokenizer.vocabulary, config).tokens)

    assert tokens(most) <= model.config.sequence.length < tokens(most + 1)


def test_predicted_frames_are_read_from_the_right_places(models, monkeypatch):
    """A model that predicts every token right gives back the real codes of both cameras; it is shown none of them."""
    model, count, T = imagine.find(models["robot"]), 5, 3
    codes = {v: np.random.default_rng(i).integers(0, CODES, (count, T, 2, 2)) for i, v in enumerate(model.views)}
    texts = [TEXTS[i % 2] for i in range(count)]
    sequence, vocabulary = dataclasses.replace(model.config.sequence, num_frames=T), model.tokenizer.vocabulary
    real = [
        compose(model.tokenizer.encode(t), {v: own[i] for v, own in codes.items()}, vocabulary, sequence).tokens
        for i, t in enumerate(texts)
    ]
    seen = {}

    def perfect(graphdef, params, tokens, predict, start, *, state, **_):
        seen.update(tokens=tokens, predict=predict, state=state)
        assert not predict[:, :start].any() and predict[:, start].any()
        return np.where(predict, [np.pad(row, (0, 64))[: tokens.shape[1]] for row in real], tokens)

    monkeypatch.setattr(imagine, "generate", perfect)
    layout = imagine.lay_out(model, texts, {v: c[:, 0] for v, c in codes.items()}, T)
    states = np.random.default_rng(9).normal(size=(count, T, 6))
    predicted = imagine.Imagination(model, None, {}, None).predict(layout, states)
    for view in codes:
        np.testing.assert_array_equal(predicted[view], codes[view])
    assert (seen["predict"].sum(axis=1) == 2 * (T - 1) * 4).all()
    assert (seen["tokens"][seen["predict"]] == 0).all()
    np.testing.assert_allclose(seen["state"], states, rtol=1e-6)


@pytest.mark.parametrize("kind", ["perfect", "copying"])
def test_numbers_of_a_perfect_and_of_a_copying_model(kind, models, tmp_path, monkeypatch, capsys):
    recorded = []

    def record(*arguments):
        recorded.append(original(*arguments))
        return recorded[0]

    def predict(self, layout, states, *, progress, **_):
        progress(0)
        progress(int(layout.predict.sum()))
        rows = slice(*((0, 4) if len(done) == 0 else (4, 8)))
        done.append(len(layout.tokens))
        codes = {v: np.resize(c[rows], (4, *c.shape[1:])) for v, c in recorded[0].codes.items()}
        return codes if kind == "perfect" else {v: c[:, :1].repeat(c.shape[1], axis=1) for v, c in codes.items()}

    done, original = [], imagine_quality.record
    monkeypatch.setattr(imagine_quality, "record", record)
    monkeypatch.setattr(imagine.Imagination, "predict", predict)
    out = tmp_path / "page.html"
    arguments = ["--source", tiny.SO100, "--examples", 6, "--batch", 4, "--frames", 2, "--out", out]
    assert run(models["robot"], *arguments) == 0
    assert done == [4, 4]  # one shape: the second batch is filled up
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(x["view"], x["frame"]) for x in lines] == [("front", 1), ("front", 2), ("wrist", 1), ("wrist", 2)]
    assert [x["seconds"] for x in lines] == [0.0333, 0.0667] * 2
    same, other = ("vqgan", "copy") if kind == "perfect" else ("copy", "vqgan")
    for line in lines:
        assert line["examples"] == 6 and line["codes_right"]["vqgan"] == 1.0
        assert line["codes_right"]["predicted"] == line["codes_right"][same]
        for name in ("psnr", "ssim"):  # XLA's rounding depends on the CPU, and on a frame's place in a batch
            assert line[name]["predicted"] == pytest.approx(line[name][same], rel=1e-4)
    assert any(line["codes_right"]["predicted"] != line["codes_right"][other] for line in lines)
    real, codec = recorded[0].frames["wrist"][:, 2], imagine.load(imagine.find(models["robot"])).codec
    assert lines[3]["psnr"]["vqgan"] == pytest.approx(psnr(real, codec.decode(codec.encode(real))))
    assert re.search(r"wrist +67 ms", capsys.readouterr().out)
    page = out.read_text(encoding="utf-8")
    assert page.count("data:image/png") == 6 * 2 * (4 * 3 - 1) and "the recorded state" in page


def test_recordings_that_are_too_short_are_named(models, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(models["video"], model)
    config = json.loads((model / "assets" / "config.json").read_text(encoding="utf-8"))
    config["sequence"] |= {"frame_interval": 100}
    (model / "assets" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run(model, "--source", tiny.EGODEX, "--frames", 1, "--out", tmp_path / "o.jsonl") == 1
    assert "long enough" in capsys.readouterr().err


@pytest.mark.parametrize("size", [(32, 64), (33, 40)])
def test_ssim_is_that_of_scikit_image(size):
    draw = np.random.default_rng(0)
    real = np.repeat(draw.integers(0, 256, (3, *size, 1)), 3, axis=3).astype(np.uint8)
    other = np.clip(real + draw.normal(scale=30, size=real.shape), 0, 255).astype(np.uint8)
    expected = [
        structural_similarity(
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(real, other, strict=True)
    ]
    assert ssim(real, other) == pytest.approx(np.mean(expected), abs=1e-7)
    assert ssim(real, real) == pytest.approx(1.0)


def test_psnr_of_a_known_difference():
    real = np.full((2, 8, 8, 3), 100, np.uint8)
    assert psnr(real, real + 10) == pytest.approx(20 * np.log10(25.5))
