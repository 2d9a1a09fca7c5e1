"""Latents are cached by content: an edited picture never meets an old latent, a damaged cache is made again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lorabake.base.errors import UserError
from lorabake.dataset.buckets import BucketConfig, place
from lorabake.dataset.folder import open_dataset
from lorabake.sampling.infotext import save_png
from lorabake.train.latents import View, _division, cached_latents
from lorabake.train.packs import write_pack


@dataclass
class Encoder:
    """Stands where a model stands, and counts what it encodes."""

    latent_space: str = "a" * 64
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seen: list[Tensor] = field(default_factory=list)
    facts: Any = field(default_factory=lambda: SimpleNamespace(latent_channels=3, latent_scale=4))

    def encode_images(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        self.seen.append(images_BCHW)
        mean = torch.nn.functional.avg_pool2d(images_BCHW, 4)
        return mean + 0.01 * torch.randn(mean.shape, generator=generator)


def views(folder: Path, mirrored: Sequence[bool] = (False,), resolution: int = 64) -> list[View]:
    config = BucketConfig(resolution=resolution, step=32)
    samples = open_dataset(folder).samples
    return [View(sample, place(sample.size, config), flip) for sample in samples for flip in mirrored]


def latents(folder: Path, encoder: Any, cache: Path | None = None, **how: Any) -> list[Tensor]:
    return cached_latents(views(folder, **how), encoder, cache or folder / "cache")


def picture(folder: Path, index: int) -> Path:
    return folder / "1_mira" / f"{index:03d}.png"


@pytest.fixture
def encoder() -> Encoder:
    return Encoder()


def test_encoded_once_and_read_back_equal(dataset: Path, encoder: Encoder) -> None:
    first = latents(dataset, encoder)
    assert len(encoder.seen) == len(first) == 6
    assert all(images.shape == (1, 3, 64, 64) and images.abs().max() <= 1 for images in encoder.seen)
    second = latents(dataset, encoder)
    assert len(encoder.seen) == 6
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(first, second, strict=True))


def test_without_a_folder_nothing_is_written(dataset: Path, encoder: Encoder) -> None:
    before = sorted(dataset.rglob("*"))
    in_memory = cached_latents(views(dataset), encoder, None)  # pyright: ignore[reportArgumentType]
    assert sorted(dataset.rglob("*")) == before
    assert all(torch.equal(a, b) for a, b in zip(in_memory, latents(dataset, encoder), strict=True))


def test_edited_pixels_give_a_new_latent_and_only_that(dataset: Path, encoder: Encoder) -> None:
    before = latents(dataset, encoder)
    image = Image.open(picture(dataset, 2)).convert("RGB")
    ImageDraw.Draw(image).rectangle((0, 0, 20, 20), fill="red")
    save_png(image, picture(dataset, 2))
    after = latents(dataset, encoder)
    assert len(encoder.seen) == 7
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True, True, True]


def test_a_renamed_picture_keeps_its_latent(dataset: Path, encoder: Encoder) -> None:
    before = latents(dataset, encoder)
    picture(dataset, 5).rename(picture(dataset, 7))
    after = latents(dataset, encoder)
    assert len(encoder.seen) == 6 and torch.equal(before[5], after[5])


def test_a_picture_alone_and_among_others_is_the_same(dataset: Path, encoder: Encoder, tmp_path: Path) -> None:
    among = latents(dataset, encoder)
    for index in (0, 1, 2, 4, 5):
        picture(dataset, index).unlink()
    (alone,) = latents(dataset, encoder, tmp_path / "another cache")
    assert torch.equal(alone, among[3])


def test_both_views_are_kept_apart(dataset: Path, encoder: Encoder) -> None:
    found = latents(dataset, encoder, mirrored=(False, True))
    assert len(found) == 12 == len(encoder.seen)
    straight = encoder.seen[0]
    assert any(torch.equal(straight.flip(3), other) for other in encoder.seen[1:])
    torch.testing.assert_close(found[0].flip(2), found[1], rtol=0, atol=0.1)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "other",
    [Encoder(latent_space="b" * 64), Encoder(dtype=torch.bfloat16), Encoder(device=torch.device("meta"))],
    ids=["another autoencoder", "another type", "another device"],
)
def test_what_another_encoder_made_is_not_used(dataset: Path, encoder: Encoder, other: Encoder) -> None:
    latents(dataset, encoder)
    latents(dataset, other)
    assert len(other.seen) == 6


def test_another_size_is_another_latent(dataset: Path, encoder: Encoder) -> None:
    latents(dataset, encoder)
    assert {tuple(latent.shape) for latent in latents(dataset, encoder, resolution=32)} == {(3, 8, 8)}
    assert len(encoder.seen) == 12


@pytest.mark.parametrize("where", [0, 9, 0.5, -1])
def test_a_flipped_byte_is_noticed_and_made_again(dataset: Path, encoder: Encoder, where: float) -> None:
    before = [latent.clone() for latent in latents(dataset, encoder)]  # they are mapped from the file
    (pack,) = (dataset / "cache").rglob("*.safetensors")
    data = bytearray(pack.read_bytes())
    data[int(where * len(data)) if 0 < where < 1 else int(where)] ^= 1
    pack.write_bytes(data)
    after = latents(dataset, encoder)
    assert len(encoder.seen) == 12
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert latents(dataset, encoder) and len(encoder.seen) == 12


def test_a_pack_cut_short_is_made_again(dataset: Path, encoder: Encoder) -> None:
    latents(dataset, encoder)
    (pack,) = (dataset / "cache").rglob("*.safetensors")
    pack.write_bytes(pack.read_bytes()[:-7])
    latents(dataset, encoder)
    assert len(encoder.seen) == 12


def test_progress_is_told_of_what_is_encoded(dataset: Path, encoder: Encoder) -> None:
    told: list[tuple[int, int]] = []
    for _ in range(2):
        cached_latents(views(dataset), encoder, dataset / "cache", lambda done, total: told.append((done, total)))  # pyright: ignore[reportArgumentType]
    assert told == [(i, 6) for i in range(1, 7)]


def test_a_latent_that_is_not_finite_names_its_picture(
    dataset: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures are encoded at the same time in any order: the one that fails is told by what it shows."""
    real = Encoder.encode_images
    cached_latents(views(dataset)[2:3], encoder, None)  # pyright: ignore[reportArgumentType]
    (third,) = encoder.seen

    def spoiled(self: Encoder, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        latent = real(self, images_BCHW, generator)
        return latent * float("nan") if torch.equal(images_BCHW, third) else latent

    monkeypatch.setattr(Encoder, "encode_images", spoiled)
    with pytest.raises(UserError, match=r"1_mira/002\.png: the VAE gives NaN"):
        latents(dataset, encoder)


def test_a_cache_that_cannot_be_written_is_done_without(dataset: Path, encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    told: list[str] = []
    found = cached_latents(views(dataset), encoder, tmp_path / "cache", not_kept=told.append)  # pyright: ignore[reportArgumentType]
    assert len(told) == 1 and "cannot be written to" in told[0]
    assert all(torch.equal(a, b) for a, b in zip(found, latents(dataset, Encoder()), strict=True))


def test_two_runs_fill_one_cache(tmp_path: Path) -> None:
    """Both write the same pack at the same time; neither may trip over the other's file."""
    pack = {"x": torch.arange(100_000.0)}
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(write_pack, tmp_path, pack, pytest.fail) for _ in range(40)]:
            done.result()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_many_pictures_at_once_give_what_one_at_a_time_gives(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabake.families import load_model

    model = load_model("pocket")
    monkeypatch.setattr("lorabake.train.latents._division", lambda views: (1, 1))
    alone = cached_latents(views(dataset, (False, True)), model, None)
    monkeypatch.setattr("lorabake.train.latents._division", lambda views: (5, 1))
    together = cached_latents(views(dataset, (False, True)), model, None)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_small_pictures_share_cores_out_and_large_ones_share_them() -> None:
    def division(side: int) -> tuple[int, int]:
        sample = Path("unused")
        place_of = place((side, side), BucketConfig(resolution=side, step=64))
        return _division(View(sample, place_of, False))  # pyright: ignore[reportArgumentType]

    cores, one_each = division(64)
    assert one_each == 1 and cores >= 1
    workers, threads = division(1024)
    assert workers == 1 and threads == cores


def test_a_larger_picture_beside_it_leaves_a_latent_as_it_was(
    dataset: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorabake.train.latents.cores", lambda: 2)
    small, large = views(dataset), views(dataset, resolution=1024)[:1]
    assert _division(small[0]) != _division(large[0])
    first = cached_latents(small, encoder, dataset / "cache")  # pyright: ignore[reportArgumentType]
    both = cached_latents([*small, *large], encoder, dataset / "cache")  # pyright: ignore[reportArgumentType]
    assert len(encoder.seen) == 6 + 1
    assert all(torch.equal(a, b) for a, b in zip(first, both, strict=False)) and both[6].shape == (3, 256, 256)


def test_an_error_in_one_picture_keeps_those_before_it(dataset: Path, encoder: Encoder) -> None:
    def fails(done: int, total: int) -> None:
        if done == 4:
            raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        cached_latents(views(dataset), encoder, dataset / "cache", fails)  # pyright: ignore[reportArgumentType]
    before = len(encoder.seen)
    cached_latents(views(dataset), encoder, dataset / "cache")  # pyright: ignore[reportArgumentType]
    assert len(encoder.seen) == before + 2
