"""Panels and contact sheets: what is drawn is there, whatever the photos are called."""

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from common.panels import SHEET, contact_sheet, draw_panel, map_sheet, to_line, to_picture

NAMES = ["plain", "$x^", "a $\\frac{1$ b", "猫", "line\nbreak", "\udcff", "w" * 500, "", "%s {0}"]


@pytest.mark.parametrize(("side", "shape"), [(224, 224), (32, 224), (300, 300), (100, 200)])
def test_to_picture_keeps_the_values(side, shape):
    """Small maps are enlarged by whole pixels; 0 is black, 1 is white."""
    heat = torch.rand(side, side)
    heat[0, 0], heat[-1, -1] = 0, 1
    picture = to_picture(heat)
    assert picture.shape == (shape, shape, 3)
    assert picture.dtype == np.uint8
    scale = shape // side
    wanted = (heat * 255).round().numpy()
    assert np.array_equal(picture[::scale, ::scale, 1], wanted)
    assert np.array_equal(picture[scale - 1 :: scale, scale - 1 :: scale, 2], wanted)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_panel_is_drawn(name, channels, tmp_path, recwarn):
    """For grey and colour, whatever the class is called; without a warning."""
    photo, heat = np.random.default_rng(0).random((32, 32, channels)), np.zeros((32, 32))
    heat[4:12, 20:28] = 1
    draw_panel(tmp_path / "x.png", photo, {"one": heat, "two": heat.T}, ["1", "2"], name)
    picture = imageio.imread(tmp_path / "x.png")[..., :3].astype(int)
    assert picture.shape[1] > picture.shape[0]
    assert picture.std() > 30
    warm = (picture[..., 0] - picture[..., 2]) > 60  # the overlay has colours of its own
    assert warm[picture.shape[0] // 2 :].mean() > (0.002 if channels == 1 else 0)
    assert not recwarn.list


def colours(count, folder, size=(60, 40)):
    """Write pictures of one colour each.

    :return: captions by file
    :rtype: dict
    """
    pictures = {}
    for i in range(count):
        file = folder / f"{i}.png"
        Image.new("RGB", size, (250 - i % 200, 10 + i % 200, 130)).save(file)
        pictures[file] = f"photo {i}"
    return pictures


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(5, 2, (3, 2)), (1, 4, (1, 1)), (4, 4, (1, 4))]
)
def test_a_contact_sheet_shows_every_picture(count, columns, shape, tmp_path):
    """In rows, in order, with a caption; a missing file is left out."""
    pictures = colours(count, tmp_path)
    contact_sheet(tmp_path / "s.png", pictures | {tmp_path / "gone.png": "gone"}, columns, 60)
    sheet = imageio.imread(tmp_path / "s.png")
    assert sheet.shape == (shape[0] * 70, shape[1] * 70, 3)
    for i in range(count):
        top, left = i // columns * 70, i % columns * 70
        assert sheet[top + 45, left + 35].tolist() == [250 - i, 10 + i, 130]
        assert sheet[top : top + 24, left : left + 70].min() < 100  # the caption
    contact_sheet(tmp_path / "none.png", {tmp_path / "gone.png": "gone"})
    assert not (tmp_path / "none.png").exists()


def test_captions_may_be_anything(tmp_path):
    """Too long ones are cut at their beginning, and stay within their column."""
    file = next(iter(colours(1, tmp_path, (400, 50))))
    for name in NAMES:
        contact_sheet(tmp_path / "s.png", {file: name}, side=400)
        sheet = imageio.imread(tmp_path / "s.png")
        assert sheet.shape == (80, 410, 3)
        assert (sheet[:24].min() < 100) == bool(name)
        assert sheet[:24, 406:].min() == 255
    assert to_line("a\nb\t c") == "a b c"
    assert to_line("\udcff") == "?"


def test_a_sheet_of_hundreds_gets_no_larger(tmp_path):
    """150 panels: smaller and in more columns, in some 100 MB of memory."""
    file = next(iter(colours(1, tmp_path, (700, 410))))
    pictures = {}
    for i in range(150):
        pictures[tmp_path / f"link{i}.png"] = f"folder/photo{i}.jpg"
        (tmp_path / f"link{i}.png").symlink_to(file)
    resource = pytest.importorskip("resource", reason="Windows can't tell the peak memory")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contact_sheet(tmp_path / "s.png", pictures, columns=2, side=640)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB
    with Image.open(tmp_path / "s.png") as sheet:
        assert 0.3 * SHEET < sheet.width * sheet.height < 1.2 * SHEET
        assert sheet.width > 1000
        assert sheet.height < 2**16


def test_a_full_disk_leaves_no_half_picture(full_disk, tmp_path):
    """The old sheet stays."""
    pictures = colours(1, tmp_path)
    (tmp_path / "s.png").write_text("old")
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    with full_disk(), pytest.raises(OSError, match="too large"):
        contact_sheet(tmp_path / "s.png", pictures)
    assert (tmp_path / "s.png").read_text() == "old"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["0.png", "s.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_every_map_of_every_photo(channels, tmp_path):
    """Photos of the same class, too: of n bright maps, n times as much of the sheet is bright."""
    bright, files = [], {}
    for i in range(4):
        heat = np.zeros((32, 32), np.float32)
        heat[:16] = 1
        photo = np.full((channels, 32, 32), 0.5, np.float32)
        np.savez(tmp_path / f"{i}.npz", photo=photo, **{"Grad-CAM": heat, "one, smooth": heat.T})
        files[tmp_path / f"{i}.npz"] = "$ the same_class"
        map_sheet(tmp_path / "sheet.png", files)
        with Image.open(tmp_path / "sheet.png") as picture:
            sheet = np.asarray(picture.convert("RGB")).astype(int)
        bright.append((abs(sheet - [252, 255, 164]).max(2) < 12).sum())  # where inferno ends
    assert bright[0] > 2000
    assert bright == pytest.approx(bright[0] * np.arange(1, 5), rel=0.1)
