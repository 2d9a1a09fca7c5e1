"""Configs and presets of OneTrainer: JSON, of any of its versions. Keys of older ones are read under their later names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorabake.base.cards import cards
from lorabake.base.errors import UserError
from lorabake.recipe.imports import _values, onetrainer_concepts, onetrainer_run, onetrainer_samples
from lorabake.recipe.imports._onetrainer_keys import IDLE, LOST, OLD, QUANTISED, RENAMED, SWALLOWED
from lorabake.recipe.imports._paths import located
from lorabake.recipe.imports._reading import Reading, Row

number, whole, flag, text = _values.number, _values.whole, _values.flag, _values.text

ROWS = (
    Row("batch_size", "train.batch_size", whole),
    Row("gradient_accumulation_steps", "train.gradient_accumulation", whole),
    Row("clip_grad_norm", "train.max_grad_norm", number, default=1.0),
    Row("lora_rank", "adapter.rank", whole, default=16),
    Row("lora_alpha", "adapter.alpha", number, default=1.0, off=(0.0,)),
    Row("dropout_probability", "adapter.dropout", number, off=(0.0,)),
)
MASKS = (
    Row("unmasked_probability", "data.masks.unmasked_probability", number, default=0.1),
    Row("unmasked_weight", "data.masks.unmasked_weight", number, default=0.1),
    Row("masked_prior_preservation_weight", "preservation.outside_masks", number, off=(0.0,)),
)
_FLOWS = ("FLUX_DEV_1", "FLUX_FILL_DEV_1", "STABLE_DIFFUSION_3", "STABLE_DIFFUSION_35")
_WHOLE = ("", "FLOAT_16", "BFLOAT_16", "FLOAT_32", "TFLOAT_32")
_T5 = {"FLUX": "text_encoder_2", "STABLE_DIFFUSION_3": "text_encoder_3"}
"""Where the T5 of a family is."""
_TYPES = {"FLOAT_16": "fp16", "BFLOAT_16": "bf16", "FLOAT_32": "fp32"}


def read(reading: Reading) -> None:
    """Set everything that a config says.

    Raises:
        UserError: it is no training of a LoRA.
    """
    method = (reading.text("training_method") or "FINE_TUNE").upper()
    if method == "EMBEDDING":
        raise UserError("The config trains an embedding, which a recipe cannot. Nothing was written.")
    reading = _modern(reading)
    model_type = (reading.text("model_type") or "STABLE_DIFFUSION_15").upper()
    flow = _model(reading, model_type)
    _quantised(reading, model_type)
    _adapter(reading, method)
    reading.rows(ROWS)
    _length(reading)
    onetrainer_run.rates(reading, model_type)
    onetrainer_run.optimizer(reading)
    onetrainer_run.schedule(reading)
    onetrainer_run.objective(reading, flow)
    onetrainer_concepts.data(reading, _concepts(reading))
    _buckets(reading)
    _masks(reading)
    _run(reading)
    _saving(reading)
    onetrainer_samples.samples(reading, model_type)
    reading.losses(LOST)
    reading.rest(IDLE, (row.key for row in (*ROWS, *MASKS)), SWALLOWED)


def _modern(reading: Reading) -> Reading:
    """The same with the keys of today's version; they are told under their own names."""
    given = dict(reading.given)
    aliases: dict[str, str] = {}
    for old, new in RENAMED.items():
        if old in given and new not in given:
            given[new] = given.pop(old)
            aliases[new] = old
    for old, (part, name) in OLD.items():
        if old in given:
            table = given.get(part)
            given[part] = {name: given.pop(old), **(table if isinstance(table, Mapping) else {})}
    if isinstance(given.get("optimizer"), str):
        table = {
            key.removeprefix("optimizer_"): given[key]
            for key in list(given)
            if key.startswith("optimizer_") and key != "optimizer_defaults"
        }
        for key in table:
            del given[f"optimizer_{key}"]
        given["optimizer"] = {
            "optimizer": given["optimizer"],
            **({"weight_decay": given.pop("weight_decay")} if "weight_decay" in given else {}),
            **table,
        }
    if "min_snr_gamma" in given and "loss_weight_fn" not in given:
        gamma = given.pop("min_snr_gamma")
        if _values.plain(gamma):
            given |= {"loss_weight_fn": "MIN_SNR_GAMMA", "loss_weight_strength": gamma}
    modern = reading.part(given, "")
    modern.aliases, modern.original = aliases, reading.given
    return modern


