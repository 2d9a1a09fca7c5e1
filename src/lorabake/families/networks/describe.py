"""What a model is that no family recognises, told from the names of its tensors, and what to do with it. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

from lorabake.families.networks.weights import SHARD, open_weights

_KINDS: tuple[tuple[str, str], ...] = (
    (
        r"^lora_(unet|te)|\.lora_(down|up|A|B)\.|\.(hada_w1_a|lokr_w1(_a)?|oft_blocks)$",
        "it is a LoRA, which goes on top of a base model. Give the base model that it was made for.",
    ),
    (r"^control_model\.|^controlnet_", "it is a ControlNet, which goes beside a base model. Give the base model."),
    (r"^(emb_params|string_to_param)", "it is an embedding (textual inversion). Give a base model."),
    (r"(^|\.)(double_blocks|single_transformer_blocks)\.\d", "it is a Flux model, of a kind that is not supported."),
    (r"(^|\.)joint_blocks\.\d", "it is a Stable Diffusion 3 model, of a kind that is not supported."),
    (r"^conditioner\.embedders\.", "it is an SDXL model of a kind that is not supported, such as a refiner."),
    (r"^model_ema\.", "it holds averaged (EMA) weights only. Get the file with the plain weights."),
    (r"(^|\.)input_blocks\.0\.0\.weight$", "it holds a U-Net of a kind that is not supported, or under unusual names."),
    (
        r"^(unet\.)?down_blocks\.0\.",
        "it holds a U-Net alone, in diffusers' names. Give the model's folder, or its single file.",
    ),
    (
        r"(^|\.)(encoder|decoder)\.conv_in\.weight$",
        'it holds a VAE alone. Give it as vae = "FILE", beside a base model.',
    ),
    (
        r"(^|\.)(token_embedding|shared)\.weight$",
        'it holds a text encoder alone. Give it as text_encoders = ["FILE"], beside a base model.',
    ),
)
"""Signs and what they mean; the first that any name shows counts."""
_SHOWN = 3


def describe(path: Path) -> str:
    """The rest of a sentence "PATH cannot be trained on: …" about a file or folder that no family takes.

    Raises:
        UserError: it is no readable safetensors file; the message says what it is.
    """
    if path.is_dir():
        return (
            "it is not a model folder that is understood. A diffusers folder has model_index.json beside unet/ (or transformer/), vae/, "
            "text_encoder/ and tokenizer/. Or give a single .safetensors file."
        )
    if match := SHARD.search(path.name):
        return f"it is one of {int(match[2])} shards of a network. Give the model's folder."
    names = list(open_weights(path))
    for sign, meaning in _KINDS:
        if any(re.search(sign, name) for name in names):
            return meaning
    shown = ", ".join(f"'{name[:60]}'" for name in names[:_SHOWN]) or "none at all"
    return f"its {len(names)} tensors belong to no kind of model that is known ({shown} …)."
