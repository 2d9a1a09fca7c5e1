"""Set before anything imports torch: one thread, so that sums have one order, and no network."""

from __future__ import annotations

import os

import hypothesis

for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "NO_COLOR": "1",
}.items():
    os.environ[_name] = _value

# Machines differ in speed, so no example has a deadline; the build repeats the same examples every time.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
