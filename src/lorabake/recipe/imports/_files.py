"""Opening foreign configs: TOML, JSON or YAML, told by their content, and nothing that is not plain data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lorabake.base.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 2_000_000
"""No config is larger. A metadata file of a dataset may be, and is none."""
_MOST_NODES = 100_000
_DEEPEST = 30
_MOST_BITS = 1000
"""Of a whole number. Settings have 64 at most, and Python writes out none of many thousands."""


def read_config(path: Path) -> Any:
    """The plain data of a config file.

    Raises:
        UserError: there is no such file, or it is too large, not text, or neither TOML, JSON nor YAML.
    """
    text = read_text(path)
    stripped = text.lstrip()
    if not stripped:
        raise UserError(f"{path} is empty. Give the config file of a trainer. Nothing was written.")
    try:
        data = _json(path, text) if stripped[0] in "{[" and not _is_toml(path, text) else _toml_or_yaml(path, text)
        _measure(path, data)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply for a config. Nothing was written.") from None
    return data


def read_text(path: Path) -> str:
    """The text of a small file.

    Raises:
        UserError: there is no such file, or it is too large, or not text.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder. Give the config file of a trainer. Nothing was written.")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UserError(
                f"{path} has {size / 1e6:.0f} MB, which is no config file ({MOST_BYTES / 1e6:.0f} MB at most). Nothing was written."
            )
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. Give the config file of a trainer. Nothing was written.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Nothing was written.") from None
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8. Save it as UTF-8. Nothing was written.") from None
    if "\0" in text:
        raise UserError(f"{path} holds binary data and is no config file. Nothing was written.")
    return text


def _is_toml(path: Path, text: str) -> bool:
    """A TOML file may begin with a table, as ``[general]``."""
    return path.suffix.lower() == ".toml" and not text.lstrip().startswith("{")


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        if text.lstrip()[0] == "[":  # a TOML table, in a file that is not called .toml
            return _toml_or_yaml(path, text)
        if "#" in text or path.suffix.lower() in (".yaml", ".yml"):  # YAML also has braces
            return _yaml(path, text)
        raise UserError(f"{path} is not valid JSON: {error}. Is it cut off? Nothing was written.") from None


def _toml_or_yaml(path: Path, text: str) -> Any:
    if path.suffix.lower() not in (".yaml", ".yml"):
        try:
            return tomllib.loads(text)
        except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
            if path.suffix.lower() == ".toml":
                raise UserError(f"{path} is not valid TOML: {error}. Nothing was written.") from None
    return _yaml(path, text)


def _yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        what = str(error.problem or error)
        raise UserError(
            f"{path} holds YAML that is no plain data ({what}), which is not read: it could run programs. Nothing was written."
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        where = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is neither valid TOML, JSON nor YAML: {where}. Nothing was written.") from None


def _measure(path: Path, data: Any) -> None:
    """Refuse what unfolds endlessly, as YAML's aliases can."""
    count, todo = 0, [(data, 0)]
    while todo:
        value, depth = todo.pop()
        count += 1
        if count > _MOST_NODES or depth > _DEEPEST:
            what = "too deeply nested" if depth > _DEEPEST else "too large"
            raise UserError(f"{path} is {what} for a config. Nothing was written.")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise UserError(f"{path} holds a number of hundreds of digits, which is no setting. Nothing was written.")
        if isinstance(value, dict):
            todo += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            todo += [(item, depth + 1) for item in value]
