"""The names LoRA files are exchanged in: ``lora_unet_<path with underscores>.<suffix>``; diffusers' are read into them.

What a suffix means is its network type's business; here is only known which suffixes there are. The names are those of
kohya's sd-scripts and of LyCORIS.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorabake.base.errors import UserError
from lorabake.base.lazy import lazy_module
from lorabake.formats.hashes import with_hashes
from lorabake.formats.safetensors_file import read_header, read_tensors, write

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy_module("torch")

Precision = Literal["fp16", "bf16", "fp32"]
Layers = dict[str, dict[str, "Tensor"]]
"""Tensors of a file by layer key (``lora_unet_mid_block_attentions_0_proj_in``) and suffix (``lora_down.weight``)."""

PREFIXES = ("lora_", "lycoris_", "oft_")
SUFFIXES: dict[str, frozenset[str]] = {
    "lora": frozenset({"lora_down.weight", "lora_up.weight", "lora_mid.weight"}),
    "loha": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
    "lokr": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
    "oft": frozenset({"oft_blocks", "rescale"}),
    "glora": frozenset({"a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"}),
    "ia3": frozenset({"weight", "on_input"}),
    "full": frozenset({"diff", "diff_b"}),
    "norm": frozenset({"w_norm", "b_norm"}),
}
"""By network type, those a layer of that type alone has. A layer is of the first type it shares a suffix with.

