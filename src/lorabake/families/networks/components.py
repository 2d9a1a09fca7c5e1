"""The networks of a model as they lie on disk: sizes, tensors, and what the tensors' names are to us. No torch here.

A model is one file, a folder of parts, or either of them with parts that lie elsewhere (``vae``, ``text_encoders``). Each finder
here takes a part in any of the layouts it is published in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from lorabake.base.errors import Problem, UserError
from lorabake.base.files import quick_digest
from lorabake.base.header import PICKLES
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig
from lorabake.families.networks.dit_config import T5Config
from lorabake.families.networks.flux_layout import t5_config, t5_encoder
from lorabake.families.networks.layouts import Rename, classic_clip, diffusers_vae, ldm_unet, ldm_vae, open_clip
from lorabake.families.networks.sizes import (
    classic_clip_config,
    is_diffusers_vae,
    ldm_unet_config,
    open_clip_config,
    vae_config,
)
from lorabake.families.networks.t5_tokenizer import FILES
from lorabake.families.networks.weights import SHARD, Weights, open_weights, shards
from lorabake.protocols.family import ModelSource

_LDM_UNET = "model.diffusion_model."
"""What the U-Net's names begin with in single files."""
_BARE_UNET = ("input_blocks.0.0.weight", "out.2.weight")
"""Tensors that tell a U-Net in a file of its own, without that prefix."""
_UNET_TENSORS = ("input_blocks.", "middle_block.", "output_blocks.", "out.", "time_embed.", "label_emb.")
_VAE_PREFIXES = ("first_stage_model.", "vae.", "")
_VAE_TENSORS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
_CLIP_PREFIXES = ("cond_stage_model.transformer.", "cond_stage_model.model.", "")
_T5_SIGN = "encoder.block.0.layer.0.SelfAttention.q.weight"
_TOKENIZER_FILES = (".json", ".model")
_COUNTS = {1: "two", 2: "three"}
_LARGEST_JSON = 1 << 20
_PARTS = ("unet", "transformer", "text_encoder", "vae", "tokenizer", "scheduler")
"""What folders of parts are called, but for numbers behind."""
_READ = re.compile(
    r"model_index\.json|(config|scheduler_config|vocab|tokenizer|tokenizer_config|special_tokens_map)\.json|merges\.txt|spiece\.model"
    r"|(diffusion_pytorch_model|model)\b.*\.safetensors"
)
"""Files that are read in a model's folder, and in those of its parts."""
_STEMS = ("diffusion_pytorch_model", "model")
_C = TypeVar("_C")


@dataclass(frozen=True, slots=True)
class Component(Generic[_C]):
    """One network on disk; :func:`lorabake.families.networks.load.fill` makes it one in memory."""

    config: _C
    weights: Weights
    rename: Rename
    json: Mapping[str, Any] | None = None
    """What its ``config.json`` holds; None where it came without one."""


def ldm_unet_tensors(weights: Weights) -> Weights:
    """A U-Net's own tensors in a single file, or in a file of its own where nothing stands before their names; none if there is none."""
    inside = weights.under(_LDM_UNET)
    if inside or not all(sign in weights for sign in _BARE_UNET):
        return inside
    bare = {
        name: entry for name, entry in weights.items() if name.startswith(_UNET_TENSORS)
    }  # beside markers such as v_pred
    return Weights(weights.files, bare, weights.metadata)


def ldm_unet_in(weights: Weights, heads: int | None = None) -> Component[UNetConfig]:
    """The U-Net of a single file (SD1.x, SD2.x, SDXL), or in a file of its own.

    Args:
        weights: all of the file.
        heads: heads at every resolution (8 in SD1.x); None for as many as are 64 channels wide (SD2.x, SDXL).

    Raises:
        UserError: its tensors are not whole.
    """
    inside = ldm_unet_tensors(weights)
    config = ldm_unet_config(inside, heads)
    return Component(config, inside, ldm_unet(config).rename())


def vae_in(weights: Weights, scaling_factor: float, shift_factor: float = 0.0) -> Component[VaeConfig] | None:
    """The autoencoder in a file of its own, in either layout, or in a single file with the whole model. None if there is none.

    Args:
        weights: all of the file.
        scaling_factor, shift_factor: of the family's latents; no file says them.

    Raises:
        UserError: its tensors are not whole.
    """
    for prefix in _VAE_PREFIXES:
        found = weights.under(prefix)
        if "encoder.conv_in.weight" in found and "decoder.conv_in.weight" in found:
            # What lies beside it is what it was trained with: a discriminator, averages.
            inside = {name: entry for name, entry in found.items() if name.startswith(_VAE_TENSORS)}
            found = Weights(weights.files, inside, weights.metadata)
            config = vae_config(found, scaling_factor, shift_factor)
            return Component(config, found, diffusers_vae if is_diffusers_vae(found) else ldm_vae(config).rename())
    return None


