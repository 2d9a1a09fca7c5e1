"""Training and dataset configs of sd-scripts: every key with its meaning there, defaults included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorabake.base.errors import Problems
from lorabake.base.units import Stretch
from lorabake.optimizers.schedules import factor
from lorabake.recipe.imports import Imported
from lorabake.recipe.imports._checks import prediction_of
from lorabake.recipe.load import parse_sections

LEAST = 'pretrained_model_name_or_path = "base.safetensors"\nnetwork_module = "networks.lora"\ntrain_data_dir = "pictures"\n'


LYCORIS = 'network_module = "lycoris.kohya"\n'


def setting(found: Imported, dotted: str) -> Any:
    """One of the recipe's settings, with defaults."""
    parsed = parse_sections(found.values, [], prediction_of(found.values))
    section, *names = dotted.split(".")
    if section == "optimizer" and names[0] in ("lr", "text_encoder_lr", "lora_plus_ratio", "block_lr"):
        section = "rates"
    value = parsed[section]
    if names == ["name"]:
        return value.name
    value = getattr(value, "settings", value)
    for name in names:
        value = getattr(value, name)
    return value


def kinds(found: Imported, key: str) -> set[str]:
    """What became of a key."""
    return {line.kind for line in found.lines if line.key == key}


def test_their_defaults_are_stated_where_ours_differ(imported: Any) -> None:
    found = imported(LEAST)
    assert found.trainer == "a training config of kohya's sd-scripts"
    expected = {
        "adapter.rank": 4,
        "adapter.alpha": 1.0,
        "optimizer.lr": 2e-6,
        "optimizer.text_encoder_lr": 2e-6,
        "schedule.name": "constant",
        "objective.weighting": "none",
        "data.buckets.enabled": False,
        "train.max_grad_norm": 1.0,
        "save.dtype": "fp32",
    }
    assert {name: setting(found, name) for name in expected} == expected
    assert str(setting(found, "train.length")) == "1600 steps"
    assert str(setting(found, "save.every")) == "1600 steps"
    assert {line.setting for line in found.of("default")} >= expected.keys() - {"adapter.name"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("max_train_epochs = 8\nmax_train_steps = 99", {"train.length": "8 epochs"}),
        ("max_train_steps = 99", {"train.length": "99 steps"}),
        ("learning_rate = 1e-4", {"optimizer.lr": 1e-4, "optimizer.text_encoder_lr": 1e-4}),
        ("learning_rate = 1e-4\nunet_lr = 2e-4", {"optimizer.lr": 2e-4, "optimizer.text_encoder_lr": 1e-4}),
        (
            "learning_rate = 1e-4\nunet_lr = 2e-4\ntext_encoder_lr = 5e-5",
            {"optimizer.lr": 2e-4, "optimizer.text_encoder_lr": 5e-5},
        ),
        (
            "learning_rate = 1e-4\ntext_encoder_lr = 5e-5\nnetwork_train_unet_only = true",
            {"optimizer.lr": 1e-4, "optimizer.text_encoder_lr": 0.0},
        ),
        (
            "learning_rate = 1e-4\nnetwork_train_text_encoder_only = true",
            {"optimizer.lr": 0.0, "optimizer.text_encoder_lr": 1e-4},
        ),
        ("text_encoder_lr = [1e-5, 2e-5]", {"optimizer.text_encoder_lr": (1e-5, 2e-5)}),
        ("text_encoder_lr = [1e-5]", {"optimizer.text_encoder_lr": 1e-5}),
        ("network_dim = 32\nnetwork_alpha = 0", {"adapter.rank": 32, "adapter.alpha": None}),
        ('network_args = ["conv_dim=8"]', {"adapter.conv_rank": 8, "adapter.conv_alpha": 1.0}),
        (
            'network_args = ["conv_dim=8", "conv_alpha=4", "rank_dropout=0.1"]',
            {"adapter.conv_alpha": 4.0, "adapter.rank_dropout": 0.1},
        ),
        ('network_args = ["loraplus_lr_ratio=16"]', {"optimizer.lora_plus_ratio": 16.0}),
        ("min_snr_gamma = 0", {"objective.weighting": "none"}),
        ("min_snr_gamma = 7", {"objective.weighting": "min-snr", "objective.min_snr_gamma": 7.0}),
        ("debiased_estimation_loss = true", {"objective.weighting": "debiased"}),
        (
            "scale_v_pred_loss_like_noise_pred = true\nv_parameterization = true",
            {"objective.weighting": "epsilon-like", "model.prediction": "v"},
        ),
        (
            "noise_offset = 0.1\nadaptive_noise_scale = 0.05",
            {"objective.noise": "offset", "objective.noise_offset": 0.1, "objective.noise_offset_adaptive": 0.05},
        ),
        (
            "multires_noise_iterations = 8",
            {"objective.noise": "pyramid", "objective.pyramid_iterations": 8, "objective.pyramid_discount": 0.3},
        ),
        (
            "ip_noise_gamma = 0.1\nip_noise_gamma_random_strength = true",
            {"objective.input_perturbation": 0.1, "objective.input_perturbation_random": True},
        ),
        (
            'loss_type = "smooth_l1"\nhuber_schedule = "exponential"',
            {"objective.loss": "smooth-l1", "objective.huber_schedule": "exponential", "objective.huber_c": 0.1},
        ),
        ("fp8_base = true", {"model.quantize": "fp8"}),
        ("fp8_base_unet = true", {"model.quantize": "fp8"}),
        ("fp8_base = false", {"model.quantize": None}),
        ("scale_weight_norms = 1.0", {"train.max_weight_norm": 1.0}),
        ("max_token_length = 225", {"model.max_tokens": 225}),
        ("clip_skip = 1", {"model.clip_skip": None}),
        ("clip_skip = 2", {"model.clip_skip": 2}),
        (
            'resolution = "512,768"\nenable_bucket = true',
            {"data.buckets.resolution": (512, 768), "data.buckets.min": 256, "data.buckets.max": 1024},
        ),
        (
            'resolution = "768"\nenable_bucket = true\nbucket_no_upscale = true',
            {"data.buckets.resolution": 768, "data.buckets.upscale": False},
        ),
        ("resolution = 520", {"data.buckets.resolution": 520, "data.buckets.step": 8}),
        (
            "shuffle_caption = true\nkeep_tokens = 2\ncaption_tag_dropout_rate = 0.1",
            {"data.captions.shuffle": True, "data.captions.keep_tokens": 2, "data.captions.tag_dropout": 0.1},
        ),
        ("token_warmup_step = 0.2", {"data.captions.token_warmup": Stretch(0.2)}),
        (
            "random_crop = true\nflip_aug = true",
            {"data.augment.random_crop": True, "data.augment.views": "fresh", "data.flip": True},
        ),
        ('face_crop_aug_range = "2.0,4.0"', {"data.augment.face_crop": (2.0, 4.0)}),
        ("alpha_mask = true", {"data.masks.source": "alpha", "data.masks.normalise": "none"}),
        (
            'save_precision = "bf16"\nsave_every_n_steps = 100\nsave_last_n_steps = 300',
            {"save.dtype": "bf16", "save.every": "100 steps", "save.keep": 4},
        ),
        (
            'network_module = "lycoris.kohya"\nnetwork_dim = 16\nnetwork_args = ["algo=locon"]',
            {"adapter.conv_rank": 16, "adapter.name": "lora"},
        ),
        (
            f'{LYCORIS}network_dim = 6\nnetwork_args = ["algo=diag-oft", "conv_dim=4", "constraint=0.01", "rescaled=True"]',
            {
                "adapter.name": "oft",
                "adapter.block_size": 6,
                "adapter.conv_block_size": 4,
                "adapter.constraint": 0.01,
                "adapter.rescale": True,
            },
        ),
        (
            f'{LYCORIS}network_dim = 12\nnetwork_alpha = 1\nnetwork_args = ["algo=boft", "preset=attn-mlp"]',
            {"adapter.name": "boft", "adapter.block_size": 12, "adapter.conv_block_size": None},
        ),
        (
            f'{LYCORIS}network_dim = 12\nnetwork_args = ["algo=ia3", "train_on_input=True"]',
            {"adapter.name": "ia3", "adapter.side": "inputs", "adapter.convolutions": True},
        ),
        (
            f'{LYCORIS}network_dim = 4\nnetwork_args = ["algo=lokr", "factor=8", "dora_wd=True", "use_tucker=True", "full_matrix=True"]',
            {
                "adapter.name": "lokr",
                "adapter.rank": 4,
                "adapter.factor": 8,
                "adapter.dora": True,
                "adapter.tucker": True,
                "adapter.full_matrix": True,
            },
        ),
        (
            f'{LYCORIS}network_dim = 4\nnetwork_args = ["algo=loha", "preset=attn-mlp", "rs_lora=True", "use_cp=True"]',
            {
                "adapter.name": "loha",
                "adapter.rank_stabilized": True,
                "adapter.tucker": False,
                "adapter.conv_rank": None,
            },
        ),
        (
            f'{LYCORIS}network_dim = 4\nnetwork_alpha = 1\nnetwork_args = ["algo=full"]',
            {"adapter.name": "diff", "adapter.convolutions": True},
        ),
    ],
)
def test_a_key_means_what_it_means_there(imported: Any, given: str, expected: dict[str, Any]) -> None:
    found = imported(
        LEAST.replace('network_module = "networks.lora"\n', "") + given if "network_module" in given else LEAST + given
    )
    told = {name: setting(found, name) for name in expected}
    assert {
        name: str(value) if "length" in name or name == "save.every" else value for name, value in told.items()
    } == expected


