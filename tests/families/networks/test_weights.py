"""Named tensors over safetensors files, known from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabake.base.errors import UserError
from lorabake.families.networks.weights import numbers, open_weights, shards


def test_names_shapes_and_texts(tmp_path: Path) -> None:
    save_file(
        {"a.x": torch.zeros(2, 3), "b.y": torch.zeros(4)}, tmp_path / "one.safetensors", metadata={"said": "here"}
    )
    weights = open_weights(tmp_path / "one.safetensors")
    assert (sorted(weights), weights.shape("a.x"), weights.metadata) == (["a.x", "b.y"], (2, 3), {"said": "here"})
    assert list(weights.under("a.")) == ["x"] and weights.under("a.")["x"].key == "a.x"
    with pytest.raises(UserError, match=r"'a\.z' is missing"):
        weights.shape("a.z")


def test_several_files_are_one_and_share_no_tensor(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.safetensors" for name in "abc")
    for path, name in ((first, "one"), (second, "two"), (third, "one")):
        save_file({name: torch.zeros(1)}, path)
    weights = open_weights(first, second)
    assert sorted(weights) == ["one", "two"] and weights["two"].file == second
    with pytest.raises(UserError, match=r"c\.safetensors holds 'one', which is in .*a\.safetensors too"):
        open_weights(first, third)


def test_shards_are_all_there_or_refused(tmp_path: Path) -> None:
    files = [tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, file in enumerate(files):
        save_file({f"t{number}": torch.zeros(1)}, file)
    assert shards(files[1]) == tuple(files)
    assert shards(tmp_path / "model.safetensors") == (tmp_path / "model.safetensors",)
    files[0].unlink()
    with pytest.raises(UserError, match=r"one of 2 shards.*model-00001-of-00002\.safetensors missing"):
        shards(files[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_numbers_without_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -1.5, 3.0e-3, 1000.0], dtype=dtype)
    save_file({"other": torch.zeros(3, dtype=dtype), "values": values}, tmp_path / "file.safetensors")
    assert numbers(open_weights(tmp_path / "file.safetensors")["values"]).tolist() == values.double().tolist()


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path) -> None:
    """0x0280 bytes: the file begins as pickles of protocol 2 do."""
    header = json.dumps({"t": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x280)
    (tmp_path / "file.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert list(open_weights(tmp_path / "file.safetensors")) == ["t"]


def test_inspecting_a_file_imports_no_torch(tmp_path: Path) -> None:
    save_file({"t": torch.zeros(1)}, tmp_path / "file.safetensors")
    code = (
        "import sys; from lorabake.base.errors import UserError; from lorabake.families import inspect_model\n"
        f"try: inspect_model({str(tmp_path / 'file.safetensors')!r})\n"
        "except UserError: print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
