"""What a Flux.1 model consists of on disk, whatever layout its parts came in, and how it is told. No torch, and no weight is read."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems
from lorabake.families.networks.clip_vocabulary import clip_tokenizer
from lorabake.families.networks.components import (
    Component,
    check_vocabulary,
    clip_in,
    digest_of,
    find_clip,
    find_t5,
    find_vae,
    folder_part,
    folder_problems,
    given_encoders,
    read_json,
    t5_in,
    vae_in,
)
from lorabake.families.networks.config import ClipConfig, VaeConfig
from lorabake.families.networks.dit_config import FluxConfig, T5Config
from lorabake.families.networks.flow_schedule import shift_of
from lorabake.families.networks.flux_layout import flux_diffusers, flux_own, flux_own_config
from lorabake.families.networks.layouts import classic_clip
from lorabake.families.networks.t5_tokenizer import T5Tokenizer
from lorabake.families.networks.t5_vocabulary import t5_tokenizer
from lorabake.families.networks.tokenizer import ClipTokenizer
from lorabake.families.networks.weights import open_weights, shards
from lorabake.protocols.family import FamilyCard, ModelFacts, ModelSource, Part, Reader, TextOptions

_RESOLUTION, _PATCH = 1024, 2
SCALE, SHIFT = 0.3611, 0.1159
"""Of Flux's latents, (z − shift) · scale, which single files do not say."""
GUIDANCE = 3.5
"""What dev is told where nobody says: what Flux's own tools draw with."""
_DEV: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""The schedule that dev is drawn with, as ``scheduler_config.json`` says it."""
_SCHNELL: Mapping[str, Any] = {**_DEV, "shift": 1.0, "use_dynamic_shifting": False}
_PREFIXES = ("model.diffusion_model.", "")
_SIGNS = (
    "img_in.weight",
    "vector_in.in_layer.weight",
    "double_blocks.0.img_mod.lin.weight",
    "double_blocks.0.img_attn.norm.query_norm.scale",
    "single_blocks.0.linear1.weight",
)
"""Tensors that tell Flux.1 from others of its make (Chroma, Flux.2, HunyuanImage)."""
_CLIP_INSIDE, _T5_INSIDE = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
_ADVICE = "Only whole Flux.1 text-to-image models can be trained."
_GIVE = 'Give {} apart: text_encoders = ["CLIP_L.safetensors", "T5XXL.safetensors"] in [model].'


@dataclass(frozen=True, slots=True)
class FluxParts:
    """The networks, and what goes with them."""

    transformer: Component[FluxConfig]
    text_encoder: Component[ClipConfig]
    text_encoder_2: Component[T5Config]
    vae: Component[VaeConfig]
    scheduler: Mapping[str, Any]
    """As in ``scheduler_config.json``."""
    tokenizer_folder: Path | None
    """CLIP's; None for its own vocabulary."""
    tokenizer_2: Path | None
    """T5's: a folder or a file; None for its own vocabulary."""

    @property
    def t5_tokens(self) -> int:
        """Tokens of a caption that T5 reads where nobody says otherwise: 512 for dev, 256 for schnell, as they were trained."""
        return 512 if self.transformer.config.guidance else 256

    def tokenizers(self) -> tuple[ClipTokenizer, T5Tokenizer]:
        """CLIP's and T5's.

        Raises:
            UserError: their files are missing or broken, or know more tokens than their text encoder.
        """
        clip = ClipTokenizer.from_folder(self.tokenizer_folder) if self.tokenizer_folder else clip_tokenizer()
        t5 = t5_tokenizer(self.tokenizer_2)
        check_vocabulary(clip.size, self.text_encoder)
        check_vocabulary(t5.size, self.text_encoder_2)
        return clip, t5


def parts_of(source: ModelSource) -> FluxParts | None:
    """The parts of a Flux.1 model; None if ``source`` is something else.

    Raises:
        UserError: it is one and cannot be used: parts are missing or damaged, or do not fit each other.
    """
    parts = _in_folder(source) if source.base.is_dir() else _in_file(source)
    if parts is not None and (problems := list(_misfits(parts, source))):
        raise Problems(str(source.base), problems, _ADVICE)
    return parts


def _in_folder(source: ModelSource) -> FluxParts | None:
    folder, sizes = source.base, source.base / "transformer" / "config.json"
    if not sizes.is_file() or (values := read_json(sizes)).get("_class_name") != "FluxTransformer2DModel":
        return None
    given = given_encoders(source, "Flux.1", clips=1)
    clip = next(iter(given.clips), None)
    own = ["transformer"] + [
        name
        for name, path in (("text_encoder", clip), ("text_encoder_2", given.t5), ("vae", source.vae))
        if path is None
    ]
    if problems := folder_problems(folder, own, ["tokenizer", *([] if given.tokenizer else ["tokenizer_2"])]):
        raise Problems(str(folder), problems, _ADVICE)
    rename = flux_diffusers(FluxConfig.from_json(values, str(sizes)))
    return FluxParts(
        transformer=folder_part(folder / "transformer", FluxConfig.from_json, rename),
        text_encoder=find_clip(clip)
        if clip
        else folder_part(folder / "text_encoder", ClipConfig.from_json, classic_clip()),
        text_encoder_2=find_t5(given.t5 or folder / "text_encoder_2"),
        vae=find_vae(source.vae or folder / "vae", SCALE, SHIFT),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizer_folder=folder / "tokenizer",
        tokenizer_2=given.tokenizer or folder / "tokenizer_2",
    )