def rate(found: Imported, step: int, steps: int) -> float:
    """Factor on the learning rate at a step of the imported schedule."""
    return factor(setting(found, "schedule.name"), parse_sections(found.values, [])["schedule"].settings, step, steps)


def test_schedules_have_the_rates_of_their_formulas(imported: Any) -> None:
    """diffusers' and transformers' formulas, written out."""
    run = LEAST + "max_train_steps = 1000\nlearning_rate = 1e-4\n"
    restarts = imported(
        run + 'lr_scheduler = "cosine_with_restarts"\nlr_scheduler_num_cycles = 3\nlr_warmup_steps = 0.1'
    )
    polynomial = imported(run + 'lr_scheduler = "polynomial"\nlr_scheduler_power = 2')
    lowest = imported(run + 'lr_scheduler = "cosine_with_min_lr"\nlr_scheduler_min_lr_ratio = 0.1')
    root = imported(run + 'lr_scheduler = "inverse_sqrt"\nlr_warmup_steps = 100')
    for step in (0, 50, 100, 333, 640, 999):
        share = max(0, step - 100) / 900
        warm = step / 100 if step < 100 else 0.5 * (1 + math.cos(math.pi * ((3 * share) % 1)))
        assert rate(restarts, step, 1000) == pytest.approx(warm)
        assert rate(polynomial, step, 1000) * 1e-4 == pytest.approx((1e-4 - 1e-7) * (1 - step / 1000) ** 2 + 1e-7)
        assert rate(lowest, step, 1000) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 1000)))
        assert rate(root, step, 1000) == pytest.approx(
            step / 100 if step < 100 else 1 / math.sqrt((step - 100 + 100) / 100)
        )


