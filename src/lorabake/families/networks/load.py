"""Read an SD1.x/2.x model from a diffusers folder, straight from the mapped files into the networks: one copy in memory.

Weights come from safetensors only. Networks are built without storage, and every tensor is checked by name, shape and type
before the first is read. On a CPU, weights that are in the wanted type already stay pages of the file until something writes
to them (which never reaches the file).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.families.networks.clip import CLIPTextModel, classic_key
from lorabake.families.networks.config import ClipConfig, UNetConfig, VaeConfig
from lorabake.families.networks.tokenizer import ClipTokenizer
from lorabake.families.networks.unet import UNet2DConditionModel
from lorabake.families.networks.vae import AutoencoderKL, current_key

_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5")
_LARGEST_JSON = 1 << 20
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_M = TypeVar("_M", bound=nn.Module)


class LoadedFolder(NamedTuple):
    """Frozen networks in evaluation mode, and what goes with them."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: ClipTokenizer
    scheduler_config: dict[str, Any]


def load_folder(
    path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LoadedFolder:
    """Load ``unet/``, ``text_encoder/``, ``vae/``, ``tokenizer/`` and ``scheduler/`` of a diffusers folder.

    Args:
        path: the folder with ``model_index.json``.
        dtype: type of all weights, whatever the files hold.
        device: where the weights go; a graphics card is filled tensor by tensor.

    Raises:
        UserError: it is not such a folder, its weights are pickles, or files are damaged or do not fit each other.
    """
    path, device = Path(path), torch.device(device)
    _check_folder(path)
    unet = UNetConfig.from_json(_json(path / "unet" / "config.json"), str(path / "unet" / "config.json"))
    clip = ClipConfig.from_json(
        _json(path / "text_encoder" / "config.json"), str(path / "text_encoder" / "config.json")
    )
    vae = VaeConfig.from_json(_json(path / "vae" / "config.json"), str(path / "vae" / "config.json"))
    _check_fit(path, unet, clip, vae)
    tokenizer = ClipTokenizer.from_folder(path / "tokenizer")
    if tokenizer.size > clip.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.size} tokens, the text encoder only {clip.vocab_size}. They are of different models."
        )
    return LoadedFolder(
        _network(lambda: UNet2DConditionModel(unet), path / "unet", str, dtype, device),
        _network(lambda: CLIPTextModel(clip), path / "text_encoder", classic_key, dtype, device),
        _network(lambda: AutoencoderKL(vae), path / "vae", current_key, dtype, device),
        tokenizer,
        _json(path / "scheduler" / "scheduler_config.json"),
    )


def memory_format(network: nn.Module, dtype: torch.dtype, device: torch.device) -> torch.memory_format:
    """How convolution weights lie fastest in memory, as measured on one AVX-512 core.

    Channels last on a CPU, where up-sampling a plain map takes 36 times as long (decoding: 22 against 28 ms, 15 against 21 in
    bfloat16; a U-Net step of SD1.5: 0.85 against 1.35 s at 64 px, 5.0 against 4.7 s at 256 px). Except for a bfloat16 U-Net
    (pocket model: 77 against 69 ms; SD1.5 at 64 px: 1.10 against 1.01 s).
    Plain on CUDA, where PyTorch's group norm gives plain maps whatever it gets, so that every norm would mean two copies.
    """
    if device.type != "cpu" or (dtype == torch.bfloat16 and isinstance(network, UNet2DConditionModel)):
        return torch.contiguous_format
    return torch.channels_last


