"""Keys of OneTrainer: their names in old versions, which it has and a recipe has not, and which say nothing about training."""

from __future__ import annotations

from lorabake.recipe.imports._values import words

SWALLOWED = "OneTrainer takes no notice of it, without a word."


OLD = {
    "train_unet": ("unet", "train"), "unet_learning_rate": ("unet", "learning_rate"), "train_text_encoder": ("text_encoder", "train"),
    "text_encoder_learning_rate": ("text_encoder", "learning_rate"), "train_text_encoder_2": ("text_encoder_2", "train"),
    "text_encoder_2_learning_rate": ("text_encoder_2", "learning_rate"), "train_prior": ("prior", "train"), "vae_model_name": ("vae", "model_name"),
    "unet_weight_dtype": ("unet", "weight_dtype"), "prior_weight_dtype": ("prior", "weight_dtype"),
    "text_encoder_weight_dtype": ("text_encoder", "weight_dtype"), "text_encoder_2_weight_dtype": ("text_encoder_2", "weight_dtype"),
    "train_text_encoder_epochs": ("text_encoder", "stop_training_after"), "train_text_encoder_2_epochs": ("text_encoder_2", "stop_training_after"),
}  # fmt: skip
"""Keys of old versions that are in tables now."""


QUANTISED = {
    "INT_8": ("int8", ""),
    "INT_W8A8": ("int8", "stored so; products are computed whole, which is more exact"),
    "FLOAT_8": ("fp8", ""),
    "FLOAT_W8A8": ("fp8", "stored so; products are computed whole, which is more exact"),
    "NFLOAT_4": ("nf4", ""),
}
"""Ours by the types that weights are stored in, and what is to be said. With ``_SVD`` behind it a type is helped out by a thin product."""


RENAMED = {
    "save_after": "save_every",
    "save_after_unit": "save_every_unit",
    "lora_layers": "layer_filter",
    "lora_layer_preset": "layer_filter_preset",
    "lora_layers_regex": "layer_filter_regex",
}


NOTHING_OF = words(
    """
adam_w_mode alpha amsgrad bias_correction bias_correction_beta1 bias_correction_beta2 block_wise capturable centered
dampening differentiable foreach fused fused_back_pass initial_accumulator initial_accumulator_value is_paged
log_every lr_decay max_unorm maximize min_8bit_size no_prox optim_bits percentile_clipping quant_block_size optimizer
fsdp_in_use use_triton stochastic_rounding
"""
)


LOST = {
    "generalized_offset_noise": ((False,), "the offset has one strength for all timesteps here."),
    "perturbation_noise_weight": ((0, 0.0), "it is asked for too, which no noise here is. Near: objective.input_perturbation, which is not asked for."),
    "force_epsilon_prediction": ((False,), 'give model.prediction = "epsilon".'),
    "force_circular_padding": ((False,), "pictures are not trained as tiles."),
    "lora_decompose": ((False,), "DoRA: see `lorabake list adapters`."),
    "layer_filter": (("",), "see `lorabake explain adapter.block_rank` for the choice of layers."),
    "custom_conditioning_image": ((False,), "there is no such condition."),
    "additional_embeddings": (([],), "embeddings are not trained here."),
    "cep_gamma": ((0, 0.0), "captions are not perturbed here."),
    "prior_prediction": ((False,), "near: preservation.weight."),
    "custom_learning_rate_scheduler": ((), "there is no such schedule here. `lorabake list schedules` shows all."),
}  # fmt: skip


IDLE = words(
    """
__version debug_mode debug_dir workspace_dir cache_dir tensorboard_expose tensorboard_port tensorboard_always_on
validate_after validate_after_unit continue_last_backup include_train_config multi_gpu device_indexes
gradient_reduce_precision fused_gradient_reduce async_gradient_reduce async_gradient_reduce_buffer output_model_format
latent_caching latent_caching_epochs clear_cache_before_training image_caching text_caching train_device temp_device
fallback_train_dtype enable_autocast_cache only_cache frames attention_mechanism vae_weight_dtype embedding_weight_dtype
lora_weight_dtype train_unet_epochs train_prior_epochs dataloader_threads caching_threads prefetch_next_batch
gradient_checkpointing_cpu_offload enable_async_offloading enable_activation_offloading
async_offloading compile vb_loss_strength loss_scaler embedding_learning_rate preserve_embedding_norm embedding
embeddings embedding_model_names token_count initial_embedding_text bundle_additional_embeddings cloud
lora_decompose_norm_epsilon lora_decompose_output_axis oft_block_size oft_block_share dora_oft oft_scaled
oft_clipped_norm oft_cans oft_coft coft_eps lokr_dim lokr_decompose_both lokr_decompose_factor lokr_use_tucker
lokr_weight_decompose lokr_dora_on_output lokr_full_matrix lokr_vec_trick optimizer_defaults sample_after
sample_after_unit sample_skip_first sample_image_format sample_video_format sample_audio_format samples_to_tensorboard
non_ema_sampling backup_after backup_after_unit rolling_backup rolling_backup_count backup_before_save save_skip_first
save_filename_prefix secrets samples extra_model_name effnet_encoder decoder decoder_text_encoder decoder_vqgan
unconditional_transformer quantization circular_mask_generation random_rotate_and_crop scheduler_params
training_method ema_update_step_interval text_encoder_3_layer_skip text_encoder_4_layer_skip transformer prior unet
text_encoder text_encoder_2 text_encoder_3 text_encoder_4 vae layer_filter_regex weight_decay prevent_overwrites
learning_rate_cycles learning_rate_min_factor tensorboard
"""
)
