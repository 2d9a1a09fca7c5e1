"""The pocket picture world: small, seeded, captioned cartoon pictures with exact ground truth.

    rng = random.Random(7)
    drawing = draw(sample(rng, hold_out={"background": {"beach"}}), rng_seed=7)
    drawing.image, drawing.tags, drawing.labels

Needs Pillow and numpy only.
"""

from lorabake.pocket.world.accessories import add_object
from lorabake.pocket.world.garments import Outfit, add_outfit
from lorabake.pocket.world.picture import SIZES, Drawing, draw, label_row, sheet
from lorabake.pocket.world.spec import Extra, Spec, axes, sample
from lorabake.pocket.world.styles import Style, add_style
from lorabake.pocket.world.tags import SUBJECT, caption, invented_name, parse, read_tags, tags_of, vocabulary

__all__ = [
    "SIZES",
    "SUBJECT",
    "Drawing",
    "Extra",
    "Outfit",
    "Spec",
    "Style",
    "add_object",
    "add_outfit",
    "add_style",
    "axes",
    "caption",
    "draw",
    "invented_name",
    "label_row",
    "parse",
    "read_tags",
    "sample",
    "sheet",
    "tags_of",
    "vocabulary",
]