def test_a_constant_schedule_has_no_warm_up(imported: Any) -> None:
    found = imported(LEAST + 'lr_scheduler = "constant"\nlr_warmup_steps = 100')
    assert kinds(found, "lr_warmup_steps") == {"unused"} and not setting(found, "schedule.warmup")
    assert (
        setting(
            imported(LEAST + 'lr_scheduler = "constant_with_warmup"\nlr_warmup_steps = 100'), "schedule.warmup"
        ).count
        == 100
    )


def test_packages_defaults_are_stated(imported: Any) -> None:
    found = imported(
        LEAST
        + 'learning_rate = 1.0\noptimizer_type = "prodigy"\noptimizer_args = ["d_coef=2", "betas=0.9,0.99"]\nunet_lr = 1.0\ntext_encoder_lr = 0.5'
    )
    settings = parse_sections(found.values, [])["optimizer"].settings
    assert (settings.d_coef, settings.betas) == (2.0, (0.9, 0.99))
    assert (settings.weight_decay, settings.use_bias_correction, settings.safeguard_warmup) == (0.0, False, False)
    assert setting(found, "optimizer.text_encoder_lr") == 1.0, "Prodigy has one rate"


def test_adafactor_finds_its_rate_unless_told_not_to(imported: Any) -> None:
    found = imported(LEAST + 'learning_rate = 1e-4\noptimizer_type = "AdaFactor"\nlr_scheduler = "cosine"')
    assert (
        setting(found, "optimizer.lr"),
        setting(found, "schedule.name"),
        setting(found, "optimizer.scale_parameter"),
    ) == (0.01, "constant", True)
    still = imported(
        LEAST
        + 'learning_rate = 1e-4\noptimizer_type = "AdaFactor"\nlr_scheduler = "cosine"\noptimizer_args = ["relative_step=False", "scale_parameter=False"]'
    )
    assert (
        setting(still, "optimizer.lr"),
        setting(still, "schedule.name"),
        setting(still, "optimizer.scale_parameter"),
    ) == (1e-4, "cosine", False)


