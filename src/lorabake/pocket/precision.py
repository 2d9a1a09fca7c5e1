"""Which precision the pocket world's own small trainings compute in."""

from __future__ import annotations

import torch


def autocast() -> torch.autocast:
    """bf16 where the processor can compute in it; elsewhere it would be emulated, several times slower than fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability().startswith("AVX512"))
