"""Limits on norms and running averages in whole runs: they are told, saved, resumed, and cost nothing when they are off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorabake.base.errors import Problems
from lorabake.base.events import Events
from lorabake.base.runs import Run
from lorabake.recipe import check_values
from lorabake.train.run import train


def values(dataset: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    raw: dict[str, dict[str, Any]] = {}
    given = {"model__base": str(dataset.with_name("base")),
             "data__folder": str(dataset), "adapter__rank": 2, "train__batch_size": 2, "train__device": "cpu", "output__name": "mira",
             "train__length": "6 steps", "save__every": "2 steps", "optimizer__lr": 0.02, "optimizer__text_encoder_lr": 0.01}  # fmt: skip
    for name, value in {**given, **settings}.items():
        section, _, key = name.partition("__")
        raw.setdefault(section, {})[key] = value
    return raw


def trained(dataset: Path, into: Path, **settings: Any) -> Path:
    """The run folder of a whole run."""
    train(check_values(values(dataset, **settings)), into, Events())
    return into


def steps(folder: Path) -> list[dict[str, Any]]:
    told = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in told if event["kind"] == "step"]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def plain(drawings: list, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset, and a run on it without any of this."""
    from lorabake.sampling.infotext import save_png

    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(tiny, folder / "base")
    for index, (image, caption) in enumerate(drawings):
        path = folder / "mira" / "1_mira" / f"{index:03d}.png"
        save_png(image, path)
        path.with_suffix(".txt").write_text(caption)
    return folder / "mira", trained(folder / "mira", folder / "run")


def test_averages_are_files_beside_and_change_nothing(plain: tuple[Path, Path], tmp_path: Path) -> None:
    dataset, before = plain
    run = trained(dataset, tmp_path / "run", train__ema=[0.5, 0.99])
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    stems = ("mira-000001", "mira-step00000002", "mira-step00000004", "mira")
    made = [stem for stem in stems if f"{stem}.safetensors" in names]
    assert len(made) == 3
    assert names == sorted(f"{stem}{end}.safetensors" for stem in made for end in ("", "-ema0.5", "-ema0.99"))
    final = Path("checkpoints", "mira.safetensors")
    assert (run / final).read_bytes() == (before / final).read_bytes()
    assert steps(run) == steps(before)
    assert [path.name for path in Run(run).checkpoint_paths()][-3:] == [
        "mira-ema0.5.safetensors", "mira-ema0.99.safetensors", "mira.safetensors",
    ]  # fmt: skip
    average, last = load_file(run / "checkpoints" / "mira-ema0.99.safetensors"), load_file(run / final)
    assert average.keys() == last.keys()
    ups = [name for name in last if name.endswith("lora_up.weight")]
    assert sum(float(average[name].float().norm()) for name in ups) < sum(
        float(last[name].float().norm()) for name in ups
    )
    assert metadata(run / "checkpoints" / "mira-ema0.99.safetensors")["ss_ema_decay"] == "0.99"
    assert "ss_ema_decay" not in metadata(run / final)


@pytest.mark.parametrize(
    "settings",
    [
        {"train__ema": [0.5, 0.99]},
        {"train__max_weight_norm": 0.05, "train__ema": [0.9], "optimizer__lora_plus_ratio": 2.0, "adapter__conv_rank": 1,
         "adapter__block_rank": {"mid_block": 4, "attn1": 0}, "adapter__rank_stabilized": True},
        {"adapter__name": "full", "train__ema": [0.9], "train__length": "3 steps", "save__every": "1 steps"},
    ],
    ids=["averages", "everything", "a whole model"],
)  # fmt: skip
def test_stopped_and_continued(plain: tuple[Path, Path], tmp_path: Path, result: Any, settings: dict[str, Any]) -> None:
    dataset, _ = plain
    given = dict(settings)
    if given.get("adapter__name") == "full":
        given["adapter__rank"] = None
        raw = values(dataset, **given)
        del raw["adapter"]["rank"]
    else:
        raw = values(dataset, **given)
    train(check_values(raw), tmp_path / "whole", Events())
    seen: list[Any] = []
    stopped = train(
        check_values(raw), tmp_path / "cut", Events(seen.append), lambda: sum(e["kind"] == "step" for e in seen) == 2
    )
    assert stopped.steps == 2
    train(check_values(raw), tmp_path / "cut", Events())
    assert result(tmp_path / "cut").differences(result(tmp_path / "whole")) == []


