"""lorabake: from a folder of pictures to a published, tested LoRA.

Importing it loads nothing heavy; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorabake.api import export_recipe, generate, grid, import_recipe, open, train, validate
    from lorabake.base.errors import LorabakeError, UserError

    __version__: str

__all__ = [
    "LorabakeError",
    "UserError",
    "__version__",
    "export_recipe",
    "generate",
    "grid",
    "import_recipe",
    "open",
    "train",
    "validate",
]

_ERRORS = ("LorabakeError", "UserError")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lorabake")
    if name not in __all__:
        raise AttributeError(f"module 'lorabake' has no attribute '{name}'")
    return getattr(importlib.import_module("lorabake.base.errors" if name in _ERRORS else "lorabake.api"), name)
