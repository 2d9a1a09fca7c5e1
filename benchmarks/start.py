"""How long starting takes: the help text, importing the package, and `import torch` beside it for scale.

python benchmarks/start.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "python alone": ["-c", "pass"],
    "import lorabake": ["-c", "import lorabake, sys; assert 'torch' not in sys.modules"],
    "lorabake --help": ["-m", "lorabake", "--help"],
    "lorabake list": ["-m", "lorabake", "list"],
    "import torch": ["-c", "import torch"],
}


def main() -> None:
    """Time each case in turn, several times; print medians."""
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(7):
        for name, words in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    for name, measured in seconds.items():
        print(f"{name:<20}{statistics.median(measured):>8.3f} s")


if __name__ == "__main__":
    main()
