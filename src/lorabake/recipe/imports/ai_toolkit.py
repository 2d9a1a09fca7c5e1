"""Jobs of ai-toolkit (``sd_trainer``): YAML, or the same as JSON. It takes no notice of keys that it does not know."""

from __future__ import annotations

from collections.abc import Mapping

from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.recipe.imports import _prompts, _values, ai_toolkit_data, ai_toolkit_run
from lorabake.recipe.imports._ai_toolkit_keys import SWALLOWED
from lorabake.recipe.imports._paths import located
from lorabake.recipe.imports._reading import Reading
from lorabake.recipe.imports._values import words

number, whole, flag, text = _values.number, _values.whole, _values.flag, _values.text
_TRAINERS = ("sd_trainer", "ui_trainer", "diffusion_trainer")
_FLOWS = ("flux", "flex1", "flex2", "sd3")

_SAVE_TYPES = {
    "float16": "fp16",
    "fp16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "fp32": "fp32",
    "float": "fp32",
}


def read(reading: Reading) -> None:
    """Set everything that a job says.

    Raises:
        UserError: the job is not a training of a LoRA with pictures.
    """
    config = reading.table("config")
    processes = config.get("process")
    if not isinstance(processes, list) or not processes or not isinstance(processes[0], Mapping):
        raise UserError("The job has no config.process with a process in it. Is it cut off? Nothing was written.")
    process = reading.part(processes[0], "")
    kind = process.text("type") or ""
    if kind not in _TRAINERS:
        raise UserError(
            f"The job is a '{_values.shown(kind)}', and only jobs of ai-toolkit's sd_trainer are trainings that a recipe can be. Nothing was written."
        )
    if len(processes) > 1:
        reading.warnings.append(f"config.process has {len(processes)} processes: the first is taken.")
    name = reading.part(config, "config.")
    if (called := name.text("name")) is not None:
        name.put("output.name", called, "name")
    model = reading.part(process.table("model"), "model.")
    flow, unknown = _model(model)
    family = _family(model, flow)
    trigger = _trigger(process)
    train = reading.part(process.table("train"), "train.")
    _network(reading.part(process.table("network"), "network."), process, flow)
    ai_toolkit_data.datasets(process, trigger)
    steps = ai_toolkit_run.train(train, flow)
    ai_toolkit_run.objective(train, flow)
    _saving(reading.part(process.table("save"), "save."), steps)
    _samples(reading.part(process.table("sample"), "sample."), trigger, steps, train, family)
    for key in ("logging", "training_folder", "device", "performance_log_every", "sqlite_db_path", "type"):
        if key in process.given and key not in ("type",):
            process.asides.append(key)
        process.seen.add(key)
    reading.asides += [key for key in reading.given if key not in ("config",)]
    for key in ("embedding", "adapter", "decorator", "slider", "guidance"):
        if process.has(key):
            process.lost(key, "only networks are trained here.")
    process.rest((), ("network", "datasets", "train", "model", "save", "sample", "trigger_word"), SWALLOWED)
    if unknown:
        reading.lines.sort(key=lambda line: line.kind != "lost")


_QUANTISED = {
    "qfloat8": "fp8",
    "qfloat8_e4m3fn": "fp8",
    "float8": "fp8",
    "qint8": "int8",
    "int8": "int8",
    "uint8": "int8",
    "qint4": "nf4",
    "uint4": "nf4",
    "nf4": "nf4",
}
"""Ours by their names; what is there in whole numbers of 4 bits is here in nf4."""
_SWAP = "set train.blocks_to_swap, the number of the denoiser's blocks that wait in main memory, with train.gradient_checkpointing = true."
_LEFT = {
    "quantize_te": "T5 goes with model.quantize, and CLIP stays whole.",
    "low_vram": f"networks that are not needed leave memory by themselves here. If it is still short, {_SWAP}",
    "layer_offloading": f"to have parts of the base wait in main memory here, {_SWAP}",
}
"""Keys without which the same is learnt, and what to do instead."""


