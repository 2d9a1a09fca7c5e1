"""What each memory option saves: bytes of weights, saved activations and optimizer state, and seconds per step.

    python benchmarks/memory.py

One LoRA step on drawings of the pocket world, for each option alone and for all together; every row in a process of its own. Weights are
those that have storage once the first step begins; activations those that autograd keeps between forward and backward, weights not counted;
the optimizer's are the adapter, its gradient and its moments. Resident memory is the process's own, Python and PyTorch included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "text encoder trained (it stays)": {"optimizer.text_encoder_lr": 5e-4},
    "text encoder frozen (it is freed)": {},
    "train.precision = bf16": {"train.precision": "bf16"},
    "train.precision = fp16": {"train.precision": "fp16"},
    "train.gradient_checkpointing = 0.5": {"train.gradient_checkpointing": 0.5},
    "train.gradient_checkpointing = true": {"train.gradient_checkpointing": True},
    "model.quantize = int8": {"model.quantize": "int8"},
    "model.quantize = fp8": {"model.quantize": "fp8"},
    "model.quantize = nf4": {"model.quantize": "nf4"},
    "train.batch_size / 4, accumulated 4 times": {"train.gradient_accumulation": 4},
    "bf16, nf4, recomputed": {"train.precision": "bf16", "model.quantize": "nf4", "train.gradient_checkpointing": True},
}


def main() -> None:
    """Measure every row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pocket", help="a model")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder))
        print("| option | denoiser | text | VAE | activations | optimizer | resident, peak | s/step |")
        print("|---|---|---|---|---|---|---|---|")
        for row in ROWS:
            command = [sys.executable, __file__, "--row", row, "--data", folder, "--base", arguments.base]
            command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            told = json.loads(done.stdout.splitlines()[-1])
            sizes = [f"{told[name] / 1e6:.2f}" for name in ("denoiser", "text", "vae", "activations", "optimizer")]
            resident = f"{told['resident'] / 1e6:.0f}, {told['peak'] / 1e6:.0f}"
            print(f"| {row} | {' | '.join(sizes)} | {resident} | {told['seconds']:.2f} |", flush=True)
    print("\nMegabytes.")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One row's numbers: bytes, and seconds per step."""
    import torch

    from lorabake.base.events import Events
    from lorabake.recipe import check_values
    from lorabake.train.loop import batch_loss, optimizer_step
    from lorabake.train.prepare import prepare

    raw: dict[str, dict[str, Any]] = {
        "model": {"base": arguments.base},
        "data": {"folder": str(arguments.data)},
        "adapter": {"rank": 8},
        "optimizer": {"text_encoder_lr": 0.0},
        "train": {
            "batch_size": arguments.batch,
            "device": "cpu",
            "precision": "fp32",
            "length": "100 steps",
            "threads": 1,
        },
    }
    for name, value in ROWS[arguments.row].items():
        section, _, key = name.partition(".")
        raw[section][key] = value
    micro = raw["train"].get("gradient_accumulation", 1)
    raw["train"]["batch_size"] //= micro
    torch.set_num_threads(1)
    bake = prepare(check_values(raw), Events())
    model: Any = bake.model
    rows = tuple(range(arguments.batch // micro))
    optimizer_step(bake, 0, [rows] * micro)
    known = {storage for part in (*model.parts.values(), model.vae) for storage in storages(part)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_loss(bake, 1, 0, rows).backward()
    began = time.perf_counter()
    for step in range(1, 1 + arguments.steps):
        optimizer_step(bake, step, [rows] * micro)
    seconds = (time.perf_counter() - began) / arguments.steps
    moments = [value for state in bake.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    texts = [part for name, part in model.parts.items() if name != "denoiser"]
    return {
        "denoiser": sum(storages(model.parts["denoiser"]).values()),
        "text": sum(size for part in texts for size in storages(part).values()),
        "vae": sum(storages(model.vae).values()),
        "activations": sum(kept.values()),
        "optimizer": sum(tensor.nbytes for group in bake.groups for tensor in (group.values, group.gradient))
        + sum(tensor.nbytes for tensor in moments),
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": seconds,
    }


def storages(network: Any) -> dict[int, int]:
    """Bytes of a network's weights by where they are, those in few bits included, an adapter's not."""
    return {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(network) if not tensor.is_meta}


def _tensors(network: Any) -> Iterator[Any]:
    for module in network.modules():
        if type(module).__name__ != "GraftedLayer":
            yield from (tensor for tensor in module._parameters.values() if tensor is not None)
            yield from (tensor for tensor in module._buffers.values() if tensor is not None)
        if (stored := module.__dict__.get("stored")) is not None:
            yield from (stored.values, stored.scale)


def draw_pictures(folder: Path) -> None:
    """Sixteen pictures with captions."""
    from lorabake.pocket.world import draw, sample
    from lorabake.sampling.infotext import save_png

    rng = random.Random(1)
    for index in range(16):
        drawing = draw(sample(rng), index, 64)
        path = folder / "1_mira" / f"{index:03d}.png"
        save_png(drawing.image, path)
        path.with_suffix(".txt").write_text(", ".join(drawing.tags))


if __name__ == "__main__":
    main()
