"""Draws pictures from a loaded model, in the numbers of diffusers' pipeline: the same seed gives the same picture there.

What is grafted on the model is drawn with; this module knows nothing of adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from lorabake.base.errors import Problem, Problems, UserError
from lorabake.protocols.family import Conditioning, Framing, Model, ModelFacts
from lorabake.recipe.prompts import Prompt, shortened, unfit
from lorabake.sampling.samplers import fitting

Progress = Callable[[int, int], None]
"""Called with (done, total), counted in denoising steps of single pictures."""


@torch.inference_mode()
def draw(
    model: Model, prompts: Sequence[Prompt], *, batch_size: int = 8, progress: Progress | None = None
) -> list[Image.Image]:
    """One RGB picture for each prompt, in their order.

    Prompts of the same size, steps and sampler are drawn together. A picture does not depend on what else is drawn, but for the
    last bit of float32 sums, whose order may change with the batch. Values that are not finite come out black.

    Args:
        model: on any device; noise is always drawn on the CPU, in float32, from a generator of its own.
        prompts: sides, samplers and guidance that are None become what suits the model.
        batch_size: most pictures drawn at once; with guidance the denoiser sees twice as many rows.
        progress: told after every step; an error it raises ends the drawing.

    Raises:
        Problems: sides, samplers or steps that this model cannot draw with, of all prompts at once.
        UserError: ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise UserError(f"A batch of {batch_size} pictures cannot be drawn; batch_size must be at least 1.")
    prompts = [prompt.on(model.facts) for prompt in prompts]
    check(model, prompts)
    done, total = 0, sum(prompt.steps for prompt in prompts)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    pictures: dict[int, Image.Image] = {}
    with _threads_for(model.facts):
        texts = _Texts(model, prompts, batch_size)
        for indices in _batches(prompts, batch_size):
            images_BCHW = _draw_batch(model, [prompts[i] for i in indices], texts, advance)
            pictures.update(zip(indices, to_pictures(images_BCHW), strict=True))
    return [pictures[i] for i in range(len(prompts))]


@contextlib.contextmanager
def _threads_for(facts: ModelFacts) -> Iterator[None]:
    """One thread for a small model, where the second costs more than it does: 5 s against 6 to 8 s for 16 pictures of the pocket model."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if facts.small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(model: Model, prompts: Sequence[Prompt]) -> None:
    """Whether the model can draw these prompts.

    Raises:
        Problems: everything it cannot.
    """
    problems: list[Problem] = []
    for number, prompt in enumerate(prompts, 1):
        problems += [
            Problem(f"prompt {number}, {where}", what) for where, what in _wrong(model, prompt.on(model.facts))
        ]
    if problems:
        raise Problems(
            f"Drawing '{shortened(prompts[0].text)}'" + (" and others" if len(prompts) > 1 else ""), problems
        )


def _wrong(model: Model, prompt: Prompt) -> Iterator[tuple[str, str]]:
    """What in one prompt the model cannot draw, and why."""
    wrong = dict(unfit(prompt, model.facts))
    yield from wrong.items()
    if "sampler" in wrong:
        return
    try:
        fitting(prompt.sampler, model.facts.prediction).trajectory(model, prompt.steps, _tokens(model.facts, prompt))
    except UserError as error:
        yield "steps", str(error)


def start_noise(facts: ModelFacts, prompt: Prompt) -> Tensor:
    """Noise the picture begins as, (1, C, H/f, W/f), as diffusers' pipeline draws it with ``torch.Generator().manual_seed(seed)``."""
    shape = (1, facts.latent_channels, *_latent_size(facts, prompt))
    return torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed))


def _latent_size(facts: ModelFacts, prompt: Prompt) -> tuple[int, int]:
    """Height and width in latent cells."""
    height, width = prompt.height or facts.resolution, prompt.width or facts.resolution
    return height // facts.latent_scale, width // facts.latent_scale


