"""Key tables: where the tensors of our networks lie in other layouts of the same weights. No torch here.

Our names are those of diffusers' (U-Net, autoencoder) and transformers' (CLIP) files. The other layout is that of single-file
checkpoints: latent-diffusion's U-Net and autoencoder, and OpenCLIP's text encoder. A :data:`Rename` goes from a file's name to
ours; a :class:`Paths` table goes both ways between paths of modules, which also names LoRA layers in that layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig

_CLIP = "text_model."
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class Target(NamedTuple):
    """What a tensor of a file is to us."""

    name: str
    rows: tuple[int, int] | None = None
    """Only these rows of it (first, behind the last): several of our tensors may be stored as one."""
    transposed: bool = False
    into: tuple[int, int] | None = None
    """It is these rows of ours (first, behind the last): one of our tensors may be stored as several."""


Rename = Callable[[str], tuple[Target, ...]]
"""From a tensor's name in the file to ours. Empty for what is known and not needed; unknown names come back as they are."""


class Paths:
    """A two-way table between our module paths and a file's. What lies below a listed path keeps the rest of its name."""

    def __init__(self, theirs_by_ours: Mapping[str, str]) -> None:
        self._theirs = dict(theirs_by_ours)
        self._ours = {theirs: ours for ours, theirs in theirs_by_ours.items()}

    def theirs(self, path: str) -> str | None:
        """The file's name of a module or tensor of ours; None if it has none."""
        return _looked_up(self._theirs, path)

    def ours(self, path: str) -> str | None:
        """Our name of a module or tensor of the file; None if we have none."""
        return _looked_up(self._ours, path)

    def rename(self, ignored: Callable[[str], bool] = lambda name: False) -> Rename:
        """For reading: names in neither the table nor ``ignored`` come back as they are, to be reported."""
        return lambda name: () if ignored(name) else (Target(self.ours(name) or name),)


def same(name: str) -> tuple[Target, ...]:
    """The rename of files in our own layout."""
    return (Target(name),)


def ldm_unet(config: UNetConfig) -> Paths:
    """The U-Net of single files, below ``model.diffusion_model.`` there (SD1.x, SD2.x, SDXL)."""
    levels = len(config.block_out_channels)
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    index = 1
    for level, count in enumerate(config.layers_per_block):
        for number in range(count):
            resnets[f"down_blocks.{level}.resnets.{number}"] = f"input_blocks.{index}.0"
            if config.attends_down[level]:
                table[f"down_blocks.{level}.attentions.{number}"] = f"input_blocks.{index}.1"
            index += 1
        if level < levels - 1:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    index = 0
    for block, level in enumerate(reversed(range(levels))):
        for number in range(config.layers_per_block[level] + 1):
            resnets[f"up_blocks.{block}.resnets.{number}"] = f"output_blocks.{index}.0"
            if config.attends_up[level]:
                table[f"up_blocks.{block}.attentions.{number}"] = f"output_blocks.{index}.1"
            if level > 0 and number == config.layers_per_block[level]:
                upsample = f"output_blocks.{index}.{2 if config.attends_up[level] else 1}.conv"
                table[f"up_blocks.{block}.upsamplers.0.conv"] = upsample
            index += 1
    inside = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return Paths(table | _within(resnets, inside))


