"""Drawing: same prompt, same picture; and the same picture as diffusers' pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorabake.base.errors import Problems, UserError
from lorabake.base.places import POCKET_MODEL
from lorabake.recipe.prompts import Prompt
from lorabake.sampling.ddim import ddim, step
from lorabake.sampling.draw import draw, start_noise, to_pictures

Tiny = Callable[..., Any]
MIXED = [
    Prompt("red hair", "blurry", seed=1, steps=4),
    Prompt("blue hair", "", seed=2, steps=4, cfg=1),
    Prompt("red hair", "blurry", seed=3, steps=3, cfg=7),
    Prompt("green hair", "blurry", seed=1, steps=4, width=40, height=24),
    Prompt("blue hair", "other", seed=5, steps=4, sampler="euler"),
    Prompt("red hair", "blurry", seed=6, steps=4, cfg=2),
]


def difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of any channel of any pixel, of 255."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_a_picture_is_the_written_out_recipe(tiny: Tiny) -> None:
    model, prompt = tiny(), MIXED[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(1))
    conditioning = model.encode_text(model.tokenize(["blurry", "red hair"]))
    latents = noise
    with torch.no_grad():
        for leg in ddim(model.betas_T, model.sampler, 4).legs:
            away, towards = model.predict(
                torch.cat([latents, latents]), torch.full((2,), leg.timestep), conditioning
            ).chunk(2)
            latents = step(away + 5.0 * (towards - away), latents, leg, "epsilon")
        pixels = ((model.decode_latents(latents) / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0)
    drawn = draw(model, [prompt])[0]
    assert drawn.size == (32, 32)
    assert drawn.mode == "RGB"
    assert difference(drawn, Image.fromarray(pixels.numpy().astype(np.uint8))) == 0


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_pictures_do_not_depend_on_each_other(tiny: Tiny, prediction: str, batch_size: int) -> None:
    model = tiny(prediction)
    alone = [draw(model, [prompt])[0] for prompt in MIXED]
    together = draw(model, MIXED, batch_size=batch_size)
    assert [picture.size for picture in together] == [(p.width or 32, p.height or 32) for p in MIXED]
    assert max(map(difference, alone, together)) <= 1
    assert difference(alone[0].resize((8, 8)), alone[2].resize((8, 8))) > 10, "the pictures differ at all"


def test_every_text_is_encoded_once_and_without_guidance_there_is_one_half(tiny: Tiny) -> None:
    model = tiny()
    draw(model, MIXED)
    assert sorted(model.encoded) == sorted({"red hair", "blurry", "blue hair", "green hair", "other"})
    model = tiny()
    draw(model, [Prompt("a", "unused", steps=3, cfg=1), Prompt("b", "unused", steps=3, cfg=1)])
    assert model.encoded == ["a", "b"]
    assert model.rows == [2, 2, 2]
    model = tiny()
    draw(model, [Prompt("a", steps=3), Prompt("b", steps=3), Prompt("c", steps=3)], batch_size=2)
    assert model.rows == [4, 4, 4, 2, 2, 2]


def test_global_randomness_is_neither_read_nor_moved(tiny: Tiny) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(tiny(), [MIXED[0]])[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert difference(first, draw(tiny(), [MIXED[0]])[0]) == 0


def test_gradients_stay_as_they_were(tiny: Tiny) -> None:
    model = tiny()
    draw(model, [MIXED[0]])
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.look.parameters())
    model.look(torch.zeros(1, 4, 8, 8)).sum().backward()


def test_progress_is_told_after_every_step_and_can_stop_the_drawing(tiny: Tiny) -> None:
    told: list[tuple[int, int]] = []
    draw(tiny(), MIXED, batch_size=2, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (23, 23)
    assert [done for done, _ in told] == sorted({done for done, _ in told})

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(tiny(), MIXED, progress=stop)


def test_sides_and_steps_that_do_not_fit_are_all_named(tiny: Tiny) -> None:
    model = tiny()
    with pytest.raises(Problems) as caught:
        draw(model, [Prompt("a", width=30, height=4), Prompt("b", steps=1000)])
    found = {problem.where: problem.what for problem in caught.value.problems}
    assert found["prompt 1, width"] == "30 is not a multiple of 8; use 24 or 32"
    assert found["prompt 1, height"] == "4 is not a multiple of 8; use 8"
    assert "1 to 999" in found["prompt 2, steps"]
    assert model.encoded == [], "nothing was started"
    with pytest.raises(UserError, match="batch_size"):
        draw(model, [Prompt("a")], batch_size=0)


# ---- flow models


def test_a_picture_of_a_flow_model_is_the_written_out_recipe(tiny: Tiny) -> None:
    """Shares of noise 1, 3/4, 1/2, 1/4, 0 shifted by 3: 1, 0.9, 0.75, 0.5, 0."""
    model, prompt = tiny("flow"), Prompt("red hair", "blurry", seed=1, steps=4, cfg=3)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(1))
    conditioning = model.encode_text(model.tokenize(["blurry", "red hair"]))
    with torch.no_grad():
        for here, there in ((1, 0.9), (0.9, 0.75), (0.75, 0.5), (0.5, 0)):
            away, towards = model.predict(
                torch.cat([latents, latents]), torch.full((2,), 1000 * here), conditioning
            ).chunk(2)
            latents = latents + (there - here) * (away + 3 * (towards - away))
        pixels = ((model.decode_latents(latents) / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0)
    assert difference(draw(model, [prompt])[0], Image.fromarray(pixels.numpy().astype(np.uint8))) <= 1


def test_only_flow_models_are_told_a_guidance_and_every_row_its_own(tiny: Tiny) -> None:
    model = tiny("flow")
    draw(model, [Prompt("a", steps=1), Prompt("b", steps=1, guidance=2.0)])
    draw(model, [Prompt("a", steps=1, cfg=1, guidance=0.0)])
    assert model.guidance == [[3.5, 2.0, 3.5, 2.0], [0.0]]
    model = tiny()
    draw(model, [Prompt("a", steps=1)])
    assert model.guidance == []


def test_a_guidance_that_would_do_nothing_is_named(tiny: Tiny) -> None:
    with pytest.raises(Problems) as caught:
        draw(tiny("v"), [Prompt("a", guidance=3.5)])
    (problem,) = caught.value.problems
    assert problem.where == "prompt 1, guidance"
    assert (
        problem.what
        == "3.5 does nothing with a model that is told no guidance: leave it out, and set cfg (--l) instead"
    )


def test_where_nobody_says_a_model_is_drawn_with_what_is_usual_for_it(tiny: Tiny) -> None:
    model = tiny("flow")
    model.facts = dataclasses.replace(model.facts, usual_cfg=1.0)
    draw(model, [Prompt("a", "unused", steps=1), Prompt("b", steps=1, cfg=3.0)])
    assert model.rows == [1, 2] and model.guidance == [[3.5], [3.5, 3.5]]
    assert model.encoded == ["a", "", "b"]
    same = [draw(tiny(), [Prompt("a", steps=2, cfg=cfg)])[0] for cfg in (None, 5.0, 4.0)]
    assert difference(same[0], same[1]) == 0 and difference(same[0], same[2]) > 0


@pytest.mark.parametrize(
    ("prediction", "sampler", "made_for", "allowed"),
    [("flow", "ddim", "epsilon or v", "flow-euler"), ("epsilon", "flow-euler", "flow", "ddim, euler"), ("v", "flow-euler", "flow", "ddim, euler")],
)  # fmt: skip
def test_a_sampler_of_other_models_is_named(
    tiny: Tiny, prediction: str, sampler: str, made_for: str, allowed: str
) -> None:
    model = tiny(prediction)
    with pytest.raises(Problems) as caught:
        draw(model, [Prompt("a"), Prompt("b", sampler=sampler, width=30)])
    found = {problem.where: problem.what for problem in caught.value.problems}
    assert found.keys() == {"prompt 2, width", "prompt 2, sampler"}
    assert found["prompt 2, sampler"] == (
        f"'{sampler}' draws with models that predict {made_for}; this one predicts {prediction}. Allowed: {allowed}. "
        f"Without a sampler, {allowed.partition(',')[0]} is taken."
    )
    assert model.encoded == [], "nothing was started"


def test_no_prompts_are_no_pictures(tiny: Tiny) -> None:
    assert draw(tiny(), []) == []


def test_noise_is_a_pictures_own(tiny: Tiny) -> None:
    noise = start_noise(tiny().facts, Prompt("a", seed=2**63 + 5, width=40, height=24))
    assert noise.shape == (1, 4, 6, 10)
    assert torch.equal(noise, start_noise(tiny().facts, Prompt("b", seed=2**63 + 5, width=40, height=24)))
    assert not torch.equal(noise, start_noise(tiny().facts, Prompt("a", seed=1, width=40, height=24)))


def test_colours_are_rounded_clipped_and_never_undefined() -> None:
    values = (
        torch.tensor([-2.0, -1, 0, 1, 3, float("nan"), float("inf"), float("-inf")]).view(1, 1, 1, 8).expand(1, 3, 1, 8)
    )
    pixels = np.asarray(to_pictures(values)[0])
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


POCKET_PROMPTS = [
    Prompt("1girl, red hair, twintails, blue dress, standing, full body, forest", "monochrome", seed=1, cfg=4),
    Prompt("1girl, blonde hair, portrait, crown, closed eyes, beach", seed=2, cfg=7, width=96),
    Prompt("1boy, black hair, spiky hair, armor, sky", seed=3, cfg=1),
]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_embedded_model_draws_what_diffusers_draws(sampler: str) -> None:
    """Float32 sums in another order: at most 2 of 255 in any pixel, and 0.02 of 255 on average."""
    import dataclasses

    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    from lorabake.families import load_model

    prompts = [dataclasses.replace(prompt, sampler=sampler) for prompt in POCKET_PROMPTS]
    ours = draw(load_model("pocket"), prompts)
    pipeline: Any = StableDiffusionPipeline.from_pretrained(POCKET_MODEL, dtype=torch.float32)
    scheduler = DDIMScheduler if sampler == "ddim" else EulerDiscreteScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for prompt, picture in zip(prompts, ours, strict=True):
        theirs = pipeline(
            prompt.text, negative_prompt=prompt.negative, num_inference_steps=prompt.steps, guidance_scale=prompt.cfg,
            width=prompt.width or 64, height=prompt.height or 64, generator=torch.Generator("cpu").manual_seed(prompt.seed),
        ).images[0]  # fmt: skip
        assert np.asarray(theirs).std() > 20, "a picture with something in it"
        assert difference(picture, theirs) <= 2
        assert np.abs(np.asarray(picture, dtype=float) - np.asarray(theirs, dtype=float)).mean() < 0.02
