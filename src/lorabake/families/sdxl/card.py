"""What an SDXL model consists of on disk, whatever layout its parts came in, and how it is told. No torch, and no weight is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.families.networks.clip_vocabulary import OPEN_CLIP_PAD, SD1_PAD, clip_tokenizer
from lorabake.families.networks.components import (
    Component,
    check_vocabulary,
    clip_in,
    digest_of,
    find_clip,
    find_vae,
    folder_part,
    folder_problems,
    latent_side,
    ldm_unet_in,
    ldm_unet_tensors,
    read_json,
    vae_in,
)
from lorabake.families.networks.config import MICRO_SIZES, ClipConfig, UNetConfig, VaeConfig
from lorabake.families.networks.layouts import classic_clip, same
from lorabake.families.networks.predictions import NAMES, prediction_of, said_by, said_in_folder
from lorabake.families.networks.tokenizer import WINDOW_TOKENS, ClipTokenizer, windows_for
from lorabake.families.networks.weights import Weights, open_weights
from lorabake.protocols.family import ZERO_TERMINAL_SNR, FamilyCard, ModelFacts, ModelSource, Part, Reader, TextOptions

SCALE = 0.13025
"""Of SDXL's latents, which single files do not say."""
PADS = (SD1_PAD, OPEN_CLIP_PAD)
"""What the two tokenizers fill rows up with, where no file says it."""
NOISE: Mapping[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""The noise schedule that SDXL was trained with, as ``scheduler_config.json`` says it."""
_LATENT_SIDE = 128
"""Of the latents SDXL is trained on, where no file says it: 1024 pixels."""
_LABELS = "label_emb.0.0.weight"
_SD2_TEXT = "cond_stage_model."
_TEXT, _TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_ADVICE = "Only whole SDXL text-to-image models can be trained; refiners and inpainting models are others."
_Encoders = tuple[Component[ClipConfig], Component[ClipConfig]]


@dataclass(frozen=True, slots=True)
class SDXLParts:
    """The networks, and what goes with them."""

    unet: Component[UNetConfig]
    text_encoder: Component[ClipConfig]
    text_encoder_2: Component[ClipConfig]
    """The one that also gives the whole text as one vector."""
    vae: Component[VaeConfig]
    scheduler: Mapping[str, Any]
    """As in ``scheduler_config.json``, with the prediction that is to be believed."""
    latent_side: int
    """Side of the latents the model was trained on."""
    tokenizer_folders: tuple[Path, Path] | None
    """None for CLIP's own vocabulary."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""

    def tokenizers(self) -> tuple[ClipTokenizer, ClipTokenizer]:
        """One for each text encoder.

        Raises:
            UserError: their files are missing or broken, or know more tokens than their text encoder.
        """
        folders = self.tokenizer_folders
        first, second = map(ClipTokenizer.from_folder, folders) if folders else map(clip_tokenizer, PADS)
        check_vocabulary(first.size, self.text_encoder)
        check_vocabulary(second.size, self.text_encoder_2)
        return first, second


def parts_of(source: ModelSource, *, half: bool = False) -> SDXLParts | None:
    """The parts of an SDXL model; None if ``source`` is something else.

    Args:
        source: where it is.
        half: take fp16 variants in a folder where both are there.

    Raises:
        UserError: it is one and cannot be used: parts are missing or damaged, or do not fit each other.
    """
    parts = _in_folder(source, half) if source.base.is_dir() else _in_file(source)
    if parts is not None and (problems := list(_misfits(parts))):
        raise Problems(str(source.base), problems, _ADVICE)
    return parts


def _in_folder(source: ModelSource, half: bool) -> SDXLParts | None:
    folder, sizes = source.base, source.base / "unet" / "config.json"
    values = read_json(sizes) if sizes.is_file() else {}
    if values.get("_class_name") != "UNet2DConditionModel" or values.get("addition_embed_type") != "text_time":
        return None
    encoders = () if source.text_encoders else ("text_encoder", "text_encoder_2")
    own = ["unet", *encoders, *(() if source.vae else ("vae",))]
    if problems := folder_problems(folder, own, ["tokenizer", "tokenizer_2"]):
        raise Problems(str(folder), problems, _ADVICE)
    unet = folder_part(folder / "unet", UNetConfig.from_json, same, half=half)
    if source.text_encoders:
        first, second = _given_encoders(source)
    else:
        first, second = (
            folder_part(folder / name, ClipConfig.from_json, classic_clip(projection=wide), half=half)
            for name, wide in (("text_encoder", False), ("text_encoder_2", True))
        )
    vae = find_vae(source.vae or folder / "vae", SCALE, half=half)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    said = said_in_folder(scheduler, str(folder), source.prediction)
    scheduler["prediction_type"] = NAMES[said.prediction]
    side = latent_side(values, sizes, _LATENT_SIDE)
    tokenizers = (folder / "tokenizer", folder / "tokenizer_2")
    return SDXLParts(unet, first, second, vae, scheduler, side, tokenizers, said.notes)


def _in_file(source: ModelSource) -> SDXLParts | None:
    weights = open_weights(source.base)
    if _LABELS not in ldm_unet_tensors(weights) or any(
        name.startswith(_SD2_TEXT) for name in weights
    ):  # SD2's unCLIP has labels too
        return None
    unet = ldm_unet_in(weights)
    first, second = _given_encoders(source) if source.text_encoders else _encoders_in(weights)
    vae = find_vae(source.vae, SCALE) if source.vae else vae_in(weights, SCALE)
    if first is None or second is None or vae is None:
        raise Problems(str(source.base), list(_missing(first, second, vae)), _ADVICE)
    said = said_by(weights, source.prediction, ("epsilon", None))
    scheduler: dict[str, Any] = {**NOISE, "prediction_type": NAMES[said.prediction]}
    if said.zero_terminal_snr:
        scheduler |= ZERO_TERMINAL_SNR
    return SDXLParts(unet, first, second, vae, scheduler, _LATENT_SIDE, None, said.notes)


def _encoders_in(weights: Weights) -> tuple[Component[ClipConfig] | None, Component[ClipConfig] | None]:
    return clip_in(weights.under(_TEXT)), clip_in(weights.under(_TEXT_2), projection=True)


def _missing(first: object | None, second: object | None, vae: object | None) -> Iterator[Problem]:
    apart = 'Give both apart: text_encoders = ["CLIP_L.safetensors", "CLIP_G.safetensors"] in [model].'
    if first is None:
        yield Problem("text encoder 1", f"is not in the file (no '{_TEXT}*'). {apart}")
    if second is None:
        yield Problem("text encoder 2", f"is not in the file (no '{_TEXT_2}*'). {apart}")
    if vae is None:
        what = "is not in the file (no 'first_stage_model.*'). Give it apart: vae = \"VAE.safetensors\" in [model]."
        yield Problem("VAE", what)


def _given_encoders(source: ModelSource) -> _Encoders:
    """The text encoders given beside the model, in any order: the second is the wider one."""
    if len(source.text_encoders) != 2:
        count = len(source.text_encoders)
        raise UserError(
            f"{source.base} is an SDXL model, which has two text encoders; {count} given. Give both, or none."
        )
    narrow, wide = sorted(source.text_encoders, key=lambda path: find_clip(path).config.hidden_size)
    second = find_clip(wide, projection=True)
    if wide.is_file():  # in transformers' layout both look the same; only the first has OpenAI's approximate GELU
        second = dataclasses.replace(second, config=dataclasses.replace(second.config, quick_gelu=False))
    return find_clip(narrow), second


def _misfits(parts: SDXLParts) -> Iterator[Problem]:
    """What parts of different models, and kinds of model that are not trained here, show."""
    unet, vae = parts.unet.config, parts.vae.config
    clip, clip_2 = parts.text_encoder.config, parts.text_encoder_2.config
    told = clip_2.projection_dim + MICRO_SIZES * unet.size_channels
    rows = (
        ("in_channels", unet.in_channels, vae.latent_channels, "the vae's latent_channels"),
        ("out_channels", unet.out_channels, vae.latent_channels, "the vae's latent_channels"),
        ("cross_attention_dim", unet.cross_attention_dim, clip.hidden_size + clip_2.hidden_size, "both text encoders' hidden_size"),
        ("projection_class_embeddings_input_dim", unet.micro_channels, told, "text_encoder_2's projection_dim with all sizes"),
    )  # fmt: skip
    for name, given, expected, what in rows:
        if given != expected:
            yield Problem(f"unet: {name}", f"is {given}, but {what} makes it {expected}.")


def recognise(source: ModelSource) -> ModelFacts | None:
    """Facts, if ``source`` is a U-Net that is told of pooled text and sizes; else None.

    Raises:
        UserError: it is one, but parts are missing or damaged, do not fit each other, or are of a kind that is not supported.
    """
    parts = parts_of(source)
    if parts is None:
        return None
    unet, latent_scale = parts.unet.config, parts.vae.config.latent_scale
    return ModelFacts(
        family="sdxl",
        path=source.base,
        name=source.base.stem if source.base.is_file() else source.base.name,
        prediction=prediction_of(parts.scheduler),
        resolution=parts.latent_side * latent_scale,
        pixel_step=latent_scale * 2 ** (len(unet.block_out_channels) - 1),
        latent_scale=latent_scale,
        latent_channels=unet.in_channels,
        base_version="sdxl_base_v1-0",
        architecture="stable-diffusion-xl-v1-base",
        implementation="https://github.com/Stability-AI/generative-models",
        digest=digest_of(source),
        small=max(unet.block_out_channels) < 256,
        vae=source.vae,
        text_encoders=source.text_encoders,
        notes=parts.notes,
    )


def readers(facts: ModelFacts, options: TextOptions) -> dict[Part, Reader]:
    """What the two text encoders see of captions.

    Raises:
        UserError: the tokenizers' files are missing or broken.
    """
    parts, windows = parts_of(facts.source), windows_for(options.get("max_tokens") or WINDOW_TOKENS)
    assert parts is not None, f"{facts.path} was recognised before"
    first, second = (functools.partial(tokenizer.read, windows=windows) for tokenizer in parts.tokenizers())
    return {"text_encoder": first, "text_encoder_2": second}


CARD = FamilyCard(
    kind="family",
    name="sdxl",
    summary="Stable Diffusion XL and models of its make, any size: a UNet and two CLIP text encoders.",
    code="lorabake.families.sdxl.model:SDXLModel",
    recognise=recognise,
    text_options=frozenset({"max_tokens"}),
    readers=readers,
)
