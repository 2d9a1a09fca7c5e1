"""Sample prompts of sd-scripts in each of their forms, as lines that a recipe reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorabake.recipe.imports import Imported
from lorabake.recipe.prompts import Prompt, line_to_prompt

LEAST = 'pretrained_model_name_or_path = "base.safetensors"\nnetwork_module = "networks.lora"\ntrain_data_dir = "pictures"\n'
FLUX = LEAST.replace("networks.lora", "networks.lora_flux") + 'ae = "ae"\nclip_l = "l"\nt5xxl = "t5"\n'


def drawn(found: Imported) -> list[Prompt]:
    """What the recipe draws."""
    return [line_to_prompt(line) for line in found.values["sample"]["prompts"]]


def left(found: Imported) -> set[str]:
    """Options that were left out."""
    return {line.key.partition(": ")[2] for line in found.of("left") if line.key.startswith("sample_prompts")}


TOML = """
[prompt]
width = 768
height = 1024
negative_prompt = "lowres,\\n blurry"
scale = 6.5
[[prompt.subset]]
prompt = "a girl"
sample_steps = 28
seed = 7
[[prompt.subset]]
prompt = "a cat"
width = 512
scale = 0.5
sample_sampler = "k_euler"
[[prompt.subset]]
prompt = "a --big dog"
seed = -1
sample_sampler = "dpm_2"
controlnet_image = "pose.png"
negative_prompt = ""
"""


def test_toml_shares_values(imported: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.toml").write_text(TOML)
    found = imported(LEAST + 'sample_prompts = "prompts.toml"\nsample_every_n_epochs = 2')
    shared: Any = {"negative": "lowres, blurry", "width": 768, "height": 1024, "cfg": 6.5}
    assert drawn(found) == [
        Prompt("a girl", **shared, steps=28, seed=7),
        Prompt("a cat", **{**shared, "width": 512, "cfg": 1.0}, sampler="euler"),
        Prompt("a -- big dog", **{**shared, "negative": ""}),
    ]
    assert left(found) == {"seed", "sample_sampler", "controlnet_image"}
    assert found.values["sample"]["every"] == "2 epochs"


def test_json_is_a_list_of_tables_or_lines(imported: Any, tmp_path: Path) -> None:
    entries = [
        {"prompt": "a girl", "width": 512.0, "seed": 0, "sample_steps": 5000, "guidance_scale": 3.5, "enum": 3, "n": 2},
        "a cat --w 640 --S 12 --n dogs --n birds --fs 3",
        17,
    ]
    (tmp_path / "prompts.json").write_text(json.dumps(entries))
    found = imported(LEAST + 'sample_prompts = "prompts.json"')
    assert drawn(found) == [
        Prompt("a girl", width=512, seed=0, steps=1000),
        Prompt("a cat", width=640, steps=12, negative="birds"),
    ]
    assert left(found) == {"guidance_scale", "n", "flow_shift", "entry"}


def test_lines_stay_in_their_file_where_every_one_is_read(imported: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# two\na girl --w 512 --d 1\na cat\n")
    assert imported(LEAST + 'sample_prompts = "prompts.txt"').values["sample"] == {"prompts_file": str(path)}
    path.write_text("a girl --w 512 --cn pose.png\na cat --xy 3 --ss heun\n")
    found = imported(LEAST + 'sample_prompts = "prompts.txt"')
    assert drawn(found) == [Prompt("a girl", width=512), Prompt("a cat")]
    assert left(found) == {"controlnet_image", "--xy", "sample_sampler"}


def test_flux_is_told_a_guidance_and_no_sampler(imported: Any) -> None:
    found = imported(FLUX + 'sample_prompts = "a girl --g 3.5 --l 1.0 --ss euler"')
    assert drawn(found) == [Prompt("a girl", guidance=3.5, cfg=1.0)] and left(found) == {"sample_sampler"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("prompts.toml", "a = 1", "[[prompt.subset]]"),
        ("prompts.json", "{}", "no list of prompts"),
        ("prompts.json", "[{", "holds no prompts"),
        ("prompts.txt", "\0", "binary"),
    ],
)
def test_files_that_cannot_be_read_are_told(imported: Any, tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    found = imported(LEAST + f'sample_prompts = "{name}"\nsample_every_n_epochs = 2')
    (line,) = (line for line in found.of("left") if line.key == "sample_prompts")
    assert says in line.note and "Nothing was written" not in line.note and "sample" not in found.values
    assert [line.key for line in found.of("unused")] == ["sample_every_n_epochs"]


def test_a_file_that_is_not_here_keeps_its_place(imported: Any, tmp_path: Path) -> None:
    found = imported(LEAST + 'sample_prompts = "gone.toml"')
    assert found.values["sample"] == {"prompts_file": str(tmp_path / "gone.toml")}
    assert any("gone.toml does not exist" in warning for warning in found.warnings)


@pytest.mark.parametrize(
    ("config", "width", "height"),
    [(LEAST, 512, 64), (FLUX, 512, 64), (LEAST.replace("base.", "sdxl."), 512, 64)],
)
def test_sides_are_rounded_as_pictures_are_drawn(imported: Any, config: str, width: int, height: int) -> None:
    found = imported(config + 'sample_prompts = "a girl --w 513 --h 50"')
    assert drawn(found) == [Prompt("a girl", width=width, height=height)] and left(found) == {"width", "height"}


@pytest.mark.parametrize(
    ("config", "side"),
    [(LEAST, 512), (FLUX, 560), (LEAST.replace("base.", "sdxl."), 544), (LEAST + "clip_g = 'g'\n", 560)],
)
def test_sides_are_multiples_of_what_the_family_draws(imported: Any, tmp_path: Path, config: str, side: int) -> None:
    (tmp_path / "prompts.txt").write_text("a girl --w 568 --h 1024\n")
    found = imported(config + 'sample_prompts = "prompts.txt"')
    assert drawn(found) == [Prompt("a girl", width=side, height=1024)] and left(found) == {"width"}
