"""Facts of Stable Diffusion XL models, from their configuration files and the headers of their weights."""

from __future__ import annotations

import functools

from lorabake.protocols.family import FamilyCard, ModelFacts, ModelSource, Part, Reader

# What reads models is imported when one is read: cards are walked for every list and every help text.


def recognise(source: ModelSource) -> ModelFacts | None:
    """Facts, if ``source`` is a U-Net that is told of pooled text and sizes; else None.

    Raises:
        UserError: it is one, but parts are missing or damaged, do not fit each other, or are of a kind that is not supported.
    """
    from lorabake.base.files import quick_digest
    from lorabake.families.networks.components import files_of
    from lorabake.families.networks.predictions import prediction_of
    from lorabake.families.sdxl.parts import parts_of

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
        digest=quick_digest(files_of(source)),
        small=max(unet.block_out_channels) < 256,
        vae=source.vae,
        text_encoders=source.text_encoders,
        notes=parts.notes,
    )


def readers(facts: ModelFacts, max_tokens: int) -> dict[Part, Reader]:
    """What the two text encoders see of captions.

    Raises:
        UserError: the tokenizers' files are missing or broken.
    """
    from lorabake.families.networks.tokenizer import windows_for
    from lorabake.families.sdxl.parts import parts_of

    parts, windows = parts_of(facts.source), windows_for(max_tokens)
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