No second list of the parts in ``adapters``, and not to be had from their cards: these are types as other tools write them, most of which
are no network types here, so that a file of one is known for what it is and told of. A network type whose own suffixes are missing
here cannot read back what it saves, which the contract of network types tests.
"""
SHARED_SUFFIXES = frozenset({"alpha", "dora_scale"})
_KNOWN = SHARED_SUFFIXES.union(*SUFFIXES.values())


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file as read: nothing is interpreted yet."""

    layers: Layers
    metadata: dict[str, str]


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file with kohya's, LyCORIS' or diffusers' names.

    Raises:
        UserError: it is no well-formed safetensors file, or some of its names are not those of a LoRA.
    """
    metadata = read_header(path).metadata
    tensors = read_tensors(path)
    if any(key.startswith(_DIFFUSERS_PREFIXES) for key in tensors):
        tensors = from_diffusers(tensors, metadata)
    layers: Layers = {}
    unknown = []
    for key, tensor in tensors.items():
        layer, _, suffix = key.partition(".")
        if layer.startswith(PREFIXES) and suffix in _KNOWN:
            layers.setdefault(layer, {})[suffix] = tensor
        else:
            unknown.append(key)
    if unknown or not layers:
        raise UserError(f"{path} is not a LoRA file that can be read: {_unknown(unknown, len(tensors))}")
    return LoraFile(layers, metadata)


def write_lora(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: Precision) -> str:
    """Write a LoRA file and return its sha256 (hex). Hashes in ``metadata`` are replaced by those of what is written.

    Raises:
        UserError: a value is NaN or infinite, or becomes so in ``dtype``; or the file cannot be written. What was there
            before is untouched.
    """
    stored = {name: cast(tensor, dtype) for name, tensor in tensors.items()}
    bad = [name for name, tensor in stored.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if bad:
        before = [name for name in bad if not bool(tensors[name].isfinite().all())]
        advice = (
            "Nothing can repair the weights: go back to an earlier checkpoint."
            if before
            else "Save it as bf16 or fp32."
        )
        raise UserError(
            f"{path} was not written: {len(bad)} of {len(stored)} tensors are not finite as {dtype}, "
            f"e.g. {bad[0]}. {advice}"
        )
    return write(path, stored, with_hashes(metadata, stored))


def cast(tensor: Tensor, dtype: Precision) -> Tensor:
    """``tensor`` on the CPU in the type of a file; whole numbers and flags keep theirs."""
    target = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return tensor.detach().to("cpu", target if tensor.is_floating_point() else tensor.dtype).contiguous()


def network_type(layers: Layers) -> str:
    """What most layers are: ``"lora"``, ``"locon"``, ``"boft"`` or another name of :data:`SUFFIXES`.

    ``locon`` is a LoRA that also reaches convolutions larger than 1x1. DyLoRA files are not told apart from LoRA: they
    hold the same tensors, and mean the same.
    """
    types = Counter(_layer_type(tensors) for tensors in layers.values())
    types.pop(None, None)
    if len(types) > 1:  # LyCORIS adds norm and full to layers that the main type cannot change
        types.pop("norm", None)
    name = max(SUFFIXES, key=lambda candidate: types[candidate])  # a tie goes to the first
    if name == "lora" and any(_reaches_convolutions(tensors) for tensors in layers.values()):
        return "locon"
    if name == "oft" and any(tensors["oft_blocks"].ndim == 4 for tensors in layers.values() if "oft_blocks" in tensors):
        return "boft"
    return name


def _layer_type(tensors: Mapping[str, Tensor]) -> str | None:
    return next((name for name, suffixes in SUFFIXES.items() if suffixes & tensors.keys()), None)


def _reaches_convolutions(tensors: Mapping[str, Tensor]) -> bool:
    down = tensors.get("lora_down.weight")
    return "lora_mid.weight" in tensors or (down is not None and down.ndim == 4 and down.shape[-2:] != (1, 1))


def _unknown(keys: list[str], total: int) -> str:
    if not total:
        return "it holds no tensors."
    examples = ", ".join(ascii(key[:80]) for key in keys[:3])
    advice = (
        "Give a LoRA or LyCORIS file with kohya's or diffusers' names. A whole checkpoint is a base model, no LoRA."
    )
    return f"{len(keys)} of {total} names are not known, e.g. {examples}. {advice}"


_DIFFUSERS_PREFIXES = ("unet.", "transformer.", "diffusion_model.", "text_encoder.", "text_encoder_2.")
_DIFFUSERS_KEY = re.compile(
    r"(?P<part>unet|transformer|diffusion_model|text_encoder|text_encoder_2)\.(?:base_model\.model\.)?"
    r"(?P<path>.+?)\.(?:lora_linear_layer\.|lora\.)?"
    r"(?P<weight>lora_A|lora_B|down|up|lora_magnitude_vector|alpha)(?:\.default)?(?:\.weight)?"
)
_OLD_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.")
_SUFFIX = {
    "lora_A": "lora_down.weight",
    "down": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "up": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "alpha": "alpha",
}


def from_diffusers(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors with diffusers' or PEFT's names (``unet.…to_q.lora_A.weight``) under names in kohya's manner; unknown ones stay.

    Below ``diffusion_model.``, as other tools write PEFT's names, the paths are kohya's. Below ``unet.`` and ``transformer.`` they are
    diffusers' own, under which a family may know its layers too (:class:`lorabake.protocols.family.Alias`).
    Such files have no alpha beside the weights. It is in the metadata (``lora_adapter_metadata``), or else the rank.
    """
    two_encoders = any(key.startswith("text_encoder_2.") for key in tensors)
    prefixes = {
        "unet": "lora_unet",
        "transformer": "lora_transformer",
        "diffusion_model": "lora_unet",
        "text_encoder": "lora_te1" if two_encoders else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    config = _adapter_config(metadata)
    named: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        plain = _OLD_PROCESSOR.sub(lambda found: f".{found[1].replace('to_out', 'to_out.0')}.lora.", key)
        match = _DIFFUSERS_KEY.fullmatch(plain)
        if not match:
            named[key] = tensor
            continue
        part, path, suffix = match["part"], match["path"], _SUFFIX[match["weight"]]
        # Since version 5, transformers has no text_model level.
        if part.startswith("text_encoder") and path.startswith("encoder.layers."):
            path = f"text_model.{path}"
        layer = f"{prefixes[part]}_{path.replace('.', '_')}"
        named[f"{layer}.{suffix}"] = tensor
        if suffix == "lora_down.weight":
            alphas[f"{layer}.alpha"] = _alpha(config, part, path, rank=tensor.shape[0])
    for key, tensor in named.items():
        if (
            key.endswith(".dora_scale") and tensor.ndim == 1
        ):  # ours has one value for each row of the weight, in the weight's dimensions
            down = named.get(key.removesuffix("dora_scale") + "lora_down.weight")
            named[key] = tensor.reshape(-1, *[1] * ((down.ndim if down is not None else 2) - 1))
    return {**{key: torch.tensor(alpha) for key, alpha in alphas.items()}, **named}


def _adapter_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _alpha(config: Mapping[str, Any], part: str, path: str, rank: int) -> float:
    """Alpha for loaders that scale by alpha / rank, by PEFT's rules; rank-stabilised LoRA scales by alpha / √rank."""
    pattern = config.get(f"{part}.alpha_pattern") or {}
    special = (
        (value for name, value in pattern.items() if path == name or path.endswith(f".{name}"))
        if isinstance(pattern, dict)
        else ()
    )
    alpha = next(iter(special), config.get(f"{part}.lora_alpha", rank))
    if not isinstance(alpha, int | float):
        return float(rank)
    return float(alpha * rank**0.5 if config.get(f"{part}.use_rslora") else alpha)
