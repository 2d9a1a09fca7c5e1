"""Where files are."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabake.base.places import expanded, run_folder
from lorabake.dataset.folder import open_dataset
from lorabake.families import inspect_model
from lorabake.fleet.queue import Queue
from lorabake.recipe.load import read_raw
from lorabake.train.going_back import find_origin

NOBODY = "~nobody-is-called-so"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_home_is_read_and_what_is_nobodys_stays(here: Path) -> None:
    assert expanded("~/x") == here / "home" / "x"
    assert expanded(Path("~")) == here / "home"
    assert expanded(f"{NOBODY}/x") == Path(NOBODY) / "x"
    assert expanded("a/~/b") == Path("a/~/b")


def test_a_folder_may_be_called_like_a_home(here: Path) -> None:
    (here / NOBODY).mkdir()
    (here / NOBODY / "recipe.toml").write_text('[data]\nfolder = "."')
    assert read_raw(Path(NOBODY)) == {"data": {"folder": NOBODY}}
    assert read_raw(Path(NOBODY) / "recipe.toml")["data"]["folder"] == str(here / NOBODY)
    queue = Queue(Path(NOBODY))
    assert queue.folder == here / NOBODY and queue.add("a", "b", Path(NOBODY), {}).into == here / NOBODY


def test_what_is_not_there_is_said_and_never_a_traceback(here: Path) -> None:
    for ask in (lambda: read_raw(Path(NOBODY)), lambda: open_dataset(Path(NOBODY)), lambda: inspect_model(NOBODY),
                lambda: find_origin(Path(NOBODY))):  # fmt: skip
        with pytest.raises(ValueError, match=NOBODY):
            ask()


def test_a_run_goes_into_runs() -> None:
    assert run_folder("mira") == Path("runs/mira")
