"""Where files are: those shipped inside the package, and those of the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path

QUEUE_VARIABLE = "LORABAKE_QUEUE"
"""Environment variable that names the folder of the queue."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path as somebody gave it, ``~`` and ``~name`` read as home folders. Where nobody is called so, it stays as it is: a file or
    folder may be called ``~backup``."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def run_folder(name: str) -> Path:
    """The folder of the run that makes the LoRA ``name``, if nobody says another."""
    return Path("runs") / name


def queue_folder() -> Path:
    """Where the queue is kept if nobody says: what the environment variable names, or else among the user's own data."""
    if named := os.environ.get(QUEUE_VARIABLE):
        return expanded(named)
    if sys.platform == "win32":
        home = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Application Support"
    else:
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return home / "lorabake" / "queue"


PACKAGE = Path(__file__).resolve().parent.parent
POCKET_MODEL = PACKAGE / "pocket" / "model"
"""The embedded base model, a diffusers folder. Recipes call it ``pocket``."""