def find_vae(
    path: Path, scaling_factor: float, shift_factor: float = 0.0, *, half: bool = False
) -> Component[VaeConfig]:
    """The autoencoder at ``path``: a file, a folder with its ``config.json``, or a whole model's folder. Arguments as for :func:`vae_in`
    and :func:`folder_part`; a folder's own ``config.json`` decides about the factors.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        return folder_part(
            path / "vae" if (path / "vae").is_dir() else path, VaeConfig.from_json, diffusers_vae, half=half
        )
    found = vae_in(open_weights(*shards(path)), scaling_factor, shift_factor)
    if found is None:
        raise UserError(
            f"{path} holds no VAE: no 'encoder.conv_in.weight', with or without 'first_stage_model.' in front."
        )
    return found


def clip_in(weights: Weights, *, skipped: int = 0, projection: bool = False) -> Component[ClipConfig] | None:
    """A CLIP text encoder in transformers' or OpenCLIP's layout. None if there is none.

    Args:
        weights: the text encoder's own tensors, or all of an SD file.
        skipped: layers at the end of an OpenCLIP encoder that the model does without: 1 in SD2.x.
        projection: our network has ``text_projection``.

    Raises:
        UserError: its tensors are not whole.
    """
    for prefix in _CLIP_PREFIXES:
        found = weights.under(prefix)
        if "token_embedding.weight" in found and "positional_embedding" in found:
            config = open_clip_config(found, skipped)
            return Component(config, found, open_clip(config, projection=projection))
        if "embeddings.token_embedding.weight" in found or "text_model.embeddings.token_embedding.weight" in found:
            return Component(classic_clip_config(found), found, classic_clip(projection=projection))
    return None


def find_clip(path: Path, *, skipped: int = 0, projection: bool = False, half: bool = False) -> Component[ClipConfig]:
    """The CLIP text encoder at ``path``, a file or a folder with its ``config.json``. Arguments as for :func:`clip_in`
    and :func:`folder_part`.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        return folder_part(path, ClipConfig.from_json, classic_clip(projection=projection), half=half)
    found = clip_in(open_weights(*shards(path)), skipped=skipped, projection=projection)
    if found is None:
        raise UserError(f"{path} holds no CLIP text encoder: no 'token_embedding.weight' and what belongs to it.")
    return found


def t5_in(weights: Weights) -> Component[T5Config] | None:
    """A T5 encoder, with or without the decoder. None if there is none.

    Raises:
        UserError: its tensors are not whole.
    """
    return Component(t5_config(weights), weights, t5_encoder(weights)) if _T5_SIGN in weights else None


