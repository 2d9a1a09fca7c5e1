"""Set before anything imports torch: one thread, so that sums have one order, and no network."""

from __future__ import annotations

import os

import hypothesis
import pytest

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

_FIRST = (
    "test_house", "stories/", "test_pairs", "test_resume", "test_capture", "every_family/", "test_bootstrap", "test_faults", "train/",
)  # fmt: skip
"""What takes longest, longest first: parts of the names of test files."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the files, the longest are begun first, so that none is left alone with one at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((i for i, part in enumerate(_FIRST) if part in item.nodeid), len(_FIRST)))
