"""Network types of sd-scripts and LyCORIS, as ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lorabake.base.cards import cards
from lorabake.recipe.imports import _blocks, _transformer_blocks, _values
from lorabake.recipe.imports._optimizers import arguments_of
from lorabake.recipe.imports._reading import Reading

_LORA_MODULES = ("networks.lora", "networks.lora_flux", "networks.lora_sd3")
_LYCORIS = ("lycoris.kohya", "locon.locon_kohya")
_LYCORIS_WHOLE = ("full", "")
_LYCORIS_LINEAR = ("attn-mlp", "attn-only", "unet-transformer-only", "full-lin", "ia3")
"""Presets without convolutions."""
_HARMLESS = {
    "use_tucker": (False,),
    "use_cp": (False,),
    "use_scalar": (False,),
    "train_norm": (False,),
    "rank_dropout_scale": (False,),
    "dora_wd": (False,),
    "bypass_mode": (False,),
    "rescaled": (False,),
    "decompose_both": (False,),
    "factor": (-1,),
    "block_size": (1, 4),
    "constraint": (0, 0.0),
    "constrain": (0, 0.0),
    "train_on_input": (True, False),
    "split_qkv": (False,),
    "train_t5xxl": (False,),
    "train_blocks": ("all",),
    "wd_on_output": (True, False),
    "unbalanced_factorization": (False,),
    "disable_conv_cp": (True, False),
    "full_matrix": (False,),
    "rs_lora": (False,),
    "unit": (1,),
    "verbose": (True, False),
}
"""Arguments that, with these values, change nothing."""


_NUMBERS = {
    "rank_dropout": "rank_dropout",
    "module_dropout": "module_dropout",
    "factor": "factor",
    "unit": "unit",
    "block_size": "unit",
}
_SWITCHES = {
    "use_tucker": "tucker",
    "use_cp": "tucker",
    "dora_wd": "dora",
    "rs_lora": "rank_stabilized",
    "full_matrix": "full_matrix",
    "decompose_both": "decompose_both",
}
"""Arguments and our settings, for the network types that have them."""


def network(reading: Reading, family: str) -> dict[str, Any]:
    """Set the adapter. Returns the network arguments that learning rates are made from."""
    module = (reading.text("network_module") or "networks.lora").strip()
    arguments = reading.take("network_args", arguments_of) or {}
    algorithm = str(arguments.pop("algo", "lora")).lower() if module in _LYCORIS else _algorithm(module)
    _name(reading, module, algorithm)
    if (unranked := _UNRANKED.get(reading.get("adapter.name"))) is not None:
        unranked(reading, arguments)
        _others(reading, arguments)
        return {}
    dim, alpha = reading.whole("network_dim"), reading.number("network_alpha")
    if reading.flag("dim_from_weights"):
        reading.say("same", "dim_from_weights", "adapter.start_from", None, "the file's rank counts")
    reading.put("adapter.rank", 4 if dim is None else dim, "network_dim", kind=None if dim is not None else "default")
    _alpha(reading, "adapter.alpha", "network_alpha", alpha, 4 if dim is None else dim)
    fields = _fields(reading)
    if (dropout := reading.number("network_dropout")) is not None:
        if "dropout" in fields:
            reading.put("adapter.dropout", dropout, "network_dropout")
        elif dropout:
            reading.lost("network_dropout", f"adapter '{reading.get('adapter.name')}' has none.")
    _convolutions(reading, module, arguments, dim or 4, 1.0 if alpha is None else alpha)
    for name, setting in _NUMBERS.items():
        key = f"network_args: {name}"
        if name not in arguments or setting not in fields or arguments[name] in _HARMLESS.get(name, ()):
            continue
        value = arguments.pop(name)
        read = _values.number if setting.endswith("dropout") else _values.whole
        if (number := reading.read(key, value, read)) is not None:
            reading.put(f"adapter.{setting}", number, key)
    for name, setting in _SWITCHES.items():
        if arguments.get(name) is not True or setting not in fields:
            continue
        del arguments[name]
        if setting == "tucker" and reading.get("adapter.conv_rank") is None:
            reading.unused(f"network_args: {name}", "no convolutions are trained.")
        else:
            reading.put(f"adapter.{setting}", True, f"network_args: {name}")
    rates = {name: arguments.pop(name) for name in list(arguments) if name.startswith("loraplus_")}
    _blocks.weights(reading, arguments, family, dim or 4, 1.0 if alpha is None else alpha)
    rates |= _transformer_blocks.ranks(reading, arguments, family, dim or 4)
    _others(reading, arguments)
    return rates


def _fields(reading: Reading) -> Collection[str]:
    """Settings of the chosen adapter."""
    return cards("adapter")[reading.get("adapter.name") or "lora"].settings.model_fields


def _algorithm(module: str) -> str:
    if module in _LORA_MODULES:
        return "lora"
    return module.rpartition(".")[2]


def _name(reading: Reading, module: str, algorithm: str) -> None:
    """The adapter by name: as the algorithm, if there is one of that name."""
    ours = {"locon": "lora", "lora_fa": "lora-fa", "diag-oft": "oft"}.get(algorithm, algorithm)
    if module in _LYCORIS and ours == "full":
        ours = "diff"
    known = cards("adapter")
    key = "network_module"
    if ours in known:
        note = "" if module in _LORA_MODULES else f"algo={algorithm}"
        reading.put("adapter.name", ours, key, note, kind=None if reading.has(key) else "default")
    else:
        what = f"there is no adapter '{algorithm}' here, so the recipe trains a LoRA; choose among {', '.join(known)}, with its rank and learning rate."
        reading.lost(key, what)


def _alpha(reading: Reading, setting: str, key: str, alpha: float | None, rank: int) -> None:
    if alpha is None:
        reading.default(setting, 1.0, key, f"the change is scaled by 1 / {rank}")
    elif alpha == 0:
        reading.say("converted", key, setting, None, "0 is the rank itself, which is our default")
    else:
        reading.put(setting, alpha, key)


def _convolutions(reading: Reading, module: str, arguments: dict[str, Any], dim: int, alpha: float) -> None:
    """kohya's LoRA leaves convolutions alone unless conv_dim is given; LyCORIS trains them with the linear layers' rank."""
    given = reading.read("network_args: conv_dim", arguments.pop("conv_dim", None), _values.whole)
    scale = reading.read("network_args: conv_alpha", arguments.pop("conv_alpha", None), _values.number)
    preset = str(arguments.pop("preset", "full") or "full")
    if module in _LYCORIS:
        if preset not in _LYCORIS_WHOLE:
            reading.lost(
                "network_args: preset",
                f"{preset}: its choice of layers is not ours. See `lorabake explain adapter.block_rank`.",
            )
            if preset in _LYCORIS_LINEAR:
                return
        rank, its = given or dim, scale or alpha
        note = "" if given else "LyCORIS takes network_dim for convolutions"
        reading.put("adapter.conv_rank", rank, "network_args: conv_dim", note, kind=None if given else "default")
        reading.put("adapter.conv_alpha", its, "network_args: conv_alpha", kind=None if scale else "default")
    elif given is not None and given > 0:
        reading.put("adapter.conv_rank", given, "network_args: conv_dim")
        its = 1.0 if scale is None else scale
        if its:
            reading.put("adapter.conv_alpha", its, "network_args: conv_alpha", kind=None if scale else "default")


def _blocks_of_outputs(reading: Reading, arguments: dict[str, Any]) -> None:
    """LyCORIS' OFT and BOFT: their dim is a block's size, and alpha says nothing."""
    dim = reading.whole("network_dim")
    reading.put("adapter.block_size", dim or 4, "network_dim", kind=None if dim else "default")
    _without_alpha(reading, arguments)
    key, bound = "network_args: constraint", arguments.pop("constraint", None)
    if bound := reading.read(key, bound, _values.number):
        reading.put("adapter.constraint", bound, key)
    if arguments.get("rescaled") is True:
        reading.put("adapter.rescale", arguments.pop("rescaled"), "network_args: rescaled")
    if _has_convolutions(reading, arguments):
        key = "network_args: conv_dim"
        given = reading.read(key, arguments.pop("conv_dim", None), _values.whole)
        note = "" if given else "LyCORIS takes network_dim for convolutions"
        reading.put("adapter.conv_block_size", given or dim or 4, key, note, kind=None if given else "default")
    arguments.pop("conv_dim", None)


def _factors(reading: Reading, arguments: dict[str, Any]) -> None:
    """LyCORIS' (IA)³: nothing has a size."""
    reading.whole("network_dim")
    if reading.has("network_dim"):
        reading.unused("network_dim", "(IA)³ has one number for each output.")
    _without_alpha(reading, arguments)
    if arguments.get("train_on_input") is True:
        arguments.pop("train_on_input")
        reading.put("adapter.side", "inputs", "network_args: train_on_input", "of every layer")
    if _has_convolutions(reading, arguments):
        reading.put("adapter.convolutions", True, "network_args: preset", "LyCORIS takes convolutions too", "default")
    arguments.pop("conv_dim", None)