def _model(reading: Reading, model_type: str) -> bool:
    """Whether it is a flow model."""
    base = reading.text("base_model_name")
    if base is None:
        reading.default("model.base", "put your base model in here", "base_model_name")
        reading.warnings.append("The config names no base model: put one in as model.base.")
    else:
        reading.put("model.base", located(reading, "base_model_name", base, model=True), "base_model_name")
    vae = reading.table("vae").get("model_name")
    if not _values.is_nothing(vae):
        reading.put("model.vae", located(reading, "vae: model_name", str(vae)), "vae: model_name")
    flow = model_type in _FLOWS
    if (
        not model_type.startswith(("STABLE_DIFFUSION", "FLUX_DEV_1"))
        or "INPAINT" in model_type
        or "DEPTH" in model_type
        or "FILL" in model_type
    ):
        reading.lost(
            "model_type",
            "lorabake has no such family of models: SD 1 and 2, SDXL, SD3 and Flux.1 are trained. Give one of these as model.base.",
        )
        flow = not model_type.startswith("STABLE_DIFFUSION")
    if flow:
        reading.put("objective.name", "flow", "model_type", "a flow model", "default")
    if reading.flag("force_v_prediction"):
        reading.put("model.prediction", "v", "force_v_prediction")
    skip = reading.whole("text_encoder_layer_skip")
    if skip and model_type.startswith(("STABLE_DIFFUSION_1", "STABLE_DIFFUSION_2")):
        reading.put(
            "model.clip_skip", skip + 1, "text_encoder_layer_skip", f"{skip} layers left out are clip skip {skip + 1}"
        )
    elif skip or reading.whole("text_encoder_2_layer_skip"):
        reading.lost("text_encoder_layer_skip", "the model's own layers are read here.")
    for key in ("text_encoder_layer_skip", "text_encoder_2_layer_skip"):
        reading.seen.add(key)
    tokens = reading.whole("text_encoder_2_sequence_length")
    if tokens and model_type.startswith("FLUX"):
        reading.put("model.t5_tokens", tokens, "text_encoder_2_sequence_length")
    elif model_type.startswith("FLUX"):
        reading.default("model.t5_tokens", 77, "text_encoder_2_sequence_length")
    reading.seen.add("text_encoder_sequence_length")
    return flow


def _quantised(reading: Reading, model_type: str) -> None:
    """Set how the base is stored: a part without a type of its own has that of all."""
    denoiser = onetrainer_run.denoiser(reading, model_type)
    t5 = next((part for start, part in _T5.items() if model_type.startswith(start)), "")
    own = _stored(reading, denoiser)
    key, given = (f"{denoiser}: weight_dtype", own) if own else ("weight_dtype", _stored(reading, ""))
    reading.seen.add("weight_dtype")
    known = given.removesuffix("_SVD")
    if known in QUANTISED:
        kind, note = QUANTISED[known]
        notes = (note, "without what SVD adds to it" if known != given else "", "T5 with it" if t5 else "")
        reading.put("model.quantize", kind, key, "; ".join(filter(None, notes)))
    elif given not in _WHOLE:
        reading.left(key, f"{given}: not stored in that type here: model.quantize takes int8, fp8 and nf4.")
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if (stored := _stored(reading, part)) in _WHOLE:
            continue
        if part == t5 and reading.get("model.quantize"):
            reading.say("converted", f"{part}: weight_dtype", note=f"{stored}: T5 goes with the denoiser")
        else:
            what = "T5 goes with the denoiser: model.quantize." if part == t5 else "CLIP stays whole here."
            reading.left(f"{part}: weight_dtype", f"{stored}: {what}")


