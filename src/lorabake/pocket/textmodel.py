"""The pocket model's text encoder, which has learned to read before it meets a picture.

A text encoder that starts from random numbers beside a random denoiser never learns which colour belongs to which thing: at first the
text explains nothing of the noise, so nothing teaches the text. Read alone, captions teach it in minutes: from its state at the end of
the text it must name the value on every axis of the world, and know what was not said.

Shapes: B captions, L tokens, A axes, D channels.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorabake.families.networks.clip import CLIPTextModel
from lorabake.families.networks.tokenizer import ClipTokenizer
from lorabake.pocket.architecture import text_config
from lorabake.pocket.world import axes, caption, invented_name, read_tags, sample, tags_of, vocabulary

_TAG_DROP, _NAME_SHARE = 0.15, 0.12
_WARM_UP = 100
_MEASURED = 500
_FRESH = 1 << 40
"""Captions for measuring come from a seed this far from those of training."""


def new_text_encoder(seed: int = 0) -> CLIPTextModel:
    """A text encoder with random weights, scaled as in CLIP's own code (Radford et al. 2021): each layer adds little."""
    config = text_config()
    encoder = CLIPTextModel(config)
    generator = torch.Generator().manual_seed(seed)
    wide = config.hidden_size**-0.5
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05, generator=generator)
        elif isinstance(module, nn.Linear):
            adds = name.endswith(("out_proj", "fc2"))
            scale = (2 * config.layers) ** -0.5 if adds else 2**-0.5 if name.endswith("fc1") else 1.0
            nn.init.normal_(module.weight, std=wide * scale, generator=generator)
            nn.init.zeros_(module.bias)
    return encoder.requires_grad_(False).eval()


@dataclass(frozen=True, slots=True)
class TextWarmUp:
    """Settings of `warm_up`."""

    steps: int = 800
    """600 read 99 % of what captions say, after two minutes on one core of their own."""
    batch_size: int = 96
    """Captions per step."""
    learning_rate: float = 2e-3
    """At its peak, which lasts for the first half."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """How well captions are read: shares of right answers on captions that were not trained on."""

    per_axis: dict[str, float]
    """Among the captions that say something about the axis."""
    unsaid: float
    """How often it is known that a caption says nothing about an axis."""

    @property
    def mean(self) -> float:
        """Mean of ``per_axis``."""
        return sum(self.per_axis.values()) / len(self.per_axis)


def warm_up(
    encoder: CLIPTextModel,
    tokenizer: ClipTokenizer,
    settings: TextWarmUp | None = None,
    report: Callable[[int, float], None] | None = None,
) -> Reading:
    """Train a text encoder in place to say, at the end of a caption, the value on every axis.

    Runs on one thread; the same settings give the same weights on the same machine.

    Args:
        encoder: a new or a trained one.
        tokenizer: cuts captions into its tokens.
        settings: length, learning rate and seed.
        report: called as ``report(step, loss)`` every 50 steps; the loss is the mean cross-entropy per axis.

    Returns:
        What it can read afterwards. The layer that answers is thrown away.
    """
    settings = settings or TextWarmUp()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        answers = nn.Linear(encoder.config.hidden_size, sum(_choices()))
    parameters = [*encoder.parameters(), *answers.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    meanings = _meanings()
    try:
        encoder.requires_grad_(True).train()
        for step in range(settings.steps):
            optimizer.param_groups[0]["lr"] = settings.learning_rate * _schedule(step, settings.steps)
            captions, labels_BA = _captions(random.Random(f"{settings.seed}/{step}"), settings.batch_size, meanings)
            logits = _answer(encoder, answers, tokenizer, captions)
            losses = [F.cross_entropy(rows_BV, labels_BA[:, axis]) for axis, rows_BV in enumerate(logits)]
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if report and (step + 1) % 50 == 0:
                report(step + 1, loss.item())
        encoder.requires_grad_(False).eval()
        return _measure(encoder, answers, tokenizer, settings.seed)
    finally:
        encoder.requires_grad_(False).eval()
        torch.set_num_threads(threads)


def _choices() -> list[int]:
    """Answers per axis: its values, and "not said" as the last."""
    return [len(values) + 1 for values in axes.values()]


def _meanings() -> Mapping[str, Mapping[int, int]]:
    """What each tag says: {place of the axis: index of the value}."""
    places = {axis: place for place, axis in enumerate(axes)}
    return {
        tag: {places[axis]: axes[axis].index(value) for axis, value in read_tags(tag).items() if value in axes[axis]}
        for tag in vocabulary()
    }


def _captions(rng: random.Random, count: int, meanings: Mapping[str, Mapping[int, int]]) -> tuple[list[str], Tensor]:
    """Random captions and what they say, int64 [B, A]."""
    captions: list[str] = []
    rows: list[list[int]] = []
    for _ in range(count):
        tags = tags_of(sample(rng), {*axes, "garment"})
        name = invented_name(rng) if rng.random() < _NAME_SHARE else None
        text = caption(tags, rng, drop=_TAG_DROP, name=name)
        row = [len(values) for values in axes.values()]
        for tag in text.split(", "):
            for place, value in meanings.get(tag, {}).items():
                row[place] = value
        captions.append(text)
        rows.append(row)
    return captions, torch.tensor(rows)


def _answer(
    encoder: CLIPTextModel, answers: nn.Linear, tokenizer: ClipTokenizer, captions: list[str]
) -> tuple[Tensor, ...]:
    """Logits per axis, [B, values + 1], read from the state at the end of each caption."""
    ids_BL = torch.tensor(tokenizer.encode(captions))
    ends_B = (ids_BL == tokenizer.end_id).int().argmax(1)
    # Attention looks back only: what follows the longest caption can be left out.
    states_BLD = encoder(ids_BL[:, : int(ends_B.max()) + 1])
    return answers(states_BLD[torch.arange(len(ends_B)), ends_B]).split(_choices(), dim=-1)


@torch.no_grad()
def _measure(encoder: CLIPTextModel, answers: nn.Linear, tokenizer: ClipTokenizer, seed: int) -> Reading:
    captions, labels_BA = _captions(random.Random(_FRESH + seed), _MEASURED, _meanings())
    guesses_BA = torch.stack([rows.argmax(-1) for rows in _answer(encoder, answers, tokenizer, captions)], dim=-1)
    right_BA, said_BA = guesses_BA == labels_BA, labels_BA < torch.tensor(_choices()) - 1
    per_axis = {axis: right_BA[said_BA[:, place], place].float().mean().item() for place, axis in enumerate(axes)}
    return Reading(per_axis, right_BA[~said_BA].float().mean().item())


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, constant for half of the time, then a straight line down to 2 %."""
    return min(1.0, (step + 1) / min(_WARM_UP, math.ceil(steps / 10))) * max(0.02, min(1.0, 2 * (1 - step / steps)))