def ldm_vae(config: VaeConfig) -> Paths:
    """The autoencoder of single files, below ``first_stage_model.`` there."""
    levels = len(config.block_out_channels)
    same_names = (
        "encoder.conv_in",
        "encoder.conv_out",
        "decoder.conv_in",
        "decoder.conv_out",
        "quant_conv",
        "post_quant_conv",
    )
    table = {name: name for name in same_names}
    resnets: dict[str, str] = {}
    attentions: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        attentions[f"{half}.mid_block.attentions.0"] = f"{half}.mid.attn_1"
        resnets[f"{half}.mid_block.resnets.0"] = f"{half}.mid.block_1"
        resnets[f"{half}.mid_block.resnets.1"] = f"{half}.mid.block_2"
    for level in range(levels):
        up = levels - 1 - level  # the file counts up-sampling levels from the picture's end
        for number in range(config.layers_per_block):
            resnets[f"encoder.down_blocks.{level}.resnets.{number}"] = f"encoder.down.{level}.block.{number}"
        for number in range(config.layers_per_block + 1):
            resnets[f"decoder.up_blocks.{level}.resnets.{number}"] = f"decoder.up.{up}.block.{number}"
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{up}.upsample.conv"
    inside_resnet = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
    inside_attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    return Paths(table | _within(resnets, inside_resnet) | _within(attentions, inside_attention))


def diffusers_vae(name: str) -> tuple[Target, ...]:
    """The rename of autoencoders in diffusers' layout, of any age."""
    return (Target(current_key(name)),)


def current_key(key: str) -> str:
    """A tensor's name today; autoencoders from before 2023 call the attention's layers query, key, value and proj_attn."""
    if ".attentions." in key:
        for old, new in _OLD_ATTENTION.items():
            key = key.replace(old, new)
    return key


def classic_key(key: str) -> str | None:
    """A CLIP tensor's classic name: newer files leave the prefix out. None for the table of positions in old ones, which is not needed."""
    key = key if key.startswith((_CLIP, "text_projection.")) else _CLIP + key
    return None if key == "text_model.embeddings.position_ids" else key


def classic_clip(*, projection: bool = False) -> Rename:
    """CLIP's text half as transformers stores it, with or without ``text_model.`` in front; whole CLIP models too.

    Args:
        projection: our network has ``text_projection``; without, it is ignored.
    """

    def rename(name: str) -> tuple[Target, ...]:
        if name.startswith("text_projection."):
            return (Target(name),) if projection else ()
        if name.startswith(("vision_model.", "visual_projection.")) or name == "logit_scale":
            return ()
        classic = classic_key(name)
        return (Target(classic),) if classic else ()

    return rename


def open_clip(config: ClipConfig, *, projection: bool = False) -> Rename:
    """OpenCLIP's text encoder: queries, keys and values in one tensor, more layers than are used in SD2.

    Below ``cond_stage_model.model.`` in SD2.x and ``conditioner.embedders.1.model.`` in SDXL. Layers beyond ``config.layers``
    are ignored.

    Args:
        projection: our network has ``text_projection.weight``, which is stored transposed; without, it is ignored.
    """
    width = config.hidden_size
    top = {
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
    inside = Paths(
        {
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "self_attn.out_proj": "attn.out_proj",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }
    )

    def rename(name: str) -> tuple[Target, ...]:
        if name in top:
            return (Target(top[name]),)
        if name == "text_projection":
            return (Target("text_projection.weight", transposed=True),) if projection else ()
        if name in ("logit_scale", "attn_mask") or name.startswith("visual."):
            return ()
        _, resblocks, rest = name.partition("transformer.resblocks.")
        number, _, rest = rest.partition(".")
        if not resblocks or not number.isdecimal():
            return (Target(name),)
        if int(number) >= config.layers:
            return ()
        layer = f"text_model.encoder.layers.{int(number)}"
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            kind = rest.rpartition("_")[2]
            parts = enumerate(("q_proj", "k_proj", "v_proj"))
            return tuple(Target(f"{layer}.self_attn.{part}.{kind}", (i * width, (i + 1) * width)) for i, part in parts)
        ours = inside.ours(rest)
        return (Target(f"{layer}.{ours}" if ours else name),)

    return rename


def _within(outer: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{a}.{c}": f"{b}.{d}" for a, b in outer.items() for c, d in inner.items()}


def _looked_up(table: Mapping[str, str], path: str) -> str | None:
    head, tail = path, ""
    while head:
        if head in table:
            return table[head] + tail
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}"
    return None
