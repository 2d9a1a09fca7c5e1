"""What network types have in common that train a layer's own numbers: which layers, and whether biases too."""

from __future__ import annotations

from typing import Annotated

from pydantic import field_validator

from lorabake.adapters._ranks import SHAPES, LayerSettings
from lorabake.base import patterns
from lorabake.protocols.adapter import ByLayer
from lorabake.protocols.family import Layer


class WholeSettings(LayerSettings):
    """Settings of network types whose changes are as large as what they change."""

    bias: Annotated[bool, SHAPES] = True
    """Train the biases of the chosen layers, too. They are few, and every client reads them; false where a tool at the end of your way does not."""
    blocks: Annotated[dict[str, bool] | None, SHAPES, ByLayer()] = None
    """Table of which layers are trained: pattern = true or false. A pattern is a piece of a layer's name (mid_block, down_blocks.0) or a regular
    expression; the first that is found decides, and where none is, the layer is trained. Fewer layers make a smaller file."""

    @field_validator("blocks")
    @classmethod
    def _is_a_table(cls, table: dict[str, bool] | None) -> dict[str, bool] | None:
        patterns.checked(table)
        return table

    def chosen(self, layer: Layer, *, usual: bool) -> bool:
        """Whether ``layer`` is to be trained; ``usual`` where the table says nothing of it."""
        found = patterns.decide(self.blocks, layer.names)
        return usual if found is None else found
