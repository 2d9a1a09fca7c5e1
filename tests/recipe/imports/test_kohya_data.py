"""Dataset configs of sd-scripts: what a folder has for itself, and where the config itself is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems

LEAST = 'pretrained_model_name_or_path = "base.safetensors"\nnetwork_module = "networks.lora"\ntrain_data_dir = "pictures"\n'


def dataset(*subsets: dict[str, Any]) -> dict[str, Any]:
    """A dataset config of these subsets, each at a size of its own if it has one."""
    sets = [{"resolution": one.pop("resolution", 512), "subsets": [{"image_dir": "a", **one}]} for one in subsets]
    return {"datasets": sets}


@pytest.mark.parametrize(
    ("first", "second", "lost"),
    [
        ({"num_repeats": 10}, {"num_repeats": 2}, {"num_repeats"}),
        ({"num_repeats": 10}, {}, {"num_repeats"}),
        ({}, {"num_repeats": 1}, set[str]()),
        ({"class_tokens": "mira"}, {"class_tokens": "noor"}, {"class_tokens"}),
        ({"num_repeats": 3, "class_tokens": "m"}, {"num_repeats": 3, "class_tokens": "m"}, set[str]()),
    ],
)
def test_a_folder_at_two_sizes_has_one_of_each(imported: Any, first: Any, second: Any, lost: set[str]) -> None:
    found = imported(dataset({"resolution": 512, **first}, {"resolution": 768, **second}))
    assert {line.key for line in found.of("lost")} == {f"datasets.subsets.{key}" for key in lost}
    assert found.values["data"]["buckets"]["resolutions"] == [512, 768]


def test_folders_without_repeats_are_left_out(imported: Any, tmp_path: Path) -> None:
    found = imported(dataset({"num_repeats": 10}, {"image_dir": "b", "num_repeats": 0}, {"image_dir": "c"}))
    assert found.values["data"]["folder"] == [str(tmp_path / "a"), str(tmp_path / "c")]
    assert found.values["data"]["repeats"] == [10, 1]
    (line,) = (line for line in found.of("unused") if line.key == "datasets.subsets.num_repeats")
    assert line.note.startswith("b: ")
    with pytest.raises(Problems, match="none to train on"):
        imported(dataset({"num_repeats": 0}))


def test_a_dataset_config_that_is_not_found_is_told(imported: Any, tmp_path: Path) -> None:
    missing = imported(LEAST + 'dataset_config = "gone.toml"')
    assert "dataset_config = gone.toml: not found; give it as --dataset." in missing.warnings
    (tmp_path / "set.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "theirs"\n')
    windows = imported(LEAST + "dataset_config = 'D:\\sets\\set.toml'")
    assert windows.values["data"]["folder"] == str(tmp_path / "theirs")
    given = imported(LEAST + 'dataset_config = "gone.toml"', dataset=(tmp_path / "set.toml").read_text())
    for found in (windows, given):
        assert not any("--dataset" in warning for warning in found.warnings)
