import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorabake.base.errors import CorruptFile, UserError
from lorabake.base.header import read_header
from lorabake.formats import safetensors_file
from lorabake.formats.safetensors_file import blocks, read_tensors, write

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.uint32,
    torch.float32,
    torch.complex64,
    torch.float64,
    torch.int64,
    torch.uint64,
]


def whole(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return b"".join(blocks(tensors, metadata))


def test_bytes_written_out_by_hand() -> None:
    header = (
        b'{"__metadata__":{"a":"\xc3\xa9","b":"2"},'
        b'"long":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
        b'"y":{"dtype":"F16","shape":[2],"data_offsets":[8,12]}}'
    )
    padded = header.ljust(-(-len(header) // 8) * 8)
    payload = bytes([7, 0, 0, 0, 0, 0, 0, 0]) + b"\x00\x3c\x00\xc0"  # 7; 1.0 and -2.0 in half precision
    made = whole({"y": torch.tensor([1.0, -2.0]).half(), "long": torch.tensor([7])}, {"b": "2", "a": "é"})
    assert made == len(padded).to_bytes(8, "little") + padded + payload


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
        max_size=8,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1),
)
def test_equals_the_library_where_the_library_has_one_answer(
    shapes: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    """With at most one metadata entry the library's order is fixed too, so every byte must agree."""
    tensors = {
        name: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(len(name))).to(dtype)
        for name, (dtype, shape) in shapes.items()
    }
    assert whole(tensors, metadata) == safetensors.torch.save(tensors, metadata or None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(6, dtype=torch.float32).reshape(2, 3).to(dtype)
    path = tmp_path / "a.safetensors"
    digest = write(path, {"w": value}, {"k": "v"})
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    back = read_tensors(path)["w"]
    assert back.dtype == dtype and back.shape == value.shape
    assert torch.equal(back.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    assert read_header(path).metadata == {"k": "v"}


def test_views_parameters_and_scalars(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": base.T, "part": base[:, 1:3], "parameter": torch.nn.Parameter(base), "alpha": torch.tensor(8.0)}
    write(tmp_path / "a.safetensors", tensors, {})
    back = read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(back[name], tensor.detach()) for name, tensor in tensors.items())
    assert back["alpha"].shape == ()


def test_equal_content_gives_equal_bytes_in_another_process(tmp_path: Path) -> None:
    code = """if True:
        import sys, torch
        from pathlib import Path
        from lorabake.formats.safetensors_file import write
        write(Path(sys.argv[1]), {n: torch.full((3,), float(ord(n))) for n in "fedcba"}, {n * 3: n for n in "fedcba"})
    """
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "theirs")], env=environment, check=True)
    write(tmp_path / "ours", {n: torch.full((3,), float(ord(n))) for n in "abcdef"}, {n * 3: n for n in "abcdef"})
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "ours").read_bytes()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write(path, {"w": torch.zeros(3)}, {})
    before = path.read_bytes()

    def full(tensor: Tensor) -> memoryview:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file, "_bytes_of", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(path, {"w": torch.ones(3)}, {})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_disk_that_lies_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "sha256_file", lambda path: "0" * 64)
    with pytest.raises(CorruptFile, match="Check the disk"):
        write(tmp_path / "a.safetensors", {"w": torch.zeros(3)}, {})


def test_never_writes_what_it_would_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="Shorten the metadata"):
        write(path, {}, {"ss_tag_frequency": "x" * (33 << 20)})
    with pytest.raises(UserError, match=r"'.*\\ud800.*' cannot be stored"):
        write(path, {}, {"comment": "a\ud800b"})
    assert not path.exists()


def test_numbers_that_torch_has_not(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(3))
    with pytest.raises(UserError, match="F6_E2M3 numbers, which torch cannot read"):
        read_tensors(tmp_path / "a.safetensors")
