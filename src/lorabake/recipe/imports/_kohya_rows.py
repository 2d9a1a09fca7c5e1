"""Keys of sd-scripts, one row each. The import and the export go by the same table."""

from __future__ import annotations

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._reading import Row

number, whole, flag, text = _values.number, _values.whole, _values.flag, _values.text

TRAINING = (
    Row("train_batch_size", "train.batch_size", whole),
    Row("gradient_accumulation_steps", "train.gradient_accumulation", whole),
    Row("gradient_checkpointing", "train.gradient_checkpointing", flag, back=bool),
    Row("max_grad_norm", "train.max_grad_norm", number, default=1.0),
    Row("scale_weight_norms", "train.max_weight_norm", number, off=(0.0,)),
    Row("seed", "train.seed", whole),
    Row("prior_loss_weight", "data.prior_loss_weight", number),
    Row("min_timestep", "objective.min_timestep", whole, off=(0,)),
    Row("max_timestep", "objective.max_timestep", whole, off=(1000,)),
    Row("training_comment", "output.comment", text),
    Row("output_name", "output.name", text),
    Row("save_state", "save.keep_state", flag),
    Row("validation_split", "validation.share", number, off=(0.0,)),
    Row("validation_seed", "validation.seed", whole),
)
"""Of the training config alone."""

SUBSET = (
    Row("shuffle_caption", "data.captions.shuffle", flag),
    Row("keep_tokens", "data.captions.keep_tokens", whole),
    Row("keep_tokens_separator", "data.captions.keep_tokens_separator", text),
    Row("caption_separator", "data.captions.separator", text),
    Row("secondary_separator", "data.captions.secondary_separator", text),
    Row("enable_wildcard", "data.captions.wildcards", flag),
    Row("caption_prefix", "data.captions.prefix", text),
    Row("caption_suffix", "data.captions.suffix", text),
    Row("caption_dropout_rate", "data.captions.caption_dropout", number),
    Row("caption_dropout_every_n_epochs", "data.captions.caption_dropout_every_n_epochs", whole),
    Row("caption_tag_dropout_rate", "data.captions.tag_dropout", number),
    Row("flip_aug", "data.flip", flag),
)
"""Of a subset, of a dataset, of [general] or of the training config: the first that has it counts."""

OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw-8bit": "AdamW8bit",
    "lion": "Lion",
    "prodigy": "Prodigy",
    "dadapt-adam": "DAdaptAdam",
    "adafactor": "AdaFactor",
    "adamw-schedule-free": "AdamWScheduleFree",
    "prodigy-schedule-free": "prodigyplus.ProdigyPlusScheduleFree",
    "came": "came_pytorch.CAME",
}
"""What sd-scripts calls our optimizers."""

WEIGHTINGS = {
    "min-snr": "min_snr_gamma",
    "debiased": "debiased_estimation_loss",
    "epsilon-like": "scale_v_pred_loss_like_noise_pred",
}
"""Key that asks for a weighting of ours."""

LOSSES = {"l2": "l2", "l1": "l1", "huber": "huber", "smooth_l1": "smooth-l1"}
"""Ours by their names."""

TIMESTEPS = {"sigmoid": "sigmoid", "uniform": "uniform", "shift": "shift", "flux_shift": "flux-shift"}
"""Ours by their names, for flow models."""

PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "float": "fp32", "fp32": "fp32"}
"""Ours by their names, in files."""

MEMORY = "it saves memory or time and leaves the mathematics as it is."

LEFT = {
    "full_fp16": ((False,), "weights of the adapter are always float32 here, which is more exact."),
    "full_bf16": ((False,), "weights of the adapter are always float32 here, which is more exact."),
    "fp8_scaled": ((False,), "fp8 weights are always scaled here, row by row."),
    "resume": (
        (),
        "states of other trainers cannot be gone on with. Begin with the LoRA file itself: adapter.start_from.",
    ),
    "save_n_epoch_ratio": ((), "give save.every."),
    "metadata_title": ((), "LoRA files have output.name as their title."),
    "metadata_author": ((), "there is no such setting."),
    "metadata_description": ((), "output.comment is a free text for the metadata."),
    "metadata_license": ((), "there is no such setting."),
    "metadata_tags": ((), "there is no such setting."),
    "no_metadata": ((False,), "LoRA files always say how they were made."),
}
"""Keys without which the same is learnt: values that mean that they are not used, and what to say else."""

