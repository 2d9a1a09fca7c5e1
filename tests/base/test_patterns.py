"""The first pattern that is found decides."""

from __future__ import annotations

import pytest

from lorabake.base.patterns import checked, decide, idle

MID = ("lora_unet_mid_block_attentions_0_proj_in", "denoiser.mid_block.attentions.0.proj_in")
DOWN = ("lora_unet_down_blocks_1_attentions_0_proj_in", "denoiser.down_blocks.1.attentions.0.proj_in")


def test_the_first_that_is_found_in_any_name_decides() -> None:
    table = {"mid_block": 1, "attentions": 2, "down_blocks.1": 3}
    assert decide(table, MID) == 1 and decide(table, DOWN) == 2
    assert decide(dict(reversed(table.items())), DOWN) == 3
    assert decide({r"^denoiser\.mid": 0}, MID) == 0 and decide({r"^denoiser\.mid": 0}, DOWN) is None
    assert decide(None, MID) is None and decide({}, MID) is None


def test_what_is_found_nowhere_is_idle() -> None:
    assert idle({"mid_block": 1, "up_blocks": 2, "down": 3}, [MID, DOWN]) == ["up_blocks"]
    assert idle(None, [MID]) == [] and idle({"x": 1}, []) == ["x"]


def test_what_is_no_pattern() -> None:
    assert checked({"a.b": 1}) == {"a.b": 1} and checked(None) is None
    with pytest.raises(ValueError, match=r"'\(mid' is no regular expression"):
        checked({"(mid": 1})
