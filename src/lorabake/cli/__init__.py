"""The command line, one file per verb. A verb's file says its help and arguments, and imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lorabake.base.errors import LorabakeError
from lorabake.cli import (
    demo,
    explain,
    export,
    generate,
    grid,
    import_,
    listing,
    pocket,
    queue,
    tensorboard,
    train,
    validate,
)

_VERBS = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "grid": grid,
    "validate": validate,
    "import": import_,
    "export": export,
    "explain": explain,
    "list": listing,
    "queue": queue,
    "tensorboard": tensorboard,
    "pocket": pocket,
}
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 failed, 2 bad input, 3 a run stopped early, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.call(arguments)
    except LorabakeError as error:
        _complain(str(error), as_json=getattr(arguments, "json", False), kind=type(error).__name__)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("Interrupted.", as_json=False, kind="Interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}", as_json=getattr(arguments, "json", False), kind="OSError")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lorabake", description="From a folder of pictures to a published, tested LoRA."
    )
    parser.add_argument("--version", action=_Version)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in _VERBS.items():
        verb = verbs.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(verb)
        verb.set_defaults(call=module.run)
    return parser


def _complain(message: str, *, as_json: bool, kind: str) -> None:
    if as_json:
        import json

        print(json.dumps({"error": kind, "message": message}), file=sys.stderr)
    else:
        print(message, file=sys.stderr)


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import lorabake

        print(f"lorabake {lorabake.__version__}")
        parser.exit()
