"""Which pictures are hard, whatever noise they met."""

from __future__ import annotations

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorabake.base.events import Event, Events
from lorabake.recipe import check_values
from lorabake.train.loop import batch_loss, optimizer_step
from lorabake.train.picture_losses import as_csv, picture_losses
from lorabake.train.prepare import prepare
from lorabake.train.run import train


def step(number: int, *rows: tuple[int, float, float]) -> Event:
    return {"kind": "step", "step": number, "pictures": rows}


def test_by_hand() -> None:
    """Timestep 10 is usually 2, timestep 900 usually 0.5."""
    events = [
        step(1, (0, 10, 1.0), (1, 20, 3.0)),
        step(2, (0, 900, 0.25)),
        {"kind": "checkpoint", "step": 2},
        step(3, (1, 910, 0.75)),
        step(4, (1, 930, 0.5)),
    ]
    hard, easy = picture_losses(events, ["a", "b"], 1)
    assert (easy.picture, easy.kind, easy.seen, easy.loss) == ("a", "training", 2, 0.625)
    assert easy.relative == pytest.approx(1.25 / 2.5) and easy.relative_late is None
    assert easy.error == pytest.approx(0.0, abs=1e-9), "half of the usual both times"
    assert (hard.picture, hard.kind, hard.seen) == ("b", "regularisation", 3)
    assert hard.relative == pytest.approx(4.25 / 3.0) and hard.relative_late == pytest.approx(1.25)
    ratio = 4.25 / 3.0
    misses = (3 - 2 * ratio) ** 2 + (0.75 - 0.5 * ratio) ** 2 + (0.5 - 0.5 * ratio) ** 2
    assert hard.error == pytest.approx((misses * 1.5) ** 0.5 / 3.0)
    assert picture_losses([], ["a"], 1) == []
    (both,) = picture_losses([step(1, (0, 10, 1.0)), step(2, (1, 10, 3.0))], ["a", "a"], 2)
    assert (both.picture, both.seen, both.loss) == ("a", 2, 2.0), "one picture at two sizes"
    assert len(picture_losses([step(1, (0, 10, 1.0), (1, 10, 3.0))], ["a", "a"], 1)) == 2, "of two kinds"


def test_the_bad_picture_is_found_among_unlucky_ones() -> None:
    """One of twenty is 1.4 times as hard; by plain means, the luck of timesteps would hide it."""
    rng = random.Random(3)
    events: list[Event] = []
    for epoch in range(12):
        for index in range(20):
            timestep = rng.random() * 1000
            loss = 2.0 ** (-timestep / 150) * rng.uniform(0.8, 1.2) * (1.4 if index == 7 else 1.0)
            events.append(step(epoch * 20 + index + 1, (index, timestep, loss)))
    rows = picture_losses(events, [f"{index}.png" for index in range(20)], 20)
    assert rows[0].picture == "7.png" and rows[0].stands_out and sum(row.stands_out for row in rows) <= 3
    assert max(rows, key=lambda row: row.loss).picture != "7.png"


def test_the_table_survives_any_name() -> None:
    names = ['a, "b"\n=1.png', "すず\udcff.png"]
    rows = picture_losses([step(1, (0, 1, 1.0), (1, 1, 2.0))], names, 2)
    table = list(csv.reader(io.StringIO(as_csv(rows).decode())))
    assert table[0] == ["picture", "kind", "seen", "loss", "relative", "error", "relative_late"]
    assert [row[0] for row in table[1:]] == ["すず\\udcff.png", names[0]] and table[2][3:5] == ["1", "0.666667"]


def raw(dataset: Path, **sections: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "model": {"base": str(dataset.with_name("base"))},
        "data": {"folder": str(dataset)},
        "adapter": {"rank": 2},
        "train": {"batch_size": 2, "device": "cpu", "length": "2 epochs"},
        "output": {"name": "mira"},
    }
    for section, values in sections.items():
        made[section] = {**made.get(section, {}), **values}
    return made


def test_a_step_tells_every_row_with_its_own_loss(dataset: Path) -> None:
    baked = prepare(check_values(raw(dataset)), Events())
    batches = [(4, 1), (2,)]
    with torch.no_grad():
        expected = [float(batch_loss(baked, 0, micro, batch)) for micro, batch in enumerate(batches)]
    done = optimizer_step(baked, 0, batches)
    assert [index for index, _, _ in done.pictures] == [4, 1, 2]
    assert done.pictures[2][2] == pytest.approx(expected[1], rel=1e-5)
    assert sum(row[2] for row in done.pictures[:2]) / 2 == pytest.approx(expected[0], rel=1e-5)
    timesteps = [row[1] for row in done.pictures]
    assert all(0 <= timestep < 1000 and timestep == int(timestep) for timestep in timesteps)


def test_noting_changes_no_bit(dataset: Path) -> None:
    noting = prepare(check_values(raw(dataset)), Events())
    silent = replace(prepare(check_values(raw(dataset)), Events()), noted_2B=None)
    for number, batches in enumerate([[(0, 1), (2,)], [(3, 4), (5, 0)]]):
        one, other = optimizer_step(noting, number, batches), optimizer_step(silent, number, batches)
        assert replace(one, pictures=[]) == other and one.pictures
    assert all(
        torch.equal(*pair)
        for pair in zip((g.values for g in noting.groups), (g.values for g in silent.groups), strict=True)
    )


def test_a_run_leaves_a_table_that_stops_do_not_change(dataset: Path, tmp_path: Path) -> None:
    checked = check_values(raw(dataset, save={"state_every": 1e-3}))
    train(checked, tmp_path / "whole", Events())
    for stops in (2, 3):
        seen: list[Event] = []
        train(checked, tmp_path / "cut", Events(seen.append), stop=lambda seen=seen, stops=stops: len(seen) > stops)
    train(checked, tmp_path / "cut", Events())
    for name in ("losses.csv", "events.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = list(csv.DictReader((tmp_path / "whole" / "losses.csv").open(encoding="utf-8")))
    assert {row["picture"] for row in rows} == {f"1_mira/{index:03d}.png" for index in range(6)}
    assert all(row["seen"] == "2" for row in rows)
    assert sum(float(row["relative"]) for row in rows) / 6 == pytest.approx(1, abs=0.3)
    told = [json.loads(line) for line in (tmp_path / "whole" / "events.jsonl").read_text().splitlines()]
    assert told[-2]["kind"] == "picture_losses" and told[-2]["file"] == "losses.csv"
