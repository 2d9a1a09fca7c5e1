"""Facts of Stable Diffusion 1.x and 2.x models, from their configuration files and the headers of their weights."""

from __future__ import annotations

import functools

from lorabake.protocols.family import FamilyCard, ModelFacts, ModelSource, Part, Reader

# What reads models is imported when one is read: cards are walked for every list and every help text.


def recognise(source: ModelSource) -> ModelFacts | None:
    """Facts, if ``source`` is a U-Net conditioned on one CLIP text encoder; else None.

    Raises:
        UserError: it is one, but parts are missing or damaged, do not fit each other, or are of a kind that is not supported.
    """
    from lorabake.base.files import quick_digest
    from lorabake.families.networks.components import files_of
    from lorabake.families.networks.predictions import prediction_of
    from lorabake.families.sd.parts import parts_of

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
        name=name if source.base.parent.name != "pocket" else "pocket",
        prediction=prediction,
        resolution=parts.latent_side * latent_scale,
        pixel_step=latent_scale * 2 ** (len(unet.block_out_channels) - 1),
        latent_scale=latent_scale,
        latent_channels=unet.in_channels,
        base_version=version + ("_v" if prediction == "v" else ""),
        architecture=architecture,
        digest=quick_digest(files_of(source)),
        small=max(unet.block_out_channels) < 256,
        vae=source.vae,
        text_encoders=source.text_encoders,
        notes=parts.notes,
    )


def readers(facts: ModelFacts, max_tokens: int) -> dict[Part, Reader]:
    """What the text encoder sees of captions.

    Raises:
        UserError: the tokenizer's files are missing or broken.
    """
    from lorabake.families.networks.tokenizer import windows_for
    from lorabake.families.sd.parts import parts_of

    parts = parts_of(facts.source)
    assert parts is not None, f"{facts.path} was recognised before"
    return {"text_encoder": functools.partial(parts.tokenizer().read, windows=windows_for(max_tokens))}


CARD = FamilyCard(
    kind="family",
    name="sd",
    summary="Stable Diffusion 1.x and 2.x, any size: a UNet and one CLIP text encoder.",
    code="lorabake.families.sd.model:SDModel",
    recognise=recognise,
    text_options=frozenset({"clip_skip", "max_tokens"}),
    readers=readers,
)
