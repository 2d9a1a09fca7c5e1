import hashlib
import io
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorabake.base.errors import UserError
from lorabake.base.files import sha256_file
from lorabake.base.header import read_header
from lorabake.formats.hashes import legacy_file_hash, legacy_hash, model_hash, with_hashes
from lorabake.formats.safetensors_file import write

NOTHING = hashlib.sha256(b"").hexdigest()


def test_model_hash_by_hand() -> None:
    # Stored by name: b = 1.0, then the two of c. 1.0 is 0x3f800000 and -2.0 is 0xc0000000, little-endian.
    payload = bytes.fromhex("0000803f000000c000000000")
    tensors = {"c": torch.tensor([-2.0, 0.0]), "b": torch.tensor(1.0)}
    assert model_hash(tensors) == hashlib.sha256(payload).hexdigest()
    assert model_hash(tensors) == "07897bbb1d312d156281b5eaf18c7e504fdd5eb25ac51b598eebb64d7fe654ec"


def test_small_files_have_the_legacy_hash_of_nothing(tmp_path: Path) -> None:
    assert legacy_hash({"a": torch.zeros(3)}, {"ss_x": "y"}) == "e3b0c442"
    write(tmp_path / "a.safetensors", {"a": torch.zeros(3)}, {})
    assert legacy_file_hash(tmp_path / "a.safetensors") == "e3b0c442" == NOTHING[:8]


@pytest.mark.parametrize("numbers", [262_100, 262_144, 270_000, 300_000])
def test_hashes_agree_with_the_library_serialisation(numbers: int) -> None:
    """As other trainers compute them: serialise with ss_* metadata, seek to 1 MiB, read 64 KiB."""
    generator = torch.Generator().manual_seed(numbers)
    tensors = {"w": torch.randn(numbers, generator=generator), "alpha": torch.tensor(4.0), "h": torch.ones(7).half()}
    metadata = {
        "ss_output_name": 'みら "x"\n',
        "ss_seed": "1",
        "modelspec.title": "left out",
        "sshs_model_hash": "left out",
    }
    file = io.BytesIO(safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")}))
    header_size = int.from_bytes(file.read(8), "little")
    file.seek(0x100000)
    assert legacy_hash(tensors, metadata) == hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    file.seek(8 + header_size)
    assert model_hash(tensors) == hashlib.sha256(file.read()).hexdigest()


def test_with_hashes_replaces_stale_ones() -> None:
    tensors = {"w": torch.ones(2)}
    stale = {"ss_a": "1", "sshs_model_hash": "0", "sshs_legacy_hash": "0", "modelspec.hash_sha256": "0"}
    fresh = with_hashes(stale, tensors)
    assert fresh["sshs_model_hash"] == model_hash(tensors)
    assert fresh["modelspec.hash_sha256"] == "0x" + model_hash(tensors)
    assert fresh["sshs_legacy_hash"] == "e3b0c442"
    assert fresh["ss_a"] == "1"
    assert stale["sshs_model_hash"] == "0", "the argument is left alone"


def test_metadata_changes_autov2_and_not_autov3(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(400_000)}
    write(tmp_path / "a.safetensors", tensors, {"title": "one"})
    write(tmp_path / "b.safetensors", tensors, {"title": "one and a half"})
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    data = a.read_bytes()
    assert legacy_file_hash(a) == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert sha256_file(a) == hashlib.sha256(data).hexdigest() != sha256_file(b)
    assert read_header(a).payload_sha256 == read_header(b).payload_sha256 == model_hash(tensors)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        legacy_file_hash(tmp_path / "absent.ckpt")