FLUX = (
    LEAST.replace("networks.lora", "networks.lora_flux")
    + 'ae = "ae.safetensors"\nclip_l = "clip_l.safetensors"\nt5xxl = "t5xxl.safetensors"\nlearning_rate = 1e-4\n'
)


@pytest.mark.parametrize(
    ("given", "expected", "lost"),
    [
        ('timestep_sampling = "shift"\ndiscrete_flow_shift = 3.1582', {"timesteps": "shift", "shift": 3.1582}, False),
        ('timestep_sampling = "flux_shift"', {"timesteps": "flux-shift"}, False),
        ('timestep_sampling = "sigmoid"\nsigmoid_scale = 0.8', {"timesteps": "sigmoid", "sigmoid_scale": 0.8}, False),
        (
            'timestep_sampling = "sigma"\nweighting_scheme = "logit_normal"\nlogit_mean = 0.5\ndiscrete_flow_shift = 2.0',
            {"timesteps": "logit-normal", "logit_mean": 0.5 + math.log(2)},
            False,
        ),
        ('timestep_sampling = "sigma"\ndiscrete_flow_shift = 1.0', {"timesteps": "uniform"}, False),
        ("", {"timesteps": "shift", "shift": 3.0}, True),
    ],
)
def test_timesteps_of_flux(imported: Any, given: str, expected: dict[str, Any], lost: bool) -> None:
    found = imported(FLUX + 'model_prediction_type = "raw"\nguidance_scale = 1.0\n' + given)
    assert setting(found, "objective.name") == "flow"
    assert {name: setting(found, f"objective.{name}") for name in expected} == pytest.approx(expected)
    assert ("lost" in kinds(found, "timestep_sampling")) == lost


def test_flux_says_what_its_defaults_would_have_done(imported: Any) -> None:
    found = imported(FLUX + "min_snr_gamma = 5\nnoise_offset = 0.1")
    assert {line.key for line in found.of("lost")} >= {"model_prediction_type", "guidance_scale"}
    assert kinds(found, "min_snr_gamma") == {"unused"} and kinds(found, "noise_offset") == {"unused"}
    assert setting(found, "optimizer.text_encoder_lr") == (1e-4, 0.0), "T5 is not trained"
    assert [Path(path).name for path in setting(found, "model.text_encoders")] == [
        "clip_l.safetensors",
        "t5xxl.safetensors",
    ]


def test_what_cannot_be_is_loud_and_what_is_misspelt_is_guessed(imported: Any) -> None:
    found = imported(
        LEAST
        + "min_snr_gamma = 5\ndebiased_estimation_loss = true\nnoise_offset = 0.1\nmultires_noise_iterations = 6\nnetwork_dimm = 8\nlogging_dir = 'x'\nvae_batch_size = 4\ncolor_aug = true"  # noqa: E501
    )
    assert {line.key for line in found.of("lost")} == {
        "debiased_estimation_loss",
        "multires_noise_iterations",
        "color_aug",
    }
    (unknown,) = found.of("unknown")
    assert (
        unknown.key == "network_dimm"
        and "Did you mean 'network_dim'?" in unknown.note
        and "without a word" in unknown.note
    )
    assert found.asides == ("vae_batch_size",)


DATASET = """
[general]
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 768
batch_size = 3
enable_bucket = true
  [[datasets.subsets]]
  image_dir = "a"
  num_repeats = 10
  [[datasets.subsets]]
  image_dir = "b"
  num_repeats = 2
  keep_tokens = 1
  [[datasets.subsets]]
  image_dir = "class"
  is_reg = true
  keep_tokens = 5
"""


def test_a_dataset_config_is_inherited_subset_dataset_general_training(imported: Any, tmp_path: Path) -> None:
    found = imported(
        LEAST + "train_batch_size = 7\nresolution = 512\nmax_bucket_reso = 2048\nflip_aug = true", dataset=DATASET
    )
    assert setting(found, "data.folder") == (tmp_path / "a", tmp_path / "b") and setting(found, "data.repeats") == (
        10,
        2,
    )
    assert setting(found, "data.regularisation") == (tmp_path / "class",)
    assert (
        setting(found, "train.batch_size"),
        setting(found, "data.buckets.resolution"),
        setting(found, "data.buckets.max"),
    ) == (3, 768, 2048)
    assert setting(found, "data.captions.keep_tokens") == 1 and setting(found, "data.flip") is True
    assert not found.of("lost"), "regularisation pictures keep what they like"
    assert kinds(found, "train_data_dir") == {"unused"} == kinds(found, "train_batch_size")


