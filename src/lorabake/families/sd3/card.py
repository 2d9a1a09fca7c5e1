"""What a Stable Diffusion 3 or 3.5 model consists of on disk, whatever layout its parts came in, and how it is told. No torch, and
no weight is read.

Our names of the denoiser are those of Stability AI's files, after which LoRA files name their layers. diffusers' folders have
queries, keys and values as layers of their own, and two scales before their shifts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.families.networks.clip_vocabulary import OPEN_CLIP_PAD, SD1_PAD, clip_tokenizer
from lorabake.families.networks.components import (
    Component,
    Given,
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
from lorabake.families.networks.dit_config import SD3Config, T5Config
from lorabake.families.networks.flow_schedule import shift_of
from lorabake.families.networks.layouts import Rename, Target, same
from lorabake.families.networks.pieces import Piece, pieces_rename, swapped
from lorabake.families.networks.sizes import HEAD_WIDTH
from lorabake.families.networks.t5_tokenizer import T5Tokenizer
from lorabake.families.networks.t5_vocabulary import t5_tokenizer
from lorabake.families.networks.tokenizer import ClipTokenizer
from lorabake.families.networks.weights import Weights, open_weights, shards
from lorabake.protocols.family import FamilyCard, ModelFacts, ModelSource, Part, Reader, TextOptions

PATCH = 2
"""Latent cells along each side of a token."""
T5_TOKENS = 256
"""Tokens of a caption that T5 reads where nobody says otherwise."""
SCALE, SHIFT = 1.5305, 0.0609
"""Of SD3's latents, (z − shift) · scale, which single files do not say."""
PADS = (SD1_PAD, OPEN_CLIP_PAD)
"""What the two CLIP tokenizers fill rows up with, where no file says it."""
SCHEDULE: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
"""The schedule that all of them are drawn with, as ``scheduler_config.json`` says it."""
_LATENT_SIDE = 128
"""Of the latents these models are trained on: 1024 pixels."""
_WIDE_CLIP = 1280
"""Width of the second CLIP. The first has 768."""
_PREFIXES = ("model.diffusion_model.", "")
_SIGNS = ("pos_embed", "x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "t_embedder.mlp.0.weight",
          "joint_blocks.0.context_block.attn.qkv.weight", "final_layer.linear.weight")  # fmt: skip