LOST = {
    "v_pred_like_loss": ((0, 0.0, False), "there is no such term in the loss."),
    "weighted_captions": ((False,), "brackets in captions are text here and weigh nothing."),
    "color_aug": (
        (False,),
        "its mixture of gamma and hue is not ours. Near: data.augment.hue = 3 and data.augment.brightness = 0.03.",
    ),
    "stop_text_encoder_training": (
        (0, -1),
        "text encoders are trained to the end here. Lower optimizer.text_encoder_lr.",
    ),
    "base_weights": (
        (),
        "LoRA files are not merged into the base first. Merge them, and give the result as model.base.",
    ),
    "base_weights_multiplier": ((), "see base_weights."),
    "train_inpainting": ((False,), "inpainting models are not trained here."),
    "apply_t5_attn_mask": ((False,), "T5's padding is seen by the model here, as when pictures are drawn."),
    "apply_lg_attn_mask": ((False,), "the padding of captions is seen by the model here."),
    "clip_l_dropout_rate": (
        (0, 0.0),
        "text encoders are not left out one by one. data.captions.caption_dropout leaves out all.",
    ),
    "clip_g_dropout_rate": (
        (0, 0.0),
        "text encoders are not left out one by one. data.captions.caption_dropout leaves out all.",
    ),
    "t5_dropout_rate": (
        (0, 0.0),
        "text encoders are not left out one by one. data.captions.caption_dropout leaves out all.",
    ),
    "resize_interpolation": (("area", "lanczos"), "pictures are made smaller by area and larger by Lanczos here."),
    "in_json": (
        (),
        "captions of a metadata file are not read. Write them beside the pictures, as 001.txt for 001.png.",
    ),
    "multires_noise_annealing": ((False,), "there is no such setting."),
    "initial_epoch": ((0, 1), "runs begin at their beginning."),
    "initial_step": ((0,), "runs begin at their beginning."),
    "fused_backward_pass": ((False,), MEMORY),
    "edm2_loss_weighting": ((False,), "near: objective.weighting = 'learned'."),
}
"""Keys that we have nothing for."""

IDLE = """
accelerate_config async_upload attn_mode block_size bnb_4bit_compute_dtype cache_info cache_latents
cache_latents_to_disk cache_text_encoder_outputs cache_text_encoder_outputs_to_disk cache_t5 clip_l_dtype config_file
config_version console_log_file console_log_level console_log_simple cpu_offload_checkpointing dataset_class
ddp_bucket_view ddp_gradient_as_bucket_view ddp_static_graph ddp_timeout debug_dataset deepspeed
disable_mmap_load_safetensors double_blocks_to_swap dynamo_backend dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph
enable_scaled_pos_embed extra_accelerate_launch_args fp16_master_weights_and_gradients full_path gpu_ids highvram
huggingface_path_in_repo huggingface_repo_id huggingface_repo_type huggingface_repo_visibility huggingface_token
log_config log_prefix log_tracker_config log_tracker_name lowram lowvram main_process_port max_data_loader_n_workers
max_validation_steps mem_eff_attn mem_eff_save mode_scale model_train_type multi_gpu no_half_vae
num_cpu_threads_per_process num_machines num_processes offload_optimizer_device offload_optimizer_nvme_path
offload_param_device offload_param_nvme_path output_config output_dir persistent_data_loader_workers
pos_emb_random_crop_rate resume_from_huggingface sample_at_first sample_sampler save_clip save_last_n_epochs_state
save_last_n_steps_state save_model_as save_state_on_train_end save_state_to_huggingface save_t5xxl sdpa sdxl
single_blocks_to_swap skip_cache_check skip_image_resolution skip_until_initial_step t5xxl_device
t5xxl_dtype text_encoder_batch_size tokenizer_cache_dir torch_compile train_text_encoder unsloth_offload_checkpointing
v2 vae_batch_size vae_tiling wandb_api_key wandb_run_name xformers zero3_init_flag zero3_save_16bit_model zero_stage
split_attn disable_cuda_reduced_precision_operations sai_model_spec lycoris_algo enable_preview ui_custom_params
network_multiplier custom_attributes use_wandb epoch noise_offset_type
"""
"""Keys of sd-scripts and of what writes its configs that say nothing about what is trained."""

IDLE_KEYS = frozenset(IDLE.split())