def _stored(reading: Reading, part: str) -> str:
    """The type that the weights of a part are stored in, or of all parts; "" where it is not said."""
    given = (reading.table(part) if part else reading.given).get("weight_dtype")
    return "" if _values.is_nothing(given) else str(given).upper()


def _adapter(reading: Reading, method: str) -> None:
    if method != "LORA":
        reading.lost(
            "training_method",
            f"{method.lower()}: the recipe trains a LoRA. For all weights: adapter.name = 'full', and a learning rate for it.",
        )
    kind = (reading.text("peft_type") or "LORA").lower()
    if kind in cards("adapter"):
        reading.put("adapter.name", kind, "peft_type", kind=None if reading.has("peft_type") else "default")
    else:
        reading.lost(
            "peft_type",
            f"there is no adapter '{kind}' here, so the recipe trains a LoRA; choose among {', '.join(cards('adapter'))}, with its rank and learning rate.",
        )
    if (start := reading.text("lora_model_name")) is not None:
        reading.put("adapter.start_from", located(reading, "lora_model_name", start), "lora_model_name")
    preset = reading.text("layer_filter_preset")
    if preset is not None and preset != "full":
        reading.lost(
            "layer_filter_preset",
            "LoRA is on all attention and feed-forward layers here. See `lorabake explain adapter.block_rank` for the choice of layers.",
        )
    elif reading.get("objective.name") != "flow":
        reading.lost(
            "layer_filter_preset",
            "OneTrainer puts the LoRA on every layer of the denoiser, convolutions included. adapter.conv_rank does that here.",
        )
        rank = reading.whole("lora_rank") or 16
        reading.put("adapter.conv_rank", rank, "layer_filter_preset", "convolutions included")
        alpha = reading.number("lora_alpha")
        reading.put(
            "adapter.conv_alpha", 1.0 if alpha is None else alpha or float(rank), "layer_filter_preset", "as lora_alpha"
        )
        reading.lines[:] = [
            line for line in reading.lines if not (line.kind == "lost" and line.key == "layer_filter_preset")
        ]


def _length(reading: Reading) -> None:
    epochs = reading.whole("epochs")
    reading.put(
        "train.length",
        _values.span(100 if epochs is None else epochs, "epochs"),
        "epochs",
        "with its unit",
        None if epochs else "default",
    )


def _concepts(reading: Reading) -> Sequence[Any] | None:
    """The concepts: in the config, or in the file that it names, if that is found."""
    reading.seen |= {"concepts", "concept_file_name"}
    if isinstance(reading.given.get("concepts"), list):
        return reading.given["concepts"]
    name = reading.text("concept_file_name")
    path = Path(name) if name else None
    if path is not None and os.path.isfile(path):
        from lorabake.recipe.imports._files import read_config

        found = read_config(path)
        if isinstance(found, list):
            return found
        reading.warnings.append(
            f"concept_file_name = {_values.shown(name)}: it holds no list of concepts. Put data.folder in."
        )
        return None
    reading.warnings.append(
        f"concept_file_name = {_values.shown(name)}: it is not in the current folder. Import in OneTrainer's own folder, or put data.folder in."
    )
    return None


def _buckets(reading: Reading) -> None:
    given = reading.take("resolution", lambda value: [item.strip() for item in str(value).split(",") if item.strip()])
    sides = [512] if not given else None
    try:
        found = sides or [whole(side) for side in given or [] if "x" not in side.lower()]
        if found and len(found) == len(given or found):
            key = "resolution"
            stated = None if given else "default"
            several = len(found) > 1
            reading.put("data.buckets.resolutions" if several else "data.buckets.resolution", sorted(found) if several else found[0], key,
                        "each picture at each of them; OneTrainer draws one of them for each" if several else "", stated)  # fmt: skip
        elif given and len(given) == 1:
            reading.put(
                "data.buckets.resolution",
                [whole(side) for side in given[0].lower().split("x")],
                "resolution",
                "width × height",
            )
        else:
            reading.lost("resolution", "sizes of several shapes are no setting here.")
    except ValueError:
        reading.lost("resolution", "it is no size in pixels.")
    enabled = not reading.has("aspect_ratio_bucketing") or reading.flag("aspect_ratio_bucketing")
    if not enabled:
        reading.put("data.buckets.enabled", False, "aspect_ratio_bucketing")
    elif reading.has("aspect_ratio_bucketing"):
        reading.say(
            "same",
            "aspect_ratio_bucketing",
            "data.buckets.enabled",
            None,
            "its shapes are not quite ours, and its last batch of each, if not full, is left out",
        )