def test_subsets_that_differ_are_told(imported: Any) -> None:
    found = imported(
        LEAST,
        dataset=DATASET.replace(
            'keep_tokens = 1\n  [[datasets.subsets]]\n  image_dir = "class"',
            'keep_tokens = 4\n  [[datasets.subsets]]\n  image_dir = "class"',
        ),
    )
    (lost,) = found.of("lost")
    assert lost.key == "keep_tokens" and "1, 4" in lost.note


def test_the_same_folder_at_several_sizes_is_several_resolutions(imported: Any) -> None:
    sizes = "".join(
        f'[[datasets]]\nresolution = {side}\nenable_bucket = true\nmax_bucket_reso = 2048\n[[datasets.subsets]]\nimage_dir = "a"\n'
        for side in (512, 768)
    )
    found = imported(LEAST, dataset=sizes)
    assert setting(found, "data.buckets.resolutions") == (512, 768) and setting(found, "data.folder").name == "a"


def test_a_key_that_a_dataset_config_may_not_have(imported: Any) -> None:
    found = imported(LEAST, dataset=DATASET.replace("shuffle_caption", "shufle_caption"))
    assert [(line.key, "Did you mean 'shuffle_caption'" in line.note) for line in found.of("unknown")] == [
        ("general.shufle_caption", True)
    ]


def test_lists_by_block_become_patterns(imported: Any) -> None:
    weights = ",".join(["1"] * 11 + ["0.5"])
    found = imported(
        LEAST
        + f'network_args = ["down_lr_weight={weights}", "mid_lr_weight=2", "up_lr_weight=0,0,0,1,1,1,1,1,1,1,1,0"]'
    )
    assert setting(found, "optimizer.block_lr") == {r"mid_block\.attentions\.0\.": 2.0}, (
        "SD's last block in has no attention, so no layer of a LoRA"
    )
    assert setting(found, "adapter.block_rank") == {r"up_blocks\.3\.attentions\.2\.": 0}
    several = imported(
        LEAST
        + f'network_dim = 4\nnetwork_alpha = 4\nnetwork_args = ["block_dims={",".join(["4"] * 12 + ["8"] + ["4"] * 12)}", "block_alphas={",".join(["4"] * 12 + ["8"] + ["4"] * 12)}"]'  # noqa: E501
    )
    assert setting(several, "adapter.block_rank") == {r"mid_block\.attentions\.0\.": 8}, "no residual blocks"
    assert not several.of("lost")


@pytest.mark.parametrize(
    "given",
    [
        'network_dim = "x"',
        "learning_rate = nan",
        "train_batch_size = 1.5",
        'optimizer_args = ["weight_decay"]',
        "enable_bucket = 7",
    ],
)
def test_values_of_no_such_kind_are_refused_all_at_once(imported: Any, given: str) -> None:
    with pytest.raises(Problems) as error:
        imported(LEAST + given + "\nseed = 'y'")
    assert {problem.where for problem in error.value.problems} == {given.split(" ")[0], "seed"}


@pytest.mark.parametrize(
    "given",
    [
        "network_dim = 5000",
        "train_batch_size = 0",
        "caption_dropout_rate = 3.0",
        "huber_c = 9.0\nloss_type = 'huber'",
        "max_token_length = 100",
        "learning_rate = 20.0",
    ],
)
def test_values_that_a_recipe_does_not_take_are_told_and_left_out(imported: Any, given: str) -> None:
    found = imported(LEAST + given)
    assert given.split(" ")[0] in {line.key for line in found.of("lost")}


def test_a_vae_in_float32_makes_no_sdxl(imported: Any) -> None:
    """train_network.py has no_half_vae as well."""
    found = imported(LEAST + "no_half_vae = true\nclip_skip = 2\n")
    assert found.values["model"]["clip_skip"] == 2
    xl = imported(LEAST + "sdxl = true\nclip_skip = 2\n")
    assert "clip_skip" not in xl.values["model"] and not xl.of("unknown")


@pytest.mark.parametrize("given", ["text_encoder_lr = 1e-4", "text_encoder_lr = [1e-4, 2e-5]"])
def test_t5_is_never_trained(imported: Any, given: str) -> None:
    found = imported(FLUX + f'network_args = ["train_t5xxl=True"]\n{given}\n')
    assert setting(found, "optimizer.text_encoder_lr") == (1e-4, 0.0)
    assert "network_args: train_t5xxl" in {line.key for line in found.of("lost")}
    without = imported(FLUX + 'network_args = ["train_t5xxl=True"]\nnetwork_train_unet_only = true\n')
    assert "network_args: train_t5xxl" in {line.key for line in without.of("unused")}
