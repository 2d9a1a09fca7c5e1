"""What is no config, or not a whole one, or of nobody known: one clear error, and nothing else."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems, UserError
from lorabake.recipe.imports import import_config
from lorabake.recipe.imports._files import MOST_BYTES

KOHYA = 'pretrained_model_name_or_path = "base.safetensors"\nnetwork_module = "networks.lora"\ntrain_data_dir = "pictures"\nlearning_rate = 1e-4\n'
GUI = {"LoRA_type": "Standard", "max_resolution": "512,512", "lr_warmup": 0, "epoch": 3}
ONETRAINER = {"training_method": "LORA", "base_model_name": "x", "model_type": "STABLE_DIFFUSION_15", "lora_rank": 4}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.toml", b"", "is empty"),
        ("space.json", b" \n\t", "is empty"),
        ("cut.json", json.dumps(GUI).encode()[:-5], "not valid JSON"),
        ("cut.toml", (KOHYA + 'seed = "').encode(), "not valid TOML"),
        ("cut.yaml", b"job: extension\nconfig: {name: [", "neither valid TOML, JSON nor YAML"),
        ("picture.json", b"\x89PNG\r\n\x1a\n\x00\x00", "not text"),
        ("zeros.toml", b"a = 1\0", "binary"),
        ("latin.toml", 'a = "ä"'.encode("latin-1"), "UTF-8"),
        ("text.txt", b"just some words", "holds no settings"),
        ("list.json", b'[{"path": "a"}]', "a list"),
        ("number.json", b"[1, 2]", "a list"),
        ("recipe.toml", b'[data]\nfolder = "x"\n', "is a recipe already"),
        (
            "full.toml",
            b'[model]\nclip_skip = 2\n[data]\nfolder = "x"\n[train]\nseed = 3\nmax_grad_norm = 1.0\n',
            "is a recipe already",
        ),
        ("meta.json", b'{"a.png": {"caption": "x", "tags": "y"}}', "metadata file"),
        ("tuner.json", b'{"--model_family": "sdxl", "--lora_rank": 8}', "SimpleTuner"),
        ("pipe.toml", b'[model]\ntype = "flux"\n[adapter]\ntype = "lora"\n[optimizer]\nlr = 1\n', "diffusion-pipe"),
        ("other.json", b'{"name": "x", "version": 3}', "known here"),
        ("tag.yaml", b"job: !!python/object/apply:os.system ['true']\nconfig: {}\n", "no plain data"),
        ("module.yaml", b"job: !!python/module:os\n", "no plain data"),
        ("self.yaml", b"job: &a {config: *a}\nconfig: {process: []}\n", "nested"),
        ("deep.json", b"[" * 5000, "nested too deeply|not valid"),
    ],
)
def test_what_is_no_config(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        import_config(path)
    assert "Nothing was written" in str(error.value) and "\n" not in str(error.value)


def test_a_bomb_of_aliases_is_too_large(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)
    ]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="too large"):
        import_config(tmp_path / "bomb.yaml")


def test_files_that_are_not_there_or_too_large(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        import_config(tmp_path / "gone.toml")
    with pytest.raises(UserError, match="is a folder"):
        import_config(tmp_path)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(100_000_000)
    with pytest.raises(UserError, match="100 MB"):
        import_config(tmp_path / "large.json")
    assert MOST_BYTES < 100_000_000


def test_keys_of_several_trainers(tmp_path: Path) -> None:
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps({**GUI, **ONETRAINER}))
    with pytest.raises(UserError, match="several trainers"):
        import_config(path)
    path.write_text(json.dumps({**ONETRAINER, "job": "extension", "config": {"process": [{"type": "sd_trainer"}]}}))
    with pytest.raises(UserError, match="several trainers"):
        import_config(path)


def test_a_dataset_config_goes_with_sd_scripts_alone(tmp_path: Path) -> None:
    (tmp_path / "ot.json").write_text(json.dumps(ONETRAINER))
    (tmp_path / "data.toml").write_text('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a"\n')
    with pytest.raises(UserError, match="--dataset"):
        import_config(tmp_path / "ot.json", tmp_path / "data.toml")
    (tmp_path / "train.toml").write_text(KOHYA)
    with pytest.raises(UserError, match="no dataset config"):
        import_config(tmp_path / "train.toml", tmp_path / "train.toml")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_marks_and_line_ends_of_other_systems(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(KOHYA.replace("\n", "\r\n").encode(encoding))
    assert import_config(path).values["optimizer"]["lr"] == 1e-4


def test_a_dataset_config_alone_and_in_sections_and_as_json(imported: Any, tmp_path: Path) -> None:
    dataset = {
        "general": {"keep_tokens": 2},
        "datasets": [{"resolution": 512, "subsets": [{"image_dir": "a", "num_repeats": 4}]}],
    }
    alone = imported(dataset)
    assert alone.trainer == "a dataset config of kohya's sd-scripts" and alone.values["data"]["repeats"] == 4
    assert any("says nothing of the training" in warning for warning in alone.warnings)
    sections = imported(
        '[one]\npretrained_model_name_or_path = "b"\n[two]\nnetwork_dim = 8\nnetwork_module = "networks.lora"\nmax_train_epochs = 3\n'
    )
    assert sections.values["adapter"]["rank"] == 8 and sections.values["train"]["length"] == "3 epochs"
    (tmp_path / "data.json").write_text(json.dumps(dataset))
    named = imported(KOHYA + 'dataset_config = "data.json"\n')
    assert named.values["data"]["folder"] == str(tmp_path / "a")


def test_nothing_that_is_thrown_at_it_breaks_it(imported: Any) -> None:
    """Values of any kind under every key that is known: an import, or a message that names the key."""
    from lorabake.recipe.imports import _KOHYA_KEYS

    odd = [
        None,
        "",
        "x",
        -1,
        0,
        1,
        2.5,
        1e300,
        "1e400",
        True,
        False,
        [],
        [1, "a", None],
        {},
        {"a": 1},
        "\ud800",
        "a" * 300,
        "C:\\x",
        "True",
        "0.5",
        "none",
        "--",
        "=",
        "a=b=c",
        "1,2,3",
    ]
    rng = random.Random(8)
    keys = sorted(_KOHYA_KEYS)
    refused = 0
    for round_ in range(300):
        config = {"network_module": "networks.lora", "pretrained_model_name_or_path": "b", "learning_rate": 1e-4}
        if round_ % 3 == 1:
            config |= GUI
        if round_ % 3 == 2:
            config = {
                **ONETRAINER,
                "optimizer": rng.choice(odd),
                "unet": rng.choice(odd),
                "concepts": rng.choice(odd),
                "learning_rate": rng.choice(odd),
                "resolution": rng.choice(odd),
            }
        else:
            config |= {key: rng.choice(odd) for key in rng.sample(keys, 12)}
        try:
            imported(config)
        except UserError:
            refused += 1
    assert 0 < refused < 300


def test_odd_jobs_do_not_break_it_either(imported: Any) -> None:
    odd: list[Any] = [None, "", "x", -1, 0, 2.5, True, [], [1, None], {}, {"a": 1}, [[]], [{}], "1e-4"]
    rng = random.Random(8)
    for _ in range(200):
        process = {
            "type": "sd_trainer",
            **{
                key: rng.choice(odd)
                for key in ("network", "save", "datasets", "train", "model", "sample", "trigger_word")
            },
        }
        for key, names in {
            "train": (
                "lr",
                "steps",
                "optimizer",
                "ema_config",
                "optimizer_params",
                "lr_scheduler_params",
                "timestep_type",
            ),
            "model": ("name_or_path", "arch"),
            "network": ("type", "linear", "conv", "network_kwargs"),
            "sample": ("prompts", "samples", "neg", "seed"),
        }.items():
            if rng.random() < 0.6:
                process[key] = {name: rng.choice(odd) for name in names}
        if rng.random() < 0.6:
            process["datasets"] = [
                {
                    name: rng.choice(odd)
                    for name in ("folder_path", "resolution", "num_repeats", "is_reg", "mask_path", "default_caption")
                }
            ]
        with contextlib.suppress(UserError):
            imported({"job": "extension", "config": {"name": rng.choice(odd), "process": [process]}})


def test_sections_may_have_any_name(imported: Any) -> None:
    """sd-scripts takes no notice of what they are called; tables of arguments stay what they are."""
    found = imported(
        '[general]\npretrained_model_name_or_path = "b"\nseed = 7\n[network_args]\nnetwork_dim = 8\nnetwork_alpha = 2\n'
        'network_args = ["conv_dim=4"]\n[optimizer_args]\nlearning_rate = 3e-4\noptimizer_type = "Lion"\n'
    )
    assert found.values["adapter"]["rank"] == 8 and found.values["adapter"]["conv_rank"] == 4
    assert found.values["optimizer"]["lr"] == 3e-4 and found.values["optimizer"]["name"] == "lion"
    assert found.values["train"]["seed"] == 7 and not found.of("unknown")
    tables = imported(KOHYA + "[network_args]\nconv_dim = 4\n[optimizer_args]\nweight_decay = 0.25\n")
    assert tables.values["adapter"]["conv_rank"] == 4 and tables.values["optimizer"]["weight_decay"] == 0.25


ONE_OF_OURS = "job: extension\nconfig: {name: x, process: [{type: sd_trainer, %s}]}\n"


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        (
            "a.toml",
            KOHYA + 'network_args = ["conv_dim=8.5", "rank_dropout=x"]\nseed = "y"',
            {"network_args: conv_dim", "network_args: rank_dropout", "seed"},
        ),
        ("a.toml", KOHYA + 'network_args = "conv_dim=8, conv_alpha=1"\n', {"network_args: conv_dim"}),
        (
            "a.toml",
            KOHYA + 'network_args = ["loraplus_lr_ratio=x"]\nseed = "y"',
            {"network_args: loraplus_lr_ratio", "seed"},
        ),
        (
            "a.yaml",
            ONE_OF_OURS % "datasets: [{folder_path: p, num_repeats: abc}], train: {lr: x}",
            {"datasets.num_repeats", "train.lr"},
        ),
        (
            "a.yaml",
            ONE_OF_OURS % "datasets: [{folder_path: p, resolution: [a]}], train: {ema_config: {ema_decay: x}}",
            {"datasets.resolution", "train.ema_config: ema_decay"},
        ),
        (
            "a.yaml",
            ONE_OF_OURS % "train: {lr_scheduler: cosine, lr_scheduler_params: {num_warmup_steps: x, eta_min: y}}",
            {"train.lr_scheduler_params: num_warmup_steps", "train.lr_scheduler_params: eta_min"},
        ),
        (
            "a.json",
            json.dumps({**ONETRAINER, "batch_size": "x", "unet": {"learning_rate": "abc", "train": "y"}}),
            {"batch_size", "unet: learning_rate", "unet: train"},
        ),
    ],
)
def test_every_wrong_value_is_told_with_its_key(tmp_path: Path, name: str, content: str, keys: set[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(Problems) as error:
        import_config(tmp_path / name)
    assert {problem.where for problem in error.value.problems} == keys
    assert str(error.value).count("Nothing was") == 1 and str(error.value).endswith("import again.")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("seed.toml", KOHYA + "seed = " + "9" * 5000),
        ("seed.json", '{"network_module": "networks.lora", "seed": ' + "9" * 5000 + "}"),
        ("unknown.toml", KOHYA + "foo = 0x" + "f" * 5000),
        ("unknown.yaml", ONE_OF_OURS % ("foo: 0x" + "f" * 5000)),
        ("seed.yaml", ONE_OF_OURS % ("train: {seed: " + "9" * 5000 + "}")),
    ],
)
def test_numbers_of_thousands_of_digits_are_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="Nothing was written"):
        import_config(tmp_path / name)


def test_they_may_also_be_in_text(imported: Any) -> None:
    found = imported(KOHYA + f'network_args = ["foo=0x{"f" * 5000}"]')
    assert "thousands of digits" in next(line.note for line in found.of("lost"))
