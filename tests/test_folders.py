"""Folders of pictures: what is a half, a class, a run, a link, and what is none of these."""

import numpy as np
import pytest
import torch
from PIL import Image

import common.data
import common.glyphs
from common.data import Dataset, check_dataset, load_dataset
from tests.helpers import POSIX, refusal


def save_picture(path):
    """Save a small picture, in a folder that is made on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (9, 9, 9)).save(path)


@pytest.mark.parametrize("place", ["a.png", "ant/a.png", "train/ant/a.png", "test/ant/a.png"])
@pytest.mark.parametrize("name", ["auto", "emnist", "cifar10"])
def test_pictures_are_seen_before_a_download(name, place, tmp_path, no_network):
    """In every layout that can be trained on, with halves and without."""
    save_picture(tmp_path / place)
    assert "--dataset folder" in refusal(load_dataset, name, tmp_path)
    assert not no_network


def test_glyphs_beside_pictures_cost_a_line(tmp_path, monkeypatch, capsys):
    """Who says glyphs gets glyphs, but perhaps meant the pictures."""
    drawn = torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.arange(3)
    monkeypatch.setattr(common.glyphs, "draw_glyphs", lambda *_, **__: drawn)  # takes seconds
    save_picture(tmp_path / "ant" / "a.png")
    assert load_dataset("glyphs", tmp_path, glyphs=3).name == "glyphs"
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("folder", ["EMNIST", "MNIST", "FashionMNIST", "cache"])
def test_a_data_folder_may_hold_a_picture(folder, tmp_path):
    """Where datasets lie already, a picture beside them changes nothing."""
    save_picture(tmp_path / "a.png")
    (tmp_path / folder).mkdir()
    assert not common.data.holds_pictures(tmp_path)


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_class_called_as_a_half_is_a_class(half, tmp_path):
    """Beside other classes, and with no folders in it; it isn't taken for the whole dataset."""
    save_picture(tmp_path / half / "a.png")
    save_picture(tmp_path / "bus" / "a.png")
    assert load_dataset("folder", tmp_path).classes == sorted(["bus", half])


@pytest.mark.parametrize("mark", ["metrics.json", "checkpoint.pt", "records/arguments.txt"])
def test_runs_are_no_data(mark, tmp_path, capsys):
    """A run folder among the classes is passed over in silence, with pictures or without."""
    save_picture(tmp_path / "ant" / "a.png")
    for run in ("run", "run2"):
        (tmp_path / run / mark).parent.mkdir(parents=True)
        (tmp_path / run / mark).touch()
    save_picture(tmp_path / "run" / "panel.png")
    assert load_dataset("folder", tmp_path).classes == ["ant"]
    assert capsys.readouterr().err == ""


def test_what_is_asked_for_is_data(tmp_path):
    """A run was written into the data folder itself; and records are a subject of photos, too."""
    save_picture(tmp_path / "music" / "records" / "a.png")
    save_picture(tmp_path / "bee" / "b.png")
    (tmp_path / "metrics.json").touch()
    assert load_dataset("folder", tmp_path).classes == ["bee", "music"]


@POSIX
def test_links_come_out_the_same_everywhere(tmp_path):
    """Loops end; of several names of one folder the first counts, whatever order the disk has."""
    save_picture(tmp_path / "store" / "a.png")
    data = tmp_path / "data"
    data.mkdir()
    for name in ("moth", "ant", "zebra", "bee", "newt"):
        (data / name).symlink_to(tmp_path / "store")
    (data / "loop").symlink_to(data)
    (tmp_path / "store" / "up").symlink_to(data)
    found = load_dataset("folder", data)
    assert found.classes == ["ant"]
    assert len(found.images) == 1


@POSIX
def test_a_link_that_leads_nowhere_costs_a_line(tmp_path, capsys):
    """As a picture that can't be read does."""
    save_picture(tmp_path / "ant" / "a.png")
    (tmp_path / "ant" / "b.png").symlink_to(tmp_path / "gone.png")
    assert len(load_dataset("folder", tmp_path).images) == 1
    error = capsys.readouterr().err
    assert str(tmp_path / "ant" / "b.png") in error
    assert error.count("\n") == 1


def test_a_mac_leaves_no_trace(tmp_path, capsys):
    """The files that it puts beside each file on other disks are neither pictures nor broken."""
    save_picture(tmp_path / "ant" / "a.png")
    (tmp_path / "ant" / "._a.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "ant" / ".DS_Store").touch()
    save_picture(tmp_path / "__MACOSX" / "ant" / "._a.png")
    found = load_dataset("folder", tmp_path)
    assert found.classes == ["ant"]
    assert len(found.images) == 1
    assert "._a.png" not in capsys.readouterr().err


def test_transparency_in_a_folder_is_white(tmp_path):
    """A GAN of cut-out icons isn't trained on whatever colour lies under them."""
    (tmp_path / "ant").mkdir()
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(tmp_path / "ant" / "a.png")
    assert (load_dataset("folder", tmp_path).images == 255).all()


def test_scans_of_floats_are_read(tmp_path, capsys):
    """A TIFF whose white is 1 keeps its grey."""
    (tmp_path / "ant").mkdir()
    Image.fromarray(np.full((40, 40), 0.2, np.float32)).save(tmp_path / "ant" / "a.tif")
    assert (load_dataset("folder", tmp_path).images == 51).all()
    assert capsys.readouterr().err == ""


def test_shrinking_is_a_mean(tmp_path):
    """Whole pixels of 4 x 4 each: a sharper filter would overshoot at the edges."""
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    (tmp_path / "ant").mkdir()
    Image.fromarray(pixels).save(tmp_path / "ant" / "a.png")
    means = pixels.reshape(32, 4, 32, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    (image,) = load_dataset("folder", tmp_path).images
    assert np.abs(image.numpy() - means).max() <= 1


@pytest.mark.parametrize(("brightest", "lines"), [(4095, 1), (4096, 0)])
def test_nearly_black_is_what_12_bits_leave(brightest, lines, tmp_path, capsys):
    """One value more needs a 13th bit."""
    (tmp_path / "ant").mkdir()
    values = np.full((40, 40), brightest, np.uint16)
    Image.fromarray(values).save(tmp_path / "ant" / "a.png")
    load_dataset("folder", tmp_path)
    assert capsys.readouterr().err.count("\n") == lines


def test_images_that_are_not_square_are_refused_at_any_size():
    """Also where no size is asked for."""
    images = torch.zeros(4, 3, 28, 14, dtype=torch.uint8)
    assert "(4, 3, 28, 14)" in refusal(check_dataset, Dataset("mine", images, [0] * 4, ["a"]))
