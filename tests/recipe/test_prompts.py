"""Prompts, prompt lines and prompt files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabake.base.errors import Problems, UserError
from lorabake.recipe.prompts import Prompt, line_to_prompt, prompts_from_file, shortened


def test_a_line_with_everything() -> None:
    line = "a girl, smile --n blurry, bad hands --w 512 --H 768 --d 42 --s 30 --l 7.5 --ss k_euler --g 2.5"
    assert line_to_prompt(line) == Prompt("a girl, smile", "blurry, bad hands", 42, 30, 7.5, 512, 768, "euler", 2.5)


def test_a_line_of_text_alone_has_the_defaults_and_the_given_seed() -> None:
    assert line_to_prompt("  a girl  ", seed=9) == Prompt("a girl", seed=9)


@pytest.mark.parametrize(
    ("line", "text", "negative"),
    [
        ("well-known -- a dash --n x", "well-known -- a dash", "x"),
        ("--n only negative", "", "only negative"),
        ("half--n joined", "half--n joined", ""),
        ("a --n", "a", ""),
    ],
)
def test_where_options_begin(line: str, text: str, negative: str) -> None:
    prompt = line_to_prompt(line)
    assert (prompt.text, prompt.negative) == (text, negative)


def test_every_problem_of_a_line_is_named() -> None:
    with pytest.raises(Problems) as caught:
        line_to_prompt("a girl --w 51x --q 3 --d -1 --s 0 --l 0.5 --ss eular --cn a.png --w 5")
    found = {problem.where: problem.what for problem in caught.value.problems}
    assert set(found) == {"--w", "--q", "--d", "steps", "cfg", "sampler", "--cn"}
    assert "Did you mean 'euler'?" in found["sampler"]
    assert "ControlNet" in found["--cn"]
    assert [p.what for p in caught.value.problems if p.where == "--w"] == [
        "'51x' is not allowed; it must be a whole number",
        "is given twice; keep one",
    ]


@given(st.text())
def test_any_line_is_a_prompt_or_a_clear_error(line: str) -> None:
    try:
        assert isinstance(line_to_prompt(line), Prompt)
    except Problems as error:
        assert error.problems


words = st.text("abcdefgh,() ", min_size=1).map(str.strip).filter(bool)


@given(
    words,
    words,
    st.integers(0, 2**64 - 1),
    st.integers(1, 1000),
    st.integers(4, 80),
    st.sampled_from(["ddim", "euler"]),
)
def test_what_is_written_as_a_line_is_read_back(
    text: str, negative: str, seed: int, steps: int, quarters: int, sampler: str
) -> None:
    prompt = Prompt(text, negative, seed, steps, quarters / 4, 64, 128, sampler)
    line = f"{text} --n {negative} --d {seed} --s {steps} --l {quarters / 4} --w 64 --h 128 --ss {sampler}"
    assert line_to_prompt(line) == prompt


@pytest.mark.parametrize(
    "wrong",
    [{"seed": -1}, {"seed": 2**64}, {"steps": 0}, {"steps": 1001}, {"cfg": 0.9}, {"cfg": float("nan")}, {"cfg": float("inf")},
     {"width": 0}, {"height": -8}, {"sampler": "ddpm"}, {"guidance": -1.0}, {"guidance": float("nan")}],
)  # fmt: skip
def test_a_prompt_that_cannot_be_drawn_is_not_made(wrong: dict) -> None:
    with pytest.raises(Problems, match=next(iter(wrong))):
        Prompt("a", **wrong)


def test_a_file_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeff# a comment\n\na girl --d 1\r\n  # another\na boy\n", encoding="utf-8")
    assert prompts_from_file(path, seed=5) == [Prompt("a girl", seed=1), Prompt("a boy", seed=5)]


def test_json_and_toml_files_say_the_same(tmp_path: Path) -> None:
    entry = {
        "prompt": "a girl",
        "negative_prompt": "bad",
        "width": 64,
        "height": 96,
        "sample_steps": 8,
        "scale": 4,
        "seed": 3,
    }
    (tmp_path / "p.json").write_text(json.dumps([{**entry, "sample_sampler": "Euler"}]), encoding="utf-8")
    (tmp_path / "p.toml").write_text(
        "[prompt]\nwidth = 64\nheight = 96\nsample_sampler = 'euler'\n[[prompt.subset]]\nprompt = 'a girl'\n"
        "negative_prompt = 'bad'\nsample_steps = 8\nscale = 4.0\nseed = 3\n",
        encoding="utf-8",
    )
    expected = [Prompt("a girl", "bad", 3, 8, 4.0, 64, 96, "euler")]
    assert prompts_from_file(tmp_path / "p.json") == expected == prompts_from_file(tmp_path / "p.toml")


def test_problems_of_a_file_are_told_together_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a --w x\nfine\nb --s 0\n")
    with pytest.raises(Problems) as caught:
        prompts_from_file(path)
    assert [problem.where for problem in caught.value.problems] == ["line 1: --w", "line 3: steps"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.json", "{", "not valid JSON"),
        ("p.json", "{}", "a list of prompts was expected"),
        ("p.json", "[3]", "neither a line of text nor a table"),
        ("p.json", '[{"promt": "a"}]', "Did you mean 'prompt'"),
        ("p.json", '[{"prompt": "a", "width": true}]', "must be a text or a number"),
        ("p.toml", "prompt = 3", "were expected"),
        ("p.toml", "[", "not valid TOML"),
    ],
)
def test_broken_files_are_explained(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        prompts_from_file(tmp_path / name)


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        prompts_from_file(tmp_path / "none.txt")


def test_shortened_is_one_short_line() -> None:
    assert shortened("a\n b") == "a b"
    assert len(shortened("word " * 40, 20)) == 20
