"""The loss of every step of a run of every family, pinned: whoever changes a number on the way from a picture to a weight sees it here.

``python -m pytest tests/train/every_family/test_golden_losses.py --regenerate`` pins them anew. Do that only where a change of
numbers is meant, and say in the commit why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.events import Event, Events
from lorabake.recipe import check
from lorabake.train import loop
from lorabake.train.run import train

PINNED = Path(__file__).with_name("golden_losses.json")
TOLERANCE = 2e-4
"""Relative. The same runs with other instructions for vectors, matrix products and convolutions (the plainest the packages have, AVX2,
AVX-512), which is how CPUs differ, move no loss of any family by more than 5e-7; other packages may order their sums in other ways. A
learning rate that is 5 % higher, the smallest of the changes below, moves the worst of the first ten by 2e-3 or more."""
BAND = 0.15
"""Relative, of each of the first losses in bfloat16, whose numbers have a relative precision of 4e-3: random networks, latents and
text all are in it."""
FIRST = 10
"""Steps of the runs that are compared with the pinned ones: the rate's course is that of the whole run, which is stopped."""


def pinned(name: str) -> list[float]:
    return json.loads(PINNED.read_text(encoding="utf-8"))[name]


def error(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of any step."""
    assert len(found) == len(expected)
    return max(abs(one - other) / other for one, other in zip(found, expected, strict=True))


def run(kitchen: Any, into: Path, *settings: str, steps: int = FIRST) -> list[float]:
    """The losses of the first steps with other settings."""
    checked = check(kitchen.recipe, ["sample.prompts=[]", "save.state_every=1e6", *settings])
    found: list[float] = []

    def listen(event: Event) -> None:
        found.extend([event["loss"]] if event["kind"] == "step" else [])

    train(checked, into, Events(listen), stop=lambda: len(found) == steps)
    return found


def test_losses_are_those_that_were_pinned(
    kitchen: Any, whole: Path, losses: Any, request: pytest.FixtureRequest
) -> None:
    found = losses(whole)
    if request.config.getoption("--regenerate", False):
        known = json.loads(PINNED.read_text(encoding="utf-8")) if PINNED.exists() else {}
        known[kitchen.name] = [float(f"{loss:.7g}") for loss in found]
        PINNED.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    assert error(found, pinned(kitchen.name)) < TOLERANCE
    assert len(found) == 20


Change = Callable[[pytest.MonkeyPatch], list[str]]
"""Changes something; returns other settings for the recipe."""


def other_timesteps(patch: pytest.MonkeyPatch) -> list[str]:
    real = loop.torch_stream

    def stream(seed: int, name: str, *indices: int) -> Any:
        return real(seed, "other" if name == "timesteps" else name, *indices)

    patch.setattr(loop, "torch_stream", stream)
    return []


def one_more_tag(patch: pytest.MonkeyPatch) -> list[str]:
    real = loop.caption_for_step
    patch.setattr(loop, "caption_for_step", lambda caption, *rest: real(f"{caption}, hat", *rest))
    return []


def setting(text: str) -> Change:
    return lambda patch: [text]


CHANGES: dict[str, Change] = {
    "a rate 5 % higher": setting("optimizer.lr=0.00525"),
    "other timesteps": other_timesteps,
    "one more tag": one_more_tag,
    "a smaller alpha": setting("adapter.alpha=3.9"),
    "smaller pictures": setting("data.buckets.resolution=64"),
    "another order": setting("train.seed=43"),
    "harder clipping": setting("train.max_grad_norm=0.1"),
}
ALL_CHANGES = ("sd1", "flux")
"""Families on which every change is tried; on the others the first, which is the hardest to see."""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change)
        for name in json.loads(PINNED.read_text(encoding="utf-8"))
        for change in (CHANGES if name in ALL_CHANGES else [*CHANGES][:1])
    ],
)
def test_a_real_change_is_seen(
    kitchens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: str
) -> None:
    found = run(kitchens(name), tmp_path / "run", *CHANGES[change](monkeypatch))
    assert error(found, pinned(name)[:FIRST]) > 5 * TOLERANCE


def test_recomputing_activations_changes_nothing(kitchen: Any, whole: Path, losses: Any, tmp_path: Path) -> None:
    assert run(kitchen, tmp_path / "run", "train.gradient_checkpointing=true") == losses(whole)[:FIRST]


def test_a_base_in_bfloat16_begins_alike(kitchen: Any, whole: Path, losses: Any, tmp_path: Path) -> None:
    found, exact = run(kitchen, tmp_path / "run", "train.precision=bf16", steps=5), losses(whole)[:5]
    assert 0 < error(found, exact) < BAND
    assert sum(found) == pytest.approx(sum(exact), rel=BAND / 3)
