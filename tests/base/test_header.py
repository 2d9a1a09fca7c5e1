"""Files by strangers: each is refused with the reason, quickly, and without taking much memory."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabake.base import header
from lorabake.base.errors import UserError
from lorabake.base.header import read_header

MIB = 1 << 20


def file_bytes(content: object, payload: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(raw).to_bytes(8, "little") + raw + payload


def tensor(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def refusal(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a usable safetensors file: ")
    assert message.isprintable(), "a name from the file could move the cursor of a terminal"
    assert len(message) < 1000
    return message.removeprefix(f"{path} is not a usable safetensors file: ")


def test_reads_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    content = {
        "b": tensor("F16", [2, 3], [4, 16]),
        "__metadata__": {"ss_output_name": "みら"},
        "a": tensor("F32", [], [0, 4]),
        "empty": tensor("I8", [0, 5], [16, 16]),
    }
    path.write_bytes(file_bytes(content, bytes(16)))
    read = read_header(path)
    assert read.metadata == {"ss_output_name": "みら"}
    assert read.tensors["b"] == ("F16", (2, 3), (4, 16))
    assert read.tensors["a"].shape == ()
    assert read.header_size == path.stat().st_size - 8 - 16
    # sha256 of sixteen zero bytes
    assert read.payload_sha256 == "374708fff7719dd5979ec875d56cd2286f6d3cf7ec317a3b25632aab28ec37bb"


def test_a_file_of_no_tensors_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(file_bytes(b"{}"))
    assert read_header(tmp_path / "empty.safetensors").tensors == {}


WRONG = {
    "no bytes": (b"", "only 0 bytes"),
    "seven bytes": (bytes(7), "only 7 bytes"),
    "no header": (bytes(8), "not JSON"),
    "header 2^63": (b"\0" * 7 + b"\x80" + bytes(100), "claims 9,223,372,036,854,775,808 bytes"),
    "99 MB header": ((99_000_000).to_bytes(8, "little") + b"{}", "claims 99,000,000 bytes"),
    "header beyond the end": ((1000).to_bytes(8, "little") + b"{}", "cut short"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs pointer"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "old pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF", "weights_only=True"),
    "new pickle": (b"\x80\x04\x95\x00\x00\x00\x00\xff", "whatever code is in it"),
    "gguf": (b"GGUF\x03\x00\x00\x00\x01", "quantised"),
    "pickle": (b"PK\x03\x04\0\0\x08\x08\0\0", "pickle"),
    "not JSON": (file_bytes(b'{"a":'), "not JSON"),
    "not an object": (file_bytes(b"[]"), "not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "not UTF-8"),
    "half a surrogate": (file_bytes(b'{"__metadata__":{"a":"\\ud800"}}'), "not valid Unicode"),
    "duplicate tensor": (
        file_bytes(
            json.dumps({"a": tensor()}).encode()[:-1] + b"," + json.dumps({"a": tensor()}).encode()[1:], bytes(4)
        ),
        "'a' twice",
    ),
    "duplicate metadata": (file_bytes(b'{"__metadata__":{"k":"1","k":"2"}}'), "'k' twice"),
    "duplicate by escape": (file_bytes(b'{"__metadata__":{"k":"1","\\u006b":"2"}}'), "'k' twice"),
    "deep": (file_bytes({"a": tensor(shape=[[[1]]])}, bytes(4)), "nested too deeply"),
    "metadata is a list": (file_bytes({"__metadata__": []}), "not a table of texts"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}), "not a table of texts"),
    "metadata is null": (file_bytes({"__metadata__": None}), "not a table of texts"),
    "unknown dtype": (file_bytes({"a": tensor("F33")}, bytes(4)), "unknown dtype 'F33'"),
    "dtype is a list": (file_bytes({"a": tensor([1])}, bytes(4)), "unknown dtype"),
    "NaN shape": (file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)), "'NaN'"),
    "float shape": (file_bytes({"a": tensor(shape=[1.0])}, bytes(4)), "'1.0'"),
    "true shape": (file_bytes({"a": tensor(shape=[True])}, bytes(4)), "not a list of sizes"),
    "negative shape": (file_bytes({"a": tensor(shape=[-1])}, bytes(4)), "not a list of sizes"),
    "negative product": (file_bytes({"a": tensor(shape=[-1, -1])}, bytes(4)), "not a list of sizes"),
    "65 dimensions": (file_bytes({"a": tensor(shape=[1] * 65)}, bytes(4)), "not a list of sizes"),
    "overflowing shape": (file_bytes({"a": tensor(shape=[2**62, 4])}, bytes(4)), "too large"),
    "overflow beside zero": (file_bytes({"a": tensor(shape=[2**62, 4, 0], offsets=[0, 0])}), "too large"),
    "endless number": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), "too large to be a size"),
    "shape and bytes differ": (file_bytes({"a": tensor(shape=[2])}, bytes(4)), "does not fit F32 [2]"),
    "half a byte": (file_bytes({"a": tensor("F4", [1], [0, 0])}), "does not fit"),
    "missing field": (file_bytes({"a": {"dtype": "F32", "shape": [1]}}), "not described by"),
    "more fields": (file_bytes({"a": tensor(code="x")}, bytes(4)), "not described by"),
    "tensor is a number": (file_bytes({"a": 1}), "not described by"),
    "three offsets": (file_bytes({"a": tensor(offsets=[0, 4, 8])}, bytes(4)), "first and a last byte"),
    "offsets reversed": (file_bytes({"a": tensor(offsets=[4, 0])}, bytes(4)), "first and a last byte"),
    "hole in front": (file_bytes({"a": tensor(offsets=[4, 8])}, bytes(8)), "leaves a hole"),
    "hole inside": (file_bytes({"a": tensor(), "b": tensor(offsets=[5, 9])}, bytes(9)), "leaves a hole"),
    "overlap": (file_bytes({"a": tensor(), "b": tensor(offsets=[2, 6])}, bytes(6)), "overlaps"),
    "same bytes twice": (file_bytes({"a": tensor(), "b": tensor()}, bytes(4)), "overlaps"),
    "payload cut": (file_bytes({"a": tensor()}, bytes(3)), "cut short: 4 bytes of weights are announced and 3 are"),
    "payload too long": (file_bytes({"a": tensor()}, bytes(5)), "1 bytes that belong to no tensor"),
    "terminal escape": (file_bytes({"\x1b[2J\u202e": tensor("F33")}, bytes(4)), "\\x1b[2J\\u202e"),
    "long name": (file_bytes({"n" * 5000: tensor("F33")}, bytes(4)), "..."),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    data, reason = WRONG[case]
    assert reason in refusal(tmp_path, data)


def large(begin: bytes, unit: bytes, end: bytes = b"") -> bytes:
    room = 31 * MIB - len(begin) - len(end)
    return file_bytes(begin + unit * (room // len(unit)) + end)


LARGE = {
    "brackets": (lambda: large(b'{"a":', b"["), "longer lists"),
    "braces": (lambda: large(b'{"a":', b"{"), "more than 32,768 tensors"),
    "closed early": (lambda: large(b"{", b"}"), "not JSON"),
    "numbers": (lambda: large(b'{"a":[0', b",0", b"]}"), "longer lists"),
    "digits": (lambda: large(b'{"a":', b"9", b"}"), "too large to be a size"),
    "texts": (lambda: large(b"{", b'"'), "more texts"),
    "escaped texts": (lambda: large(b"{", b'"\\\\"'), "more texts"),
    "escaped quotes": (lambda: large(b'{"', b'\\"'), "not JSON"),
    "backslashes": (lambda: large(b'{"', b"\\"), "not JSON"),
    "one long name": (lambda: large(b'{"', b"n", b'":1}'), "not described by"),
    "spaces": (lambda: large(b"{", b" "), "not JSON"),
    "same key": (lambda: large(b'{"__metadata__":{', b'"k":"",' + b" " * 4096, b'"k":""}}'), "twice"),
    "small tensors": (lambda: large(b'{"a":{}', b',"a":{}', b"}"), "more"),
}


@pytest.mark.parametrize("case", LARGE)
def test_headers_just_below_the_limit_cost_little(tmp_path: Path, case: str) -> None:
    make, reason = LARGE[case]
    path = tmp_path / "large.safetensors"
    path.write_bytes(make())
    started = time.process_time()
    with pytest.raises(UserError, match=reason):
        read_header(path)
    assert time.process_time() - started < 1
    tracemalloc.start()
    with pytest.raises(UserError):
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * header.MAX_HEADER_BYTES


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # sparse: 50 MB of metadata that take no room
        file.write((50_000_000).to_bytes(8, "little"))
        file.truncate(50_000_008)
    tracemalloc.start()
    with pytest.raises(UserError, match="at most 33,554,432 are read"):
        read_header(path)
    assert tracemalloc.get_traced_memory()[1] < MIB
    tracemalloc.stop()


def test_too_much_metadata(tmp_path: Path) -> None:
    many = {f"k{i}": "" for i in range(header.MAX_METADATA + 1)}
    assert "16,385 metadata entries" in refusal(tmp_path, file_bytes({"__metadata__": many}))


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        read_header(tmp_path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_header(tmp_path / "absent.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UserError, match="is not a file"):
        read_header(tmp_path / "pipe.safetensors")


@given(data=st.binary(max_size=300), honest_length=st.booleans())
def test_random_bytes_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, honest_length: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(file_bytes(b"{" + data) if honest_length else data)
    try:
        accepted = read_header(path)
    except UserError:
        return
    assert not accepted.tensors, "300 random bytes describe nothing"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "F4", "", "data_offsets"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=8,
)


@given(content=st.dictionaries(st.sampled_from(["__metadata__", "a", "b"]), VALUES), payload=st.binary(max_size=8))
def test_random_json_is_read_as_the_library_reads_it_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, object], payload: bytes
) -> None:
    from safetensors import SafetensorError, safe_open

    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(file_bytes(content, payload))
    try:
        ours = read_header(path)
    except UserError:
        return
    try:
        with safe_open(path, framework="np") as file:
            assert set(file.keys()) == set(ours.tensors)
    except SafetensorError as error:
        raise AssertionError(f"we accept what the library refuses: {content}") from error


def test_reading_a_header_does_not_load_torch() -> None:
    code = "import sys, lorabake.base.header, lorabake.formats.kohya; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )


def test_a_large_model_is_read(tmp_path: Path) -> None:
    """A T5-XXL, a Flux and their text encoders in one file have about 2,000 tensors; ten times as many are fine."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(
        file_bytes({f"blocks.{number}.weight": tensor(shape=[0], offsets=[0, 0]) for number in range(20_000)})
    )
    assert len(read_header(path).tensors) == 20_000


def test_what_is_called_a_pickle_is_told_so_unless_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="is a pickle, which is not opened: loading one runs whatever code is in it"):
        read_header(path)
    path.write_bytes(file_bytes({"a": tensor()}, bytes(4)))
    assert list(read_header(path).tensors) == ["a"]
