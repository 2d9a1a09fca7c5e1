"""Where the files shipped inside the package are."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
POCKET_MODEL = PACKAGE / "pocket" / "model"
"""The embedded base model, a diffusers folder. Recipes call it ``pocket``."""
