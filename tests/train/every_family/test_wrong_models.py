"""Base models that cannot be trained on, as people give them to ``lorabake train``: exit code 2, one message, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorabake.base.errors import Problems, UserError
from lorabake.families import family_card, inspect_model, load_model
from lorabake.families.networks.config import UNetConfig, VaeConfig
from lorabake.families.networks.layouts import Paths, ldm_unet, ldm_vae
from lorabake.families.networks.vae import AutoencoderKL
from lorabake.recipe import check

Models = Callable[[str], Path]
"""The model folder of a family, by name."""
UNET = "model.diffusion_model."
CLIP_TOKENS = 49408


def tensors_of(part: Path) -> dict[str, Tensor]:
    (file,) = part.glob("*.safetensors")
    return load_file(file)


def single_sdxl(model: Path) -> dict[str, Tensor]:
    """All tensors of an SDXL model under the names of single files."""

    def renamed(part: str, table: Paths, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}{table.theirs(name)}": tensor for name, tensor in tensors_of(model / part).items()}

    unet = UNetConfig.from_json(json.loads((model / "unet/config.json").read_text()))
    vae = VaeConfig(block_out_channels=(32,), layers_per_block=1)  # single files are read with 32 groups of channels
    names = ldm_vae(vae)
    encoders = {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    }
    return {
        **renamed("unet", ldm_unet(unet), UNET),
        **{f"first_stage_model.{names.theirs(name)}": t for name, t in AutoencoderKL(vae).state_dict().items()},
        **{prefix + name: t for part, prefix in encoders.items() for name, t in tensors_of(model / part).items()},
    }


def whole(models: Models, here: Path) -> list[str]:
    """With as many tokens as single files are read with: CLIP's whole vocabulary."""
    tensors = single_sdxl(models("sdxl"))
    for name in [name for name in tensors if name.endswith("token_embedding.weight")]:
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, CLIP_TOKENS - len(tensors[name])))
    save_file(tensors, here / "base.safetensors")
    return []


