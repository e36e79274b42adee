"""Exports and public weights on the Hugging Face Hub, against a Hub on 127.0.0.1: push, import, load, start from."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from rynnvla_jax.cli.main import main
from rynnvla_jax.config import InitFromConfig, TrainConfig
from rynnvla_jax.convert import model_card, starting_point
from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.export_format import ExportError
from rynnvla_jax.deploy.policy import Policy
from rynnvla_jax.storage import hub, hub_push
from rynnvla_jax.storage.hub import HubError
from tests import hub as hubs
from tests.exports import write_tiny

NAME = "hf://owner/policy"
KEY = "model", "owner/policy"


@pytest.fixture
def served(monkeypatch, tmp_path):
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "cache"))
    starting_point.model_dir.cache_clear()
    with hubs.running(monkeypatch, tmp_path / "home", "hf_owner") as found:
        yield found


@pytest.fixture
def export(tmp_path):
    write_tiny(tmp_path / "export")
    export_format.write_sums(tmp_path / "export")
    return tmp_path / "export"


def restarted():
    hub._commit.cache_clear()


def test_push_is_one_commit_and_the_same_bytes_are_none(served, export, capsys):
    assert main(["convert", "push", str(export), NAME, "--license", "apache-2.0"]) == 0
    repository = served.repositories[KEY]
    assert repository.private and len(repository.titles) == 2  # the Hub makes the first one
    newest = repository.commits[repository.refs["main"]]
    assert {name for name in newest if name != ".gitattributes"} == hubs.content(export).keys()
    assert f"pushed to {served.url}/owner/policy/commit/{repository.refs['main']}" in capsys.readouterr().out
    restarted()
    assert main(["convert", "push", str(export), NAME]) == 0
    assert len(repository.titles) == 2 and "there is no new commit" in capsys.readouterr().err
    policy, there = Policy.load(export), Policy.load(NAME)
    assert np.array_equal(policy.act(*policy.example()), there.act(*there.example()))
    card = newest["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert f'Policy.load("{NAME}"' in card


def test_what_an_earlier_export_left_is_deleted_and_other_files_stay(served, export):
    (export / "old.json").write_text("{}", encoding="utf-8")
    export_format.write_sums(export)
    hub_push.push(export, NAME)
    repository = served.repositories[KEY]
    served.add("owner/policy", {**repository.commits[repository.refs["main"]], "notes.txt": b"mine"})
    (export / "old.json").unlink()
    export_format.write_sums(export)
    restarted()
    hub_push.push(export, NAME, private=False)
    newest = repository.commits[repository.refs["main"]]
    assert "old.json" not in newest and newest["notes.txt"] == b"mine" and repository.private
    restarted()
    assert not (export_format.local(NAME) / "notes.txt").exists()  # it is no part of the export


def test_a_push_that_fails_says_how_to_go_on(served, export, capsys):
    served.refuse = "/commit/"
    assert main(["convert", "push", str(export), NAME]) == 1
    said = capsys.readouterr().err
    assert "the Hub answered 500" in said and f"push it again with: rynnvla convert push {export} {NAME}" in said
    assert len(served.repositories[KEY].titles) == 1
    served.refuse = ""
    assert main(["convert", "push", str(export), NAME, "--public"]) == 0
    assert len(served.repositories[KEY].titles) == 2


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("hf://owner/policy@v1", "hf_owner", "main branch of a whole repository"),
        ("hf://datasets/owner/policy", "hf_owner", "main branch of a whole repository"),
        ("hf://else/policy", "hf_owner", "you are logged in as owner, who may not write for else"),
        ("hf://owner/policy", "", "you are not logged in to the Hub; log in"),
        ("hf://owner/policy", "hf_wrong", "does not accept the token"),
        ("EXPORT", "hf_owner", "is not a name on the Hub"),
    ],
)
def test_pushes_that_are_refused_at_once(served, monkeypatch, tmp_path, capsys, name, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    assert main(["convert", "export", str(tmp_path / "absent"), str(tmp_path / "out"), "--push", name]) == 1
    assert said in capsys.readouterr().err and not served.repositories


def test_public_without_push(capsys, tmp_path):
    assert main(["convert", "export", str(tmp_path), str(tmp_path / "out"), "--public"]) == 2
    assert "--public and --license are for --push" in capsys.readouterr().err


def test_damaged_exports_are_not_pushed(served, export, capsys):
    (export / "statistics.json").write_text("{}", encoding="utf-8")
    assert main(["convert", "push", str(export), NAME]) == 1
    assert "is not the file that was exported" in capsys.readouterr().err and not served.repositories


def test_an_export_on_the_hub_starts_a_run_and_is_exported_again(served, export, tmp_path, capsys):
    served.add("owner/start", export)
    model, near = starting_point.model_dir("hf://owner/start"), starting_point.model_dir(str(export))
    assert "PyTorch weights are imported into" in capsys.readouterr().err
    for name in ("tokenizer.json", "statistics.json", "vqgan/assets/model.json", "action_vae/assets/statistics.json"):
        assert (model / "assets" / name).read_bytes() == (near / "assets" / name).read_bytes()
    starting_point.model_dir.cache_clear()  # as another process would begin
    assert starting_point.model_dir(str(export)) == near and not capsys.readouterr().err
    again = tmp_path / "again"
    assert main(["convert", "export", str(model), str(again), "--push", NAME, "--public"]) == 0
    old, new = load_file(export / export_format.WEIGHTS), load_file(again / export_format.WEIGHTS)
    assert not old.keys() ^ new.keys()
    for key in old:  # rows of a norm that are equal, as in this untrained model, are imported as one
        assert np.array_equal(old[key], np.broadcast_to(new[key], old[key].shape)), key
    repository = served.repositories[KEY]
    assert not repository.private
    assert repository.commits[repository.refs["main"]].keys() >= hubs.content(again).keys()


def test_import_of_a_repository_takes_one_set_of_weights(served, export, tmp_path):
    more = {"pytorch_model.bin": b"x" * 2000, "flax_model.msgpack": b"x", "images/cup.png": b"x"}
    commit = served.add("owner/policy", {**hubs.content(export), **more})
    assert main(["convert", "import", NAME, str(tmp_path / "model"), "--vqgan", f"{NAME}/vqgan"]) == 0
    root = hub.here(f"{NAME}@{commit}", choose=lambda names: [])
    assert not any((root / name).exists() for name in more)
    assert (tmp_path / "model" / "assets" / "vqgan" / "assets" / "model.json").exists()


def test_the_card_tells_data_config_and_metrics(export, tmp_path):
    lines = [{"step": 1, "eval/loss": 9.0}, {"step": 2, "eval/loss": 1.25}]
    (tmp_path / "eval.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    source = {"source": "lerobot:/home/me/so100", "episodes": 6, "steps": 1853, "rates": [30.0]}
    named = {"source": f"lerobot:hf://owner/set@{'0' * 40}", "episodes": 2, "steps": 10}
    attempt = {"packages": {}, "data": "", "sources": [source, named]}
    (export / "run.json").write_text(json.dumps({"attempts": [attempt]}), encoding="utf-8")
    config = TrainConfig(stage="robot", init_from=InitFromConfig(path="hf://owner/base@v1"))
    model_card.write(export, "mit", NAME, config, model_card.metrics_of(tmp_path, 2))
    card = (export / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "owner/base" and head["datasets"] == ["owner/set"] and head["license"] == "mit"
    assert "| eval/loss | 1.25 |" in card and "| `lerobot:.../so100` | 6 | 1,853 | 30 Hz |" in card
    assert "Stage robot, from owner/base: 1000 steps of 8 examples" in card and "/home/me" not in card
    assert model_card.metrics_of(tmp_path, 3) is None


def test_a_repository_that_is_no_export(served):
    served.add("owner/policy", {"README.md": b"x"})
    with pytest.raises(ExportError, match="so it is no export"):
        Policy.load(NAME)
    with pytest.raises(HubError, match="no such model"):
        Policy.load("hf://owner/none")


def test_a_card_that_was_changed_is_kept(export):
    (export / "README.md").write_text("mine", encoding="utf-8")
    model_card.write(export, "mit", NAME)
    assert (export / "README.md").read_text(encoding="utf-8") == "mine"