def find_t5(path: Path) -> Component[T5Config]:
    """The T5 encoder at ``path``, a file or a folder with its ``config.json``.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        part = folder_part(path, T5Config.from_json, lambda name: ())
        return Component(part.config, part.weights, t5_encoder(part.weights), part.json)
    found = t5_in(open_weights(*shards(path)))
    if found is None:
        raise UserError(f"{path} holds no T5 text encoder: no '{_T5_SIGN}'.")
    return found


@dataclass(frozen=True, slots=True)
class Given:
    """The paths in ``text_encoders``, told apart by what they are."""

    clips: tuple[Path, ...] = ()
    t5: Path | None = None
    tokenizer: Path | None = None
    """T5's, where it is not T5's own. A T5's folder may be its tokenizer's too."""


def given_encoders(source: ModelSource, model: str, clips: int) -> Given:
    """What ``source.text_encoders`` names, in any order.

    Args:
        source: where the model is.
        model: its kind, for messages.
        clips: CLIP text encoders it has, beside one T5.

    Raises:
        UserError: more of a kind than the model has, or something else.
    """
    found: dict[str, list[Path]] = {"clip": [], "t5": [], "tokenizer": []}
    for path in source.text_encoders:
        kind = _kind(path)
        if kind is None:
            raise UserError(
                f"{path} is none of what {model} reads captions with: a CLIP or T5-XXL text encoder, or T5's {' or '.join(FILES)}."
            )
        found[kind].append(path)
        if len(found[kind]) > (most := clips if kind == "clip" else 1):
            named = " and ".join(map(str, found[kind]))
            raise UserError(f"text_encoders names {_COUNTS[most]} of a kind ({kind}): {named}. Give {most}.")
    t5, tokenizer = next(iter(found["t5"]), None), next(iter(found["tokenizer"]), None)
    if tokenizer is None and t5 is not None and any((t5 / name).is_file() for name in FILES):
        tokenizer = t5
    return Given(tuple(found["clip"]), t5, tokenizer)


def _kind(path: Path) -> Literal["clip", "t5", "tokenizer"] | None:
    if path.suffix in _TOKENIZER_FILES:
        return "tokenizer"
    if path.is_file():
        weights = open_weights(*shards(path))
        return "t5" if _T5_SIGN in weights else "clip" if clip_in(weights) else None
    if weights_file(path):
        return "t5" if read_json(path / "config.json").get("model_type") == "t5" else "clip"
    return "tokenizer" if any((path / name).is_file() for name in FILES) else None


def check_vocabulary(tokens: int, encoder: Component[ClipConfig] | Component[T5Config]) -> None:
    """Whether a text encoder knows all ``tokens`` of its tokenizer.

    Raises:
        UserError: it does not.
    """
    if tokens > (most := encoder.config.vocab_size):
        raise UserError(
            f"{encoder.weights.subject}: the tokenizer has {tokens} tokens, the text encoder only {most}. They are of different models."
        )


def folder_part(
    folder: Path, config: Callable[[Mapping[str, Any], str], _C], rename: Rename, *, half: bool = False
) -> Component[_C]:
    """A part of a diffusers folder: ``config.json`` beside one weights file, or a whole set of shards.

    Args:
        folder: such as ``MODEL/unet``.
        config: reads the parsed JSON and its path, such as ``UNetConfig.from_json``.
        rename: of the file's names.
        half: take the fp16 variant where both are there.

    Raises:
        UserError: a file is missing, damaged, or no safetensors file.
    """
    where = folder / "config.json"
    values = read_json(where)
    sizes = config(values, str(where))
    file = weights_file(folder, half)
    if file is None:
        raise UserError(f"{folder}: the weights are missing{instead_of_weights(folder)}.")
    return Component(sizes, open_weights(*shards(file)), rename, values)


def latent_side(values: Mapping[str, Any], path: Path, usual: int) -> int:
    """Side, in latent cells, of the pictures that a U-Net was trained on; ``usual`` where its ``config.json``, read from ``path``, does not say.

    Raises:
        UserError: it says something that is no such number.
    """
    side = values.get("sample_size")
    if side is None:
        return usual
    if not isinstance(side, int) or isinstance(side, bool) or not 1 <= side <= 4096:
        raise UserError(f"{path}: sample_size is {side!r}; a whole number of latent cells was expected.")
    return side


def folder_problems(folder: Path, networks: Sequence[str], folders: Sequence[str]) -> list[Problem]:
    """All that is missing in a diffusers folder, at once.

    Args:
        folder: the one with the parts' folders in it.
        networks: parts that need ``config.json`` and weights.
        folders: other parts that have to be there.
    """
    problems: list[Problem] = []
    for part in networks:
        if not (folder / part / "config.json").is_file():
            problems.append(Problem(f"{part}/config.json", "is missing."))
        if weights_file(folder / part) is None:
            problems.append(Problem(f"{part}/*.safetensors", f"is missing{instead_of_weights(folder / part)}."))
    problems += [Problem(f"{part}/", "is missing.") for part in folders if not (folder / part).is_dir()]
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        problems.append(Problem("scheduler/scheduler_config.json", "is missing."))
    return problems


def weights_file(folder: Path, half: bool = False) -> Path | None:
    """The weights to read in a part's folder: the plain file, or its fp16 variant if it is alone or wanted; the first of shards."""
    files = {file.name: file for stem in _STEMS for file in sorted(folder.glob(f"{stem}*.safetensors"))}
    order = (".fp16", "") if half else ("", ".fp16")
    for name in (f"{stem}{variant}.safetensors" for variant in order for stem in _STEMS):
        if name in files:
            return files[name]
    whole = [file for file in files.values() if not SHARD.search(file.name)]
    return next(iter([*whole, *files.values()]), None)


def instead_of_weights(folder: Path) -> str:
    """What lies there in place of weights, if anything, as the rest of a sentence."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if pickles := [file.name for file in files if file.suffix in PICKLES]:
        return f"; {pickles[0]} is not opened, because loading a pickle runs whatever code is in it: convert it to safetensors"
    return ""


def digest_of(source: ModelSource) -> str:
    """Fingerprint (hex) of all that makes a model what it is: weights, sizes, vocabularies.

    Files and folders may be renamed and moved, and what else lies in a folder does not count.
    """
    vae = source.vae / "vae" if source.vae and (source.vae / "vae").is_dir() else source.vae  # as find_vae has it
    places = {"base": source.base, "vae": vae}
    places |= {f"text encoder {number}": path for number, path in enumerate(source.text_encoders, 1)}
    return quick_digest(
        (f"{place} {name}", file) for place, path in places.items() if path for name, file in _files_at(path)
    )


def _files_at(path: Path) -> Iterator[tuple[str, Path]]:
    """The files of a model or of a part of one, with what they are there."""
    if path.is_file():
        yield from ((str(number), file) for number, file in enumerate(shards(path)))
        return
    parts = [part for part in path.iterdir() if part.name.rstrip("_0123456789") in _PARTS and part.is_dir()]
    for file in sorted(file for folder in (path, *parts) for file in folder.iterdir()):
        if _READ.fullmatch(file.name) and file.is_file():
            yield file.relative_to(path).as_posix(), file


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file.

    Raises:
        UserError: it is missing, far too large, or no JSON object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{path} is larger than any configuration ({path.stat().st_size} bytes).")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; an object with settings was expected.")
    return found
