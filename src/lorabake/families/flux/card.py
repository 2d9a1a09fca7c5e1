"""Facts of Flux.1 models, from their configuration files and the headers of their weights."""

from __future__ import annotations

import functools

from lorabake.protocols.family import FamilyCard, ModelFacts, ModelSource, Part, Reader

# What reads models is imported when one is read: cards are walked for every list and every help text.

_RESOLUTION = 1024
_PATCH = 2


def recognise(source: ModelSource) -> ModelFacts | None:
    """Facts, if ``source`` is a Flux.1 model; else None.

    Raises:
        UserError: it is one, but parts are missing or damaged, do not fit each other, or are of a kind that is not supported.
    """
    from lorabake.base.files import quick_digest
    from lorabake.families.flux.parts import parts_of
    from lorabake.families.networks.components import files_of

    parts = parts_of(source)
    if parts is None:
        return None
    config, vae = parts.transformer.config, parts.vae.config
    return ModelFacts(
        family="flux",
        path=source.base,
        name=source.base.stem if source.base.is_file() else source.base.name,
        prediction="flow",
        resolution=_RESOLUTION,
        pixel_step=vae.latent_scale * _PATCH,
        latent_scale=vae.latent_scale,
        latent_channels=vae.latent_channels,
        base_version="flux1",
        architecture="flux-1-dev" if config.guidance else "flux-1-schnell",
        digest=quick_digest(files_of(source)),
        small=config.channels < 256,
        vae=source.vae,
        text_encoders=source.text_encoders,
    )


def readers(facts: ModelFacts, max_tokens: int) -> dict[Part, Reader]:
    """What T5 sees of captions. CLIP's part in it is one vector for the whole caption, from its first 75 tokens.

    Raises:
        UserError: the tokenizers' files are missing or broken.
    """
    from lorabake.families.flux.parts import parts_of

    parts = parts_of(facts.source)
    assert parts is not None, f"{facts.path} was recognised before"
    _, t5 = parts.tokenizers()
    return {"text_encoder_2": functools.partial(t5.read, length=parts.t5_tokens)}


CARD = FamilyCard(
    kind="family",
    name="flux",
    summary="Flux.1 dev and schnell, any size: a diffusion transformer, a CLIP and a T5 text encoder.",
    code="lorabake.families.flux.model:FluxModel",
    recognise=recognise,
    readers=readers,
)