def _tokens(facts: ModelFacts, prompt: Prompt) -> int:
    """Patches of 2 × 2 latent cells."""
    height, width = _latent_size(facts, prompt)
    return (height // 2) * (width // 2)


def to_pictures(images_BCHW: Tensor) -> list[Image.Image]:
    """8-bit pictures of images in [-1, 1]; what lies outside is clipped, and NaN is black."""
    shares = (images_BCHW.float() / 2 + 0.5).nan_to_num(0.0).clamp(0, 1)
    bytes_BHWC = (shares * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(pixels_HWC) for pixels_HWC in bytes_BHWC]


def _framing(facts: ModelFacts, prompt: Prompt) -> Framing:
    """A picture of the size that is drawn, of which nothing was cut off."""
    size = prompt.width or facts.resolution, prompt.height or facts.resolution
    return Framing(size, (0, 0), size)


def _guidance(model: Model, prompts: Sequence[Prompt]) -> Conditioning:
    """``guidance_B`` for models that are told one."""
    strengths = [prompt.guidance for prompt in prompts if prompt.guidance is not None]
    return {"guidance_B": torch.tensor(strengths, device=model.device)} if strengths else {}


class _Texts:
    """Conditioning of every distinct text that is needed, encoded once."""

    def __init__(self, model: Model, prompts: Sequence[Prompt], batch_size: int) -> None:
        needed = [text for prompt in prompts for text in _texts_of(prompt)]
        self._rows = {text: row for row, text in enumerate(dict.fromkeys(needed))}
        distinct = list(self._rows)
        chunks = [distinct[i : i + batch_size] for i in range(0, len(distinct), batch_size)]
        encoded = [model.encode_text(model.tokenize(chunk)) for chunk in chunks]
        self._conditioning = (
            {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]} if encoded else {}
        )

    def of(self, texts: Sequence[str]) -> Conditioning:
        """Conditioning with one row for each text."""
        rows = [self._rows[text] for text in texts]
        return {name: tensor[rows] for name, tensor in self._conditioning.items()}


def _texts_of(prompt: Prompt) -> tuple[str, ...]:
    return (prompt.negative, prompt.text) if prompt.guided else (prompt.text,)


def _batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[int]]:
    alike: dict[object, list[int]] = {}
    for index, prompt in enumerate(prompts):
        alike.setdefault((prompt.width, prompt.height, prompt.steps, prompt.sampler, prompt.guided), []).append(index)
    return [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]


def _draw_batch(model: Model, prompts: Sequence[Prompt], texts: _Texts, advance: Callable[[int], None]) -> Tensor:
    """Images of prompts that share size, steps, sampler and whether they are guided."""
    guided, sampler = prompts[0].guided, fitting(prompts[0].sampler, model.facts.prediction)
    trajectory = sampler.trajectory(model, prompts[0].steps, _tokens(model.facts, prompts[0]))
    latents_BCHW = (
        torch.cat([start_noise(model.facts, prompt) for prompt in prompts]).to(model.device) * trajectory.noise_scale
    )
    conditioning = texts.of([prompt.negative for prompt in prompts] * guided + [prompt.text for prompt in prompts])
    conditioning |= model.frame([_framing(model.facts, prompt) for prompt in prompts] * (1 + guided))
    conditioning |= _guidance(model, list(prompts) * (1 + guided))
    cfg_B111 = torch.tensor([prompt.cfg or 1.0 for prompt in prompts], device=model.device).view(-1, 1, 1, 1)
    for leg in trajectory.legs:
        asked_BCHW = torch.cat([latents_BCHW] * (1 + guided))
        timesteps_B = torch.full((len(asked_BCHW),), leg.timestep, device=model.device)
        output_BCHW = model.predict(asked_BCHW, timesteps_B, conditioning).float()
        if guided:
            away_BCHW, towards_BCHW = output_BCHW.chunk(2)
            output_BCHW = away_BCHW + cfg_B111 * (towards_BCHW - away_BCHW)
        latents_BCHW = sampler.step(output_BCHW, latents_BCHW, leg, model.facts.prediction)
        advance(len(prompts))
    return model.decode_latents(latents_BCHW)
