"""Options in every combination of two: a run that is killed again and again ends with the same bytes as one that was not, and what only
looks on while it trains changes none of its weights.

A few of the combinations are tried in the suite; ``LORABAKE_EVERY_PAIR=1`` tries them all, which takes some twenty minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from lorabake.base.errors import Problems
from lorabake.pocket.world import draw, sample
from lorabake.recipe import check_values
from lorabake.sampling.infotext import save_png

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")]

Level = Mapping[str, Any]
TRAINED: dict[str, Sequence[Level]] = {
    "loss": ({}, {"objective.loss": "l1"}, {"objective.loss": "huber", "objective.huber_schedule": "exponential"},
             {"objective.loss": "smooth-l1"}),
    "weighting": ({}, *({"objective.weighting": name} for name in ("none", "p2", "debiased", "learned", "soft-min-snr"))),
    "noise": ({}, {"objective.noise": "offset", "objective.noise_offset_random": True}, {"objective.noise": "pyramid"},
              {"objective.input_perturbation": 0.1, "objective.input_perturbation_random": True}),
    "timesteps": ({}, {"objective.timesteps": "stratified"}, {"objective.timesteps": "logit-normal"},
                  {"objective.timesteps": "sigmoid", "objective.stratified": True},
                  {"objective.min_timestep": 100, "objective.max_timestep": 700}),
    "captions": ({}, {"data.captions.shuffle": True, "data.captions.keep_tokens": 1}, {"data.captions.tag_dropout": 0.3},
                 {"data.captions.caption_dropout_every_n_epochs": 2}, {"data.captions.token_warmup": 0.5},
                 {"data.captions.wildcards": True, "data.captions.caption_dropout": 0.3}),
    "views": ({}, {"data.flip": True}, {"data.augment.hue": 10.0, "data.augment.views": 3},
              {"data.augment.saturation": 0.3, "data.augment.views": "fresh"}),
    "sizes": ({}, {"data.buckets.resolutions": [32, 64]}),
    "masks": ({}, {"data.masks.source": "files", "data.masks.unmasked_probability": 0.3}),
    "regularisation": ({}, {"data.regularisation": ["REG"], "data.prior_loss_weight": 0.5}),
    "preservation": ({}, {"preservation.weight": 0.5, "preservation.share": 0.6, "preservation.trigger": "mira"}),
    "optimizer": ({}, *({"optimizer.name": name} for name in ("adamw-8bit", "adafactor", "came", "lion", "muon")),
                  {"optimizer.name": "prodigy", "optimizer.lr": 1.0}, {"optimizer.name": "dadapt-adam", "optimizer.lr": 1.0},
                  {"optimizer.name": "prodigy-schedule-free", "optimizer.lr": 1.0, "schedule.name": "constant"},
                  {"optimizer.name": "adamw-schedule-free", "schedule.name": "constant"}),
    "schedule": ({}, {"schedule.name": "cosine-warm-restarts", "schedule.decay": 0.7}, {"schedule.name": "rex"},
                 {"schedule.name": "linear", "schedule.warmup": "2 steps"}, {"schedule.name": "inverse-sqrt"}),
    "rates": ({}, {"optimizer.text_encoder_lr": 0.0}, {"optimizer.lora_plus_ratio": 4.0}, {"optimizer.block_lr": {"mid_block": 2e-4}}),
    "adapter": ({}, {"adapter.conv_rank": 2}, {"adapter.dropout": 0.2, "adapter.rank_dropout": 0.2, "adapter.module_dropout": 0.2},
                {"adapter.rank_stabilized": True, "adapter.alpha": 2.0}, {"adapter.block_rank": {"down_blocks": 0}, "adapter.block_alpha": {"mid_block": 0.5}}),
    "step": ({}, {"train.gradient_accumulation": 2}, {"train.gradient_checkpointing": True}, {"train.precision": "bf16"},
             {"train.gradient_checkpointing": True, "train.blocks_to_swap": 4},
             {"train.max_weight_norm": 0.5}, {"train.ema": [0.5, 0.9]}),
}  # fmt: skip
"""What may change the result: the levels of each factor, the first of which is off."""
SEEN: dict[str, Sequence[Level]] = {
    "samples": ({}, {"sample.prompts": ["mira --s 2 --w 32 --h 32"], "sample.every": "2 steps"}),
    "validation": ({}, {"validation.folder": "HELD", "validation.every": "2 steps", "validation.timesteps": 2}),
    "files": ({}, {"save.every": "2 steps", "save.keep": 1}, {"save.tensorboard": True, "save.keep_state": True}),
}
"""What only looks on."""
USUAL: Level = {
    "adapter.rank": 2,
    "optimizer.lr": 1e-3,
    "train.batch_size": 2,
    "train.length": "7 steps",
    "train.device": "cpu",
    "save.every": "4 steps",
    "save.state_every": 1e-3,
    "output.name": "mira",
}
Row = dict[str, int]


def rows(factors: Mapping[str, Sequence[Level]]) -> list[Row]:
    """Levels of every factor, so that any two levels of any two factors are together in one of the rows; few, not fewest."""
    rng = random.Random(0)
    left = {
        frozenset([(one, i), (other, j)])
        for one, other in itertools.combinations(factors, 2)
        for i, j in itertools.product(range(len(factors[one])), range(len(factors[other])))
    }
    found: list[Row] = []
    while left:
        row: Row = dict(min(left, key=sorted))
        for name in rng.sample(sorted(factors.keys() - row.keys()), len(factors) - len(row)):
            gains = [
                sum(frozenset([(name, level), pair]) in left for pair in row.items())
                for level in range(len(factors[name]))
            ]
            row[name] = max(range(len(gains)), key=lambda level: (gains[level], rng.random()))
        left -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        found.append(row)
    return found


ROWS = rows({**TRAINED, **SEEN})
TRIED = ROWS if os.environ.get("LORABAKE_EVERY_PAIR") else random.Random(5).sample(ROWS, 3)


@pytest.fixture
def home(dataset: Path, tmp_path: Path) -> Path:
    """The dataset with masks and a trigger, and other pictures beside it."""
    rng = random.Random(8)
    for folder, count in (("reg", 5), ("held", 2)):
        for index in range(count):
            save_png(draw(sample(rng), 10 * count + index, 64).image, tmp_path / folder / "1_girl" / f"{index}.png")
    for path in sorted(dataset.glob("1_mira/*.png"))[:-1]:
        path.with_suffix(".txt").write_text(f"mira, {path.with_suffix('.txt').read_text()}")
        mask = Image.new("L", (64, 64), "black")
        mask.paste("white", (32, 0, 64, 64))
        mask.save(path.with_name(f"{path.stem}-masklabel.png"))
    return dataset


def accepted(row: Row, factors: Mapping[str, Sequence[Level]], home: Path) -> dict[str, Any]:
    """The row's settings; of a factor that does not go with those before it (and is refused), those that are left without it."""
    settings: dict[str, Any] = {**USUAL, "model.base": str(home.with_name("base"))}
    for name in factors:
        level = {key: _placed(value, home) for key, value in factors[name][row[name]].items()}
        try:
            check_values(_raw({**settings, **level}, home))
            settings |= level
        except Problems:
            assert level, "what is off cannot be refused"
    return settings


