"""What the demo does with files that are there."""

from __future__ import annotations

from pathlib import Path

from lorabake.cli.demo import _write_recipe


def test_a_recipe_that_was_changed_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    assert _write_recipe(tmp_path, "zorbi")
    first = path.read_text()
    assert _write_recipe(tmp_path, "zorbi") and path.read_text() == first, "as the demo wrote it"
    assert _write_recipe(tmp_path, "kavi") and 'trigger = "kavi"' in path.read_text(), "nobody changed it"
    path.write_text(path.read_text().replace("rank = 32", "rank = 8"))
    mine = path.read_text()
    assert not _write_recipe(tmp_path, "kavi") and path.read_text() == mine
    assert not _write_recipe(tmp_path, "zorbi") and path.read_text() == mine
    path.unlink()
    assert _write_recipe(tmp_path, "zorbi") and path.read_text() == first
