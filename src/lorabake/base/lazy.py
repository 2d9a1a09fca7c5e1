"""Modules that are imported when they are first used, so that reading a card never costs the import of torch."""

from __future__ import annotations

import importlib
from typing import Any


class _LazyModule:
    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(importlib.import_module(self._name), attribute)
        self.__dict__[attribute] = found  # the next access is a plain one
        return found


def lazy_module(name: str) -> Any:
    """Stand-in for module ``name``; the real import happens at the first attribute access.

    Use it beside a ``TYPE_CHECKING`` import, in files that hold a card *and* code on tensors.
    """
    return _LazyModule(name)