_CLIP, _CLIP_2, _T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
_ADVICE = "Only whole Stable Diffusion 3 and 3.5 text-to-image models can be trained."
_GIVE = 'Give {} apart: text_encoders = ["CLIP_L.safetensors", "CLIP_G.safetensors", "T5XXL.safetensors"] in [model].'
_AROUND = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_STREAMS = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
"""Ours in a block, and diffusers'; no model has all of them in every block."""
_CONTEXT_MODULATION = ("context_block.adaLN_modulation.1", "norm1_context.linear")
"""Its halves are the other way round in the last block."""
_JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def own_config(weights: Weights) -> SD3Config:
    """Sizes of the denoiser in Stability AI's layout.

    Raises:
        UserError: tensors are missing, or do not say how wide a head is.
    """
    channels, latent_channels, *_ = weights.shape("x_embedder.proj.weight")
    blocks = weights.count("joint_blocks.{}.x_block.attn.qkv.weight")
    normed = "joint_blocks.0.x_block.attn.ln_q.weight"
    head = weights.shape(normed)[0] if normed in weights else HEAD_WIDTH
    if channels % head:
        raise UserError(
            f"{weights.subject}: {channels} channels make no whole number of heads of {head}. Give the model as a diffusers folder."
        )
    return SD3Config(
        latent_channels=latent_channels,
        blocks=blocks,
        heads=channels // head,
        head_channels=head,
        text_channels=weights.shape("context_embedder.weight")[1],
        pooled_channels=weights.shape("y_embedder.mlp.0.weight")[1],
        places=math.isqrt(math.prod(weights.shape("pos_embed")) // channels),
        qk_norm=normed in weights,
        dual=tuple(n for n in range(blocks) if f"joint_blocks.{n}.x_block.attn2.qkv.weight" in weights),
    )


def sd3_pieces(config: SD3Config) -> Iterator[Piece]:
    """All modules with weights that such a network may have, in diffusers' layout."""
    channels = config.channels
    yield from (Piece(*pair) for pair in _AROUND.items())
    yield from swapped("final_layer.adaLN_modulation.1", "norm_out.linear", channels)
    for index in range(config.blocks):
        ours, theirs = f"joint_blocks.{index}.", f"transformer_blocks.{index}."
        yield from (Piece(ours + name, theirs + other) for name, other in _STREAMS.items())
        modulation = (ours + _CONTEXT_MODULATION[0], theirs + _CONTEXT_MODULATION[1])
        yield from swapped(*modulation, channels) if index == config.blocks - 1 else (Piece(*modulation),)
        for name, others in _JOINED.items():
            for place, other in enumerate(others):
                yield Piece(ours + name, theirs + other, (place * channels, (place + 1) * channels))


def sd3_diffusers(config: SD3Config) -> Rename:
    """The denoiser in diffusers' layout."""
    rename = pieces_rename(sd3_pieces(config))
    return lambda name: (Target("pos_embed"),) if name == "pos_embed.pos_embed" else rename(name)


def sd3_json(config: SD3Config) -> dict[str, Any]:
    """``transformer/config.json``."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": config.head_channels,
        "caption_projection_dim": config.channels,
        "dual_attention_layers": list(config.dual),
        "in_channels": config.latent_channels,
        "joint_attention_dim": config.text_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.blocks,
        "out_channels": config.latent_channels,
        "patch_size": PATCH,
        "pooled_projection_dim": config.pooled_channels,
        "pos_embed_max_size": config.places,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": _LATENT_SIDE,
    }


@dataclass(frozen=True, slots=True)
class SD3Parts:
    """The networks, and what goes with them."""

    transformer: Component[SD3Config]
    text_encoder: Component[ClipConfig]
    text_encoder_2: Component[ClipConfig]
    text_encoder_3: Component[T5Config] | None
    """T5; None where the model goes without."""
    vae: Component[VaeConfig]
    scheduler: Mapping[str, Any]
    """As in ``scheduler_config.json``."""
    tokenizer_folders: tuple[Path, Path] | None
    """The CLIPs'; None for their own vocabulary."""
    tokenizer_3: Path | None
    """T5's: a folder or a file; None for its own vocabulary."""

    def clip_tokenizers(self) -> tuple[ClipTokenizer, ClipTokenizer]:
        """One for each CLIP.

        Raises:
            UserError: their files are missing or broken, or know more tokens than their text encoder.
        """
        folders = self.tokenizer_folders
        first, second = map(ClipTokenizer.from_folder, folders) if folders else map(clip_tokenizer, PADS)
        check_vocabulary(first.size, self.text_encoder)
        check_vocabulary(second.size, self.text_encoder_2)
        return first, second

    def t5_tokenizer(self) -> T5Tokenizer | None:
        """T5's, if the model has a T5.

        Raises:
            UserError: its files are missing or broken, or know more tokens than the text encoder.
        """
        if self.text_encoder_3 is None:
            return None
        tokenizer = t5_tokenizer(self.tokenizer_3)
        check_vocabulary(tokenizer.size, self.text_encoder_3)
        return tokenizer


def parts_of(source: ModelSource) -> SD3Parts | None:
    """The parts of an SD3 model; None if ``source`` is something else.

    Raises:
        UserError: it is one and cannot be used: parts are missing or damaged, or do not fit each other.
    """
    parts = _in_folder(source) if source.base.is_dir() else _in_file(source)
    if parts is not None and (problems := list(_misfits(parts, source))):
        raise Problems(str(source.base), problems, _ADVICE)
    return parts


def _in_folder(source: ModelSource) -> SD3Parts | None:
    folder, sizes = source.base, source.base / "transformer" / "config.json"
    if not sizes.is_file() or (values := read_json(sizes)).get("_class_name") != "SD3Transformer2DModel":
        return None
    given = given_encoders(source, "Stable Diffusion 3", clips=2)
    has_t5 = given.t5 is not None or _names_t5(folder)
    clips = [] if len(given.clips) == 2 else ["text_encoder", "text_encoder_2"]
    apart = {"text_encoder_3": given.t5 or not has_t5, "vae": source.vae}
    own = ["transformer", *clips, *(name for name, path in apart.items() if not path)]
    own_tokenizer = has_t5 and given.tokenizer is None
    tokenizers = ["tokenizer", "tokenizer_2", *["tokenizer_3"] * own_tokenizer]
    if problems := folder_problems(folder, own, tokenizers):
        raise Problems(str(folder), problems, _ADVICE)
    find_own = functools.partial(find_clip, projection=True)
    first, second = _clips(given, *(find_own(folder / name) for name in clips))
    assert first is not None and second is not None, "what is missing was told above"
    rename = sd3_diffusers(SD3Config.from_json(values, str(sizes)))
    return SD3Parts(
        transformer=folder_part(folder / "transformer", SD3Config.from_json, rename),
        text_encoder=first,
        text_encoder_2=second,
        text_encoder_3=find_t5(given.t5 or folder / "text_encoder_3") if has_t5 else None,
        vae=find_vae(source.vae or folder / "vae", SCALE, SHIFT),
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizer_folders=(folder / "tokenizer", folder / "tokenizer_2"),
        tokenizer_3=given.tokenizer or (folder / "tokenizer_3" if own_tokenizer else None),
    )


def _names_t5(folder: Path) -> bool:
    """Whether a folder holds a T5, or its index says that it should."""
    index = folder / "model_index.json"
    said = read_json(index).get("text_encoder_3") if index.is_file() else None
    return (folder / "text_encoder_3").is_dir() or said not in (None, [None, None])


def _in_file(source: ModelSource) -> SD3Parts | None:
    weights = open_weights(*shards(source.base))
    prefix = next((prefix for prefix in _PREFIXES if all(prefix + sign in weights for sign in _SIGNS)), None)
    if prefix is None:
        return None
    inside = weights.under(prefix)
    config = own_config(inside)
    given = given_encoders(source, "Stable Diffusion 3", clips=2)
    first, second = _clips(given, clip_in(weights.under(_CLIP)), clip_in(weights.under(_CLIP_2), projection=True))
    t5 = find_t5(given.t5) if given.t5 else t5_in(weights.under(_T5))
    vae = find_vae(source.vae, SCALE, SHIFT) if source.vae else vae_in(weights, SCALE, SHIFT)
    if first is None or second is None or vae is None:
        raise Problems(str(source.base), list(_missing(first, second, vae)), _ADVICE)
    return SD3Parts(Component(config, inside, same), first, second, t5, vae, SCHEDULE, None, given.tokenizer)


def _missing(first: object, second: object, vae: object) -> Iterator[Problem]:
    for name, prefix, part in (("CLIP-L", _CLIP, first), ("CLIP-G", _CLIP_2, second)):
        if part is None:
            yield Problem(name, f"is not in the file (no '{prefix}*'). {_GIVE.format('it')}")
    if vae is None:
        yield Problem("VAE", 'is not in the file. Give it apart: vae = "VAE.safetensors" in [model].')


def _clips(
    given: Given, first: Component[ClipConfig] | None = None, second: Component[ClipConfig] | None = None
) -> tuple[Component[ClipConfig] | None, Component[ClipConfig] | None]:
    """The two CLIPs: those given, else the model's own. Of two given, the second is the wider one; one alone is told by its width.

    What a single file holds of the first's projection is not used: SD3 is trained without. diffusers' folders have one all the same.
    """
    ordered = sorted(given.clips, key=lambda path: find_clip(path).config.hidden_size)
    wide = second.config.hidden_size if second else _WIDE_CLIP
    for place, path in enumerate(ordered):
        if place == 1 or (len(ordered) == 1 and find_clip(path).config.hidden_size == wide):
            second = find_clip(path, projection=True)
        else:
            first = find_clip(path, projection=path.is_dir())
    if second is not None and second.json is None:  # no file says it: the first alone has OpenAI's approximate GELU
        second = dataclasses.replace(second, config=dataclasses.replace(second.config, quick_gelu=False))
    return first, second


def is_projected(clip: Component[ClipConfig]) -> bool:
    """Whether a CLIP came with a projection of the whole text to one vector."""
    return any(target.name == "text_projection.weight" for name in clip.weights for target in clip.rename(name))


def _misfits(parts: SD3Parts, source: ModelSource) -> Iterator[Problem]:
    """What parts of different models, and kinds of model that are not trained here, show."""
    sd3, clips, t5 = parts.transformer.config, (parts.text_encoder, parts.text_encoder_2), parts.text_encoder_3
    if source.prediction not in (None, "flow"):
        yield Problem("prediction", f"is '{source.prediction}', but Stable Diffusion 3 predicts 'flow'. Leave it out.")
    if t5 is None and parts.tokenizer_3 is not None:
        yield Problem(
            "T5", f"is not there, but its tokenizer is: {parts.tokenizer_3}. Give T5 too, or leave its tokenizer out."
        )
    wide = sum(clip.config.hidden_size for clip in clips)
    pooled = sum(clip.config.projection_dim if is_projected(clip) else clip.config.hidden_size for clip in clips)
    rows = (
        ("in_channels", sd3.latent_channels, parts.vae.config.latent_channels, "the vae's latent_channels"),
        ("joint_attention_dim", sd3.text_channels, t5.config.channels if t5 else sd3.text_channels, "T5's d_model"),
        ("joint_attention_dim", sd3.text_channels, max(wide, sd3.text_channels), "both CLIPs' hidden_size, at least,"),
        ("pooled_projection_dim", sd3.pooled_channels, pooled, "both CLIPs' projection_dim"),
    )
    for name, told, expected, what in rows:
        if told != expected:
            yield Problem(f"transformer: {name}", f"is {told}, but {what} makes it {expected}.")


def recognise(source: ModelSource) -> ModelFacts | None:
    """Facts, if ``source`` is an SD3 model; else None.

    Raises:
        UserError: it is one, but parts are missing or damaged, do not fit each other, or are of a kind that is not supported.
    """
    parts = parts_of(source)
    if parts is None:
        return None
    config, vae = parts.transformer.config, parts.vae.config
    kind = "3-medium" if not config.qk_norm else "3.5-medium" if config.dual else "3.5-large"
    without_t5 = f"{source.base.name} has no T5: zeros stand in for what it would say of captions, as diffusers has it. {_GIVE.format('it')}"
    return ModelFacts(
        family="sd3",
        path=source.base,
        name=source.base.stem if source.base.is_file() else source.base.name,
        prediction="flow",
        resolution=_LATENT_SIDE * vae.latent_scale,
        pixel_step=vae.latent_scale * PATCH,
        latent_scale=vae.latent_scale,
        latent_channels=vae.latent_channels,
        base_version="sd3",
        architecture=f"stable-diffusion-v{kind}",
        implementation="https://github.com/Stability-AI/generative-models",
        digest=digest_of(source),
        small=config.channels < 256,
        shift=shift_of(parts.scheduler, str(source.base)),
        usual_t5_tokens=T5_TOKENS if parts.text_encoder_3 else None,
        vae=source.vae,
        text_encoders=source.text_encoders,
        notes=() if parts.text_encoder_3 else (without_t5,),
    )


def readers(facts: ModelFacts, options: TextOptions) -> dict[Part, Reader]:
    """What each text encoder sees of captions: the CLIPs their first 75 tokens, T5 more.

    Raises:
        UserError: the tokenizers' files are missing or broken.
    """
    parts = parts_of(facts.source)
    assert parts is not None, f"{facts.path} was recognised before"
    first, second = parts.clip_tokenizers()
    found: dict[Part, Reader] = {"text_encoder": first.read, "text_encoder_2": second.read}
    if t5 := parts.t5_tokenizer():
        found["text_encoder_3"] = functools.partial(t5.read, length=options.get("t5_tokens") or T5_TOKENS)
    return found


CARD = FamilyCard(
    kind="family",
    name="sd3",
    summary="Stable Diffusion 3 and 3.5, medium and large: a diffusion transformer, two CLIP and a T5 text encoder.",
    code="lorabake.families.sd3.model:SD3Model",
    recognise=recognise,
    text_options=frozenset({"t5_tokens"}),
    fp16=False,
    groups=frozenset({"transformer", "text"}),
    readers=readers,
)
