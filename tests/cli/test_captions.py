"""``lorabake validate --captions``: what the text encoder sees; and long prompts on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ON_CPU = ["--set", "train.device=cpu"]


@pytest.fixture
def captioned(dataset: Path) -> Path:
    """Captions of 80, 5 and 160 tokens."""
    for name, text in (("000", "hair, " * 39 + "red hat"), ("001", "1girl, smile,"), ("002", "hair, " * 80)):
        (dataset / f"{name}.txt").write_text(text.strip())
    return dataset


def test_one_line_says_how_long_captions_are(lorabake: Any, captioned: Path) -> None:
    said = lorabake("validate", "mira", *ON_CPU)
    assert said.code == 0 and "captions  3, of 5 to 160 tokens; 2 are cut off at 75" in said.out
    assert "note: data.captions: 2 of 3 captions have more than the 75 tokens" in said.out
    assert "001.png" not in said.out
    said = lorabake("validate", "mira", *ON_CPU, "--set", "model.max_tokens=225")
    assert "captions  3, of 5 to 160 tokens; all fit into 225" in said.out and "note" not in said.out


def test_every_caption_the_longest_first(lorabake: Any, captioned: Path) -> None:
    out = lorabake("validate", "mira", *ON_CPU, "--captions").out
    shown = out[out.index("\n002.png") :].strip().split("\n\n")
    assert [block.splitlines()[0] for block in shown] == ["002.png", "000.png", "001.png"]
    assert shown[1] == f"000.png\n  75 of 80 tokens read: {'hair, ' * 37}hair\n  cut off: , hair, red hat"
    assert shown[2] == "001.png\n  all 5 tokens read: 1girl, smile,"


def test_the_longest_only_and_in_windows(lorabake: Any, captioned: Path) -> None:
    out = lorabake("validate", "mira", *ON_CPU, "--captions", "1", "--set", "model.max_tokens=150").out
    assert "002.png\n  150 of 160 tokens read in 2 windows: hair, " in out
    assert "000.png\n" not in out


def test_for_programs(lorabake: Any, captioned: Path) -> None:
    found = lorabake("validate", "mira", *ON_CPU, "--captions", "2", "--json").json["captions"]
    assert (found["count"], found["cut"], found["longest"]) == (3, 2, 160)
    assert [caption["picture"] for caption in found["shown"]] == ["002.png", "000.png"]
    assert found["shown"][1] == {
        "picture": "000.png",
        "text": "hair, " * 39 + "red hat",
        "cut": True,
        "text_encoders": {
            "text_encoder": {"tokens": 80, "room": 75, "windows": 1, "kept": "hair, " * 37 + "hair", "lost": ", hair, red hat"}
        },
    }  # fmt: skip
    assert "captions" not in lorabake("validate", "mira", *ON_CPU, "--json").json


def test_what_a_terminal_would_obey_is_shown_as_a_sign(lorabake: Any, captioned: Path) -> None:
    (captioned / "001.txt").write_text("smile\x1b[2J\x07 hat")
    out = lorabake("validate", "mira", *ON_CPU, "--captions").out
    assert "\x1b" not in out and "smile\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER} hat" in out


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_how_many_must_be_a_number(lorabake: Any, captioned: Path, count: str) -> None:
    assert lorabake("validate", "mira", f"--captions={count}").code == 2


def test_training_says_once_what_is_cut(lorabake: Any, captioned: Path) -> None:
    said = lorabake("train", "mira", *ON_CPU, "--set", "adapter.rank=1", "--set", "train.length=1 steps")
    assert said.code == 0 and said.err.count("2 of 3 captions have more than the 75 tokens") == 1


SHORT_RUN = ("--set", "adapter.rank=1", "--set", "train.length=1 steps", "--set", "model.clip_skip=2")


def test_training_tells_of_sample_prompts_and_draws_them_as_it_reads_captions(lorabake: Any, captioned: Path) -> None:
    from lorabake.sampling.infotext import infotext_of

    prompts = json.dumps(["hair " * 76 + "--s 1", "hat --n red --l 1 --s 1"])
    options = (*ON_CPU, *SHORT_RUN, "--set", f"sample.prompts={prompts}")
    said = lorabake("train", "mira", *options, "--json")
    assert said.code == 0 and said.err == ""
    notes = [event["text"] for event in map(json.loads, said.out.splitlines()) if event["kind"] == "note"]
    assert [note.split()[:4] for note in notes] == [
        ["data.captions:", "2", "of", "3"],
        ["'hair", "hair", "hair", "hair"],
        ["the", "negative", "prompt", "'red'"],
    ]
    assert "has 76 tokens; 75 are read" in notes[1] and "does nothing where cfg is 1" in notes[2]
    pictures = sorted((captioned.parent / "runs" / "mira" / "samples").glob("*.png"))
    assert len(pictures) == 4 and all("Clip skip: 2" in infotext_of(path) for path in pictures)
    assert "CFG scale: 5," in infotext_of(pictures[0]) and "CFG scale: 1," in infotext_of(pictures[1])
    shown = lorabake("train", "mira", *options, "--into", "again")
    assert shown.code == 0 and [shown.err.count(f"note: {note}") for note in notes] == [1, 1, 1]


def test_prompts_are_cut_or_read_in_more_windows(
    lorabake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is behind 75 tokens changes nothing with one window, and the picture with two."""
    monkeypatch.chdir(tmp_path)
    prompts = ["hair " * 75 + f"{ending} --s 1" for ending in ("beach", "night")]
    for tokens, told in (("75", 2), ("150", 0)):
        said = lorabake("generate", *prompts, "--max-tokens", tokens, "--out", tokens)
        assert said.code == 0 and said.err.count("the rest is not seen") == told, said.err
        beach, night = map(pixels, sorted((tmp_path / tokens).glob("*.png")))
        assert (beach == night) == (tokens == "75")


def test_clip_skip_is_drawn_with_and_written_down(
    lorabake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorabake.sampling.infotext import infotext_of

    monkeypatch.chdir(tmp_path)
    for skip in ("1", "2"):
        assert lorabake("generate", "hair --s 1", "--clip-skip", skip, "--out", f"{skip}.png").code == 0
    assert pixels(Path("1.png")) != pixels(Path("2.png"))
    assert "Clip skip: 2" in infotext_of(Path("2.png")) and "Clip skip" not in infotext_of(Path("1.png"))
    said = lorabake("generate", "hair", "--clip-skip", "9")
    assert said.code == 2 and "has 3 layers" in said.err


def pixels(path: Path) -> bytes:
    from PIL import Image

    return Image.open(path).tobytes()
