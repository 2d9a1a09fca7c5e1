"""Opening a dataset: nothing is lost, everything wrong is said at once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import ExifTags, Image

from lorabake.base.errors import Problems
from lorabake.dataset.folder import open_dataset


def picture(path: Path, size: tuple[int, int] = (8, 6), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    Image.new("RGB", size, colour).save(path, {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:].upper()))
    return path


def caption(path: Path, text: str = "a, b") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def captioned(path: Path, text: str = "a, b") -> Path:
    caption(path.with_suffix(".txt"), text)
    return picture(path)


def problems_of(path: Path, **options: object) -> dict[str, str]:
    with pytest.raises(Problems) as caught:
        open_dataset(path, **options)  # type: ignore[arg-type]
    return {problem.where: problem.what for problem in caught.value.problems}


# --- what is used ---


def test_numbered_other_and_plain_folders_together(tmp_path: Path) -> None:
    captioned(tmp_path / "10_suzu" / "1.png", "suzu, smile")
    captioned(tmp_path / "extra" / "2.jpg", "extra")
    captioned(tmp_path / "3.webp", "plain")
    dataset = open_dataset(tmp_path)
    assert [(s.name, s.folder, s.repeats, s.caption, s.caption_source) for s in dataset.samples] == [
        ("10_suzu/1.png", "10_suzu", 10, "suzu, smile", "txt"),
        ("3.webp", "", 1, "plain", "txt"),
        ("extra/2.jpg", "extra", 1, "extra", "txt"),
    ]
    assert (len(dataset), dataset.entries) == (3, 12)
    assert not dataset.dropped
    assert not dataset.warnings
    assert any("Folder extra has no number in front" in note for note in dataset.notes)
    assert any("1 picture directly in" in note for note in dataset.notes)


def test_a_newcomers_folder_has_nothing_to_say(tmp_path: Path) -> None:
    captioned(tmp_path / "1.png")
    dataset = open_dataset(tmp_path)
    assert (dataset.notes, dataset.warnings, dataset.dropped) == ((), (), ())


def test_a_sample_says_what_the_file_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    sample = open_dataset(tmp_path).samples[0]
    assert sample.size == (30, 40)
    assert sample.sha256 == hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()
    assert sample.path == tmp_path / "a.jpg"


def test_a_changed_picture_has_another_hash(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    times = os.stat(path)
    before = open_dataset(tmp_path).samples[0].sha256
    picture(path, colour="lime")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_dataset(tmp_path).samples[0].sha256 != before


@pytest.mark.parametrize("name", ["a.PNG", "a.Jpg", "a.JPEG", "a.WebP", "a.BMP", "a.avif", "a.GIF"])
def test_every_extension_in_any_case(tmp_path: Path, name: str) -> None:
    captioned(tmp_path / name)
    assert open_dataset(tmp_path).samples[0].caption == "a, b"


@pytest.mark.parametrize(
    "stem", ["猫 \U0001f431", 'it\'s "q" $(x) `y`', "CON", "a.b.c", "-rf", "e\u0301", "a" * 240, " space ", "%41&amp;"]
)
def test_difficult_names(tmp_path: Path, stem: str) -> None:
    picture(tmp_path / f"{stem}.png")
    caption(tmp_path / f"{stem}.txt", "found")
    dataset = open_dataset(tmp_path)
    assert dataset.samples[0].name == f"{stem}.png"
    assert dataset.samples[0].caption == "found"
    assert json.dumps(dataset.summary(), ensure_ascii=False).encode()


def test_a_caption_in_another_normal_form_is_found(tmp_path: Path) -> None:
    picture(tmp_path / unicodedata.normalize("NFD", "é.png"))
    caption(tmp_path / unicodedata.normalize("NFC", "é.txt"), "found")
    assert open_dataset(tmp_path).samples[0].caption == "found"


def test_normal_form_twins_keep_their_own_captions(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        picture(tmp_path / unicodedata.normalize(form, "é.png"))
        caption(tmp_path / unicodedata.normalize(form, "é.txt"), form)
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system does not tell the two apart")
    captions = {sample.name: sample.caption for sample in open_dataset(tmp_path).samples}
    assert captions == {"é.png": "NFC", "e\u0301.png": "NFD"}


def test_the_order_is_by_code_points_of_nfc(tmp_path: Path) -> None:
    for name in ("b", "B", "10", "2", "z", "e\u0301", "f"):
        picture(tmp_path / f"{name}.png")
    order = [sample.name[:-4] for sample in open_dataset(tmp_path).samples]
    assert order == ["10", "2", "B", "b", "f", "z", "e\u0301"]  # é is U+00E9, behind z, whichever form the file has


# --- captions ---


def test_txt_wins_over_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    caption(tmp_path / "a.caption", "second")
    assert open_dataset(tmp_path).samples[0].caption_source == "caption"
    caption(tmp_path / "a.TXT", "first")
    sample = open_dataset(tmp_path).samples[0]
    assert (sample.caption, sample.caption_source) == ("first", "txt")
    other = open_dataset(tmp_path, caption_extensions=(".caption",)).samples[0]
    assert other.caption == "second"


def test_empty_file_is_an_empty_prompt_and_missing_is_the_folder_name(tmp_path: Path) -> None:
    picture(tmp_path / "2_suzu red_dress" / "a.png")
    picture(tmp_path / "2_suzu red_dress" / "b.png")
    caption(tmp_path / "2_suzu red_dress" / "b.txt", "")
    captioned(tmp_path / "2_suzu red_dress" / "c.png", "c")
    picture(tmp_path / "other" / "d.png")
    dataset = open_dataset(tmp_path)
    assert [(s.caption, s.caption_source) for s in dataset.samples] == [
        ("suzu red_dress", "folder"),
        ("", "txt"),
        ("c", "txt"),
        ("", "none"),
    ]
    notes = "\n".join(dataset.notes)
    assert (
        "1 of 4 pictures have no caption file, so their folder's name is their caption: 2_suzu red_dress/a.png."
        in notes
    )
    assert "1 of 4 pictures have no caption file, so they train with an empty prompt: other/d.png." in notes
    assert "1 of 4 pictures have an empty caption file" in notes
    assert not dataset.warnings


def test_at_most_five_names_are_listed(tmp_path: Path) -> None:
    for index in range(8):
        picture(tmp_path / f"{index}.png")
    captioned(tmp_path / "9.png")
    assert "0.png, 1.png, 2.png, 3.png, 4.png and 3 more" in "\n".join(open_dataset(tmp_path).notes)


def test_no_captions_at_all_is_a_warning(tmp_path: Path) -> None:
    picture(tmp_path / "2_suzu" / "a.png")
    picture(tmp_path / "2_suzu" / "b.png")
    (warning,) = open_dataset(tmp_path).warnings
    assert "none of the 2 pictures has a caption file (.txt or .caption" in warning.what
    picture(tmp_path / "other" / "c.png")
    meant = open_dataset(tmp_path, class_tokens="a girl")
    assert not meant.warnings
    assert [(s.caption, s.caption_source) for s in meant.samples] == [
        ("suzu", "folder"),
        ("suzu", "folder"),
        ("a girl", "class_tokens"),
    ]


def test_only_empty_captions_is_a_warning(tmp_path: Path) -> None:
    captioned(tmp_path / "a.png", "")
    assert "are empty" in open_dataset(tmp_path).warnings[0].what


def test_shared_lines_and_orphans_are_noted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "a.jpg")
    caption(tmp_path / "a.txt", "one\ntwo")
    caption(tmp_path / "gone.txt")
    notes = "\n".join(open_dataset(tmp_path).notes)
    assert "a.jpg, a.png share the caption a.txt." in notes
    assert "1 caption files have more than one line; only the first is used: a.txt." in notes
    assert "1 caption files belong to no picture: gone.txt." in notes


def test_every_line_where_it_is_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    caption(tmp_path / "a.txt", "\r\nred, Hat\r\n\r\n hat, blue \n")
    dataset = open_dataset(tmp_path, every_line=True)
    assert dataset.samples[0].caption == "red, Hat\nhat, blue"
    assert not dataset.notes
    assert dataset.tag_frequency() == {tmp_path.name: {"red": 1, "hat": 1, "blue": 1}}


# --- masks ---


def test_masks_are_recorded_and_never_trained_on(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        captioned(tmp_path / "2_x" / f"{name}.png")
    a = picture(tmp_path / "2_x" / "a-masklabel.png")
    b = picture(tmp_path / "2_x" / "masks" / "b.png")
    c = picture(tmp_path / "masks" / "2_x" / "c.PNG")
    d = picture(tmp_path / "masks" / "d.png")
    picture(tmp_path / "2_x" / "lonely-masklabel.png")
    dataset = open_dataset(tmp_path)
    masks = {sample.name: sample.mask for sample in dataset.samples}
    assert masks == {"2_x/a.png": a, "2_x/b.png": b, "2_x/c.png": c, "2_x/d.png": d, "2_x/lonely-masklabel.png": None}
    assert not dataset.dropped


def test_a_mask_for_two_pictures_is_noted(tmp_path: Path) -> None:
    captioned(tmp_path / "1_x" / "a.png")
    captioned(tmp_path / "1_y" / "a.png")
    picture(tmp_path / "masks" / "a.png")
    assert "1_x/a.png, 1_y/a.png share the mask a.png." in open_dataset(tmp_path).notes


# --- what is not used ---


def test_side_files_and_hidden_things_are_ignored_quietly(tmp_path: Path) -> None:
    captioned(tmp_path / "a.png")
    captioned(tmp_path / ".lorabake" / "thumbs" / "x.png")
    picture(tmp_path / ".hidden.png")
    for name in ("meta.json", "recipe.toml", "README.md", "a_sdxl.npz", "Thumbs.db", "b.png.part"):
        caption(tmp_path / name)
    dataset = open_dataset(tmp_path)
    assert [sample.name for sample in dataset.samples] == ["a.png"]
    assert (dataset.dropped, dataset.notes) == ((), ())


def test_everything_else_is_dropped_with_a_reason(tmp_path: Path) -> None:
    captioned(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>")
    Image.effect_noise((64, 64), 90).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-200])
    (tmp_path / "photo.heic").write_bytes(b"x")
    (tmp_path / "noext").write_bytes(b"x")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    picture(tmp_path / "2_x" / "deep" / "b.png")
    dataset = open_dataset(tmp_path)
    reasons = {item.path.relative_to(tmp_path).as_posix(): item.reason for item in dataset.dropped}
    for name, reason in {
        "empty.png": "empty",
        "page.jpg": "web page",
        "cut.png": "cut short",
        "photo.heic": ".heic",
        "noext": "no extension",
        "broken.png": "No such file",
        "moves.gif": "animated",
        "2_x/deep": "holds 1 picture. Move it up",
    }.items():
        assert reason in reasons.pop(name)
    assert not reasons
    assert "Folder 2_x holds no pictures." in dataset.notes
    assert any("8 files or folders are not used" in note for note in dataset.notes)


def test_content_that_is_not_what_the_name_says_is_noted(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", "PNG")
    assert any("a.jpg is PNG" in note for note in open_dataset(tmp_path).notes)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_text(tmp_path: Path) -> None:
    captioned(tmp_path / "a.png")
    picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png")))
    picture(Path(os.fsdecode(os.fsencode(tmp_path) + b"/1_\xff")) / "b.png")
    dataset = open_dataset(tmp_path)
    assert [sample.name for sample in dataset.samples] == ["a.png"]
    assert len(dataset.dropped) == 2
    assert json.dumps(dataset.summary(), ensure_ascii=False).encode()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_does_not_hang_the_opening(tmp_path: Path) -> None:
    captioned(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    assert "not a regular file" in open_dataset(tmp_path).dropped[0].reason


# --- what is wrong ---


def test_missing_and_file(tmp_path: Path) -> None:
    assert "no such folder" in problems_of(tmp_path / "nope")["folder"]
    assert "is a file. Give the folder" in problems_of(picture(tmp_path / "a.png"))["folder"]


def test_no_pictures_says_what_was_looked_for_and_what_was_found(tmp_path: Path) -> None:
    assert "Found instead: no files at all" in problems_of(tmp_path)["pictures"]
    caption(tmp_path / "a.txt")
    caption(tmp_path / "b.heic")
    caption(tmp_path / "c.heic")
    what = problems_of(tmp_path)["pictures"]
    assert ".png .jpg .jpeg .webp" in what
    assert "2 x .heic, 1 x .txt" in what


def test_pictures_too_deep_are_pointed_at(tmp_path: Path) -> None:
    picture(tmp_path / "datasets" / "10_suzu" / "a.png")
    assert "a folder inside a folder is not read; it holds 1 picture" in problems_of(tmp_path)["pictures"]


def test_no_readable_picture_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert "none of the 1 pictures can be used. a.png: the file is empty" in problems_of(tmp_path)["pictures"]


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    captioned(tmp_path / "0_none" / "a.png")
    captioned(tmp_path / "-3_minus" / "a.png")
    captioned(tmp_path / "99999999999_many" / "a.png")
    picture(tmp_path / "2_x" / "a.png")
    (tmp_path / "2_x" / "a.txt").write_bytes(b"caf\xe9")
    problems = problems_of(tmp_path)
    assert set(problems) == {"0_none", "-3_minus", "99999999999_many", "2_x/a.txt"}
    assert "asks for 0 repeats; 1 to 10000 are allowed" in problems["0_none"]
    assert "not UTF-8" in problems["2_x/a.txt"]


def test_a_year_in_front_is_questioned(tmp_path: Path) -> None:
    captioned(tmp_path / "2024_holiday" / "a.png")
    assert "2024 repeats. If that is a year" in open_dataset(tmp_path).warnings[0].what


def test_opening_the_numbered_folder_itself_is_noted(tmp_path: Path) -> None:
    captioned(tmp_path / "10_suzu" / "a.png")
    dataset = open_dataset(tmp_path / "10_suzu")
    assert dataset.samples[0].repeats == 1
    assert any("Open the folder above" in note for note in dataset.notes)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    captioned(tmp_path / "a.png")
    (tmp_path / "1_x").mkdir(mode=0)
    assert "cannot be read" in problems_of(tmp_path)["1_x"]


def test_caption_extensions_are_checked(tmp_path: Path) -> None:
    assert set(problems_of(tmp_path, caption_extensions=("txt", ".png"))) == {"txt", ".png"}


# --- the dataset in numbers ---


def test_tag_frequency_counts_as_kohya_does(tmp_path: Path) -> None:
    captioned(tmp_path / "10_suzu" / "1.png", "Suzu, smile, , Smile ")
    captioned(tmp_path / "10_suzu" / "2.png", "suzu")
    captioned(tmp_path / "3.png", "plain")
    assert open_dataset(tmp_path).tag_frequency() == {"10_suzu": {"suzu": 2, "smile": 2}, tmp_path.name: {"plain": 1}}


def test_summary(tmp_path: Path) -> None:
    captioned(tmp_path / "10_suzu" / "1.png")
    picture(tmp_path / "10_suzu" / "2.png", size=(20, 10))
    (tmp_path / "10_suzu" / "3.png").write_bytes(b"")
    summary = open_dataset(tmp_path).summary()
    assert summary["name"] == tmp_path.name
    assert (summary["pictures"], summary["entries_per_epoch"]) == (2, 20)
    assert summary["folders"] == {"10_suzu": {"pictures": 2, "repeats": 10, "entries": 20}}
    assert summary["captions"] == {"folder": 1, "txt": 1}
    assert summary["sizes"] == {"8x6": 1, "20x10": 1}
    assert summary["dropped"] == [{"name": "10_suzu/3.png", "reason": "the file is empty (0 bytes)"}]
    assert str(tmp_path.parent) not in json.dumps(summary)


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captioned(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert open_dataset(".").summary()["name"] == tmp_path.name


def test_opening_changes_nothing(tmp_path: Path) -> None:
    captioned(tmp_path / "2_x" / "a.png")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    open_dataset(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_room_never_imports_torch() -> None:
    modules = [
        "buckets",
        "caption",
        "caption_file",
        "colour",
        "companions",
        "folder",
        "image",
        "order",
        "scan",
        "wholeness",
    ]
    imports = "\n".join(f"import lorabake.dataset.{module}" for module in modules)
    code = f"import sys\n{imports}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
