"""What a flow model's ``scheduler_config.json`` says of how it was trained. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorabake.base.errors import UserError

_MOST = 100.0


def shift_of(scheduler: Mapping[str, Any], where: str) -> float | None:
    """How far timesteps are moved towards noise (2403.03206, equation 23); None where the file does not say.

    Args:
        scheduler: the parsed file.
        where: what to name in messages.

    Raises:
        UserError: it is no number above 0 and up to 100.
    """
    value = scheduler.get("shift")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST:
        raise UserError(
            f"{where}: the scheduler's shift is {value!r}; a number above 0 and up to {_MOST:g} was expected."
        )
    return float(value)
