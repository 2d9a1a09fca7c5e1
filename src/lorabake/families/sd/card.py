"""Facts of Stable Diffusion 1.x and 2.x models, read from the small configuration files of a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorabake.base.errors import UserError
from lorabake.base.files import quick_digest
from lorabake.protocols.family import FamilyCard, ModelFacts

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def recognise(path: Path) -> ModelFacts | None:
    """Facts, if ``path`` is a diffusers folder whose denoiser is a UNet conditioned on one CLIP text encoder; else None.

    Raises:
        UserError: it is one, but its configuration is broken or asks for what is not supported.
    """
    unet = _read(path / "unet" / "config.json")
    if unet is None or unet.get("_class_name") != "UNet2DConditionModel" or unet.get("addition_embed_type"):
        return None
    vae, scheduler = _required(path / "vae" / "config.json"), _required(path / "scheduler" / "scheduler_config.json")
    prediction = _PREDICTIONS.get(scheduler.get("prediction_type", "epsilon"))
    if prediction is None:
        raise UserError(
            f"{path}: prediction type '{scheduler['prediction_type']}' is not supported. Allowed: {', '.join(_PREDICTIONS)}."
        )
    latent_scale = 2 ** (len(vae["block_out_channels"]) - 1)
    second = unet["cross_attention_dim"] == 1024
    version = ("sd_v2" if second else "sd_v1") + ("_v" if prediction == "v" else "")
    architecture = (
        "stable-diffusion-v1" if not second else "stable-diffusion-v2-" + ("768-v" if prediction == "v" else "512")
    )
    return ModelFacts(
        family="sd",
        path=path,
        name=path.name if path.parent.name != "pocket" else "pocket",
        prediction="v" if prediction == "v" else "epsilon",
        resolution=unet["sample_size"] * latent_scale,
        pixel_step=latent_scale * 2 ** (len(unet["block_out_channels"]) - 1),
        latent_scale=latent_scale,
        latent_channels=unet["in_channels"],
        base_version=version,
        architecture=architecture,
        digest=quick_digest(
            sorted(file for file in path.glob("*/*") if file.suffix in (".safetensors", ".json", ".txt"))
        ),
        small=max(unet["block_out_channels"]) < 256,
    )


def _required(path: Path) -> dict[str, Any]:
    found = _read(path)
    if found is None:
        raise UserError(f"The model folder is not whole: {path} is missing.")
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    return found if isinstance(found, dict) else None


CARD = FamilyCard(
    kind="family",
    name="sd",
    summary="Stable Diffusion 1.x and 2.x, any size: a UNet and one CLIP text encoder.",
    code="lorabake.families.sd.model:SDModel",
    recognise=recognise,
)