def _network(
    build: Callable[[], _M], folder: Path, rename: Callable[[str], str | None], dtype: torch.dtype, device: torch.device
) -> _M:
    with torch.device("meta"):
        network = build()
    file = _weights_file(folder, dtype)
    layout = memory_format(network, dtype, device)
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            names = _matched(tensors, network.state_dict(), rename, file)
            state: dict[str, torch.Tensor] = {}
            for name, key in names.items():
                tensor = tensors.get_tensor(key)
                form = layout if tensor.dim() == 4 else torch.preserve_format
                state[name] = tensor.to(device, dtype, memory_format=form)  # type and layout in one copy, or in none
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} cannot be read as safetensors: {error}. It is cut short or damaged; fetch it again."
        ) from error
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def _matched(
    tensors: Any, wanted: Mapping[str, torch.Tensor], rename: Callable[[str], str | None], file: Path
) -> dict[str, str]:
    """The file's key for each of the network's names, after names, shapes and types have been compared."""
    names: dict[str, str] = {}
    problems: list[Problem] = []
    for key in tensors.keys():  # noqa: SIM118  (not a dict)
        if (name := rename(key)) is None:
            continue
        if name not in wanted or name in names:
            problems.append(
                Problem(
                    key,
                    "is in the file twice under two names."
                    if name in names
                    else "is in the file, but not in the network.",
                )
            )
            continue
        names[name] = key
        view = tensors.get_slice(key)
        if (given := tuple(view.get_shape())) != (shape := tuple(wanted[name].shape)):
            problems.append(Problem(key, f"has shape {given}; config.json makes it {shape}."))
        elif view.get_dtype() not in _FLOATS:
            problems.append(
                Problem(key, f"holds {view.get_dtype()} numbers; weights must be floating point (not quantised).")
            )
    problems += [Problem(name, "is missing in the file.") for name in wanted if name not in names]
    if problems:
        shown = problems[:8] + [Problem("…", f"and {len(problems) - 8} more.")] * (len(problems) > 8)
        raise Problems(
            str(file),
            shown,
            "config.json and weights are of different models, or the file is not whole: fetch the folder again.",
        )
    return names


def _weights_file(folder: Path, dtype: torch.dtype) -> Path:
    """The weights to read: the plain file, or its fp16 variant if it is alone or is what was asked for."""
    files = {file.name: file for stem in _STEMS for file in sorted(folder.glob(f"{stem}*.safetensors"))}
    order = (".fp16", "") if dtype == torch.float16 else ("", ".fp16")
    for name in (f"{stem}{variant}.safetensors" for variant in order for stem in _STEMS):
        if name in files:
            return files[name]
    whole = [file for file in files.values() if "-of-" not in file.name]
    return whole[0]


def _has_weights(folder: Path) -> bool:
    return any("-of-" not in file.name for stem in _STEMS for file in folder.glob(f"{stem}*.safetensors"))


def _check_folder(path: Path) -> None:
    """All that is missing in the folder, at once."""
    if not path.is_dir():
        what = "is a file" if path.is_file() else "does not exist"
        raise UserError(
            f"{path} {what}; a diffusers folder with unet/, text_encoder/, vae/, tokenizer/ and scheduler/ was expected."
        )
    problems: list[Problem] = []
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("vae", "diffusion_pytorch_model"),
    ):
        if not (path / part / "config.json").is_file():
            problems.append(Problem(f"{part}/config.json", "is missing."))
        if not _has_weights(path / part):
            problems.append(Problem(f"{part}/{stem}.safetensors", f"is missing{_instead(path / part)}."))
    if not (path / "tokenizer").is_dir():
        problems.append(Problem("tokenizer/", "is missing (vocab.json with merges.txt, or tokenizer.json)."))
    if not (path / "scheduler" / "scheduler_config.json").is_file():
        problems.append(Problem("scheduler/scheduler_config.json", "is missing."))
    if problems:
        raise Problems(str(path), problems, "Give a folder in diffusers' layout, as model hosts offer it.")


def _instead(folder: Path) -> str:
    """What lies there in place of weights, if anything."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if any("-of-" in file.name for file in files):
        return ", only shards are there: join them into one file"
    if pickles := [file.name for file in files if file.suffix in _PICKLES]:
        return f"; {pickles[0]} is not opened, because loading a pickle runs whatever code is in it: convert it to safetensors"
    return ""


def _check_fit(path: Path, unet: UNetConfig, clip: ClipConfig, vae: VaeConfig) -> None:
    problems: list[Problem] = []
    if unet.cross_attention_dim != clip.hidden_size:
        what = f"is {unet.cross_attention_dim}, but the text encoder's hidden_size is {clip.hidden_size}."
        problems.append(Problem("unet: cross_attention_dim", what))
    if vae.latent_channels != unet.out_channels:
        problems.append(
            Problem(
                "unet: out_channels", f"is {unet.out_channels}, but the vae's latent_channels is {vae.latent_channels}."
            )
        )
    if problems:
        raise Problems(str(path), problems, "The parts are of different models.")


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(f"{path} is larger than any configuration ({path.stat().st_size} bytes).")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; an object with settings was expected.")
    return found