def _in_file(source: ModelSource) -> FluxParts | None:
    weights = open_weights(*shards(source.base))
    prefix = next((prefix for prefix in _PREFIXES if all(prefix + sign in weights for sign in _SIGNS)), None)
    if prefix is None:
        return None
    inside = weights.under(prefix)
    config = flux_own_config(inside)
    given = given_encoders(source, "Flux.1", clips=1)
    clip = find_clip(given.clips[0]) if given.clips else clip_in(weights.under(_CLIP_INSIDE))
    t5 = find_t5(given.t5) if given.t5 else t5_in(weights.under(_T5_INSIDE))
    vae = find_vae(source.vae, SCALE, SHIFT) if source.vae else vae_in(weights, SCALE, SHIFT)
    if clip is None or t5 is None or vae is None:
        raise Problems(str(source.base), list(_missing(clip, t5, vae)), _ADVICE)
    schedule = _DEV if config.guidance else _SCHNELL
    return FluxParts(Component(config, inside, flux_own), clip, t5, vae, schedule, None, given.tokenizer)


def _missing(clip: object, t5: object, vae: object) -> Iterator[Problem]:
    if clip is None:
        yield Problem("CLIP", f"is not in the file. {_GIVE.format('it')}")
    if t5 is None:
        yield Problem("T5", f"is not in the file. {_GIVE.format('it')}")
    if vae is None:
        yield Problem("VAE", 'is not in the file. Give it apart: vae = "AE.safetensors" in [model].')


def _misfits(parts: FluxParts, source: ModelSource) -> Iterator[Problem]:
    """What parts of different models, and kinds of model that are not trained here, show."""
    flux, vae = parts.transformer.config, parts.vae.config
    clip, t5 = parts.text_encoder.config, parts.text_encoder_2.config
    if source.prediction not in (None, "flow"):
        yield Problem("prediction", f"is '{source.prediction}', but Flux.1 predicts 'flow'. Leave it out.")
    if flux.token_channels != 4 * vae.latent_channels:
        what = f"is {flux.token_channels}; the vae's latent_channels make it {4 * vae.latent_channels} (fill and control models see more)."
        yield Problem("transformer: in_channels", what)
    if flux.text_channels != t5.channels:
        yield Problem(
            "transformer: joint_attention_dim", f"is {flux.text_channels}, but T5's d_model is {t5.channels}."
        )
    if flux.pooled_channels != clip.hidden_size:
        what = f"is {flux.pooled_channels}, but CLIP's hidden_size is {clip.hidden_size}."
        yield Problem("transformer: pooled_projection_dim", what)


def recognise(source: ModelSource) -> ModelFacts | None:
    """Facts, if ``source`` is a Flux.1 model; else None.

    Raises:
        UserError: it is one, but parts are missing or damaged, do not fit each other, or are of a kind that is not supported.
    """
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
        implementation="https://github.com/black-forest-labs/flux",
        digest=digest_of(source),
        small=config.channels < 256,
        shift=shift_of(parts.scheduler, str(source.base)),
        usual_cfg=1.0,
        usual_guidance=GUIDANCE if config.guidance else None,
        usual_t5_tokens=parts.t5_tokens,
        vae=source.vae,
        text_encoders=source.text_encoders,
    )


def readers(facts: ModelFacts, options: TextOptions) -> dict[Part, Reader]:
    """What T5 sees of captions. CLIP's part in it is one vector for the whole caption, from its first 75 tokens.

    Raises:
        UserError: the tokenizers' files are missing or broken.
    """
    parts = parts_of(facts.source)
    assert parts is not None, f"{facts.path} was recognised before"
    _, t5 = parts.tokenizers()
    return {"text_encoder_2": functools.partial(t5.read, length=options.get("t5_tokens") or parts.t5_tokens)}


CARD = FamilyCard(
    kind="family",
    name="flux",
    summary="Flux.1 dev and schnell, any size: a diffusion transformer, a CLIP and a T5 text encoder.",
    code="lorabake.families.flux.model:FluxModel",
    recognise=recognise,
    text_options=frozenset({"t5_tokens"}),
    fp16=False,
    groups=frozenset({"transformer", "text"}),
    readers=readers,
)
