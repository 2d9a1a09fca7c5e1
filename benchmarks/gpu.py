"""One LoRA step on a GPU beside others' ways to take it: images per second, peak memory, share of the GPU's own matrix-product rate.

    python benchmarks/gpu.py --json gpu.json                  # ends within eight minutes
    python benchmarks/gpu.py --device cpu --tiny              # the same code on toy sizes, anywhere

Two cases: SD1.5 at 512 px and SDXL at 1024 px, one picture a step, bfloat16, LoRA of rank 32 on the layers of every transformer
(attention, MLP, projections) with float32 weights, AdamW. Denoisers have full size and random weights, made on the GPU; latents
and text are given to all. Sides, each in a process of its own:

- ours captured, ours eager: our loop as a run has it, batches drawn and assembled on the CPU, with and without CUDA graphs;
- frozen base captured, frozen base eager: our network alone, forward and backward down to its input: the floor under any LoRA;
- diffusers + peft: diffusers' network with PEFT's adapter under autocast, in a loop as its example scripts have it;
- diffusers + kohya-style: the same with two small modules for each layer, as kohya's scripts have it.

"Of its rate" is the arithmetic of our LoRA step, counted once and without what is computed twice, per second, as a share of what one large
matrix product reaches on the same device. A side that fails or takes too long is told and left out.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from networks import SD15, SDXL, diffusers_unet, floor, one_module_per_layer, our_unet, with_peft

OURS, FLOORS = ("ours captured", "ours eager"), ("frozen base captured", "frozen base eager")
SIDES = (*OURS, *FLOORS, "diffusers + peft", "diffusers + kohya-style")
DEVICE = "the device itself"
RANK, TOKENS = 32, 77
LIMIT = 8 * 60
"""Seconds that everything together may take."""
AMPLE = 40 << 30
"""Bytes of a GPU from which on SDXL's activations are kept and not recomputed."""


@dataclass(frozen=True)
class Case:
    """What is trained."""

    family: str
    pixels: int
    full: dict[str, Any]
    """Sizes of the U-Net in diffusers' names; SD1's where nothing is said."""
    toy: dict[str, Any]
    """The same for a network that takes no time; it computes in float32, as a CPU may have no fast 16 bits."""

    def sizes(self, tiny: bool) -> dict[str, Any]:
        """Of the U-Net."""
        return self.toy if tiny else self.full

    def side(self, tiny: bool) -> int:
        """Of the picture, in pixels."""
        return 64 if tiny else self.pixels

    def dtype(self, tiny: bool) -> Any:
        """Of weights and activations."""
        import torch

        return torch.float32 if tiny else torch.bfloat16


CASES = {
    "SD1.5 512 px": Case(
        "sd",
        512,
        SD15,
        {"cross_attention_dim": 64, "attention_head_dim": 2, "block_out_channels": [32, 32, 64, 64]},
    ),
    "SDXL 1024 px": Case(
        "sdxl",
        1024,
        SDXL,
        SDXL
        | {
            "block_out_channels": [32, 32, 64],
            "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [1, 1, 2],
            "cross_attention_dim": 64,
            "projection_class_embeddings_input_dim": 64 + 6 * 256,
        },
    ),
}


