"""The layers that a LoRA changes, by name and by the blocks that sd-scripts counts.

Blocks of a U-Net are those of the original network: 12 in, 1 in the middle and 12 out for SD; 9, 3 and 9 for SDXL, whose lists for ranks
have one more in front (embeddings) and behind (the output).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lorabake.families.networks.config import UNetConfig
from lorabake.families.networks.layouts import ldm_unet

Kind = Literal["attention", "resnet", "convolution", "text"]
"""Of attention; of a residual block, by the rank of linear layers; of 3 × 3 cells there, in resamplers too; of a text encoder."""
Name = Literal["sd", "sdxl"]

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
_TEXT = (
    "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Named:
    """A layer by its names."""

    names: tuple[str, str]
    """What tables by pattern look in: the key in files, and part and path with dots."""
    kind: Kind
    block: int = -1
    """Its place in a list by block; -1 for layers of text encoders and of transformers."""


@dataclass(frozen=True, slots=True)
class UNet:
    """A U-Net as sd-scripts' lists see it."""

    title: str
    down: tuple[int, ...]
    """Depth of the transformers by resolution, 0 for none."""
    middle: int
    up: tuple[int, ...]
    side: int
    """Blocks in, and as many out."""
    between: int
    """Blocks in the middle."""
    ends: int
    """Blocks that lists of ranks have more, in front and behind."""
    text: tuple[tuple[str, str, int], ...]
    """Text encoders: prefix of their keys, part, and layers."""

    @property
    def count(self) -> int:
        """Blocks in a list of ranks."""
        return 2 * (self.side + self.ends) + self.between

    @property
    def before_middle(self) -> int:
        """Place of the first block in the middle."""
        return self.ends + self.side

    @property
    def before_up(self) -> int:
        """Place of the first block out."""
        return self.before_middle + self.between

    def patterns(self, convolutions: bool) -> list[str]:
        """For each block a pattern of its layers that are trained; "" where there is none.

        Args:
            convolutions: whether residual blocks and resamplers are trained too.
        """
        found = [""] * self.count
        for stage, depth in enumerate(self.down):
            first = self.ends + 1 + 3 * stage
            for block in range(2):
                found[first + block] = _block("down", stage, block, depth > 0, convolutions)
            if convolutions and stage < len(self.down) - 1:
                found[first + 2] = rf"down_blocks\.{stage}\.downsamplers\."
        found[self.before_middle : self.before_up] = self._between(convolutions)
        for stage, depth in enumerate(self.up):
            first = self.before_up + 3 * stage
            for block in range(3):
                found[first + block] = _block("up", stage, block, depth > 0, convolutions)
            if convolutions and stage < len(self.up) - 1:
                found[first + 2] = rf"up_blocks\.{stage}\.((resnets|attentions)\.2|upsamplers)\."
        return found

    def has_linear(self, place: int, convolutions: bool) -> bool:
        """Whether a block has layers that are trained with the rank of linear ones."""
        return bool(_kinds(self)[place] & ({"attention", "resnet"} if convolutions else {"attention"}))

    def has_convolutions(self, place: int) -> bool:
        """Whether a block has 3 × 3 convolutions."""
        return "convolution" in _kinds(self)[place]

    def inner_patterns(self, convolutions: bool) -> list[str]:
        """For each block that has both kinds of layers a pattern of its 3 × 3 convolutions; "" else."""
        found = [""] * self.count
        if not convolutions:
            return found
        for stage in range(len(self.down)):
            for block in range(2):
                found[self.ends + 1 + 3 * stage + block] = rf"down_blocks\.{stage}\.resnets\.{block}\.conv[12]"
        for block in range(self.between):
            found[self.before_middle + block] = (
                r"mid_block\.resnets\.\d\.conv[12]"
                if self.between == 1
                else ("" if block == 1 else rf"mid_block\.resnets\.{block // 2}\.conv[12]")
            )
        for stage in range(len(self.up)):
            for block in range(3):
                own = rf"resnets\.{block}\.conv[12]"
                more = rf"({own}|upsamplers\.)" if block == 2 and stage < len(self.up) - 1 else own
                found[self.before_up + 3 * stage + block] = rf"up_blocks\.{stage}\.{more}"
        return found

    def _between(self, convolutions: bool) -> list[str]:
        attention = r"mid_block\.attentions\.0\."
        if self.between == 1:
            return ["mid_block" if convolutions else attention]
        resnets = [rf"mid_block\.resnets\.{block}\." if convolutions else "" for block in range(2)]
        return [resnets[0], attention, resnets[1]]


UNETS: dict[Name, UNet] = {
    "sd": UNet("SD", (1, 1, 1, 0), 1, (0, 1, 1, 1), 12, 1, 0, (("lora_te", "text_encoder", 12),)),
    "sdxl": UNet(
        "SDXL", (0, 2, 10), 10, (10, 2, 0), 9, 3, 1,
        (("lora_te1", "text_encoder", 12), ("lora_te2", "text_encoder_2", 32)),
    ),
}  # fmt: skip
FLUX_BLOCKS = {"double_blocks": 19, "single_blocks": 38}
"""Blocks of Flux.1."""
_FLUX_DOUBLE = ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
_FLUX_SINGLE = ("linear1", "linear2", "modulation.lin")


