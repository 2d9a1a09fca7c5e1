"""Keys of ai-toolkit: which it has and a recipe has not, and which say nothing about training."""

from __future__ import annotations

from lorabake.recipe.imports._values import words

SWALLOWED = "ai-toolkit takes no notice of it, without a word."


LOST_TRAIN = {
    "snr_gamma": ((0, 0.0), "it multiplies the loss by γ / SNR without a limit, which no weighting here does. Near: objective.weighting = 'min-snr'."),
    "learnable_snr_gos": ((False,), "near: objective.weighting = 'learned'."),
    "linear_timesteps": ((False,), "its weights by timestep are not ours. Near: objective.timesteps = 'uniform'."),
    "linear_timesteps2": ((False,), "its weights by timestep are not ours. Near: objective.timesteps = 'uniform'."),
    "weight_jitter": ((0, 0.0), "there is no such noise on weights."),
    "noise_multiplier": ((1, 1.0), "noise has a strength of 1 here."),
    "target_noise_multiplier": ((1, 1.0), "noise has a strength of 1 here."),
    "random_noise_multiplier": ((0, 0.0), "noise has a strength of 1 here."),
    "random_noise_shift": ((0, 0.0), "near: objective.noise = 'offset'."),
    "dynamic_noise_offset": ((False,), "near: objective.noise = 'offset' with objective.noise_offset_adaptive."),
    "img_multiplier": ((1, 1.0), "pictures have a strength of 1 here."),
    "noisy_latent_multiplier": ((1, 1.0), "pictures have a strength of 1 here."),
    "latent_multiplier": ((1, 1.0), "pictures have a strength of 1 here."),
    "do_cfg": ((False,), "guidance is not trained here."),
    "do_random_cfg": ((False,), "guidance is not trained here."),
    "bypass_guidance_embedding": ((False,), "Flux dev is told a guidance of 1 here while it is trained."),
    "prompt_dropout_prob": ((0, 0.0), "text encoders are not left out one by one. data.captions.caption_dropout leaves out all."),
    "loss_target": (("noise",), "the target is the noise, or the model's own, here."),
    "inverted_mask_prior": ((False,), "near: preservation.outside_masks = 0.5, which keeps the black of masks as the base has it."),
    "blank_prompt_preservation": ((False,), 'near: preservation.weight = 1 with preservation.caption = "".'),
    "short_and_long_captions": ((False,), "each picture has one caption here."),
    "standardize_images": ((False,), "pictures are not standardised here."),
    "standardize_latents": ((False,), "latents are not standardised here."),
    "correct_pred_norm": ((False,), "there is no such correction."),
    "match_noise_norm": ((False,), "there is no such correction."),
    "match_adapter_assist": ((False,), "there is no assistant adapter."),
    "adapter_assist_name_or_path": ((), "there is no assistant adapter."),
    "target_norm_std": ((), "there is no such term in the loss."),
    "train_turbo": ((False,), "there is no such training."),
    "single_item_batching": ((False,), "set train.batch_size = 1 and train.gradient_accumulation."),
    "embedding_lr": ((), "embeddings are not trained here."),
    "free_u": ((False,), "it is for drawing."),
    "switch_boundary_every": ((), "there is one denoiser here."),
    "force_consistent_noise": ((False,), "noise is drawn anew at every step here."),
    "unconditional_prompt": (("",), "left-out captions are empty here."),
    "negative_prompt": ((), "guidance is not trained here."),
}  # fmt: skip


IDLE_TRAIN = words(
    """
noise_scheduler content_or_style content_or_style_reg skip_first_sample force_first_sample disable_sampling
merge_network_on_save start_step xformers sdp train_refiner show_turbo_outputs unload_text_encoder
cache_text_embeddings attention_backend num_train_timesteps linear_timesteps adaptive_scaling_factor refiner_lr
adapter_lr diff_output_preservation_class diff_output_preservation_multiplier inverted_mask_prior_multiplier cfg_scale
max_cfg_scale cfg_rescale blank_prompt_preservation_multiplier gradient_accumulation_steps pseudo_huber_c
next_sample_timesteps free_u optimizer_params lr_scheduler_params ema_config do_paramiter_swapping
paramiter_swapping_factor
"""
)


IDLE_DATASET = words(
    """
caption_ext cache_latents cache_latents_to_disk cache_text_embeddings is_reg folder_path dataset_path resolution
num_repeats network_weight mask_path mask_min_value alpha_mask type num_frames shrink_video_to_frames do_i2v do_audio
buckets bucket_tolerance enable_ar_bucket caption_type prefetch_factor num_workers standardize_images fast_image_size
control_path
"""
)


LOST_DATASET = {
    "flip_y": ((False,), "pictures are not turned upside down here."),
    "augments": ((), "see data.augment: brightness, contrast, saturation, hue."),
    "augmentations": ((), "see data.augment: brightness, contrast, saturation, hue."),
    "random_scale": ((False,), "pictures are always scaled to their bucket here."),
    "scale": ((1, 1.0), "pictures are always scaled to their bucket here."),
    "random_triggers": ((), "use data.captions.wildcards, with choices in braces in the captions."),
    "poi": ((), "near: data.augment.face_crop."),
    "square_crop": ((False,), "near: data.buckets.enabled = false."),
    "control_path": (("",), "pictures to edit are not trained with here."),
    "inpaint_path": ((), "inpainting models are not trained here."),
    "clip_image_path": ((), "there is no image encoder."),
    "unconditional_path": ((), "guidance is not trained here."),
    "loss_multiplier": ((1, 1.0), "all pictures count alike, but for regularisation pictures: data.prior_loss_weight."),
}  # fmt: skip
