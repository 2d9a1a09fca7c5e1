"""Cards are found by walking the rooms; nothing holds a second list."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lorabake.base import cards as cards_module
from lorabake.base.cards import Card, cards, find
from lorabake.base.errors import MissingExtra, UserError

Room = Callable[[dict[str, str]], None]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    """Makes a room of the given files for cards of kind ``optimizer``."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cards_module.ROOMS, "optimizer", "made_up_room")
    forget()

    def make(files: dict[str, str]) -> None:
        for name, text in {"__init__.py": "", **files}.items():
            path = tmp_path / "made_up_room" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("from lorabake.base.cards import Card\n" + text)

    yield make
    forget()
    for name in [name for name in sys.modules if name.startswith("made_up_room")]:
        del sys.modules[name]


def forget() -> None:
    cards.cache_clear()
    cards_module._plugins.cache_clear()


def card(name: str, code: str = "math:sqrt") -> str:
    return f"Card('optimizer', {name!r}, 'It is one.', {code!r})"


def test_files_packages_and_rows_are_walked_in_order(room: Room) -> None:
    room(
        {
            "zeta.py": f"CARD = {card('b')}",
            "many.py": f"CARDS = ({card('c')}, {card('a')})",
            "_own.py": f"CARD = {card('machinery')}",
            "family/__init__.py": f"CARD = {card('not here')}",
            "family/card.py": f"CARD = {card('d')}",
            "plain/__init__.py": "",
        }
    )
    assert list(cards("optimizer")) == ["a", "b", "c", "d"]


def test_other_kinds_are_left_alone(room: Room) -> None:
    room({"x.py": f"CARD = {card('a')}\nOTHER = Card('schedule', 's', 'Another.', 'math:sqrt')"})
    assert list(cards("optimizer")) == ["a"]


def test_the_same_card_met_twice_is_one(room: Room) -> None:
    room({"x.py": f"CARD = {card('a')}\nCARDS = (CARD,)", "y.py": "from made_up_room.x import CARD"})
    assert list(cards("optimizer")) == ["a"]


def test_two_cards_of_one_name_are_our_mistake(room: Room) -> None:
    room({"x.py": f"CARD = {card('a')}", "y.py": f"CARD = {card('a')}"})
    with pytest.raises(AssertionError, match="'a'"):
        cards("optimizer")


def test_plug_ins_bring_cards(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    room({})
    plug_in = ModuleType("plug_in")
    plug_in.__dict__["CARD"] = Card("optimizer", "from-outside", "It is one.", "math:sqrt")
    monkeypatch.setitem(sys.modules, "plug_in", plug_in)
    entry = importlib.metadata.EntryPoint("x", "plug_in", "lorabake.cards")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [entry] if group == entry.group else [])
    assert find("optimizer", "from-outside").load()(4) == 2


def test_a_broken_plug_in_is_told_and_left_out(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    room({"x.py": f"CARD = {card('a')}"})
    entry = importlib.metadata.EntryPoint("broken", "a_package_nobody_has", "lorabake.cards")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [entry])
    with pytest.warns(UserWarning, match="'broken' .* cannot be loaded: ModuleNotFoundError"):
        assert list(cards("optimizer")) == ["a"]


def test_an_unknown_name_says_what_was_probably_meant() -> None:
    with pytest.raises(UserError, match=r"'adamww' is not a known optimizer\. Did you mean 'adamw'\?"):
        find("optimizer", "adamww")


def test_a_missing_package_is_named_with_its_extra() -> None:
    given = Card("optimizer", "x", "It is one.", "a_package_nobody_has:X", extra="8bit")
    with pytest.raises(MissingExtra, match=r"The optimizer 'x' needs .* pip install 'lorabake\[8bit\]'"):
        given.load()


@pytest.mark.parametrize(
    ("code", "missing"),
    [("a_package_nobody_has.optim:X", True), ("json.decoder:X", False), ("lorabake.nowhere:X", False)],
)
def test_what_is_missing_is_known_without_importing(code: str, missing: bool) -> None:
    told = Card("optimizer", "x", "It is one.", code, extra="8bit").missing()
    assert ("pip install 'lorabake[8bit]'" in told) == missing and bool(told) == missing
    assert Card("optimizer", "x", "It is one.", code).missing() == ""


def test_a_missing_module_of_ours_is_no_missing_extra() -> None:
    with pytest.raises(ModuleNotFoundError):
        Card("optimizer", "x", "It is one.", "lorabake.nowhere:X", extra="8bit").load()