def _block(side: str, stage: int, block: int, attention: bool, convolutions: bool) -> str:
    if convolutions:
        return rf"{side}_blocks\.{stage}\.(resnets|attentions)\.{block}\."
    return rf"{side}_blocks\.{stage}\.attentions\.{block}\." if attention else ""


@cache
def _kinds(unet: UNet) -> tuple[frozenset[Kind], ...]:
    """The kinds of layers in each block."""
    paths = list(_unet_paths(unet))
    return tuple(frozenset(kind for _, kind, block in paths if block == place) for place in range(unet.count))


@cache
def unet_layers(name: Name) -> tuple[Named, ...]:
    """Every layer of SD's or SDXL's U-Net and text encoders that a LoRA may change."""
    unet = UNETS[name]
    attends = tuple(depth > 0 for depth in unet.down)
    sizes = UNetConfig(
        block_out_channels=(320, 640, 1280), layers_per_block=(2, 2, 2), attends_down=attends, attends_up=attends
    )
    theirs = ldm_unet(sizes).theirs if name == "sdxl" else lambda path: path
    found = [
        Named((f"lora_unet_{(theirs(path) or path).replace('.', '_')}", f"denoiser.{path}"), kind, block)
        for path, kind, block in _unet_paths(unet)
    ]
    return (*found, *(layer for prefix, part, layers in unet.text for layer in _text(prefix, part, layers)))


@cache
def flux_layers() -> tuple[Named, ...]:
    """Every layer of Flux.1's denoiser and CLIP that a LoRA may change."""
    paths = [
        *(f"double_blocks.{number}.{stream}_{layer}" for number in range(FLUX_BLOCKS["double_blocks"])
          for stream in ("img", "txt") for layer in _FLUX_DOUBLE),
        *(f"single_blocks.{number}.{layer}" for number in range(FLUX_BLOCKS["single_blocks"]) for layer in _FLUX_SINGLE),
    ]  # fmt: skip
    denoiser = [Named((f"lora_unet_{path.replace('.', '_')}", f"denoiser.{path}"), "attention") for path in paths]
    return (*denoiser, *_text("lora_te1", "text_encoder", 12))


def _text(prefix: str, part: str, layers: int) -> Iterator[Named]:
    for number in range(layers):
        for layer in _TEXT:
            path = f"text_model.encoder.layers.{number}.{layer}"
            yield Named((f"{prefix}_{path.replace('.', '_')}", f"{part}.{path}"), "text")


def _unet_paths(unet: UNet) -> Iterator[tuple[str, Kind, int]]:
    for stage, depth in enumerate(unet.down):
        first = unet.ends + 1 + 3 * stage
        for block in range(2):
            yield from _one(f"down_blocks.{stage}", block, depth, block == 0 and stage in (1, 2), first + block)
        if stage < len(unet.down) - 1:
            yield f"down_blocks.{stage}.downsamplers.0.conv", "convolution", first + 2
    inner = [0, 0, 0] if unet.between == 1 else [0, 1, 2]
    places = [unet.before_middle + place for place in inner]
    yield from _resnet("mid_block.resnets.0", False, places[0])
    yield from _attention("mid_block.attentions.0", unet.middle, places[1])
    yield from _resnet("mid_block.resnets.1", False, places[2])
    for stage, depth in enumerate(unet.up):
        first = unet.before_up + 3 * stage
        for block in range(3):
            yield from _one(f"up_blocks.{stage}", block, depth, True, first + block)
        if stage < len(unet.up) - 1:
            yield f"up_blocks.{stage}.upsamplers.0.conv", "convolution", first + 2


def _one(where: str, block: int, depth: int, shortcut: bool, place: int) -> Iterator[tuple[str, Kind, int]]:
    yield from _resnet(f"{where}.resnets.{block}", shortcut, place)
    if depth:
        yield from _attention(f"{where}.attentions.{block}", depth, place)


def _resnet(path: str, shortcut: bool, place: int) -> Iterator[tuple[str, Kind, int]]:
    """``shortcut``: whether it changes the number of channels."""
    for name in ("conv1", "conv2"):
        yield f"{path}.{name}", "convolution", place
    for name in ("time_emb_proj", *(("conv_shortcut",) if shortcut else ())):
        yield f"{path}.{name}", "resnet", place


def _attention(path: str, depth: int, place: int) -> Iterator[tuple[str, Kind, int]]:
    inside: Sequence[str] = [*(f"attn{n}.{layer}" for n in (1, 2) for layer in _ATTENTION), *_FEED_FORWARD]
    for name in ("proj_in", "proj_out", *(f"transformer_blocks.{n}.{layer}" for n in range(depth) for layer in inside)):
        yield f"{path}.{name}", "attention", place
