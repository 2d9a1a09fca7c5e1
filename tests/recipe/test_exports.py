"""A recipe in sd-scripts' words, and back."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems, UserError
from lorabake.recipe.exports import export_recipe
from lorabake.recipe.imports import import_config
from lorabake.recipe.imports._checks import prediction_of
from lorabake.recipe.imports._layer_names import UNETS
from lorabake.recipe.load import parse_sections
from lorabake.recipe.recipe import Recipe

OPTIMIZERS = (
    "adamw",
    "adamw-8bit",
    "lion",
    "prodigy",
    "dadapt-adam",
    "adafactor",
    "adamw-schedule-free",
    "prodigy-schedule-free",
    "came",
)


def drawn(rng: random.Random, home: Path) -> dict[str, dict[str, Any]]:
    """A random recipe of settings that sd-scripts has too. What lorabake would work out for itself is given."""

    def maybe(chance: float = 0.5, **settings: Any) -> dict[str, Any]:
        return settings if rng.random() < chance else {}

    flow, epochs, optimizer = rng.random() < 0.3, rng.random() < 0.5, rng.choice(OPTIMIZERS)
    adapts = optimizer in ("prodigy", "dadapt-adam")
    several = rng.random() < 0.5
    folders = [str(home / name) for name in (("a", "b") if several else ("a",))]
    schedule = rng.choice(["constant", "linear", "cosine", "cosine-restarts", "polynomial", "inverse-sqrt"])
    lr = 1.0 if adapts else rng.choice([1e-4, 3e-4])
    text: Any = [0.5e-4, 0.0] if flow else rng.choice([0.0, lr if adapts else 5e-5, lr])
    if adapts and flow:
        text = [lr, 0.0]
    recipe: dict[str, dict[str, Any]] = {
        "model": {
            **maybe(0.3, quantize="fp8"),
            "base": str(home / "base.safetensors"),
            **(
                {
                    "vae": str(home / "ae.sft"),
                    "text_encoders": [str(home / "clip_l.safetensors"), str(home / "t5xxl.safetensors")],
                }
                if flow
                else {}
            ),
            **({} if flow else maybe(clip_skip=2) | maybe(max_tokens=150) | maybe(0.2, prediction="v")),
        },
        "data": {
            "folder": folders if several else folders[0],
            **({"repeats": rng.choice([2, [3, 1]])} if several else maybe(repeats=5)),
            **maybe(flip=True),
            **maybe(regularisation=[str(home / "class")], prior_loss_weight=0.5),
            "captions": {
                **maybe(shuffle=True, keep_tokens=2),
                **maybe(caption_dropout=0.1),
                **maybe(prefix="x,"),
                **maybe(tag_dropout=0.1),
                **maybe(token_warmup="100 steps", token_warmup_min=2),
                **maybe(wildcards=True),
            },
            "buckets": rng.choice(
                [
                    {"resolution": 768, "step": 64, "min": 320, "max": 1536},
                    {"resolution": [512, 768], "step": 32, "upscale": False},
                    {"resolution": 512, "enabled": False},
                ]
            ),
            **maybe(0.3, augment={"random_crop": True, "views": "fresh"}),
            **maybe(0.3, masks={"source": "alpha", "normalise": "none"}),
        },
        "adapter": {
            "name": "lora",
            "rank": rng.choice([4, 16, 64]),
            "alpha": rng.choice([1.0, 8.0]),
            **({} if flow else maybe(conv_rank=8, conv_alpha=4.0)),
            **maybe(dropout=0.1),
            **maybe(rank_dropout=0.1),
            **maybe(0.2, start_from=str(home / "start.safetensors")),
        },
        "optimizer": {
            "name": optimizer,
            "lr": lr,
            "text_encoder_lr": text,
            **({} if adapts or optimizer == "prodigy-schedule-free" else maybe(0.3, lora_plus_ratio=4.0)),
            **maybe(weight_decay=0.125),
        },
        "schedule": {
            "name": schedule,
            **maybe(warmup=0.125 if epochs else "50 steps"),
            **({"cycles": 3} if schedule == "cosine-restarts" else {}),
            **({"power": 2.0, "floor": 1e-7 / lr} if schedule == "polynomial" else {}),
            **({"timescale": "200 steps"} if schedule == "inverse-sqrt" else {}),
            **(maybe(floor=0.1) if schedule == "cosine" else {}),
        },
        "objective": {
            "weighting": "none" if flow else rng.choice(["none", "min-snr", "debiased"]),
            **({"name": "flow", "timesteps": "shift", "shift": 3.0} if flow else {}),
            **maybe(0.3, loss="huber", huber_schedule="exponential", huber_c=0.2),
            **({} if flow else maybe(0.3, noise="pyramid", pyramid_iterations=8)),
            **maybe(0.3, input_perturbation=0.1),
        },
        "train": {
            "length": "7 epochs" if epochs else "900 steps",
            "batch_size": rng.choice([1, 4]),
            "gradient_accumulation": rng.choice([1, 2]),
            "max_grad_norm": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(1000),
            "precision": rng.choice(["bf16", "fp32"] if flow else ["bf16", "fp32", "fp16"]),
            **({} if adapts or "schedule-free" in optimizer else maybe(0.3, max_weight_norm=1.0)),
            **(
                maybe(gradient_checkpointing=True, blocks_to_swap=rng.choice([3, 27]))
                if flow
                else maybe(gradient_checkpointing=True)
            ),
        },
        "save": {
            "every": rng.choice(["2 epochs", "100 steps"]),
            "dtype": rng.choice(["fp16", "bf16", "fp32"]),
            **maybe(keep=3),
            **maybe(keep_state=True),
        },
        "sample": maybe(prompts_file=str(home / "prompts.txt"), every="1 epoch"),
        "validation": maybe(0.3, share=0.125, seed=5, every="2 epochs"),
        "output": {"name": "mira", **maybe(comment="hello")},
    }
    if recipe["objective"]["weighting"] == "min-snr":
        recipe["objective"]["min_snr_gamma"] = 6.0
    ranks, rates = by_block(rng, recipe, flow, home)
    recipe["adapter"] |= {"block_rank": ranks} if ranks else {}
    if rates and not adapts and optimizer != "prodigy-schedule-free":
        recipe["optimizer"]["block_lr"] = rates
    return recipe


def by_block(
    rng: random.Random, recipe: dict[str, dict[str, Any]], flow: bool, home: Path
) -> tuple[dict[str, int], dict[str, float]]:
    """Random tables of ranks and of factors, as an import writes them."""
    if rng.random() < 0.4:
        return {}, {}
    if flow:
        return {r"double_blocks_[0-3]_": 0, "img_mod": 0}, {"single_blocks_": 0.5, r"double_blocks_1\d_": 2.0}
    name = rng.choice(list(UNETS))
    if name == "sdxl":
        recipe["model"]["base"] = rng.choice([str(home / "sdxl.safetensors"), "owner/sdxl"])
        recipe["model"].pop("clip_skip", None)
    patterns = [found for found in UNETS[name].patterns("conv_rank" in recipe["adapter"]) if found]
    chosen = sorted({*rng.sample(patterns, 5), patterns[-1]}, key=patterns.index)
    ranks = {pattern: rng.choice([0, 6, 24]) for pattern in chosen if rng.random() < 0.5 or pattern is chosen[-1]}
    rates = {pattern: rng.choice([0.5, 2.0]) for pattern in chosen if ranks.get(pattern) != 0}
    return ranks, rates


def as_recipe(values: Any) -> Recipe:
    """The recipe with all its defaults; a package that is not installed is no problem here."""
    problems: list[Any] = []
    parsed = parse_sections(json.loads(json.dumps(values)), problems, prediction_of(values))
    assert [problem for problem in problems if "not installed" not in problem.what] == []
    return Recipe(**parsed)


def round_trip(values: Any, into: Path) -> Any:
    """Exported, written and imported again: the values."""
    into.mkdir()
    for path, text in export_recipe(values).texts(into).items():
        path.write_text(text, encoding="utf-8")
    return import_config(into / "config.toml")


def test_export_and_import_give_the_same_recipe(tmp_path: Path) -> None:
    rng = random.Random(11)
    for number in range(40):
        values = drawn(rng, tmp_path)
        exported = export_recipe(values)
        assert [line.key for line in exported.lines if line.kind == "lost"] == []
        back = round_trip(values, tmp_path / f"kohya{number}")
        assert back.of("lost", "unknown", "left") == ()
        assert as_recipe(back.values).differences(as_recipe(values).to_dict()) == []


def test_a_second_round_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an import stated stays as it is through export and import."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign.toml").write_text(
        'pretrained_model_name_or_path = "b.safetensors"\nnetwork_module = "networks.lora"\nnetwork_dim = 8\ntrain_data_dir = "p"\nlr_scheduler = "polynomial"\nlr_warmup_steps = 0.1\n'  # noqa: E501
        'optimizer_type = "AdaFactor"\nresolution = "640,512"\nenable_bucket = true\nmultires_noise_iterations = 6\nnetwork_args = ["conv_dim=4"]\n'
    )
    first = import_config(tmp_path / "foreign.toml")
    second = round_trip(first.values, tmp_path / "one")
    third = round_trip(second.values, tmp_path / "two")
    assert second.values == first.values == third.values


def test_what_sd_scripts_cannot_say_is_loud(tmp_path: Path) -> None:
    told = export_recipe(
        {
            "model": {"base": str(tmp_path / "b.safetensors")},
            "data": {
                "folder": str(tmp_path / "p"),
                "masks": {"source": "alpha"},
                "augment": {"hue": 3.0},
                "captions": {"token_warmup": "2 epochs"},
            },
            "schedule": {"name": "rex", "d": 0.5},
            "objective": {"weighting": "p2", "timesteps": "stratified"},
            "preservation": {"weight": 1.0},
            "optimizer": {"block_lr": {"mid_block": 0.5}},
            "train": {"ema": [0.99], "threads": 2},
            "output": {"trigger": "zorbi"},
        }
    )
    by_kind = {kind: {line.key for line in told.lines if line.kind == kind} for kind in ("lost", "left")}
    assert by_kind["lost"] == {
        "data.masks.normalise",
        "data.augment.hue",
        "data.captions.token_warmup",
        "schedule.name",
        "objective.weighting",
        "objective.timesteps",
        "preservation.weight",
        "optimizer.block_lr",
    }
    assert by_kind["left"] == {"train.ema", "train.threads", "output.trigger"}
    assert "CANNOT SAY IT" in told.report()


def test_folders_that_sd_scripts_would_not_see_get_a_dataset_config(tmp_path: Path) -> None:
    base = {"model": {"base": str(tmp_path / "b.safetensors")}}
    numbered, loose = tmp_path / "numbered", tmp_path / "loose"
    for path in (numbered / "3_mira" / "1.png", loose / "1.png", loose / "2_noor" / "2.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    plain = export_recipe({**base, "data": {"folder": str(numbered)}})
    assert plain.dataset is None and plain.config["train_data_dir"] == str(numbered)
    told = export_recipe({**base, "data": {"folder": str(loose), "repeats": 5}})
    assert told.dataset is not None and "train_data_dir" not in told.config
    assert told.dataset["datasets"][0]["subsets"] == [
        {"image_dir": str(loose), "num_repeats": 5},
        {"image_dir": str(loose / "2_noor"), "num_repeats": 10, "class_tokens": "noor"},
    ]


def test_convolutions_have_the_scale_that_they_have_here(tmp_path: Path) -> None:
    """rsLoRA scales by alpha / √rank: 4 / √16 = 1, which sd-scripts has as 16 / 16."""
    adapter = {"rank": 4, "alpha": 2.0, "conv_rank": 16, "conv_alpha": 4.0}
    base = {"model": {"base": str(tmp_path / "b.safetensors")}, "data": {"folder": "p"}}
    plain = export_recipe({**base, "adapter": adapter})
    assert plain.config["network_args"] == ["conv_dim=16", "conv_alpha=4.0"] and plain.config["network_alpha"] == 2.0
    told = export_recipe({**base, "adapter": {**adapter, "rank_stabilized": True}})
    assert told.config["network_args"] == ["conv_dim=16", "conv_alpha=16.0"] and told.config["network_alpha"] == 4.0
    assert [line.kind for line in told.lines if line.key == "adapter.conv_alpha"] == ["converted"]


@pytest.mark.parametrize(
    ("warmup", "length", "expected"),
    [
        (1.0, "900 steps", 900),
        ("100 %", "900 steps", 900),
        (1.0, "7 epochs", 0.999999),
        (0.5, "7 epochs", 0.5),
        ("1 step", "900 steps", 1),
    ],
)
def test_a_token_warm_up_of_the_whole_run_is_not_one_step(warmup: Any, length: str, expected: float) -> None:
    values = {"model": {"base": "b.sft"}, "data": {"folder": "p", "captions": {"token_warmup": warmup}}}
    told = export_recipe({**values, "train": {"length": length}})
    assert told.config["token_warmup_step"] == expected


def masked(home: Path, *masks: str) -> Any:
    """A recipe that trains ``3_a/1.png`` and ``3_a/2.png`` by masks in files, exported."""
    for name in ("3_a/1.png", "3_a/2.png", *masks):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"")
    return {
        "model": {"base": str(home / "b.safetensors")},
        "data": {"folder": str(home), "masks": {"source": "files", "normalise": "none"}},
    }


@pytest.mark.parametrize("place", ["3_a/masks", "masks/3_a", "masks"])
def test_masks_are_named_where_they_are(tmp_path: Path, place: str) -> None:
    told = export_recipe(masked(tmp_path, f"{place}/1.png", f"{place}/2.png"))
    assert told.dataset is not None and told.config["masked_loss"] is True
    (subset,) = told.dataset["datasets"][0]["subsets"]
    assert subset["conditioning_data_dir"] == str(tmp_path / place)
    assert [line.key for line in told.lines if line.kind == "lost"] == []


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        (("3_a/masks/1.png",), "2 has no mask"),
        (("3_a/1-masklabel.png", "3_a/2-masklabel.png"), "not called as their pictures"),
        (("3_a/masks/1.png", "masks/2.png"), "several folders"),
        (("masks/1.png", "masks/2.png", "masks/3.png"), "of other pictures"),
    ],
)
def test_masks_that_sd_scripts_would_stop_at_are_told(tmp_path: Path, masks: tuple[str, ...], says: str) -> None:
    told = export_recipe(masked(tmp_path, *masks))
    (line,) = (line for line in told.lines if line.kind == "lost")
    assert line.key == "data.masks.source" and says in line.note
    assert "masked_loss" not in told.config and "conditioning_data_dir" not in str(told.dataset)


def test_masks_in_files_leave_no_regularisation(tmp_path: Path) -> None:
    """sd-scripts takes masks from a dataset config all folders of which have some."""
    values = masked(tmp_path, "3_a/masks/1.png", "3_a/masks/2.png")
    values["data"]["regularisation"] = [str(tmp_path / "class")]
    told = export_recipe(values)
    assert [line.key for line in told.lines if line.kind == "lost"] == ["data.regularisation"]
    assert told.dataset is not None
    assert all("conditioning_data_dir" in subset for subset in told.dataset["datasets"][0]["subsets"])


def test_wrong_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        export_recipe(tmp_path)
    with pytest.raises(Problems, match=r"adapter\.rnak"):
        export_recipe({"data": {"folder": "x"}, "adapter": {"rnak": 3}})


def test_memory_options_that_sd_scripts_has_not_are_told(tmp_path: Path) -> None:
    values = {
        "model": {"base": str(tmp_path / "b.safetensors"), "quantize": "nf4"},
        "data": {"folder": str(tmp_path)},
        "train": {"gradient_checkpointing": 0.5},
    }
    exported = export_recipe(values)
    assert "fp8_base" not in exported.config and exported.config["gradient_checkpointing"] is True
    assert [line.setting or line.key for line in exported.lines if line.kind == "left"] == ["model.quantize"]


@pytest.mark.parametrize(
    "base", ["stabilityai/stable-diffusion-xl-base-1.0", "C:\\\\models\\\\x.safetensors", "\\\\\\\\nas\\\\x.sft"]
)
def test_models_that_are_not_here_stay_as_they_are_called(tmp_path: Path, base: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(f'[model]\nbase = "{base}"\nvae = "owner/vae"\n[data]\nfolder = "sets/mira"\n')
    told = export_recipe(tmp_path / "mine.toml").config
    assert told["pretrained_model_name_or_path"] == base.replace("\\\\", "\\") and told["vae"] == "owner/vae"
    assert told["train_data_dir"] == str(tmp_path / "sets" / "mira"), "a folder is no name on a hub"
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "vae").mkdir()
    assert export_recipe(tmp_path / "mine.toml").config["vae"] == str(tmp_path / "owner" / "vae")


def test_paths_of_windows_come_back(tmp_path: Path) -> None:
    values = {
        "model": {
            "base": "D:\\flux.safetensors",
            "vae": "D:\\ae.sft",
            "text_encoders": ["D:\\t5\\clip_l.sft", "D:\\t5\\t5xxl.sft"],
        },
        "data": {"folder": "D:\\sets\\10_mira"},
        "objective": {"name": "flow", "timesteps": "shift", "shift": 3.0},
    }
    back = round_trip(values, tmp_path / "kohya").values
    assert back["model"] == values["model"] and back["data"]["folder"] == values["data"]["folder"]


SDXL = {"base": "sdxl.safetensors"}


@pytest.mark.parametrize(
    ("model", "adapter", "block_lr", "lost"),
    [
        ({"base": "b.safetensors"}, {}, {"mid_block": 0.5}, "optimizer.block_lr"),
        ({"base": "b.safetensors"}, {}, {r"up_blocks\.3": 0.5}, ""),
        (SDXL, {}, {"attn1": 0.5}, "optimizer.block_lr"),
        (SDXL, {}, {"text_model": 0.5}, "optimizer.block_lr"),
        (SDXL, {}, {"lora_unet_input_blocks_4_": 0.5}, ""),
        (SDXL, {"block_rank": {"text_model": 8}}, {}, "adapter.block_rank"),
        (SDXL, {"block_rank": {"mid_block": 8}}, {}, "adapter.block_rank"),
        (SDXL, {"block_rank": {"mid_block": 0}}, {}, ""),
        (SDXL, {"block_rank": {"mid_block": 8}, "conv_rank": 4}, {}, ""),
        (SDXL, {"block_rank": {"to_q": 8}}, {}, "adapter.block_rank"),
        (SDXL, {"block_alpha": {"to_q": 8.0}}, {}, "adapter.block_alpha"),
        (SDXL, {"block_alpha": {"text_model": 8.0}}, {}, "adapter.block_alpha"),
        (SDXL, {"block_alpha": {"mid_block": 8.0}}, {}, ""),
    ],
)
def test_tables_by_pattern_that_are_no_lists_by_block_are_told(
    model: Any, adapter: Any, block_lr: dict[str, float], lost: str
) -> None:
    rates = {"lr": 1e-4, "text_encoder_lr": 5e-5, **({"block_lr": block_lr} if block_lr else {})}
    told = export_recipe({"model": model, "data": {"folder": "p"}, "adapter": adapter, "optimizer": rates})
    assert [line.key for line in told.lines if line.kind == "lost"] == ([lost] if lost else [])
    written = ["_lr_weight" in word or "block_dims" in word for word in told.config.get("network_args", [])]
    assert any(written) != bool(lost)


FLOW = {
    "model": {"base": "b.sft", "vae": "ae.sft", "text_encoders": ["clip_l.sft", "t5xxl.sft"]},
    "data": {"folder": "p"},
    "objective": {"name": "flow", "timesteps": "sigmoid"},
}


@pytest.mark.parametrize(
    ("rank", "expected", "lost"),
    [
        ({r"double_blocks\.3\.": 0}, "network_reg_dims=double_blocks_3_=0", False),
        ({r"denoiser\.single_blocks\.": 0}, "network_reg_dims=single_blocks_=0", False),
        ({"img_attn": 4}, "network_reg_dims=img_attn=4", True),
        ({"img_attn": 16}, "network_reg_dims=img_attn=16", False),
        ({r"single_blocks\.\d{1,2}\.": 0}, "", True),
    ],
)
@pytest.mark.parametrize("stabilized", [False, True])
def test_patterns_of_flux_are_expressions(rank: dict[str, int], expected: str, lost: bool, stabilized: bool) -> None:
    adapter = {"rank": 16, "alpha": 16.0, "rank_stabilized": stabilized, "block_rank": rank}
    told = export_recipe({**FLOW, "adapter": adapter})
    assert told.config.get("network_args", []) == ([expected] if expected else [])
    assert [line.key for line in told.lines if line.kind == "lost"] == (["adapter.block_rank"] if lost else [])


def test_alphas_by_pattern_are_none_of_sd_scripts_for_flux_and_sd3() -> None:
    told = export_recipe({**FLOW, "adapter": {"rank": 16, "block_alpha": {"img_attn": 4.0}}})
    assert [line.key for line in told.lines if line.kind == "lost"] == ["adapter.block_alpha"]
    model = {"base": "b.sft", "text_encoders": ["clip_l.sft", "clip_g.sft"]}
    told = export_recipe({**FLOW, "model": model, "adapter": {"block_alpha": {"joint_blocks": 4.0}}})
    assert [line.key for line in told.lines if line.kind == "lost"] == ["adapter.block_alpha"]


def test_sd3_has_no_such_lists() -> None:
    model = {"base": "b.sft", "text_encoders": ["clip_l.sft", "clip_g.sft"]}
    told = export_recipe({**FLOW, "model": model, "optimizer": {"block_lr": {"joint_blocks": 0.5}}})
    assert [line.key for line in told.lines if line.kind == "lost"] == ["optimizer.block_lr"]
