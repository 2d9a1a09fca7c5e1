"""Sizes of the pocket model, as the ``config.json`` files of its diffusers folder say them.

Pictures of 64 x 64 pixels, latents of 8 x 16 x 16, captions of 77 tokens from a vocabulary of 2048.
"""

from __future__ import annotations

from typing import Any

from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig

VOCABULARY = 2048
"""Tokens: 512 bytes (inside and at the end of words), merged pieces, and two special ones at the end."""
LATENT_CHANNELS = 8
"""Twice SD's: a face of twenty pixels is five latent cells wide, and its eyes must fit into one or two."""
START, END = "<|startoftext|>", "<|endoftext|>"

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    # Heads per resolution, not their width: SD's name for it is an old mistake that stayed.
    "attention_head_dim": 2,
    "block_out_channels": [32, 64, 96, 96],
    "center_input_sample": False,
    "cross_attention_dim": 128,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "out_channels": LATENT_CHANNELS,
    "sample_size": 16,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": False,
}
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": VOCABULARY - 2,
    "dtype": "float32",
    "eos_token_id": VOCABULARY - 1,
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": VOCABULARY - 1,
    "projection_dim": 128,
    "vocab_size": VOCABULARY,
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": LATENT_CHANNELS,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 64,
    # SD1's own; the encoder is made so that latents times this have unit variance.
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
TOKENIZER: dict[str, Any] = {
    "add_prefix_space": False,
    "bos_token": START,
    "do_lower_case": True,
    "eos_token": END,
    "errors": "replace",
    "model_max_length": 77,
    "pad_token": END,
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": END,
}
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def unet_config() -> UNetConfig:
    """Sizes of the denoiser."""
    return UNetConfig.from_json(UNET)


def text_config() -> ClipConfig:
    """Sizes of the text encoder."""
    return ClipConfig.from_json(TEXT_ENCODER)


def vae_config() -> VaeConfig:
    """Sizes of the autoencoder."""
    return VaeConfig.from_json(VAE)
