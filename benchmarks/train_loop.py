"""Our loop beside a plain diffusers + PEFT loop: images per second, peak memory, seconds to the first step.

    python benchmarks/train_loop.py

Both train the same LoRA (rank 8 on the same layers of denoiser and text encoder) on the same 20 pictures of the pocket world, with the
same base model, batch, precision and thread count. Each side runs in processes of its own, in turn, several times; the table shows
medians and their ratio. The plain loop comes twice: encoding pictures at every step as the example scripts do, and with latents cached.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from networks import ATTENTION

SIDES = ("lorabake", "diffusers + peft", "diffusers + peft, latents cached")
RANK, WARM_UP = 8, 5


def main() -> None:
    """Run every side in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=40, help="timed steps per run")
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        measured = (_ours if arguments.side == "lorabake" else _plain)(arguments)
        print(json.dumps({**measured, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_pictures(Path(folder))
        results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                results[side].append(_run(side, Path(folder), arguments))
    _print_table(results)


def _run(side: str, data: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--data", str(data)]
    command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "STARTED": repr(time.time())}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _print_table(results: dict[str, list[dict[str, float]]]) -> None:
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for side, runs in results.items()
    }
    ours = medians["lorabake"]
    print(f"{'':<36}{'images/s':>10}{'peak MB':>10}{'first step s':>14}{'our speed-up':>14}{'our memory':>12}")
    for side, row in medians.items():
        speed, memory = ours["images_per_second"] / row["images_per_second"], ours["peak_mb"] / row["peak_mb"]
        print(
            f"{side:<36}{row['images_per_second']:>10.1f}{row['peak_mb']:>10.0f}{row['first_step']:>14.2f}{speed:>13.2f}x{memory:>11.2f}x"
        )


def _write_pictures(folder: Path) -> None:
    from lorabake.pocket.characters import CHARACTERS
    from lorabake.pocket.trial import write_training_set

    write_training_set(folder, CHARACTERS["zorbi"], "zorbi")


def _timed(step: Callable[[], None], steps: int, batch: int) -> dict[str, float]:
    """``step()`` repeated; the clock for the first step starts when the process was started."""
    step()
    first = time.time() - float(os.environ["STARTED"])
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"images_per_second": batch / statistics.median(seconds), "first_step": first}


def _ours(arguments: argparse.Namespace) -> dict[str, float]:
    from lorabake.base.events import Events
    from lorabake.dataset.order import epoch_batches
    from lorabake.recipe import check_values
    from lorabake.train.loop import optimizer_step
    from lorabake.train.prepare import prepare

    checked = check_values(
        {
            "data": {"folder": str(arguments.data), "captions": {"shuffle": True, "keep_tokens": 1}},
            "adapter": {"rank": RANK},
            "train": {"batch_size": arguments.batch, "length": "100 epochs", "threads": 1, "precision": "fp32"},
        }
    )
    bake = prepare(checked, Events())
    state = {"step": 0}

    def step() -> None:
        full = [
            batch
            for batch in epoch_batches(bake.buckets, [1] * len(bake.samples), arguments.batch, 0, state["step"])
            if len(batch) == arguments.batch
        ]
        optimizer_step(bake, state["step"], full[:1])
        state["step"] += 1

    return _timed(step, arguments.steps, arguments.batch)


def _plain(arguments: argparse.Namespace) -> dict[str, float]:
    import random

    import numpy as np
    import torch
    from PIL import Image

    from lorabake.base.places import POCKET_MODEL

    torch.set_num_threads(1)
    torch.manual_seed(0)
    diffusers: Any = importlib.import_module("diffusers")
    peft: Any = importlib.import_module("peft")
    transformers: Any = importlib.import_module("transformers")
    part = {name: str(POCKET_MODEL / name) for name in ("unet", "text_encoder", "vae", "tokenizer", "scheduler")}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(part["tokenizer"])
    text_encoder = transformers.CLIPTextModel.from_pretrained(part["text_encoder"], dtype=torch.float32).requires_grad_(
        False
    )
    vae = diffusers.AutoencoderKL.from_pretrained(part["vae"]).float().requires_grad_(False)
    unet = diffusers.UNet2DConditionModel.from_pretrained(part["unet"]).float().requires_grad_(False)
    scheduler = diffusers.DDPMScheduler.from_pretrained(part["scheduler"])
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(ATTENTION)))
    text_targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    text_encoder = peft.get_peft_model(
        text_encoder, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=text_targets)
    )
    trained = [p for model in (unet, text_encoder) for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    files = sorted(arguments.data.glob("*/*.png"))
    captions = [path.with_suffix(".txt").read_text().strip() for path in files]
    pixels = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 127.5 - 1 for path in files]
    scale = vae.config.scaling_factor
    cached = None
    if "cached" in arguments.side:
        with torch.no_grad():
            cached = [vae.encode(image[None]).latent_dist.sample()[0] * scale for image in pixels]
    rng = random.Random(0)

    def step() -> None:
        chosen = rng.sample(range(len(files)), arguments.batch)
        if cached:
            latents = torch.stack([cached[i] for i in chosen])
        else:
            with torch.no_grad():
                latents = vae.encode(torch.stack([pixels[i] for i in chosen])).latent_dist.sample() * scale
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (arguments.batch,))
        ids = tokenizer(
            [captions[i] for i in chosen], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        states = text_encoder(ids)[0]
        prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
        loss = torch.nn.functional.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _timed(step, arguments.steps, arguments.batch)


if __name__ == "__main__":
    main()