def _whole(reading: Reading, arguments: dict[str, Any]) -> None:
    """LyCORIS' full: nothing has a rank."""
    reading.whole("network_dim")
    if reading.has("network_dim"):
        reading.unused("network_dim", "every number of a layer is trained.")
    _without_alpha(reading, arguments)
    if _has_convolutions(reading, arguments):
        reading.put("adapter.convolutions", True, "network_args: preset", "LyCORIS takes convolutions too", "default")
    arguments.pop("conv_dim", None)


_UNRANKED = {"oft": _blocks_of_outputs, "boft": _blocks_of_outputs, "ia3": _factors, "diff": _whole}
"""Network types of ours that have no rank: what reads their keys."""


def _without_alpha(reading: Reading, arguments: dict[str, Any]) -> None:
    reading.number("network_alpha")
    if reading.has("network_alpha"):
        reading.unused("network_alpha", f"'{reading.get('adapter.name')}' has no alpha.")
    arguments.pop("conv_alpha", None)
    key = "network_args: module_dropout"
    if share := reading.read(key, arguments.pop("module_dropout", None), _values.number):
        reading.put("adapter.module_dropout", share, key)


def _has_convolutions(reading: Reading, arguments: dict[str, Any]) -> bool:
    """Whether LyCORIS trains convolutions, which goes by its preset; one that is not ours is told."""
    preset = str(arguments.pop("preset", "full") or "full")
    if preset in _LYCORIS_WHOLE:
        return True
    reading.lost("network_args: preset", f"{preset}: its choice of layers is not ours. See `lorabake list adapters`.")
    return preset not in _LYCORIS_LINEAR


def _others(reading: Reading, arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if _values.is_nothing(value) or value in _HARMLESS.get(name, ()):
            continue
        if name == "train_t5xxl" and reading.flag("network_train_unet_only"):
            reading.unused("network_args: train_t5xxl", "network_train_unet_only.")
            continue
        if name == "train_t5xxl":
            reading.lost("network_args: train_t5xxl", "T5 is never trained here: its rate in the recipe is 0.")
            continue
        reading.lost(
            f"network_args: {name}",
            f"{_values.shown(value)}: adapter '{reading.get('adapter.name') or 'lora'}' has no such setting.",
        )