def _placed(value: Any, home: Path) -> Any:
    folders = {"REG": str(home.parent / "reg"), "HELD": str(home.parent / "held")}
    return [_placed(item, home) for item in value] if isinstance(value, list) else folders.get(str(value), value)


def _raw(settings: Mapping[str, Any], home: Path) -> dict[str, Any]:
    raw: dict[str, Any] = {"data": {"folder": str(home)}}
    for name, value in settings.items():
        *sections, last = name.split(".")
        section = raw
        for part in sections:
            section = section.setdefault(part, {})
        section[last] = value
    return raw


def words(settings: Mapping[str, Any]) -> list[str]:
    """Arguments of the command line."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={_toml(value)}")]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def done_steps(run: Path) -> int:
    events = run / "events.jsonl"
    return events.read_bytes().count(b'"kind": "step"') if events.exists() else 0


def kills(row: Row) -> Iterator[int]:
    """Steps after which this row's run is killed: in the first epoch, at its end, and in a later one."""
    rng = random.Random(str(sorted(row.items())))
    yield from sorted(rng.sample(range(1, 7), 2))


@pytest.mark.parametrize("row", TRIED, ids=[str(ROWS.index(row)) for row in TRIED])
def test_killed_and_watched_it_is_the_same_run(
    row: Row, oven: Any, home: Path, tmp_path: Path, result: Any, kill_at: Any
) -> None:
    trained = accepted(row, TRAINED, home)
    watched = trained | {
        name: value
        for name, value in accepted(row, {**TRAINED, **SEEN}, home).items()
        if name not in trained or name in ("save.every",)
    }
    alone, whole, cut = (tmp_path / name for name in ("alone", "whole", "cut"))
    for into, settings in ((alone, trained), (whole, watched)):
        done = oven.run("train", home, "--into", into, *words(settings))
        assert done.code == 0, (settings, done.err)
    first, second = (load_file(folder / "checkpoints" / "mira.safetensors") for folder in (alone, whole))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first), watched
    for steps in kills(row):
        pid = oven.start("train", home, "--into", cut, *words(watched))
        assert kill_at(pid, lambda steps=steps: done_steps(cut) >= steps), watched
        oven.end()
    done = oven.run("train", home, "--into", cut, *words(watched))
    assert done.code == 0, (watched, done.err)
    assert result(cut).differences(result(whole)) == [], watched


def test_every_two_levels_meet() -> None:
    factors = {**TRAINED, **SEEN}
    met = {frozenset(pair) for row in ROWS for pair in itertools.combinations(row.items(), 2)}
    for one, other in itertools.combinations(factors, 2):
        for i, j in itertools.product(range(len(factors[one])), range(len(factors[other]))):
            assert frozenset([(one, i), (other, j)]) in met
    assert len(ROWS) < 100