def test_norms_are_kept_and_told(plain: tuple[Path, Path], tmp_path: Path) -> None:
    dataset, before = plain
    run = trained(dataset, tmp_path / "run", train__max_weight_norm=0.05)
    told = steps(run)
    assert all(event["norm_mean"] <= event["norm_max"] <= 0.05 * 1.001 for event in told)
    assert told[0]["norms_scaled"] <= told[-1]["norms_scaled"] and told[-1]["norms_scaled"] > 0
    assert "norms_scaled" not in steps(before)[0]
    path = run / "checkpoints" / "mira.safetensors"
    assert metadata(path)["ss_scale_weight_norms"] == "0.05"
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith("lora_up.weight")]:
        down = tensors[name.replace("lora_up", "lora_down")].float().flatten(1)
        assert float((tensors[name].float().flatten(1) @ down).norm()) <= 0.05 * 1.01


def test_what_the_recipe_says_is_in_the_file(plain: tuple[Path, Path], tmp_path: Path) -> None:
    dataset, before = plain
    run = trained(dataset, tmp_path / "run", train__length="1 steps", optimizer__lora_plus_ratio=4.0, optimizer__block_lr={"mid_block": 0.5},
                  optimizer__text_encoder_lr=[0.001])  # fmt: skip
    told = metadata(run / "checkpoints" / "mira.safetensors")
    assert json.loads(told["ss_network_args"]) == {"loraplus_lr_ratio": 4.0, "block_lr": {"mid_block": 0.5}}
    assert told["ss_text_encoder_lr"] == "[0.001]"
    assert (
        not {"ss_network_args", "ss_ema_decay", "ss_lr_scheduler_args"}
        & metadata(before / "checkpoints" / "mira.safetensors").keys()
    )


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"train__max_weight_norm": 1.0, "optimizer__name": "prodigy-schedule-free"}, "train.max_weight_norm", "mislead it"),
        ({"train__max_weight_norm": 1.0, "optimizer__name": "adamw-schedule-free"}, "train.max_weight_norm", "averages the weights"),
        ({"train__max_weight_norm": 0.0}, "train.max_weight_norm", "greater than 0"),
        ({"train__ema": [0.9], "optimizer__name": "adamw-schedule-free"}, "train.ema", "averages the weights itself"),
        ({"train__ema": [0.9, 0.9]}, "train.ema", "the same in six digits"),
        ({"train__ema": [0.99999991, 0.99999992]}, "train.ema", "the same in six digits"),
        ({"train__ema": [1.0]}, "train.ema", "less than 1"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be(dataset: Path, settings: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(Problems) as caught:
        check_values(values(dataset, **settings))
    assert what in {problem.where: problem.what for problem in caught.value.problems}[where]


def test_weights_themselves_have_no_limit(dataset: Path) -> None:
    raw = {"data": {"folder": str(dataset)}, "adapter": {"name": "full"}, "train": {"max_weight_norm": 1.0}}
    with pytest.raises(Problems, match=r"train\.max_weight_norm .*trains the weights themselves"):
        check_values(raw)


def test_averages_are_restored_to_the_bit(plain: tuple[Path, Path], tmp_path: Path) -> None:
    dataset, _ = plain
    run = trained(dataset, tmp_path, train__ema=[0.9])
    state = load_file(max((run / "state").iterdir()))
    assert torch.equal(state["ema0.9.denoiser.values"].half().sort()[0], torch.cat(
        [tensor.flatten() for name, tensor in load_file(run / "checkpoints" / "mira-ema0.9.safetensors").items()
         if name.startswith("lora_unet") and not name.endswith("alpha")]
    ).sort()[0])  # fmt: skip