def _masks(reading: Reading) -> None:
    if not reading.flag("masked_training"):
        for key in (*(row.key for row in MASKS), "normalize_masked_area_loss", "masked_training"):
            if key in reading.given:
                reading.asides.append(key)
            reading.seen.add(key)
        return
    reading.put("data.masks.source", "files", "masked_training")
    reading.rows(MASKS)
    normal = reading.flag("normalize_masked_area_loss")
    reading.put(
        "data.masks.normalise",
        "area" if normal else "none",
        "normalize_masked_area_loss",
        kind=None if reading.has("normalize_masked_area_loss") else "default",
    )


def _run(reading: Reading) -> None:
    ema = (reading.text("ema") or "OFF").upper()
    decay = reading.number("ema_decay")
    if ema != "OFF":
        reading.put(
            "train.ema",
            [0.999 if decay is None else decay],
            "ema_decay",
            "a second file NAME-ema beside each checkpoint; OneTrainer saves that one alone",
        )
    precision = (reading.text("train_dtype") or "").upper()
    if precision in _TYPES:
        reading.put("train.precision", _TYPES[precision], "train_dtype")
    elif precision:
        reading.left("train_dtype", "it is not computed in here: bf16 where a GPU has it, else fp32.")
    checkpointing = str(reading.given.get("gradient_checkpointing", "ON")).upper()
    reading.put(
        "train.gradient_checkpointing",
        checkpointing not in ("OFF", "FALSE"),
        "gradient_checkpointing",
        kind=None if reading.has("gradient_checkpointing") else "default",
    )
    reading.seen.add("gradient_checkpointing")
    share = reading.number("layer_offload_fraction")
    if checkpointing == "CPU_OFFLOADED":
        waits = f", {share:g} of them there" if share else ""
        reading.left(
            "layer_offload_fraction" if share else "gradient_checkpointing",
            f"to have layers wait in main memory here, set train.blocks_to_swap, a number of the denoiser's blocks{waits}. They are recomputed already.",
        )
    elif share:
        reading.unused("layer_offload_fraction", "it goes with gradient_checkpointing = CPU_OFFLOADED.")
    if reading.flag("tensorboard"):
        reading.put("save.tensorboard", True, "tensorboard", "into the run's folder")
    if reading.flag("validation"):
        reading.lost("validation", "give validation.folder, or a share of the pictures: validation.share.")


def _saving(reading: Reading) -> None:
    every, unit = reading.number("save_every"), (reading.text("save_every_unit") or "NEVER").upper()
    if every and unit in ("EPOCH", "STEP"):
        accumulation = reading.whole("gradient_accumulation_steps") or 1
        count = int(every) if unit == "EPOCH" else max(1, int(every / accumulation))
        reading.put("save.every", f"{count} {'epochs' if unit == 'EPOCH' else 'steps'}", "save_every", "with its unit")
    elif unit in ("MINUTE", "HOUR", "SECOND"):
        reading.left("save_every", "checkpoints are saved by epochs or steps here: save.every.")
    else:
        reading.put("save.every", reading.get("train.length"), "save_every", "only the last one is saved", "default")
    given = (reading.text("output_dtype") or "FLOAT_32").upper()
    if given in _TYPES:
        reading.put(
            "save.dtype", _TYPES[given], "output_dtype", kind=None if reading.has("output_dtype") else "default"
        )
    else:
        reading.left("output_dtype", "LoRA files are fp16, bf16 or fp32 here.")
    destination = reading.text("output_model_destination")
    if destination is not None:
        stem = Path(destination.replace("\\", "/")).stem
        reading.put(
            "output.name",
            stem,
            "output_model_destination",
            "the file's name; the run's folder is given to train --into",
        )
