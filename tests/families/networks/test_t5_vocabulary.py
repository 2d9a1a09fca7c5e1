"""The vocabulary that comes with the product is T5's."""

from __future__ import annotations

from pathlib import Path

from lorabake.families.networks.t5_tokenizer import T5Tokenizer
from lorabake.families.networks.t5_vocabulary import t5_tokenizer


def test_ids_are_those_that_t5_was_trained_with() -> None:
    """The example of T5's own paper, as its documentation gives the ids; and an article, which T5 spells in two pieces."""
    tokenizer = t5_tokenizer()
    assert (tokenizer.size, tokenizer.end_id, tokenizer.pad_id) == (32_100, 1, 0)
    (row,) = tokenizer.encode(["translate English to German: The house is wonderful."], 13)
    assert row == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1, 0, 0]
    assert tokenizer.encode(["a cat"], 4) == [[3, 9, 1712, 1]]


def test_equal_characters_and_blanks_are_evened_out() -> None:
    tokenizer = t5_tokenizer()
    plain, odd = tokenizer.encode(["fine full width", "\ufb01ne \uff46ull   width "], 8)
    assert plain == odd


def test_written_as_files_it_reads_the_same(tmp_path: Path) -> None:
    tokenizer = t5_tokenizer()
    for name, text in tokenizer.files(512).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    captions = ["1girl, red hair, holding a cup", "日本 émigré #42 <extra_id_3>", ""]
    assert T5Tokenizer.from_path(tmp_path).encode(captions, 40) == tokenizer.encode(captions, 40)