def _model(model: Reading) -> tuple[bool, bool]:
    """Whether it is a flow model, and whether it is of a family that is not here."""
    base = model.text("name_or_path")
    arch = (model.text("arch") or "").partition(":")[0].lower()
    if base is None:
        model.warnings.append("The job names no base model: put one in as model.base.")
        model.put("model.base", "put your base model in here", "name_or_path", "", "default")
    else:
        model.put("model.base", located(model, "name_or_path", base, model=True), "name_or_path")
    if (vae := model.text("vae_path")) is not None:
        model.put("model.vae", located(model, "vae_path", vae), "vae_path")
    if model.flag("is_v_pred"):
        model.put("model.prediction", "v", "is_v_pred")
    flow = model.flag("is_flux") or model.flag("is_v3") or arch in _FLOWS
    known = arch in ("", "sd1", "sd15", "sd2", "sd", "sdxl", "xl", "flux", "sd3", "ssd", "vega")
    others = [
        key for key in ("is_pixart", "is_auraflow", "is_lumina2", "is_ssd", "is_vega", "is_flex") if model.flag(key)
    ]
    if not known or others:
        model.lost(
            "arch" if not known else others[0],
            "lorabake has no such family of models: SD 1 and 2, SDXL, SD3 and Flux.1 are trained. Give one of these as model.base.",
        )
        flow = True
    if flow:
        model.put("objective.name", "flow", "base model", "a flow model", "default")
    if (lora := model.text("assistant_lora_path")) is not None:
        model.lost(
            "assistant_lora_path",
            f"{lora}: no LoRA is laid over the base while training. Merge it, and give the result as model.base.",
        )
    if (lora := model.text("lora_path")) is not None:
        model.lost(
            "lora_path",
            f"{lora}: LoRA files are not merged into the base first. Merge it, and give the result as model.base.",
        )
    if model.flag("quantize"):
        _quantised(model)
    for key, what in _LEFT.items():
        if model.flag(key):
            model.left(key, what)
    model.rest(
        words(
"""
is_v2 is_xl is_sdxl is_flux is_v3 dtype quantize_kwargs qtype qtype_te te_name_or_path refiner_name_or_path
use_text_encoder_1 use_text_encoder_2 experimental_xl attn_masking split_model_over_gpus model_kwargs model_paths
compile layer_offloading_text_encoder_percent layer_offloading_transformer_percent extras_name_or_path
accuracy_recovery_adapter vae_device te_device unet_path text_encoder_bits
"""
),
        (), SWALLOWED,
    )  # fmt: skip
    return flow, bool(not known or others)


def _quantised(model: Reading) -> None:
    """Set how the base is stored. Behind a bar the type may name an adapter that makes up for it."""
    given, _, recovery = (model.text("qtype") or "qfloat8").partition("|")
    kind = _QUANTISED.get(given.strip().lower())
    key = "qtype" if model.has("qtype") else "quantize"
    if recovery or model.has("accuracy_recovery_adapter"):
        model.left("accuracy_recovery_adapter", "there is none here: int8 is closest to the original, nf4 farthest.")
    if kind:
        model.put("model.quantize", kind, key, "T5 with it, and rows are scaled each by itself")
    else:
        model.left(key, f"{given}: not stored in that type here: model.quantize takes int8, fp8 and nf4.")


def _network(network: Reading, process: Reading, flow: bool) -> None:
    if not network.given:
        process.lost(
            "network",
            "there is none, so ai-toolkit trains the whole model; the recipe trains a LoRA. For the whole: adapter.name = 'full'.",
        )
        return
    kind = (network.text("type") or "lora").lower()
    ours = {"locon": "lora", "lierla": "lora", "c3lier": "lora"}.get(kind, kind)
    if ours in cards("adapter"):
        network.put(
            "adapter.name", ours, "type", "" if ours == kind else kind, None if network.has("type") else "default"
        )
    else:
        network.lost(
            "type",
            f"there is no adapter '{kind}' here, so the recipe trains a LoRA; choose among {', '.join(cards('adapter'))}, with its rank and learning rate.",
        )
    rank_key = "rank" if network.has("rank") else "linear"
    rank = network.whole(rank_key)
    network.put("adapter.rank", rank or 4, rank_key, kind=None if rank else "default")
    alpha_key = "linear_alpha" if network.has("linear_alpha") else "alpha"
    alpha = network.number(alpha_key)
    if flow:
        if alpha is not None and alpha != (rank or 4):
            network.unused(alpha_key, "ai-toolkit puts the rank in its place for transformers, and so does the recipe.")
        elif alpha is not None:
            network.say("same", alpha_key, "adapter.alpha", None, "the rank, which is our default")
    else:
        network.put(
            "adapter.alpha", 1.0 if alpha is None else alpha, alpha_key, kind=None if alpha is not None else "default"
        )
    conv, conv_alpha = network.whole("conv"), network.number("conv_alpha")
    if conv and not flow:
        network.put("adapter.conv_rank", conv, "conv")
        if conv_alpha is not None:
            network.put("adapter.conv_alpha", conv_alpha, "conv_alpha")
    elif conv:
        network.unused("conv", "the model has no convolutions that are trained.")
    if (dropout := network.number("dropout")) is not None:
        network.put("adapter.dropout", dropout, "dropout")
    start = "pretrained_lora_path"
    if (path := network.text(start)) is not None:
        network.put("adapter.start_from", located(network, start, path), start)
    for name, value in network.table("network_kwargs").items():
        if not _values.is_nothing(value):
            network.lost(
                f"network_kwargs: {name}",
                f"{_values.shown(value)}: see `lorabake explain adapter.block_rank` for the choice of layers.",
            )
    network.rest(words(
"""
transformer_only lokr_full_rank lokr_factor old_lokr_format lorm split_multistage_loras alpha linear_alpha conv_alpha
linear rank network_kwargs
"""
), (), SWALLOWED)  # fmt: skip


