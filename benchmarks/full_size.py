"""One LoRA step on a full-size SD1.5 denoiser (random weights) beside others' ways to take it: seconds, peak memory, ratios.

    python benchmarks/full_size.py --pixels 64 128 256 --batch 1 4 --precision fp32 bf16
    python benchmarks/full_size.py --model sdxl-half           # SDXL with half its channels, a quarter of its weights; `sdxl` is 10 GB

Five sides: the frozen networks alone, forward and backward (the floor under any LoRA; ours and diffusers'), our LoRA step, a plain
diffusers + PEFT step, and diffusers with one small module per layer, as kohya's scripts have it. LoRA of rank 16 on the attention layers (SD1.5's
are 192), latents and text given, AdamW. Each side has a process of its own per case; sides take turns, and medians are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from networks import SD15, SDXL, SDXL_HALF, diffusers_unet, floor, one_module_per_layer, our_unet, with_peft

FLOORS = ("our frozen base", "diffusers' frozen base")
SIDES = (*FLOORS, "lorabake", "diffusers + peft", "diffusers + kohya-style")
RANK, TOKENS = 16, 77
MODELS = {"sd15": SD15, "sdxl": SDXL, "sdxl-half": SDXL_HALF}


def main() -> None:
    """Measure every case and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=tuple(MODELS), default="sd15")
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32"])
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_measure(arguments)))
        return
    for pixels, batch, precision in itertools.product(arguments.pixels, arguments.batch, arguments.precision):
        results: dict[str, list[dict[str, float]]] = {side: [] for side in arguments.sides}
        for side in arguments.sides * arguments.rounds:
            case = ["--pixels", str(pixels), "--batch", str(batch), "--precision", precision]
            more = ["--model", arguments.model, "--steps", str(arguments.steps)]
            results[side].append(_run(side, [*case, *more], arguments.threads))
        print(f"\n{arguments.model}, {pixels} px, batch {batch}, {precision}, {arguments.threads} threads")
        _print_table(results)


def _run(side: str, case: list[str], threads: int) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--side", side, *case]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _print_table(results: dict[str, list[dict[str, float]]]) -> None:
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for side, runs in results.items()
    }
    ours = medians.get("lorabake")
    print(f"{'':<26}{'s/step':>10}{'peak MB':>10}{'ours takes':>14}")
    for side, row in medians.items():
        ratio = f"{ours['seconds'] / row['seconds']:>13.2f}x" if ours else ""
        print(f"{side:<26}{row['seconds']:>10.3f}{row['peak_mb']:>10.0f}{ratio}")


def _measure(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision[0]]
    step = _ours(arguments, dtype) if arguments.side in ("lorabake", FLOORS[0]) else _theirs(arguments, dtype)
    step()
    seconds: list[float] = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _inputs(arguments: argparse.Namespace, dtype: Any) -> tuple[Any, ...]:
    """Latents, noise, timesteps, text, and what SDXL is told besides (pooled text and sizes, or neither) of one batch."""
    import torch

    generator, sizes = torch.Generator().manual_seed(0), MODELS[arguments.model]
    side, batch = arguments.pixels[0] // 8, arguments.batch[0]
    latents, noise = (torch.randn(batch, 4, side, side, generator=generator).to(dtype) for _ in range(2))
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    text = torch.randn(batch, TOKENS, sizes["cross_attention_dim"], generator=generator).to(dtype)
    more: list[Any] = []
    if told := sizes.get("projection_class_embeddings_input_dim"):
        pooled = torch.randn(batch, told - 6 * sizes["addition_time_embed_dim"], generator=generator).to(dtype)
        more = [
            pooled,
            torch.tensor([[arguments.pixels[0], arguments.pixels[0], 0, 0] + 2 * arguments.pixels[:1]] * batch).to(
                dtype
            ),
        ]
    return latents, noise, timesteps, text, more


def _ours(arguments: argparse.Namespace, dtype: Any) -> Callable[[], None]:
    """Our network and, for the side that has one, our adapter and optimizer."""
    import torch

    from lorabake.adapters import graft
    from lorabake.adapters.lora import LoraSettings
    from lorabake.families.sd.model import _layers
    from lorabake.optimizers._flat import FlatGroup, clip_gradients
    from lorabake.optimizers.adamw import AdamW, AdamWSettings

    unet = our_unet(MODELS[arguments.model], dtype, "cpu")
    latents, noise, timesteps, text, more = _inputs(arguments, dtype)
    if arguments.side in FLOORS:
        return floor(lambda x: unet(x, timesteps, text, *more), latents, noise)

    class Denoiser:
        """What an adapter needs of a model."""

        parts = {"denoiser": unet}
        device = torch.device("cpu")

        def layers(self) -> list[Any]:
            return list(_layers("denoiser", unet))

    model: Any = Denoiser()
    adapter = graft(model, "lora", LoraSettings(rank=RANK), seed=0, parts=("denoiser",))
    adapter.training = True
    groups = [FlatGroup(part, parameters) for part, parameters in adapter.parameters().items()]
    optimizer = AdamW([{"params": [group.values], "lr": 1e-4} for group in groups], **AdamWSettings().model_dump())

    def step() -> None:
        for group in groups:
            group.zero_gradient()
        with adapter.ahead():  # as the loop does
            torch.nn.functional.mse_loss(unet(latents, timesteps, text, *more).float(), noise.float()).backward()
        clip_gradients(groups, 1.0)
        optimizer.step()

    return step


def _theirs(arguments: argparse.Namespace, dtype: Any) -> Callable[[], None]:
    """diffusers' network, frozen, with PEFT's adapter or with a module for each layer."""
    import torch

    unet = diffusers_unet(MODELS[arguments.model], dtype, "cpu")
    latents, noise, timesteps, text, more = _inputs(arguments, dtype)
    told = dict(zip(("text_embeds", "time_ids"), more, strict=False)) or None
    if arguments.side in FLOORS:
        return floor(lambda x: unet(x, timesteps, text, added_cond_kwargs=told).sample, latents, noise)
    peft = arguments.side == "diffusers + peft"
    trained = with_peft(unet, RANK) if peft else one_module_per_layer(unet, dtype, RANK)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)

    def step() -> None:
        prediction = unet(latents, timesteps, text, added_cond_kwargs=told).sample
        torch.nn.functional.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
