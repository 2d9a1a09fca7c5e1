"""Sizes of networks from the shapes of their tensors, for files that come without a ``config.json``. No torch here."""

from __future__ import annotations

from lorabake.base.errors import UserError
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig
from lorabake.families.networks.weights import Weights

HEAD_WIDTH = 64
"""Channels per attention head in every CLIP that diffusion models use, and in the U-Nets of SD2.x and SDXL."""
_GROUPS = 32
_OPEN_CLIP_WIDTHS = (1024, 1280)
"""Of the text encoders of SD2.x and SDXL. All other CLIPs are OpenAI's, with the quick GELU."""


def ldm_unet_config(weights: Weights, heads: int | None = None) -> UNetConfig:
    """Sizes of a U-Net in the layout of single files.

    Args:
        weights: its tensors, by their names below ``model.diffusion_model.``.
        heads: heads at every resolution (8 in SD1.x); None for as many as are 64 channels wide (SD2.x, SDXL).

    Raises:
        UserError: tensors are missing, or channels cannot be split into heads or groups.
    """
    widths, counts, depths, attends_down = _down(weights)
    attends_up = _up(weights, len(widths))
    middle = weights.count("middle_block.1.transformer_blocks.{}.norm1.weight")
    # A resolution without transformers has a depth too: at the coarsest one it is the middle block's.
    depths = [depth or (middle if level == len(widths) - 1 else 1) for level, depth in enumerate(depths)]
    some = next((name for name in weights if name.endswith("attn2.to_k.weight")), "middle_block.1.attn2.to_k.weight")
    divisors = [heads or HEAD_WIDTH, _GROUPS]
    if bad := [width for width in widths if any(width % divisor for divisor in divisors)]:
        raise UserError(
            f"{weights.subject}: a U-Net with {bad[0]} channels has no whole number of "
            f"{f'{heads} heads' if heads else f'heads of {HEAD_WIDTH}'} and {_GROUPS} groups. Give the model as a diffusers folder."
        )
    return UNetConfig(
        in_channels=weights.shape("input_blocks.0.0.weight")[1],
        out_channels=weights.shape("out.2.weight")[0],
        block_out_channels=tuple(widths),
        layers_per_block=tuple(counts),
        heads=tuple(heads or width // HEAD_WIDTH for width in widths),
        transformer_depth=tuple(depths),
        attends_down=tuple(attends_down),
        attends_up=attends_up,
        cross_attention_dim=weights.shape(some)[1],
        norm_num_groups=_GROUPS,
        use_linear_projection=len(weights.shape("middle_block.1.proj_in.weight")) == 2,
        micro_channels=weights.shape("label_emb.0.0.weight")[1] if "label_emb.0.0.weight" in weights else None,
    )


def _down(weights: Weights) -> tuple[list[int], list[int], list[int], list[bool]]:
    """Channels, residual blocks, transformer depth and whether there are transformers, by resolution."""
    widths, counts, depths, attends = [0], [0], [0], [False]
    index = 1
    while True:
        if f"input_blocks.{index}.0.op.weight" in weights:
            for sizes in (widths, counts, depths):
                sizes.append(0)
            attends.append(False)
        elif f"input_blocks.{index}.0.out_layers.3.weight" in weights:
            widths[-1] = weights.shape(f"input_blocks.{index}.0.out_layers.3.weight")[0]
            counts[-1] += 1
            depths[-1] = weights.count(f"input_blocks.{index}.1.transformer_blocks.{{}}.norm1.weight")
            attends[-1] = depths[-1] > 0
        else:
            break
        index += 1
    if not all(widths):
        raise UserError(f"{weights.subject}: the U-Net's 'input_blocks' are not whole. Fetch the file again.")
    return widths, counts, depths, attends


def _up(weights: Weights, levels: int) -> tuple[bool, ...]:
    """Which resolutions have transformers on the way up, from the finest to the coarsest."""
    attends = [False]
    index = 0
    while f"output_blocks.{index}.0.out_layers.3.weight" in weights:
        attends[-1] = f"output_blocks.{index}.1.transformer_blocks.0.norm1.weight" in weights
        if any(f"output_blocks.{index}.{place}.conv.weight" in weights for place in (1, 2)):
            attends.append(False)
        index += 1
    if len(attends) != levels:
        raise UserError(f"{weights.subject}: the U-Net's 'output_blocks' are not whole. Fetch the file again.")
    return tuple(reversed(attends))


def vae_config(weights: Weights, scaling_factor: float, shift_factor: float = 0.0) -> VaeConfig:
    """Sizes of an autoencoder, in diffusers' layout or that of single files.

    Args:
        weights: its tensors, by their names below ``first_stage_model.``.
        scaling_factor, shift_factor: of the family's latents; no file says them.

    Raises:
        UserError: tensors are missing, or channels cannot be split into groups.
    """
    down, block = ("down_blocks", "resnets") if is_diffusers_vae(weights) else ("down", "block")
    middle = (
        "encoder.mid_block.attentions.0.group_norm.weight"
        if is_diffusers_vae(weights)
        else "encoder.mid.attn_1.norm.weight"
    )
    levels = weights.count(f"encoder.{down}.{{}}.{block}.0.conv2.weight")
    weights.shape(f"encoder.{down}.0.{block}.0.conv2.weight")
    widths = tuple(weights.shape(f"encoder.{down}.{level}.{block}.0.conv2.weight")[0] for level in range(levels))
    if bad := [width for width in widths if width % _GROUPS]:
        raise UserError(
            f"{weights.subject}: an autoencoder with {bad[0]} channels has no {_GROUPS} groups of equal size, which files without a "
            "config.json are taken to have. Give the VAE as a diffusers folder."
        )
    return VaeConfig(
        in_channels=weights.shape("encoder.conv_in.weight")[1],
        out_channels=weights.shape("decoder.conv_out.weight")[0],
        latent_channels=weights.shape("decoder.conv_in.weight")[1],
        block_out_channels=widths,
        layers_per_block=weights.count(f"encoder.{down}.0.{block}.{{}}.conv2.weight"),
        norm_num_groups=_GROUPS,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv="quant_conv.weight" in weights,
        use_post_quant_conv="post_quant_conv.weight" in weights,
        mid_block_add_attention=middle in weights,
    )


def is_diffusers_vae(weights: Weights) -> bool:
    """Whether an autoencoder's tensors are in diffusers' layout."""
    return "encoder.down_blocks.0.resnets.0.conv2.weight" in weights


def classic_clip_config(weights: Weights) -> ClipConfig:
    """Sizes of CLIP's text half as transformers stores it, with or without ``text_model.`` in front.

    Raises:
        UserError: tensors are missing.
    """
    inner = weights.under("text_model.") if "text_model.final_layer_norm.weight" in weights else weights
    vocabulary, width = inner.shape("embeddings.token_embedding.weight")
    return ClipConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner.shape("encoder.layers.0.mlp.fc1.weight")[0],
        layers=inner.count("encoder.layers.{}.layer_norm1.weight"),
        heads=_clip_heads(width),
        positions=inner.shape("embeddings.position_embedding.weight")[0],
        quick_gelu=width not in _OPEN_CLIP_WIDTHS,
        projection_dim=weights.shape("text_projection.weight")[0] if "text_projection.weight" in weights else width,
    )


def open_clip_config(weights: Weights, skipped: int = 0) -> ClipConfig:
    """Sizes of OpenCLIP's text encoder.

    Args:
        weights: its tensors, by their names below ``cond_stage_model.model.``.
        skipped: layers at the end that the model does without: 1 in SD2.x.

    Raises:
        UserError: tensors are missing.
    """
    vocabulary, width = weights.shape("token_embedding.weight")
    return ClipConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=weights.shape("transformer.resblocks.0.mlp.c_fc.weight")[0],
        layers=max(1, weights.count("transformer.resblocks.{}.ln_1.weight") - skipped),
        heads=_clip_heads(width),
        positions=weights.shape("positional_embedding")[0],
        quick_gelu=False,
        projection_dim=weights.shape("text_projection")[1] if "text_projection" in weights else width,
    )


def _clip_heads(width: int) -> int:
    """Heads are 64 wide in every CLIP text encoder; narrower toys have one."""
    return width // HEAD_WIDTH if width >= HEAD_WIDTH and width % HEAD_WIDTH == 0 else 1
