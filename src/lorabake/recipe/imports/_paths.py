"""Foreign paths. Every trainer here resolves them from the folder that it was started in, which nobody can know: the current one is taken."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath

from lorabake.base.places import expanded
from lorabake.recipe.imports._reading import Reading

_WINDOWS = re.compile(r"^(?:[A-Za-z]:[\\/]|\\\\)")
_HUB = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = (".safetensors", ".ckpt", ".sft", ".pt", ".bin", ".pth", ".gguf")


def located(reading: Reading, key: str, text: str, *, model: bool = False) -> str:
    """A path as a recipe has it: absolute, or as it was if it is of another system or, of a ``model``, its name on a hub."""
    given = text.strip()
    if is_foreign(given):
        reading.warnings.append(
            f"{reading.prefix}{key} = {given} is a path of Windows. Put in where it is on this machine."
        )
        return given
    path = expanded(given)
    if model and is_hub_name(given):
        reading.warnings.append(
            f"{reading.prefix}{key} = {given} is the name of a model on a hub. lorabake downloads nothing: put in the path of a file or folder that you have."
        )
        return given
    found = os.path.abspath(path)
    if not os.path.exists(found):
        how = "" if path.is_absolute() else ", counted from the current folder as the trainer would from its own"
        reading.warnings.append(f"{reading.prefix}{key} = {given}: {found} does not exist{how}.")
    return found


def is_foreign(text: str) -> bool:
    """Whether it is a path of Windows, elsewhere."""
    return bool(_WINDOWS.match(text)) and os.name != "nt"


def is_hub_name(text: str, folder: str | os.PathLike[str] = "") -> bool:
    """Whether it is ``owner/model`` and no file or folder that is counted from ``folder``, else from the current one."""
    return (
        bool(_HUB.match(text))
        and not text.lower().endswith(_FILES)
        and not os.path.exists(os.path.join(folder, os.path.expanduser(text)))
    )


def beside(config: Path, text: str) -> Path | None:
    """A file that a config names: from the current folder, else from the config's own or the one above it; of a path of Windows its name alone."""
    name = PureWindowsPath(text).name if is_foreign(text) else text
    for folder in (Path(), config.parent, config.parent.parent):
        if os.path.isfile(folder / name):
            return folder / name
    return None
