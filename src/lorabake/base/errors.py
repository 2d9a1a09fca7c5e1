"""Every error lorabake raises on purpose.

LorabakeError
├── UserError            something given is wrong (exit code 2; nothing was started)
│   ├── Problems         several wrong things, all named at once
│   └── MissingExtra     an optional package is not installed; names the pip command
├── CorruptFile          a file of ours does not have the bytes it should have
└── RunStopped           a run ended before its last step; the last good files are kept (exit code 3)
    ├── Interrupted      somebody asked for it (exit code 130)
    └── NotFinite        NaN or infinity in a loss or gradient
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class LorabakeError(Exception):
    """Base class; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class UserError(LorabakeError, ValueError):
    """Bad input. The message says what was given, what is allowed and what to do."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One wrong thing: ``where`` it is (a setting or a file), and ``what`` is wrong and what to do about it."""

    where: str
    what: str


class Problems(UserError):
    """All problems of one input, reported together, so that nobody has to fix them one run at a time."""

    def __init__(self, subject: str, problems: Sequence[Problem], advice: str = "") -> None:
        self.subject, self.problems, self.advice = subject, tuple(problems), advice
        width = min(32, max((len(p.where) for p in problems), default=0))
        count = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
        lines = [f"{subject} has {count}."]
        lines += [f"  {p.where:<{width}}  {p.what}" for p in problems]
        super().__init__("\n".join([*lines, f"Nothing was started. {advice}".rstrip()]))


class MissingExtra(UserError):
    """An optional package is needed and absent."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs a package that is not installed. Install it with: pip install 'lorabake[{extra}]'"
        )


class CorruptFile(LorabakeError):
    """A file does not hold the bytes it was written with, or is cut short."""


class RunStopped(LorabakeError):
    """A run ended before its last step. Everything saved up to then is intact."""

    exit_code = 3


class Interrupted(RunStopped):
    """Somebody asked for a stop (Ctrl-C) before there was a step to stop after."""

    exit_code = 130


class NotFinite(RunStopped):
    """A loss or gradient became NaN or infinite; training on would only spoil the weights."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`` Did you mean 'rank'?`` when something allowed is close to what was given, else the allowed values."""
    options = sorted(allowed)
    close = difflib.get_close_matches(given, options, n=1, cutoff=0.6)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Allowed: {', '.join(options)}." if options else ""