def _trigger(process: Reading) -> str | None:
    trigger = process.text("trigger_word")
    if trigger is not None:
        process.put("output.trigger", trigger, "trigger_word")
    return trigger


def _saving(save: Reading, micro: int) -> None:
    every = save.whole("save_every")
    stated = None if every else "default"
    count = max(1, (every or 1000) // micro)
    save.put(
        "save.every",
        _values.span(count, "steps"),
        "save_every",
        "with its unit" if micro == 1 else f"/ {micro}: it counts passes",
        stated,
    )
    keep = save.whole("max_step_saves_to_keep")
    save.put(
        "save.keep", 5 if keep is None else keep, "max_step_saves_to_keep", kind=None if keep is not None else "default"
    )
    given = (save.text("dtype") or "float16").lower()
    if given in _SAVE_TYPES:
        if save.has("dtype"):
            save.put("save.dtype", _SAVE_TYPES[given], "dtype")
    else:
        save.lost("dtype", "it is none of float16, bf16 and float32.")
    save.rest(["push_to_hub", "hf_repo_id", "hf_private", "save_format"], (), SWALLOWED)


def _samples(sample: Reading, trigger: str | None, micro: int, train: Reading, family: str) -> None:
    prompts = sample.given.get("prompts") or [
        item.get("prompt") for item in _values.tables(sample.given.get("samples"))
    ]
    texts = [str(prompt) for prompt in prompts if not _values.is_nothing(prompt)] if isinstance(prompts, list) else []
    sample.seen |= {"prompts", "samples"}
    if texts and not train.flag("disable_sampling"):
        _lines(sample, [text.replace("[trigger]", trigger or "") for text in texts], family)
        every = max(1, (sample.whole("sample_every") or 100) // micro)
        sample.put(
            "sample.every",
            _values.span(every, "steps"),
            "sample_every",
            "with its unit" if micro == 1 else f"/ {micro}: it counts passes",
            None if sample.has("sample_every") else "default",
        )
    sample.rest(words(
"""
neg seed walk_seed width height guidance_scale sample_steps sampler sample_start_step network_multiplier
guidance_rescale ext format adapter_conditioning_scale refiner_start_at do_cfg_norm num_frames fps sample_every
prompt_2 neg_2 samples
"""
), (), SWALLOWED)  # fmt: skip


def _lines(sample: Reading, texts: list[str], family: str) -> None:
    """Prompts as lines with what they share; an option in a prompt itself goes first."""
    seed, walks = sample.whole("seed"), sample.flag("walk_seed")
    guidance = "guidance_scale" if family == "flux" else "scale"
    shared = {
        "negative_prompt": sample.given.get("neg"),
        "width": sample.whole("width"),
        "height": sample.whole("height"),
        "seed": seed,
        "sample_steps": sample.whole("sample_steps"),
        guidance: sample.number("guidance_scale"),
    }
    lines = _prompts.Lines(family, "ai-toolkit")
    found: list[str] = []
    for index, text in enumerate(texts):
        own = _prompts.table_of(text)
        if "scale" in own:
            own[guidance] = own.pop("scale")
        if walks and seed is not None and seed >= 0:  # -1 is any
            shared["seed"] = seed + index
        found.append(lines.line({**shared, **own}))
    note = "as prompt lines: negative, size, seed, steps and guidance with them"
    sample.put("sample.prompts", found, "prompts", note)
    for option, why in lines.left.items():
        sample.left(f"prompts: {option}", why)


def _family(model: Reading, flow: bool) -> str:
    """What the base is, as far as samples go by it."""
    arch = (model.text("arch") or "").partition(":")[0].lower()
    if model.flag("is_v3") or arch == "sd3":
        return "sd3"
    if flow:
        return "flux" if model.flag("is_flux") or arch in _FLOWS else "other"
    return "sdxl" if arch in ("sdxl", "xl", "ssd", "vega") or model.flag("is_xl") or model.flag("is_sdxl") else "sd"
