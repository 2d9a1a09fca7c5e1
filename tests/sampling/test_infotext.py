"""Parameters text: what is written is read back, and others can read it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.infotext import Infotext, UsedLora, infotext_of, parse, read, save_png, write

texts = st.text(st.characters(exclude_categories=["Cs"]))
tricky = st.sampled_from(
    [
        "Negative prompt: x",
        "a\nNegative prompt: b",
        "Steps: 3, Size: 1x1",
        "a <lora:b:0.5>",
        " a ",
        "a\nSteps: 20, Seed: 1",
    ]
)
names = texts.map(lambda text: text.replace("/", "").replace("\\", ""))
sides = st.one_of(st.none(), st.integers(8, 4096))
prompts = st.builds(
    Prompt, texts | tricky, texts | tricky, st.integers(0, 2**64 - 1), st.integers(1, 1000), st.none() | st.floats(1, 30),
    st.just(64), sides.map(lambda side: side or 64), st.sampled_from([None, *cards("sampler")]),
    st.none() | st.floats(0, 30),
)  # fmt: skip
loras = st.builds(UsedLora, names, st.floats(-3, 3), st.sampled_from(["", "0123456789ab"]))
extras = st.dictionaries(st.sampled_from(["Clip skip", "Version", "VAE"]), names)
infos = st.builds(
    Infotext, prompts, names, st.sampled_from(["", "6ce0161689"]), st.lists(loras, max_size=3).map(tuple), extras
)


@given(infos)
@example(Infotext(Prompt("", "only negative", width=64, height=64)))
@example(
    Infotext(
        Prompt("a, Negative prompt: b", "c\nNegative prompt: d", width=8, height=8),
        loras=(UsedLora("a: b, c", 0.5, "00"),),
    )
)
def test_what_is_written_is_read_back(info: Infotext) -> None:
    assert read(write(info)) == info


def test_it_looks_as_web_ui_writes_it() -> None:
    prompt = Prompt("a girl, smile", "blurry", 1, 20, 7, 512, 768, "ddim")
    loras = (UsedLora("mira", 0.8, "0123456789ab"), UsedLora("hat", 1.0, "ba9876543210"))
    assert write(Infotext(prompt, "sd15", "6ce0161689", loras, {"Clip skip": "2"})) == (
        "a girl, smile <lora:mira:0.8> <lora:hat:1>\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x768, Model hash: 6ce0161689, Model: sd15, "
        'Lora hashes: "mira: 0123456789ab, hat: ba9876543210", Clip skip: 2'
    )


def test_what_others_wrote_can_be_parsed() -> None:
    text = (
        "masterpiece,\n1girl <lora:x:1>\nNegative prompt: lowres,\nbad\n"
        'Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 7, Size: 832x1216, Hashes: "{\\"a\\": \\"b\\"}"'
    )
    positive, negative, pairs = parse(text)
    assert (positive, negative) == ("masterpiece,\n1girl <lora:x:1>", "lowres,\nbad")
    assert pairs["Schedule type"] == "Karras"
    assert pairs["Hashes"] == '{"a": "b"}'
    with pytest.raises(UserError, match=r"'DPM\+\+ 2M' is not offered"):
        read(text)


@given(st.text() | st.text().map(lambda text: f"a\nSteps: {text}, Seed: {text}, Exact prompt: {text}"))
def test_any_text_is_read_or_refused_in_our_words(text: str) -> None:
    parse(text)
    with contextlib.suppress(UserError):
        assert isinstance(read(text), Infotext)


@pytest.mark.parametrize("path", ["/home/someone/models/sd15", "C:\\models\\sd15", "sd15"])
def test_folders_of_this_machine_are_never_written(path: str) -> None:
    text = write(Infotext(Prompt("a"), model=path, loras=(UsedLora(path, 1.0, "00"),)))
    assert "someone" not in text
    assert "models" not in text
    assert "Model: sd15" in text


def test_a_parameter_of_ours_cannot_be_overwritten() -> None:
    with pytest.raises(AssertionError, match="Seed"):
        Infotext(Prompt("a"), extra={"Seed": "3"})


@pytest.mark.parametrize("text", ["a\nSteps: 1, Seed: 2", "日本語 é", "", "two\nlines"])
def test_a_png_carries_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "folder" / "a.png"
    picture = Image.new("RGB", (4, 4), (1, 2, 3))
    save_png(picture, path, text)
    assert infotext_of(path) == text
    with Image.open(path) as found:
        assert found.getpixel((0, 0)) == (1, 2, 3)
        assert set(found.info) == ({"parameters"} if text else set())
    assert [item.name for item in path.parent.iterdir()] == ["a.png"]


def test_what_png_text_cannot_hold_is_replaced_not_refused(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (1, 1)), tmp_path / "a.png", "a\0b \ud800")
    assert infotext_of(tmp_path / "a.png") == "a\N{REPLACEMENT CHARACTER}b ?"


def test_a_file_that_is_no_picture_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        infotext_of(tmp_path / "a.png")
