"""Sizes of pictures in sd-scripts, as ours."""

from __future__ import annotations

from lorabake.recipe.imports import _values
from lorabake.recipe.imports._reading import Reading

_SIDES = (64, 32, 16, 8)
"""Steps between sides that are tried, where sides are no multiples of 64."""


def buckets(reading: Reading) -> None:
    """Set the sizes that pictures are trained at."""
    enabled = reading.flag("enable_bucket")
    reading.put(
        "data.buckets.enabled", enabled, "enable_bucket", kind=None if reading.has("enable_bucket") else "default"
    )
    step = _resolution(reading, reading.whole("bucket_reso_steps") if enabled else None)
    if not enabled:
        for key in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"):
            if reading.has(key):
                reading.unused(key, "there are no buckets without enable_bucket.")
        return
    if step is None and not reading.has("bucket_reso_steps"):
        reading.default("data.buckets.step", 64, "bucket_reso_steps")
    elif step is None:
        reading.put("data.buckets.step", reading.whole("bucket_reso_steps"), "bucket_reso_steps")
    frozen = reading.flag("bucket_no_upscale")
    if reading.has("bucket_no_upscale"):
        reading.put("data.buckets.upscale", not frozen, "bucket_no_upscale", "the opposite")
    for key, setting, default in (("min_bucket_reso", "min", 256), ("max_bucket_reso", "max", 1024)):
        given = reading.whole(key)
        if frozen:
            if reading.has(key):
                reading.unused(key, "sd-scripts does not look at it with bucket_no_upscale.")
        elif given == 0:
            reading.say("same", key, f"data.buckets.{setting}", None, "off")
        else:
            reading.put(
                f"data.buckets.{setting}",
                default if given is None else given,
                key,
                kind=None if given is not None else "default",
            )


def _resolution(reading: Reading, step: int | None) -> int | None:
    """Set the resolution, and a step that it is a multiple of if the usual one is none; returns that step."""
    sides = reading.take("resolution", lambda value: [_values.whole(side) for side in _values.numbers(value)])
    if not sides:
        return None
    if len(sides) > 2:
        reading.lost("resolution", "it has more than two sides.")
        return None
    if reading.get("data.buckets.resolutions"):
        return None
    found = step or 64
    if any(side % found for side in sides) and step is None:
        found = next((small for small in _SIDES if not any(side % small for side in sides)), 64)
    near = [max(found, round(side / found) * found) for side in sides]
    ours = near[0] if len(set(near)) == 1 else near
    note = "" if near == sides else f"the nearest multiple of {found}, which sides are here"
    reading.put("data.buckets.resolution", ours, "resolution", note)
    if found != (step or 64):
        reading.put("data.buckets.step", found, "resolution", f"sides are no multiples of 64, but of {found}")
        return found
    return None