def cut_short(models: Models, here: Path) -> list[str]:
    whole(models, here)
    data = (here / "base.safetensors").read_bytes()
    (here / "base.safetensors").write_bytes(data[: len(data) // 2])
    return []


def pickled(models: Models, here: Path) -> list[str]:
    torch.save(tensors_of(models("sd1") / "unet"), here / "base.ckpt")
    return ["--base", "base.ckpt"]


def pickled_and_renamed(models: Models, here: Path) -> list[str]:
    torch.save(tensors_of(models("sd1") / "unet"), here / "base.safetensors")
    return []


def a_lora(models: Models, here: Path) -> list[str]:
    layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
    pair = {f"{layer}.lora_down.weight": torch.zeros(4, 32), f"{layer}.lora_up.weight": torch.zeros(32, 4)}
    save_file(pair, here / "base.safetensors", {"ss_base_model_version": "sd_v1"})
    return []


def eight_bits(models: Models, here: Path) -> list[str]:
    tensors = single_sdxl(models("sdxl"))
    save_file(
        {name: t.to(torch.float8_e4m3fn) if UNET in name else t for name, t in tensors.items()},
        here / "base.safetensors",
    )
    return []


def no_vae(models: Models, here: Path) -> list[str]:
    tensors = single_sdxl(models("sdxl"))
    save_file({name: t for name, t in tensors.items() if not name.startswith("first_stage")}, here / "base.safetensors")
    return []


def flux_alone(models: Models, here: Path) -> list[str]:
    state = load_model(models("flux")).parts["denoiser"].state_dict()
    own = {name.replace("_norm.weight", "_norm.scale"): tensor for name, tensor in state.items()}
    save_file(own, here / "base.safetensors")
    return []


def encoders(family: str, *others: str) -> Callable[[Models, Path], list[str]]:
    """A family's model with text encoders of others: ``sd2-v/text_encoder``."""

    def make(models: Models, here: Path) -> list[str]:
        given = [str(models(name) / part) for name, _, part in (other.partition("/") for other in others)]
        return ["--base", str(models(family)), "--set", f"model.text_encoders={json.dumps(given)}"]

    return make


CASES: dict[str, tuple[Callable[[Models, Path], list[str]], list[str]]] = {
    "cut short": (cut_short, ["base.safetensors", "cut short", "download it again"]),
    "a pickle": (pickled, ["base.ckpt", "is not opened", "runs whatever code is in it", "save_file"]),
    "a pickle with another suffix": (pickled_and_renamed, ["base.safetensors", "is not opened", "runs whatever code is in it"]),
    "a LoRA": (a_lora, ["base.safetensors", "it is a LoRA", "Give the base model"]),
    "8 bits": (eight_bits, ["base.safetensors", "F8_E4M3", "fp16, bf16 or fp32"]),
    "SDXL without its VAE": (no_vae, ["VAE", "first_stage_model", "vae ="]),
    "Flux without all the rest": (flux_alone, ["CLIP", "T5", "VAE", "text_encoders = [", "vae ="]),
    "SD1 with SD2's text encoder": (encoders("sd1", "sd2-v/text_encoder"), ["cross_attention_dim", "32", "48"]),
    "SD1 with a T5": (encoders("sd1", "flux/text_encoder_2"), ["text_encoder_2", "config.json", "model_type", "'t5'", "'clip'"]),
    "SD1 with two": (encoders("sd1", "sd1/text_encoder", "sdxl/text_encoder_2"), ["one text encoder", "2 were given"]),
    "SDXL with SD1's alone": (encoders("sdxl", "sd1/text_encoder"), ["two text encoders", "1 given"]),
    "SDXL with one too wide": (encoders("sdxl", "sd2-v/text_encoder", "sdxl/text_encoder_2"), ["cross_attention_dim", "80", "96"]),
    "SDXL with a T5": (encoders("sdxl", "sdxl/text_encoder", "flux/text_encoder_2"), ["text_encoder_2", "model_type", "'t5'", "'clip'"]),
    "Flux with SD2's CLIP": (encoders("flux", "sd2-v/text_encoder"), ["pooled_projection_dim", "32", "48"]),
    "Flux with two CLIPs": (encoders("flux", "sd1/text_encoder", "sdxl/text_encoder"), ["two", "text_encoders"]),
}  # fmt: skip


@pytest.fixture
def models(kitchens: Any) -> Models:
    return lambda name: kitchens(name).folder / "model"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(oven: Any, models: Models, kitchens: Any, tmp_path: Path, case: str) -> None:
    make, expected = CASES[case]
    shutil.copytree(
        kitchens("sd1").folder / "pictures", tmp_path / "pictures", ignore=shutil.ignore_patterns(".lorabake")
    )
    words = make(models, tmp_path)
    before = everything(tmp_path)
    done = oven.run("train", "pictures", *(words or ["--base", "base.safetensors"]), cwd=tmp_path)
    assert done.code == 2 and done.out == "", done.err
    assert "Traceback" not in done.err and "Nothing was started." in done.err
    assert [word for word in expected if word not in done.err] == [], done.err
    assert done.err.count("has 1 problem") + done.err.count("problems.") == 1, done.err
    assert everything(tmp_path) == before


def test_the_same_file_whole_is_fine(oven: Any, models: Models, kitchens: Any, tmp_path: Path) -> None:
    """What makes the cases above: without what was done to it, the file is a base model."""
    whole(models, tmp_path)
    done = oven.run("validate", kitchens("sdxl").recipe, "--base", "base.safetensors", cwd=tmp_path)
    assert done.code == 0 and "base (sdxl, epsilon" in done.out, done.err


@pytest.mark.slow
def test_a_v_model_that_is_called_an_epsilon_model_is_found_out(
    oven: Any, models: Models, kitchens: Any, tmp_path: Path
) -> None:
    """A v model that has learned its pictures, by ``lorabake train`` itself, is then declared to predict noise."""
    for name in ("001.png", "001.txt"):  # one picture four times an epoch
        (tmp_path / "pictures" / "4_mira").mkdir(parents=True, exist_ok=True)
        shutil.copy(kitchens("sd2-v").folder / "pictures" / "1_mira" / name, tmp_path / "pictures" / "4_mira")
    usual = [
        "train.device=cpu",
        "train.threads=1",
        "data.buckets.resolution=80",
        "output.name=mira",
        "save.every=1000 steps",
    ]
    full = ["adapter.name=full", "optimizer.lr=0.003", "optimizer.text_encoder_lr=0", "objective.weighting=none",
            "train.batch_size=4", "train.length=120 steps"]  # fmt: skip

    def train(base: Path, into: str, *settings: str) -> Any:
        words = [word for setting in (*usual, *settings) for word in ("--set", setting)]
        return oven.run("train", tmp_path / "pictures", "--base", base, "--into", tmp_path / into, *words)

    learned = train(models("sd2-v"), "learned", *full)
    assert learned.code == 0, learned.err
    base = tmp_path / "learned" / "checkpoints" / "mira"
    honest = train(base, "honest", "train.length=1 steps")
    assert honest.code == 0, honest.err
    wrong = train(base, "wrong", "model.prediction=epsilon")
    assert wrong.code == 2 and "Traceback" not in wrong.err
    assert "is declared to predict noise (epsilon), but it answers as a model that predicts v would" in wrong.err
    assert 'Set model.prediction = "v".' in wrong.err and "Nothing was started." in wrong.err
    assert [path.name for path in (tmp_path / "wrong").iterdir() if path.name != ".lock"] == []


def test_float16_is_refused_before_the_run_where_a_family_cannot_run_in_it(kitchens: Any) -> None:
    for name in ("sd1", "sdxl", "flux", "sd3"):
        kitchen = kitchens(name)
        facts = inspect_model(kitchen.folder / "model")
        if family_card(facts).fp16:
            check(kitchen.recipe, ["train.precision=fp16"])
            continue
        with pytest.raises(Problems, match=r"train.precision.*'fp16'.*overflows"):
            check(kitchen.recipe, ["train.precision=fp16"])
        with pytest.raises(UserError, match="float16"):
            load_model(facts, dtype=torch.float16)
