"""Training begins with what a LoRA file already does."""

from __future__ import annotations

from pathlib import Path

from lorabake.adapters import adopt
from lorabake.base.errors import UserError
from lorabake.base.events import Events
from lorabake.base.header import read_header
from lorabake.formats.hashes import legacy_file_hash
from lorabake.formats.kohya import read_lora
from lorabake.protocols.adapter import Graft
from lorabake.protocols.family import ModelFacts
from lorabake.sampling.apply import adapter_of

_OF_NOTHING = "e3b0c442"
"""What files below 1 MiB have for a hash; it tells nothing apart."""


def start_from_file(path: Path, graft: Graft, facts: ModelFacts, events: Events) -> str:
    """Let ``graft``, newborn, do what the file does; returns how the files trained from here on name where they began.

    Raises:
        UserError: the file is of another network type, rank or model, or cannot be read.
    """
    file = read_lora(path)
    kind = adapter_of(path, file)
    if kind not in (graft.card.name, graft.card.writes):
        raise UserError(
            f"adapter.start_from: {path.name} is of the network type '{kind}', the recipe's adapter is '{graft.card.name}'. Set "
            f'adapter.name = "{kind}", or start from another file. Nothing was started.'
        )
    newborn = adopt(graft, file.layers)
    if newborn:
        events.emit("note", text=f"{path.name} says nothing of {newborn} layers that are trained: those start anew.")
    if other := _other_base(file.metadata, facts):
        events.emit("note", text=f"{path.name} was trained on {other}: on another base it may look different.")
    return f"{path.name} {read_header(path).payload_sha256[:12]}"


def _other_base(metadata: dict[str, str], facts: ModelFacts) -> str:
    """The base that the file says it was trained on, if it is not this one; by hash where both have one, else by name."""
    name = metadata.get("ss_sd_model_name", "")
    told = metadata.get("ss_sd_model_hash", "None")
    if told not in ("None", _OF_NOTHING) and facts.path.is_file():
        found = legacy_file_hash(facts.path)
        return "" if told == found else f"{name or 'a base'} (hash {told}; this one is {facts.name}, {found})"
    stems = Path(name).name.removesuffix(".safetensors"), facts.name.removesuffix(".safetensors")
    return "" if name in ("", "None") or stems[0] == stems[1] else f"'{name}' (this one is '{facts.name}')"
