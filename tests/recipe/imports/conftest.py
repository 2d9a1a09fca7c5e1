"""Foreign configs in a folder of their own, which is also the current one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problem
from lorabake.recipe.imports import Imported, import_config
from lorabake.recipe.imports._checks import prediction_of
from lorabake.recipe.load import anchored, parse_sections, read_raw

Import = Callable[..., Imported]


@pytest.fixture
def imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Imports a config given as text, or as values of JSON; what comes of it must load."""
    monkeypatch.chdir(tmp_path)

    def run(config: str | dict[str, Any], name: str = "config.toml", dataset: str | None = None) -> Imported:
        text = config if isinstance(config, str) else json.dumps(config)
        path = tmp_path / (name if isinstance(config, str) else "config.json")
        path.write_text(text, encoding="utf-8")
        pictures = None
        if dataset is not None:
            pictures = tmp_path / "dataset.toml"
            pictures.write_text(dataset, encoding="utf-8")
        found = import_config(path, pictures)
        loads(found, tmp_path / "imported-recipe.toml")
        return found

    return run


def loads(found: Imported, path: Path) -> None:
    """The recipe's text reads back as its values, and every value is one that a recipe may have."""
    path.write_text(found.toml(), encoding="utf-8")
    raw = read_raw(path)
    assert raw == json.loads(json.dumps(anchored(found.values, path.parent)))
    problems: list[Problem] = []
    parse_sections(raw, problems, prediction_of(raw))
    assert [problem for problem in problems if "not installed" not in problem.what] == []
