"""A written recipe is read back equal, whatever is in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabake.base.cards import cards
from lorabake.families import inspect_model
from lorabake.recipe.load import parse_sections
from lorabake.recipe.recipe import Recipe
from lorabake.recipe.resolve import resolve
from lorabake.recipe.toml import to_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FACTS = inspect_model("pocket")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.floats(1e-12, 0.99, allow_nan=False)
LENGTHS = st.builds("{} {}".format, st.integers(2, 10**6), st.sampled_from(["steps", "epochs"]))


def sections() -> st.SearchStrategy[dict[str, Any]]:
    """Valid recipes of every shape."""

    def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
        return st.fixed_dictionaries({}, optional=fields)

    lora = some(
        rank=st.integers(1, 1024),
        alpha=NUMBER,
        dropout=NUMBER,
        rank_dropout=NUMBER,
        module_dropout=NUMBER,
        conv_rank=st.integers(1, 9),
    )
    buckets = some(
        resolution=st.one_of(st.integers(1, 4096), st.tuples(st.integers(1, 4096), st.integers(1, 4096)).map(list)),
        enabled=st.booleans(), min=st.integers(1, 512), step=st.integers(1, 128), upscale=st.booleans(),
    )  # fmt: skip
    captions = some(
        shuffle=st.booleans(),
        keep_tokens=st.integers(0, 9),
        prefix=TEXT,
        suffix=TEXT,
        caption_dropout=NUMBER,
        tag_dropout=NUMBER,
    )
    return st.fixed_dictionaries(
        {"data": st.fixed_dictionaries({"folder": TEXT.filter(lambda t: "\0" not in t).map(lambda t: "/x/" + t)},
                                       optional={"flip": st.booleans(), "buckets": buckets, "captions": captions})},
        optional={
            "model": some(clip_skip=st.integers(1, 12)),
            "adapter": st.one_of(lora, st.just({"name": "full"})),
            "objective": some(min_snr_gamma=st.floats(0.1, 100), min_timestep=st.integers(0, 500), max_timestep=st.integers(501, 1000)),
            "optimizer": some(lr=st.floats(1e-9, 10), text_encoder_lr=NUMBER, betas=st.tuples(NUMBER, NUMBER).map(list), eps=NUMBER),
            "schedule": st.one_of(*(st.fixed_dictionaries({"name": st.just(name)}, optional={"warmup": NUMBER}) for name in cards("schedule"))),
            "train": some(length=LENGTHS, batch_size=st.integers(1, 4096), seed=st.integers(0, 2**63 - 1), threads=st.integers(1, 64),
                          gradient_checkpointing=st.one_of(st.booleans(), st.floats(0.01, 0.99))),
            "save": some(every=LENGTHS, dtype=st.sampled_from(["fp16", "bf16", "fp32"]), state_every=NUMBER),
            "sample": some(prompts=st.lists(TEXT, max_size=3)),
            "output": some(trigger=TEXT, comment=TEXT),
        },
    )  # fmt: skip


def parsed(raw: dict[str, Any]) -> Recipe:
    problems: list = []
    values = parse_sections(raw, problems)
    assert problems == []
    return Recipe(**values)


@given(sections())
def test_written_and_read_back(raw: dict[str, Any]) -> None:
    recipe = parsed(raw)
    assert parsed(tomllib.loads(to_toml(recipe))) == recipe
    resolved = resolve(recipe, FACTS)
    text = to_toml(resolved)
    again = parsed(tomllib.loads(text))
    assert again == resolved and again.to_dict() == resolved.to_dict()
    assert to_toml(resolve(again, FACTS)) == to_toml(again)


def test_every_reason_stands_beside_its_value() -> None:
    recipe = resolve(parsed({"data": {"folder": "/x/mira"}}), FACTS)
    lines = to_toml(recipe).splitlines()
    assert len(recipe.reasons) >= 7
    for name, reason in recipe.reasons.items():
        short = name.rpartition(".")[2]
        assert any(
            line.startswith((f"{short} = ", f"[{name}]")) and line.endswith(f"  # {reason}") for line in lines
        ), name


@pytest.mark.parametrize("reason", ["two\nlines = 3", "a bell \x07", "a tab\there", "\x7f", "a # in it", "\u2028"])
def test_no_reason_breaks_the_file(reason: str) -> None:
    recipe = parsed({"data": {"folder": "/x/mira"}}).with_value("optimizer", "lr", 0.5, reason)
    assert parsed(tomllib.loads(to_toml(recipe))) == recipe


def test_the_file_is_utf8(tmp_path: Path) -> None:
    recipe = parsed({"data": {"folder": "/x/すず"}, "output": {"comment": 'é "quoted" \\ \x7f \t'}})
    path = tmp_path / "recipe.toml"
    path.write_bytes(to_toml(recipe).encode())
    assert parsed(tomllib.loads(path.read_text(encoding="utf-8"))) == recipe
