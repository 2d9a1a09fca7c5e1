"""What commands answer, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.cards import ROOMS, cards
from lorabake.base.units import size
from lorabake.recipe.explain import explain
from lorabake.recipe.sections import PARTS, SECTIONS

SETTINGS = sorted({entry["name"] for section in [*SECTIONS, *PARTS] for entry in explain(section)})
SMALL = ["--set", "adapter.rank=1", "--set", "train.length=3 steps", "--set", "train.device=cpu"]


def test_list_names_every_part(lorabake: Any) -> None:
    said = lorabake("list")
    assert said.code == 0 and said.err == ""
    for kind in ROOMS:
        for name, card in cards(kind).items():
            assert any(
                line.split() and line.split()[0] == name and card.summary in line for line in said.out.splitlines()
            ), name


@pytest.mark.parametrize("kind", ROOMS)
def test_list_of_one_kind(lorabake: Any, kind: str) -> None:
    said = lorabake("list", kind, "--json")
    (found,) = said.json.values()
    assert said.code == 0 and found == {name: card.summary for name, card in cards(kind).items()}
    assert lorabake("list", next(iter(said.json))).code == 0


def test_list_of_everything_for_programs(lorabake: Any) -> None:
    found = lorabake("list", "--json").json
    assert len(found) == len(ROOMS) and found["adapters"]["lora"]


def test_list_of_what_is_no_kind(lorabake: Any) -> None:
    said = lorabake("list", "optimisers")
    assert said.code == 2 and "Did you mean 'optimizers'?" in said.err


def test_explain_of_every_setting(lorabake: Any) -> None:
    for name in SETTINGS:
        said = lorabake("explain", name)
        assert said.code == 0 and said.out.startswith(name) and said.err == "", name
        assert lorabake("explain", name, "--json").json == explain(name)


@pytest.mark.parametrize("name", [*SECTIONS, *PARTS])
def test_explain_of_every_section(lorabake: Any, name: str) -> None:
    said = lorabake("explain", name)
    assert said.code == 0 and all(setting in said.out for setting in SETTINGS if setting.startswith(f"{name}."))


def test_explain_of_what_is_not_there(lorabake: Any) -> None:
    said = lorabake("explain", "adapter.rnak")
    assert said.code == 2 and "Did you mean 'adapter.rank'?" in said.err


def test_validate_says_what_would_be_done(lorabake: Any, dataset: Path, everything: Any) -> None:
    before = everything()
    said = lorabake("validate", "mira", "--set", "train.length=4 epochs", "--set", "train.batch_size=2")
    assert said.code == 0
    assert "mira is fine." in said.out and "4 epochs = 8 optimizer steps of 2 × 1, 12 images seen" in said.out
    assert "optimizer.lr because pocket is small" in said.out
    assert "the base's weights take " in said.out and "; with model.quantize int8 " in said.out
    assert everything() == before


def test_validate_says_what_fewer_bits_save(lorabake: Any, dataset: Path) -> None:
    words = ["--set", "train.device=cpu", "--set", "train.precision=bf16"]
    memory = lorabake("validate", "mira", "--json", *words).json["base_memory"]
    assert (memory["precision"], memory["quantize"], set(memory["quantized"])) == ("bf16", None, {"int8", "fp8", "nf4"})
    assert memory["bytes"] == sum(memory["networks"].values())
    nf4, int8 = (memory["quantized"][kind]["networks"] for kind in ("nf4", "int8"))
    assert (
        nf4["denoiser"] < int8["denoiser"] < memory["networks"]["denoiser"] and nf4["vae"] == memory["networks"]["vae"]
    )
    said = lorabake("validate", "mira", "--set", "model.quantize=nf4", *words).out
    assert f"{size(memory['quantized']['nf4']['bytes'])} with model.quantize = nf4, which saves " in said


def test_validate_for_programs(lorabake: Any, dataset: Path) -> None:
    found = lorabake("validate", "mira", "--json", "--set", "train.length=4 epochs").json
    assert found["steps"] == 12 and found["steps_per_epoch"] == 3 and found["images_seen"] == 12
    assert found["recipe"]["data"]["folder"] == str(dataset) and found["reasons"]["optimizer.lr"]
    assert found["dataset"]["pictures"] == 3 and found["warnings"] == []


def test_what_is_probably_not_meant_is_told(lorabake: Any, dataset: Path) -> None:
    (dataset / "000.txt").unlink()
    said = lorabake("validate", "mira")
    assert said.code == 0 and "note: 1 of 3 pictures have no caption file" in said.out


def test_train_for_programs_tells_every_event_as_json(lorabake: Any, dataset: Path) -> None:
    said = lorabake("train", "mira", "--json", *SMALL)
    assert said.code == 0, said.err
    told = [json.loads(line) for line in said.out.splitlines()]
    kinds = [event["kind"] for event in told]
    assert kinds[:5] == ["pictures", *["encoding"] * 3, "started"] and kinds[-1] == "finished"
    assert kinds.count("step") == 3
    assert said.err == ""
    logged = (dataset.parent / "runs" / "mira" / "events.jsonl").read_text().splitlines()
    events = [event for event in told if event["kind"] in ("step", "checkpoint", "picture_losses", "finished")]
    assert [json.loads(line) for line in logged] == [
        {**event, "crc32": line[-10:-2]} for event, line in zip(events, logged, strict=True)
    ]
    again = lorabake("train", "mira", "--json", *SMALL)
    assert [json.loads(line)["kind"] for line in again.out.splitlines()] == ["already_finished"]


def test_train_for_people_says_where_it_is(lorabake: Any, dataset: Path) -> None:
    said = lorabake("train", "mira", *SMALL)
    assert said.code == 0 and said.out == ""
    assert (
        "Done: 3 steps in" in said.err and str(Path("runs") / "mira" / "checkpoints" / "mira.safetensors") in said.err
    )


def test_version_and_help(lorabake: Any) -> None:
    import lorabake as package

    assert lorabake("--version").out.strip() == f"lorabake {package.__version__}"
    said = lorabake("--help")
    assert said.code == 0 and "usage: lorabake" in said.out


def test_a_finished_run_whose_files_were_moved_says_so(lorabake: Any, dataset: Path) -> None:
    words = ["train", "mira", *SMALL, "--set", "save.every=2 steps"]
    assert lorabake(*words).code == 0
    files = Path("runs") / "mira" / "checkpoints"
    assert {file.name for file in files.iterdir()} == {"mira-step00000002.safetensors", "mira.safetensors"}
    for file in ("mira.safetensors", "mira-step00000002.safetensors"):
        (files / file).unlink()
        said = lorabake(*words)
        assert said.code == 0 and f"{files / 'mira.safetensors'} is not there any more" in said.err
        assert "--into another folder" in said.err and "Traceback" not in said.err and "Done" not in said.err
    said = lorabake("grid", "runs/mira", "--prompt", "a girl")
    assert said.code == 2 and "moved or deleted" in said.err


def test_a_date_in_a_recipe_can_be_queued(lorabake: Any, dataset: Path) -> None:
    Path("recipe.toml").write_text('[data]\nfolder = "mira"\n[output]\ncomment = 2026-01-01\n')
    assert lorabake("queue", "add", "recipe.toml", "--queue", "queue", "--set", "output.trigger=2026-01-02").code == 0
    (job,) = Path("queue", "jobs").iterdir()
    assert json.loads(job.read_text())["recipe"]["output"] == {"comment": "2026-01-01", "trigger": "2026-01-02"}


def test_where_a_queued_job_goes(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    add = ("queue", "add", "mira", "--queue", "queue", "--json")
    assert lorabake(*add).json["into"] == str(tmp_path / "runs" / "mira")
    again = lorabake(*add, "--into", "runs/mira")
    assert "job 1 goes into" in again.err


def test_help_says_who_is_asked(lorabake: Any) -> None:
    for words in (["train"], ["queue", "add"]):
        said = lorabake(*words, "--help")
        assert "`train` asks, where there is somebody to ask, and a job of the queue fails" in said.out
