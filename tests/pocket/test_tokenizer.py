"""The tokenizer knows the world's words, always in the same way, and lets any other text fall into pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lorabake.families.networks.tokenizer import ClipTokenizer
from lorabake.pocket import characters
from lorabake.pocket.architecture import VOCABULARY
from lorabake.pocket.tokenizer import build_tokenizer, learn_merges, world_words
from lorabake.pocket.world import draw, invented_name, sample, vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ClipTokenizer:
    return ClipTokenizer.from_folder(folder)


def test_every_word_of_the_world_is_one_token(tokenizer: ClipTokenizer) -> None:
    assert {"hair", "1", "girl", "twintails", "background", "umbrella"} <= set(world_words())
    assert tokenizer.size == VOCABULARY
    assert all(tokenizer.count(word) == 1 for word in world_words())
    for tag in ("1girl", "short hair", "holding an umbrella", "white background", "blue witch hat", "pastel color"):
        assert tokenizer.count(tag) == len(tag.replace("1girl", "1 girl").split())


def test_held_out_things_stay_unknown(tokenizer: ClipTokenizer) -> None:
    """Importing the characters adds tags to the world, which must not change the tokens."""
    assert characters.CHARACTERS and "poncho" in vocabulary()
    assert not {"poncho", "lollipop", "dusk"} & set(world_words())
    assert all(tokenizer.count(word) > 1 for word in ("poncho", "lollipop", "zorbi", "mirvo"))


def test_unknown_words_and_any_bytes_fall_into_pieces(tokenizer: ClipTokenizer) -> None:
    rng = random.Random(3)
    counts = [tokenizer.count(invented_name(rng)) for _ in range(200)]
    assert 1.5 < sum(counts) / 200 < 4
    ids = tokenizer.pieces("東京 café ∞!")
    assert len(ids) > 5 and max(ids) < VOCABULARY - 2


def test_merges_by_hand() -> None:
    """l+o is in both words; then equal frequencies go by the alphabet: the longer pieces of "low" before those of "lot"."""
    assert learn_merges({"low": 3, "lot": 1}, 9) == [("l", "o"), ("lo", "w</w>"), ("lo", "t</w>")]
    assert learn_merges({"ab": 2, "cd": 2}, 1) == [("a", "b</w>")]
    assert learn_merges({"aaaa": 1}, 9) == [("a", "a"), ("a", "a</w>"), ("aa", "aa</w>")]


def test_captions_fit(tokenizer: ClipTokenizer) -> None:
    rng = random.Random(0)
    assert max(tokenizer.count(", ".join(draw(sample(rng), seed).tags)) for seed in range(60)) <= 75


def test_files_are_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    vocab = json.loads((folder / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(VOCABULARY))
    assert (vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (VOCABULARY - 2, VOCABULARY - 1)


@pytest.mark.slow
def test_transformers_reads_the_same_tokens(folder: Path, tokenizer: ClipTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    texts = ["1girl, red hair, zorbi", "", "Rabbit ears;  holding an umbrella 東京 123 :)", "pastel color"]
    ids = theirs(texts, padding="max_length", max_length=77, truncation=True).input_ids
    assert ids == tokenizer.encode(texts)
