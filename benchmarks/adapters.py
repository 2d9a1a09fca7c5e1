"""What each network type adds to a step over the frozen base, beside LyCORIS' and PEFT's own modules on the same layers.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --types loha lokr --pixels 256 --rank 8

The layers are the linear ones of SD1.5's transformer blocks, one block of each width with as many rows as a picture of --pixels has
there; each is run forward and backward on its own. Every side has a process of its own per case; sides take turns, and medians of what
they take above the frozen base are compared. Memory is the peak above that of the frozen base (Linux).
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

SIDES = ("base", "lorabake", "lycoris", "peft")
WIDTHS = ((320, 8), (640, 16), (1280, 32))
"""Channels, and pixels of the picture along one side of a cell."""
TEXT, TOKENS = 768, 77


def _ours(rank: int) -> dict[str, dict[str, Any]]:
    ranked = {"rank": rank, "alpha": rank / 2}
    return {
        "lora": ranked,
        "dora": {**ranked, "dora": True},
        "loha": ranked,
        "lokr": ranked,
        "lokr factor 8": {**ranked, "factor": 8},
    }


def main() -> None:
    """Measure every type on every side and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--types", nargs="+", default=list(_ours(8)))
    parser.add_argument("--pixels", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_measure(arguments)))
        return
    print(f"{arguments.pixels} px, rank {arguments.rank}, {arguments.threads} threads: ms and MB above the frozen base")
    print(
        f"{'':<16}" + "".join(f"{side:>12}{'MB':>8}" for side in SIDES[1:]) + f"{'lycoris/ours':>14}{'peft/ours':>11}"
    )
    for name in arguments.types:
        print(f"{name:<16}" + _row(name, arguments), flush=True)


def _row(name: str, arguments: argparse.Namespace) -> str:
    found: dict[str, list[dict[str, float] | None]] = {side: [] for side in SIDES}
    for side in SIDES * arguments.rounds:
        found[side].append(_run(side, name, arguments))
    above: dict[str, tuple[float, float] | None] = {}
    for side in SIDES[1:]:
        pairs = [(own, base) for own, base in zip(found[side], found["base"], strict=True) if own and base]
        above[side] = (
            statistics.median(own["ms"] - base["ms"] for own, base in pairs),
            statistics.median(own["mb"] - base["mb"] for own, base in pairs),
        ) if pairs else None  # fmt: skip
    text = "".join(f"{a[0]:>12.2f}{a[1]:>8.0f}" if (a := above[side]) else f"{'-':>12}{'-':>8}" for side in SIDES[1:])
    ours = above["lorabake"]
    ratios = (f"{other[0] / ours[0]:.2f}x" if ours and (other := above[side]) else "-" for side in ("lycoris", "peft"))
    return text + "".join(f"{ratio:>{width}}" for ratio, width in zip(ratios, (14, 11), strict=True))


def _run(side: str, name: str, arguments: argparse.Namespace) -> dict[str, float] | None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    numbers = [word for key in ("pixels", "rank", "steps") for word in (f"--{key}", str(getattr(arguments, key)))]
    command = [sys.executable, __file__, "--side", side, "--types", name, *numbers]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(arguments: argparse.Namespace) -> dict[str, float] | None:
    import torch

    package = {"lycoris": "lycoris.modules", "peft": "peft"}.get(arguments.side, "lorabake.adapters._graft")
    importlib.import_module(package)
    torch.manual_seed(0)
    layers: list[torch.nn.Linear] = []
    inputs: list[torch.Tensor] = []
    for width, pixels in WIDTHS:
        rows = (arguments.pixels // pixels) ** 2
        own = [(width, width)] * 6 + [(width, 8 * width), (4 * width, width)]
        for inside, outside in [*own, (TEXT, width), (TEXT, width)]:
            layers.append(torch.nn.Linear(inside, outside).requires_grad_(False))
            inputs.append(torch.randn(1, TOKENS if inside == TEXT else rows, inside, requires_grad=True))
    makers: dict[str, Callable[[], Sequence[torch.nn.Module] | None]] = {
        "base": lambda: layers,
        "lorabake": lambda: _with_ours(layers, arguments),
        "lycoris": lambda: _with_lycoris(layers, arguments),
        "peft": lambda: _with_peft(layers, arguments),
    }
    gc.collect()
    before = _memory("VmRSS")
    modules = makers[arguments.side]()
    if modules is None:
        return None
    gradients = [
        torch.randn(x.shape[0], x.shape[1], layer.out_features) for x, layer in zip(inputs, layers, strict=True)
    ]

    def step() -> None:
        outputs = [module(x) for module, x in zip(modules, inputs, strict=True)]  # all kept, as those of a network are
        torch.autograd.backward(outputs, gradients)

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest so far is forgotten
    step()
    taken: list[float] = []
    for _ in range(arguments.steps):
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    return {"ms": 1000 * statistics.median(taken), "mb": _memory("VmHWM") - before}


def _memory(entry: str) -> float:
    """What this process takes (VmRSS) or took at most (VmHWM), MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{entry}:"))


def _with_ours(layers: Sequence[Any], arguments: argparse.Namespace) -> Sequence[Any]:
    import torch

    from lorabake.adapters import graft
    from lorabake.base.cards import find
    from lorabake.protocols.family import Layer

    root = torch.nn.ModuleList(layers)

    class Layers:
        """As much of a model as grafting needs."""

        parts = {"denoiser": root}
        device = torch.device("cpu")

        def layers(self) -> list[Layer]:
            return [
                Layer("denoiser", str(index), layer, "transformer", f"lora_unet_{index}")
                for index, layer in enumerate(layers)
            ]

    (name,) = arguments.types
    adapter = {"dora": "lora", "lokr factor 8": "lokr"}.get(name) or str(name)
    model: Any = Layers()
    card = find("adapter", adapter)
    made = graft(model, adapter, card.settings(**_ours(arguments.rank)[name]), seed=0, parts=("denoiser",))
    made.training = True
    return list(root)


def _with_lycoris(layers: Sequence[Any], arguments: argparse.Namespace) -> Sequence[Any]:
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    (name,) = arguments.types
    kind, options = {
        "lora": (LoConModule, {}),
        "dora": (LoConModule, {"weight_decompose": True}),
        "loha": (LohaModule, {}),
        "lokr": (LokrModule, {}),
        "lokr factor 8": (LokrModule, {"factor": 8}),
    }[name]
    for index, layer in enumerate(layers):
        module = kind(f"l{index}", layer, 1.0, arguments.rank, arguments.rank / 2, **options)
        module.apply_to()
    return layers


def _with_peft(layers: Sequence[Any], arguments: argparse.Namespace) -> Sequence[Any] | None:
    import peft
    import torch

    (name,) = arguments.types
    rank, alpha = arguments.rank, arguments.rank / 2
    targets = [f"layers.{index}" for index in range(len(layers))]
    config = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets),
        "dora": lambda: peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=True),
        "loha": lambda: peft.LoHaConfig(r=rank, alpha=alpha, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=rank, alpha=alpha, target_modules=targets),
        "lokr factor 8": lambda: peft.LoKrConfig(r=rank, alpha=alpha, target_modules=targets, decompose_factor=8),
    }[name]()

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layers)

    holder = Holder()
    peft.inject_adapter_in_model(config, holder)
    return list(holder.layers)


if __name__ == "__main__":
    main()
