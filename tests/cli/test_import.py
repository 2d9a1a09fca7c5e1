"""`lorabake import` and `lorabake export`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorabake as lb

CONFIG = 'pretrained_model_name_or_path = "base.safetensors"\nnetwork_module = "networks.lora"\nnetwork_dim = 8\ntrain_data_dir = "mira"\nmax_train_epochs = 2\nip_noise_gama = 0.1\n'  # noqa: E501


def test_a_recipe_and_a_report(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.toml").write_text(CONFIG)
    said = lorabake("import", "lora.toml", "--into", "mine.toml")
    assert (
        said.code == 0
        and "network_dim = 8" in said.out
        and "Did you mean 'ip_noise_gamma'?" in said.out
        and "mine.toml" in said.out
    )
    text = (tmp_path / "mine.toml").read_text()
    assert "rank = 8  # their network_dim = 8" in text
    assert "holds 3 pictures directly in it, which sd-scripts leaves out" in said.out


def test_the_same_as_data(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "lora.toml").write_text(CONFIG)
    told = lorabake("import", "lora.toml", "--json").json
    assert told["written"] == "recipe.toml" and told["recipe"]["adapter"]["rank"] == 8
    lines = {line["key"]: line for line in told["lines"]}
    assert lines["network_dim"] == {
        "kind": "same",
        "key": "network_dim",
        "given": 8,
        "setting": "adapter.rank",
        "value": 8,
        "note": "",
    }
    assert told["recipe"] == json.loads(json.dumps(lb.import_recipe("lora.toml").values))


def test_nothing_is_overwritten_and_nothing_is_written_in_vain(
    lorabake: Any, dataset: Path, tmp_path: Path, everything: Callable[[], dict[str, bytes]]
) -> None:
    (tmp_path / "lora.toml").write_text(CONFIG)
    (tmp_path / "recipe.toml").write_text("mine")
    (tmp_path / "cut.json").write_text('{"LoRA_type": ')
    before = everything()
    for words in (
        ("lora.toml",),
        ("cut.json", "--into", "new.toml"),
        ("gone.toml",),
        ("lora.toml", "--into", "no/such/folder.toml"),
        ("lora.toml", "--dataset", "cut.json", "--into", "new.toml"),
    ):
        said = lorabake("import", *words)
        assert said.code == 2 and said.err and "Traceback" not in said.err and not said.out
    assert "not overwritten" in lorabake("import", "lora.toml").err
    assert everything() == before


def test_export_writes_what_import_reads(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        '[data]\nfolder = "mira"\nrepeats = 4\n[adapter]\nrank = 8\n[schedule]\nname = "rex"\n[sample]\nprompts = ["mira"]\n'
    )
    said = lorabake("export", "mine.toml", "--into", "kohya")
    assert said.code == 0 and "CANNOT SAY IT" in said.out and "rex" in said.out
    assert {path.name for path in (tmp_path / "kohya").iterdir()} == {"config.toml", "dataset.toml", "prompts.txt"}
    assert lb.import_recipe(tmp_path / "kohya" / "config.toml").values["data"]["repeats"] == 4
    assert lorabake("export", "mine.toml", "--into", "kohya").code == 2, "it is there already"
    assert lorabake("export", "mine.toml", "--into", "one.toml", "--json").json["written"] == [
        "one-dataset.toml",
        "one-prompts.txt",
        "one.toml",
    ]


def test_prompts_and_blocks_there_and_back(lorabake: Any, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.toml").write_text(
        '[prompt]\nwidth = 512\n[[prompt.subset]]\nprompt = "mira"\nseed = 3\n[[prompt.subset]]\nprompt = "a dog"\nsample_sampler = "heun"\n'
    )
    (tmp_path / "lora.toml").write_text(
        CONFIG.replace("base.safetensors", "owner/sdxl-base").replace("ip_noise_gama = 0.1\n", "")
        + 'sample_prompts = "prompts.toml"\nsample_every_n_epochs = 1\nnetwork_args = ["mid_lr_weight=0.5,1,1", "up_lr_weight=zeros+0.25"]\n'
    )
    told = lorabake("import", "lora.toml", "--into", "mine.toml", "--json").json
    assert told["recipe"]["sample"]["prompts"] == ["mira --w 512 --d 3", "a dog --w 512"]
    assert "sample_prompts: sample_sampler" in {line["key"] for line in told["lines"] if line["kind"] == "left"}
    config = lorabake("export", "mine.toml", "--into", "kohya", "--json").json["config"]
    assert config["pretrained_model_name_or_path"] == "owner/sdxl-base"
    up = ",".join(["0.25"] * 6 + ["1.0"] * 3)
    assert config["network_args"][:3] == [
        "down_lr_weight=" + ",".join(["1.0"] * 9),
        "mid_lr_weight=1.0,1.0,1.0",
        f"up_lr_weight={up}",
    ]
    assert (tmp_path / "kohya" / "prompts.txt").read_text() == "mira --w 512 --d 3\na dog --w 512\n"
