"""lorabake: from a folder of pictures to a published, tested LoRA.

Importing it loads nothing heavy; each name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
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


class _RoomAndVerb(ModuleType):
    """A room that has the name of a verb: it is called as the verb is."""

    def __call__(self, *values: Any, **named: Any) -> Any:
        verb = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("lorabake.api"), verb)(*values, **named)


class _Package(ModuleType):
    """Python puts each room that is imported into the package under its name, also where a verb has that name (``train``)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in __all__ and isinstance(value, ModuleType):
            value.__class__ = _RoomAndVerb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
