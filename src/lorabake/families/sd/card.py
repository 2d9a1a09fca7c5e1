"""What a Stable Diffusion 1.x or 2.x model consists of on disk, whatever layout its parts came in, and how it is told. No torch, and no weight is read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.base.places import POCKET_MODEL
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
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig
from lorabake.families.networks.layouts import same
from lorabake.families.networks.predictions import NAMES, prediction_of, said_by, said_in_folder
from lorabake.families.networks.tokenizer import WINDOW_TOKENS, ClipTokenizer, windows_for
from lorabake.families.networks.weights import FLOATS, Weights, numbers, open_weights
from lorabake.protocols.family import (
    ZERO_TERMINAL_SNR,
    FamilyCard,
    ModelFacts,
    ModelSource,
    Part,
    Prediction,
    Reader,
    TextOptions,
)

SCALE = 0.18215
"""Of SD's latents, which single files do not say."""
NOISE: Mapping[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""The noise schedule that SD was trained with, as ``scheduler_config.json`` says it."""
_SD1_HEADS = 8
_LATENT_SIDE = 64
"""Of the latents a model is trained on, where no file says it: 512 pixels."""
_LATENT_SIDE_V = 96
"""The same for the SD2 models that predict v: 768 pixels."""
_TELLING_NORM = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09
_OTHER_INPUTS = {9: "an inpainting model", 5: "a depth model", 8: "an instruct-pix2pix model"}
"""Kinds of U-Net that see more than latents, by their input channels beside 4 output channels."""


@dataclass(frozen=True, slots=True)
class SDParts:
    """The networks, and what goes with them."""

    unet: Component[UNetConfig]
    text_encoder: Component[ClipConfig]
    vae: Component[VaeConfig]
    scheduler: Mapping[str, Any]
    """As in ``scheduler_config.json``, with the prediction that is to be believed."""
    latent_side: int
    """Side of the latents the model was trained on."""
    tokenizer_folder: Path | None
    """None for CLIP's own vocabulary."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""

    @property
    def second(self) -> bool:
        """SD2.x: linear layers around the transformers, where SD1.x has 1×1 convolutions."""
        return self.unet.config.use_linear_projection

    @property
    def pad(self) -> str:
        """Token that rows are filled up with where there is no ``tokenizer_folder``."""
        return OPEN_CLIP_PAD if self.second else SD1_PAD

    def tokenizer(self) -> ClipTokenizer:
        """The tokenizer.

        Raises:
            UserError: its files are missing or broken, or it knows more tokens than the text encoder.
        """
        folder = self.tokenizer_folder
        tokenizer = ClipTokenizer.from_folder(folder) if folder else clip_tokenizer(self.pad)
        check_vocabulary(tokenizer.size, self.text_encoder)
        return tokenizer


def parts_of(source: ModelSource, *, half: bool = False) -> SDParts | None:
    """The parts of an SD1.x or SD2.x model; None if ``source`` is something else.

    Args:
        source: where it is.
        half: take fp16 variants in a folder where both are there.

    Raises:
        UserError: it is one and cannot be used: parts are missing or damaged, or do not fit each other.
    """
    parts = _in_folder(source, half) if source.base.is_dir() else _in_file(source)
    if parts is not None and (problems := list(_misfits(parts))):
        raise Problems(
            str(source.base),
            problems,
            "The parts are of different models, or the model is of a kind that is not trained.",
        )
    return parts


def _in_file(source: ModelSource) -> SDParts | None:
    weights = open_weights(source.base)
    inside = ldm_unet_tensors(weights)
    if "input_blocks.0.0.weight" not in inside or "label_emb.0.0.weight" in inside:
        return None
    second = len(inside.shape("middle_block.1.proj_in.weight")) == 2
    unet = ldm_unet_in(weights, None if second else _SD1_HEADS)
    if second:  # SD 2.1's scores leave the range of 16 bits, and 2.0's tensors look the same
        unet = dataclasses.replace(unet, config=dataclasses.replace(unet.config, exact_attention=True))
    given = _text_encoder_path(source)
    text_encoder = find_clip(given, skipped=int(second)) if given else clip_in(weights, skipped=int(second))
    vae = find_vae(source.vae, SCALE) if source.vae else vae_in(weights, SCALE)
    if text_encoder is None or vae is None:
        advice = "The file holds the U-Net of a Stable Diffusion model."
        raise Problems(str(source.base), list(_missing(text_encoder, vae)), advice)
    said = said_by(weights, source.prediction, _undeclared(weights) if second else ("epsilon", None))
    scheduler: dict[str, Any] = {**NOISE, "prediction_type": NAMES[said.prediction]}
    if said.zero_terminal_snr:
        scheduler |= ZERO_TERMINAL_SNR
    side = _LATENT_SIDE_V if second and said.prediction == "v" else _LATENT_SIDE
    return SDParts(unet, text_encoder, vae, scheduler, side, None, said.notes)


def _missing(text_encoder: object | None, vae: object | None) -> Iterator[Problem]:
    if text_encoder is None:
        what = "is not in the file (no 'cond_stage_model.*'). Give it apart: text_encoders = [\"CLIP.safetensors\"] in [model]."
        yield Problem("text encoder", what)
    if vae is None:
        what = "is not in the file (no 'first_stage_model.*'). Give it apart: vae = \"VAE.safetensors\" in [model]."
        yield Problem("VAE", what)


def _undeclared(weights: Weights) -> tuple[Prediction, str]:
    """What an SD2 file predicts that does not say it: the biases of one norm spread wider in models that predict v.

    The rule is ComfyUI's, and only a sign: that is why the answer comes with a note. kohya's scripts take noise unless told.
    """
    entry = ldm_unet_tensors(weights).get(_TELLING_NORM)
    spread = float(numbers(entry).std()) if entry and entry.dtype in FLOATS else None
    prediction: Prediction = "v" if spread is not None and spread > _V_SPREAD else "epsilon"
    sign = (
        "nothing in it tells"
        if spread is None
        else f"the biases of its last norm spread by {spread:.3f}; v: above {_V_SPREAD:g}"
    )
    return prediction, (
        f"The file does not say whether this SD2 model predicts noise (as 512-base) or v (as 768-v). '{prediction}' is assumed "
        f'({sign}). Set model.prediction = "epsilon" or "v" to be sure.'
    )


def _text_encoder_path(source: ModelSource) -> Path | None:
    if len(source.text_encoders) > 1:
        count = len(source.text_encoders)
        raise UserError(f"{source.base} is an SD1.x or SD2.x model, which has one text encoder; {count} were given.")
    return next(iter(source.text_encoders), None)


def _in_folder(source: ModelSource, half: bool) -> SDParts | None:
    folder = source.base
    if not (folder / "unet" / "config.json").is_file():
        return None
    values = read_json(folder / "unet" / "config.json")
    if values.get("_class_name") != "UNet2DConditionModel" or values.get("addition_embed_type"):
        return None
    clip_path = _text_encoder_path(source)
    own = ["unet", *(() if clip_path else ("text_encoder",)), *(() if source.vae else ("vae",))]
    if problems := folder_problems(folder, own, ["tokenizer"]):
        raise Problems(str(folder), problems, "Give a folder in diffusers' layout, as model hosts offer it.")
    unet = folder_part(folder / "unet", UNetConfig.from_json, same, half=half)
    skipped = int(unet.config.use_linear_projection)  # a folder's own text encoder is already without it
    text_encoder = find_clip(clip_path or folder / "text_encoder", skipped=skipped, half=half)
    vae = find_vae(source.vae or folder / "vae", SCALE, half=half)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    said = said_in_folder(scheduler, str(folder), source.prediction)
    scheduler["prediction_type"] = NAMES[said.prediction]
    side = latent_side(values, folder / "unet" / "config.json", _LATENT_SIDE)
    return SDParts(unet, text_encoder, vae, scheduler, side, folder / "tokenizer", said.notes)


def _misfits(parts: SDParts) -> Iterator[Problem]:
    """What parts of different models, and kinds of model that are not trained here, show."""
    unet, clip, vae = parts.unet.config, parts.text_encoder.config, parts.vae.config
    if unet.in_channels != unet.out_channels:
        kind = _OTHER_INPUTS.get(unet.in_channels, "a model of another kind")
        what = f"is {unet.in_channels}: {kind}, which sees more than latents. Only text-to-image models can be trained; take its base."
        yield Problem("unet: in_channels", what)
    if unet.cross_attention_dim != clip.hidden_size:
        what = f"is {unet.cross_attention_dim}, but the text encoder's hidden_size is {clip.hidden_size}."
        yield Problem("unet: cross_attention_dim", what)
    if vae.latent_channels != unet.out_channels:
        what = f"is {unet.out_channels}, but the vae's latent_channels is {vae.latent_channels}."
        yield Problem("unet: out_channels", what)


def recognise(source: ModelSource) -> ModelFacts | None:
    """Facts, if ``source`` is a U-Net conditioned on one CLIP text encoder; else None.

    Raises:
        UserError: it is one, but parts are missing or damaged, do not fit each other, or are of a kind that is not supported.
    """
    parts = parts_of(source)
    if parts is None:
        return None
    unet, latent_scale, prediction = parts.unet.config, parts.vae.config.latent_scale, prediction_of(parts.scheduler)
    version, architecture = ("sd_v1", "stable-diffusion-v1")
    if parts.second:
        version, architecture = "sd_v2", "stable-diffusion-v2-" + ("768-v" if prediction == "v" else "512")
    name = source.base.stem if source.base.is_file() else source.base.name
    return ModelFacts(
        family="sd",
        path=source.base,
        name="pocket" if source.base.resolve() == POCKET_MODEL else name,
        prediction=prediction,
        resolution=parts.latent_side * latent_scale,
        pixel_step=latent_scale * 2 ** (len(unet.block_out_channels) - 1),
        latent_scale=latent_scale,
        latent_channels=unet.in_channels,
        base_version=version + ("_v" if prediction == "v" else ""),
        architecture=architecture,
        implementation="diffusers",
        digest=digest_of(source),
        small=max(unet.block_out_channels) < 256,
        vae=source.vae,
        text_encoders=source.text_encoders,
        notes=parts.notes,
    )


def readers(facts: ModelFacts, options: TextOptions) -> dict[Part, Reader]:
    """What the text encoder sees of captions.

    Raises:
        UserError: the tokenizer's files are missing or broken.
    """
    parts = parts_of(facts.source)
    assert parts is not None, f"{facts.path} was recognised before"
    return {
        "text_encoder": functools.partial(
            parts.tokenizer().read, windows=windows_for(options.get("max_tokens") or WINDOW_TOKENS)
        )
    }


CARD = FamilyCard(
    kind="family",
    name="sd",
    summary="Stable Diffusion 1.x and 2.x, any size: a UNet and one CLIP text encoder.",
    code="lorabake.families.sd.model:SDModel",
    recognise=recognise,
    text_options=frozenset({"clip_skip", "max_tokens"}),
    readers=readers,
)