def main() -> None:
    """Measure every side of every case, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=(*SIDES, DEVICE), help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the benchmark itself")
    parser.add_argument("--cases", choices=tuple(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto", help="recompute activations")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_measure_device(arguments) if arguments.side == DEVICE else _measure(arguments)))
        return
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("full sizes are for a GPU: on a CPU give --tiny, or use benchmarks/full_size.py.")
    if arguments.device == "cuda" and not _has_cuda():
        parser.error("no CUDA device was found. `--device cpu --tiny` tries the benchmark itself.")
    results = _run_all(arguments)
    for name in arguments.cases:
        _print_table(name, results["device"], results["cases"][name])
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# ---- processes and their time


def _run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    deadline, left = time.monotonic() + LIMIT - 5, len(arguments.cases) * len(arguments.sides) + 1
    results: dict[str, Any] = {"device": {}, "cases": {name: {} for name in arguments.cases}}
    jobs = [(arguments.cases[0], DEVICE), *((name, side) for side in arguments.sides for name in arguments.cases)]
    for name, side in jobs:
        # The first ones take longer (files are not in memory yet), and what they leave is shared by the others.
        seconds = min(120.0, 2 * (deadline - time.monotonic()) / left, deadline - time.monotonic())
        found = _run(arguments, name, side, seconds)
        left -= 1
        print(f"{name}, {side}: {found.get('failed') or 'measured'}", file=sys.stderr)
        if side == DEVICE:
            results["device"] = found
        else:
            results["cases"][name][side] = found
    return results


def _run(arguments: argparse.Namespace, case: str, side: str, seconds: float) -> dict[str, Any]:
    """What a process of its own measures, or how it ``failed``."""
    command = [sys.executable, __file__, "--side", side, "--device", arguments.device, "--cases"]
    command += [*(arguments.cases if side == DEVICE else [case]), "--checkpointing", arguments.checkpointing]
    command += ["--tiny"] * arguments.tiny
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "STARTED": repr(time.time())}
    try:
        done = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True, timeout=max(1.0, seconds)
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr.strip().splitlines() or ["no message"])[-1]}


def _print_table(case: str, device: dict[str, Any], sides: dict[str, dict[str, Any]]) -> None:
    rate, work = device.get("tflops"), device.get("work", {}).get(case)
    ours = sides.get(OURS[0], {}).get("images_per_second")
    print(f"\n{case}, {device.get('name', 'device unknown')}: {rate or 0:.1f} TFLOP/s in one large matrix product")
    print(
        f"{'':<26}{'images/s':>10}{'ours is':>9}{'peak MB':>10}{'held MB':>10}{'of its rate':>13}{'first step s':>14}"
    )
    for side, row in sides.items():
        if "failed" in row:
            print(f"{side:<26}{row['failed']}")
            continue
        speed = row["images_per_second"]
        ratio = f"{ours / speed:.2f}x" if ours else ""
        share = f"{work * speed / rate:.1%}" if work and rate and side not in FLOORS else ""
        memory = f"{row['peak_mb']:>10.0f}{row['held_mb']:>10.0f}"
        note = f"  ({row['note']})" if row.get("note") else ""
        print(f"{side:<26}{speed:>10.2f}{ratio:>9}{memory}{share:>13}{row['first_step']:>14.1f}{note}")


# ---- one side


def _measure_device(arguments: argparse.Namespace) -> dict[str, Any]:
    """The rate of a large matrix product, and the arithmetic of our step in each case; both in TFLOP."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lorabake.train.loop import batch_loss

    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    matrix = torch.randn(
        2 * (8192 if on_gpu else 512,), device=device, dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    seconds = _seconds_per_step(lambda: matrix @ matrix, finish, 1.0)
    work: dict[str, float] = {}
    for name in arguments.cases:
        case = CASES[name]
        bake = _bake(
            case,
            arguments.tiny,
            our_unet(case.sizes(arguments.tiny), case.dtype(arguments.tiny), "meta"),
            capture=False,
        )
        with FlopCounterMode(display=False) as counter:
            batch_loss(bake, 0, 0, (0,)).backward()
        work[name] = counter.get_total_flops() / 1e12
    rate = 2 * matrix.shape[0] ** 3 / seconds / 1e12
    return {"name": torch.cuda.get_device_name() if on_gpu else "a CPU", "tflops": rate, "work": work}


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side of one case, in this process."""
    import torch

    side, case, tiny = arguments.side, CASES[arguments.cases[0]], arguments.tiny
    device, on_gpu = torch.device(arguments.device), arguments.device == "cuda"
    recompute = arguments.checkpointing == "on"
    if arguments.checkpointing == "auto" and on_gpu and case.family == "sdxl":
        recompute = torch.cuda.get_device_properties(0).total_memory < AMPLE
    notes = ["activations recomputed"] if recompute else []
    if side in (*OURS, *FLOORS):
        unet = our_unet(case.sizes(tiny), case.dtype(tiny), device)
        unet.checkpoint_gradients(recompute)
        step = (_floor if side in FLOORS else _ours)(case, tiny, unet, side in (OURS[0], FLOORS[0]), notes.append)
    else:
        step = _theirs(case, tiny, device, recompute, peft="peft" in side)
    finish = torch.cuda.synchronize if on_gpu else lambda: None
    step()
    finish()
    first = time.time() - float(os.environ["STARTED"])
    images = 1 / _seconds_per_step(step, finish, 0.0 if tiny else 8.0)
    if on_gpu:
        peak, held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    else:
        peak = held = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = {"peak_mb": peak / 2**20, "held_mb": held / 2**20}
    return {"images_per_second": images, "first_step": first, **memory, "note": "; ".join(notes)}


def _seconds_per_step(step: Callable[[], object], finish: Callable[[], object], budget: float) -> float:
    """Median over blocks of steps; only after a block the clock waits for the device."""
    for _ in range(3):
        step()
    finish()
    blocks: list[float] = []
    stop = time.perf_counter() + budget
    while len(blocks) < 3 or (time.perf_counter() < stop and len(blocks) < 20):
        start = time.perf_counter()
        for _ in range(3):
            step()
        finish()
        blocks.append((time.perf_counter() - start) / 3)
    return statistics.median(blocks)


# ---- ours


def _model(case: Case, pixels: int, unet: Any) -> Any:
    """A model of its family as far as training needs it; nothing of it comes from files."""
    from lorabake.families.networks.noise import betas_of
    from lorabake.families.sd.model import SDModel
    from lorabake.families.sd.model import _layers as sd_layers
    from lorabake.families.sdxl.model import SDXLModel, layers_of
    from lorabake.protocols.family import ModelFacts, Part

    family: Any = SDXLModel if case.family == "sdxl" else SDModel

    class Denoiser(family):
        """With a U-Net alone."""

        def __init__(self) -> None:
            self.facts = ModelFacts(case.family, Path(), "random", "epsilon", pixels, 8, 8, 4, "", "", "", small=False)
            weight = unet.conv_in.weight
            self.unet, self._device, self._dtype = unet, weight.device, weight.dtype
            self.parts: dict[Part, Any] = {"denoiser": unet}
            self._layers = list(layers_of(self.parts) if case.family == "sdxl" else sd_layers("denoiser", unet))
            self.sampler = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
            self.betas_T = betas_of(self.sampler)

    return Denoiser()


def _bake(case: Case, tiny: bool, unet: Any, capture: bool, told: Callable[[str], None] = print) -> Any:
    """What our loop trains: one picture a step, its latents and text in memory as if they had been encoded."""
    from lorabake.adapters import graft
    from lorabake.adapters.lora import LoraSettings
    from lorabake.dataset.folder import Sample
    from lorabake.objectives.diffusion import DiffusionSettings, diffusion_for
    from lorabake.optimizers._flat import FlatGroup
    from lorabake.optimizers.adamw import AdamW, AdamWSettings
    from lorabake.optimizers.schedules import ScheduleSettings
    from lorabake.protocols.family import Framing
    from lorabake.recipe import sections
    from lorabake.recipe.recipe import Choice, Recipe
    from lorabake.train.bake import Bake
    from lorabake.train.capture import Captured, CudaGraphs
    from lorabake.train.loop import loss_of

    pixels, given = case.side(tiny), _given(case, tiny)
    model = _model(case, pixels, unet)
    grafted = graft(model, "lora", LoraSettings(rank=RANK), seed=0, parts=("denoiser",))
    grafted.training = True
    objective = diffusion_for(DiffusionSettings(), model)
    groups = [FlatGroup(part, parameters) for part, parameters in grafted.parameters().items()]
    rates = [{"params": [group.values], "lr": 1e-4} for group in groups]
    optimizer: Any = AdamW(rates, **AdamWSettings().model_dump())
    record: Any = CudaGraphs(model.device) if model.device.type == "cuda" else lambda step: step
    recipe = Recipe(
        model=sections.ModelSettings(),
        data=sections.DataSettings(folder=Path()),
        adapter=Choice("lora", LoraSettings(rank=RANK)),
        objective=Choice("diffusion", DiffusionSettings()),
        optimizer=Choice("adamw", AdamWSettings()),
        rates=sections.RateSettings(lr=1e-4, text_encoder_lr=0.0),
        schedule=Choice("constant", ScheduleSettings()),
        train=sections.TrainSettings(),
        save=sections.SaveSettings(),
        sample=sections.SampleSettings(),
        output=sections.OutputSettings(),
    )
    return Bake(
        recipe=recipe,
        model=model,
        graft=grafted,
        objective=objective,
        text=lambda captions: {name: given[name] for name in given.keys() - {"latents_BCHW"}},  # pyright: ignore[reportArgumentType]
        groups=groups,
        base_rates=[1e-4],
        optimizer=optimizer,
        samples=[Sample(Path(), "picture", "", 1, "a picture", "txt", pixels, pixels, "", None)],
        latents=[[given["latents_BCHW"][0].float()]],
        framings=[[Framing((pixels, pixels), (0, 0), (pixels, pixels))]],
        buckets=[(pixels, pixels)],
        steps_per_epoch=1,
        total_steps=1 << 20,
        captured=Captured(partial(loss_of, model, objective), groups, model.device, record, told, grafted.ahead)
        if capture
        else None,
    )


def _ours(case: Case, tiny: bool, unet: Any, capture: bool, told: Callable[[str], None]) -> Callable[[], object]:
    """A step of our loop."""
    from lorabake.train.loop import optimizer_step

    bake = _bake(case, tiny, unet, capture, lambda reason: told(f"not captured: {reason}"))
    steps = itertools.count()
    return lambda: optimizer_step(bake, next(steps), [(0,)])


def _floor(case: Case, tiny: bool, unet: Any, capture: bool, told: Callable[[str], None]) -> Callable[[], object]:
    """Our network alone."""
    import torch

    from lorabake.protocols.family import Framing
    from lorabake.train.capture import CudaGraphs

    pixels, device = case.side(tiny), unet.conv_in.weight.device
    model = _model(case, pixels, unet)
    framing = Framing((pixels, pixels), (0, 0), (pixels, pixels))
    told_of = {name: tensor.to(device) for name, tensor in (_given(case, tiny) | model.frame([framing])).items()}
    latents = told_of.pop("latents_BCHW")
    timesteps = torch.full((1,), 500, device=device)
    step: Any = floor(lambda x: model.predict(x, timesteps, told_of), latents, torch.randn_like(latents))
    return CudaGraphs(device)(step) if capture and device.type == "cuda" else step


def _given(case: Case, tiny: bool) -> dict[str, Any]:
    """Latents and text of one picture, random, on the CPU."""
    import torch

    generator, sizes, side = torch.Generator().manual_seed(0), case.sizes(tiny), case.side(tiny) // 8
    given = {"latents_BCHW": (1, 4, side, side), "text_BLD": (1, TOKENS, sizes["cross_attention_dim"])}
    if case.family == "sdxl":
        given["pooled_BD"] = (1, sizes["projection_class_embeddings_input_dim"] - 6 * 256)
    return {name: torch.randn(shape, generator=generator).to(case.dtype(tiny)) for name, shape in given.items()}


# ---- theirs


def _theirs(case: Case, tiny: bool, device: Any, recompute: bool, peft: bool) -> Callable[[], object]:
    """diffusers' network under autocast, with PEFT's adapter or with modules for each layer; noise and timesteps drawn on the device."""
    import torch

    schedulers: Any = importlib.import_module("diffusers.schedulers.scheduling_ddpm")
    unet = diffusers_unet(case.sizes(tiny), case.dtype(tiny), device).train()
    if recompute:
        unet.enable_gradient_checkpointing()
    trained = with_peft(unet, RANK) if peft else one_module_per_layer(unet, torch.float32, RANK)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    scheduler = schedulers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    told = {name: tensor.to(device) for name, tensor in _given(case, tiny).items()}
    latents, added = told["latents_BCHW"], None
    if case.family == "sdxl":
        pixels = float(case.side(tiny))
        sizes = torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]], device=device)
        added = {"text_embeds": told["pooled_BD"], "time_ids": sizes}

    def step() -> None:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (1,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16, enabled=not tiny):
            prediction = unet(noisy, timesteps, told["text_BLD"], added_cond_kwargs=added).sample
        torch.nn.functional.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
