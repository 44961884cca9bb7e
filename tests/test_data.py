"""Datasets: read as they lie on disk, upright, and refused in one line that says what to do.

No test reads real data or reaches the network: each writes a few images in the dataset's own
format, so that the readers are tested against the format and not against themselves.
"""

import gzip
import os
import pickle
import struct
import urllib.request
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common.data
import common.glyphs
from common.data import Dataset, check_dataset, load_dataset
from common.device import set_up
from common.errors import UserError
from tests.helpers import POSIX, refusal
from tests.processes import group, wait

COUNT = 5  # images in the small datasets here
# An L: a long stroke down its left side, a short one along its foot. Transposing it gives
# a stroke along the top, so that no other orientation passes for it.
UPRIGHT = np.zeros((28, 28), np.uint8)
UPRIGHT[4:24, 6:9] = 255
UPRIGHT[21:24, 6:18] = 200
EMNIST = ("emnist-balanced-train-images-idx3-ubyte", "emnist-balanced-train-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Cut the network off below torchvision."""
    addresses = []

    def refuse(request, *_, **__):
        addresses.append(getattr(request, "full_url", request))
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return addresses


def make_images(count=COUNT):
    """Make images that differ: the L, darker from one to the next, and one more corner pixel."""
    images = np.stack([UPRIGHT // (i + 1) for i in range(count)])
    images[np.arange(count), 0, np.arange(count)] = 9
    return images


def write_idx(path, array, magic=None, pack=False):
    """Write NIST's format: big-endian magic number and sizes, then the bytes.

    :param numpy.ndarray array: uint8, images (N, H, W) or labels (N,)
    :param int magic: a wrong magic number; None for the right one
    :param bool pack: compress to PATH.gz, as they are shipped
    """
    magic = magic or {3: 2051, 1: 2049}[array.ndim]
    data = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype("u1").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if pack:
        path = path.with_name(f"{path.name}.gz")
        data = gzip.compress(data)
    path.write_bytes(data)


def write_emnist(root, images=None, labels=range(COUNT), start="emnist-balanced-train", pack=False):
    """Write one half of EMNIST, each image transposed, as NIST did."""
    images = make_images(len(labels)) if images is None else images
    raw = root / "EMNIST" / "raw"
    write_idx(raw / f"{start}-images-idx3-ubyte", images.transpose(0, 2, 1), pack=pack)
    write_idx(raw / f"{start}-labels-idx1-ubyte", np.array(labels), pack=pack)
    return raw


def write_cifar10(root, monkeypatch):
    """Write CIFAR-10, two images a batch, and have torchvision accept their checksums."""
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda *_, **__: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    batches = []
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        batches.append(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
        batch = {"data": batches[-1].reshape(2, -1), "labels": [i, 9]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = {"label_names": [f"class{k}" for k in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    return batches


def save_picture(path, color=(1, 2, 3), size=(40, 40), mode="RGB"):
    """Save a picture of one colour, in a folder that is made on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


# ----------------------------------------------------------------- EMNIST, MNIST, Fashion, CIFAR-10


@pytest.mark.parametrize("pack", [False, True], ids=["files", "only .gz"])
def test_emnist_comes_out_upright(pack, tmp_path, asked, capsys):
    """Letters stand up although the files hold them transposed; each half has its own files."""
    labels = [0, 10, 46, 3, 3]
    write_emnist(tmp_path, labels=labels, pack=pack)
    write_emnist(tmp_path, make_images()[::-1], labels[::-1], "emnist-balanced-test", pack)
    data = load_dataset("emnist", tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), make_images())
    assert (data.images.dtype, data.labels.dtype) == (torch.uint8, torch.int64)
    assert data.labels.tolist() == labels
    assert [data.classes[i] for i in (0, 10, 46)] == ["0", "A", "t"]
    assert len(data.classes) == 47
    test = load_dataset("emnist", tmp_path, train=False)
    assert np.array_equal(test.images[:, 0].numpy(), make_images()[::-1])
    assert test.labels.tolist() == labels[::-1]
    assert load_dataset("auto", tmp_path).name == "emnist"  # where it is, auto takes it
    assert not asked
    assert capsys.readouterr().err == ""


def test_emnist_letters_start_at_0(tmp_path):
    """The letters split runs from 1 in the files; a label 0 would stand for no letter."""
    write_emnist(tmp_path, labels=[1, 2, 26], start="emnist-letters-train")
    data = load_dataset("emnist", tmp_path, split="letters")
    assert data.labels.tolist() == [0, 1, 25]
    assert data.classes == list("abcdefghijklmnopqrstuvwxyz")
    write_emnist(tmp_path, labels=[0, 1], start="emnist-letters-train")
    assert "damaged" in refusal(load_dataset, "emnist", tmp_path, split="letters")


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("mnist", "MNIST", "0"), ("fashion", "FashionMNIST", "T-shirt/top")],
)
def test_mnist_and_fashion(name, folder, first, tmp_path, asked):
    """Both are upright in their files already, and have plain class names."""
    for half, step in (("train", 1), ("t10k", -1)):
        write_idx(tmp_path / folder / "raw" / f"{half}-images-idx3-ubyte", make_images()[::step])
        write_idx(tmp_path / folder / "raw" / f"{half}-labels-idx1-ubyte", np.arange(5)[::step])
    for train, step in ((True, 1), (False, -1)):
        data = load_dataset(name, tmp_path, train=train)
        assert np.array_equal(data.images[:, 0].numpy(), make_images()[::step])
        assert data.labels.tolist() == list(range(COUNT))[::step]
        assert data.classes[0] == first
    small = load_dataset(name, tmp_path, size=14).images
    means = torch.nn.functional.avg_pool2d(torch.from_numpy(make_images()).float(), 2)
    assert (small[:, 0].float() - means).abs().mean() < 8  # the same, a little softer
    assert not asked


def test_cifar10(tmp_path, monkeypatch, asked):
    """CIFAR-10's pickles give colour images, channels first."""
    *train, test = write_cifar10(tmp_path, monkeypatch)
    data = load_dataset("cifar10", tmp_path)
    assert np.array_equal(data.images.numpy(), np.concatenate(train))
    assert data.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data.classes == [f"class{k}" for k in range(10)]
    data = load_dataset("cifar10", tmp_path, train=False, size=32)
    assert np.array_equal(data.images.numpy(), test)
    assert data.labels.tolist() == [5, 9]
    assert not asked


def test_a_damaged_cifar10_never_reaches_pickle(tmp_path, monkeypatch):
    """Its checksum is held against torchvision's first; without our care, this file would harm."""
    with monkeypatch.context() as patch:
        write_cifar10(tmp_path, patch)
    folder = tmp_path / "cifar-10-batches-py"
    evil = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "harmed") + b"'\ntR."
    (folder / "data_batch_1").write_bytes(evil)
    assert str(folder) in refusal(load_dataset, "cifar10", tmp_path)
    assert not (tmp_path / "harmed").exists()


# ------------------------------------------------------------------------------------ damaged files


SPOILT = {
    "cut": lambda images, labels: images.write_bytes(images.read_bytes()[:-100]),
    "too long": lambda images, labels: images.write_bytes(images.read_bytes() + b"more"),
    "no bytes": lambda images, labels: labels.write_bytes(b""),
    "another kind": lambda images, labels: write_idx(images, make_images(), magic=0x50D03),
    "a login page": lambda images, labels: images.write_bytes(b"<!DOCTYPE html><html>Log in"),
    "one label fewer": lambda images, labels: write_idx(labels, np.arange(COUNT - 1)),
    "no such class": lambda images, labels: write_idx(labels, np.array([0, 1, 2, 3, 47])),
    "no images": lambda images, labels: (
        write_idx(images, np.zeros((0, 28, 28))),
        write_idx(labels, np.zeros(0)),
    ),
}


@pytest.mark.parametrize("name", ["emnist", "auto"])
@pytest.mark.parametrize("damage", SPOILT)
def test_damaged_files_are_refused(damage, name, tmp_path, asked):
    """One line says which folder to clear; who has EMNIST isn't given other data for it."""
    raw = write_emnist(tmp_path)
    SPOILT[damage](*(raw / file for file in EMNIST))
    message = refusal(load_dataset, name, tmp_path, glyphs=62)
    assert f"the emnist files in {raw} are damaged" in message
    assert not asked


def test_a_damaged_archive_is_named(tmp_path, full_disk):
    """A .gz that can't be unpacked leaves no file; a good one isn't blamed for a full disk."""
    raw = write_emnist(tmp_path, pack=True)
    packed = raw / f"{EMNIST[0]}.gz"
    good = packed.read_bytes()
    flipped = good[:-6] + bytes([good[-6] ^ 1]) + good[-5:]  # in the checksum at the end
    before = set(raw.iterdir())
    for damaged in (good[:-20], flipped, b"<html>"):
        packed.write_bytes(damaged)
        for name in ("emnist", "auto"):
            assert str(packed) in refusal(load_dataset, name, tmp_path)
    packed.write_bytes(good)
    with full_disk(), pytest.raises(OSError, match="too large"):
        load_dataset("emnist", tmp_path)
    assert set(raw.iterdir()) == before


# ----------------------------------------------------------------------------- without the network


@pytest.mark.parametrize(
    ("name", "place", "file"),
    [
        ("emnist", "EMNIST/raw", EMNIST[0]),
        ("mnist", "MNIST/raw", "train-images-idx3-ubyte"),
        ("fashion", "FashionMNIST/raw", "train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py", "data_batch_1"),
    ],
)
def test_a_dead_address_says_where_the_files_belong(name, place, file, tmp_path, asked):
    """Without files and network, the one line names the files and their place."""
    message = refusal(load_dataset, name, tmp_path)
    assert asked  # it did try
    assert file in message
    assert str(tmp_path / place) in message


@pytest.mark.parametrize(
    ("error", "seen"), [(TimeoutError, UserError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_download_that_stops_half_way_leaves_no_file(error, seen, tmp_path, monkeypatch):
    """Half unpacked files would pass for whole ones the next time; files that were there stay."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"mine")

    def stop_half_way(_, root, *__, **___):
        (root / "MNIST" / "raw").mkdir(parents=True)
        (root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"half")
        raise error

    monkeypatch.setattr(common.data, "open_with_torchvision", stop_half_way)
    with pytest.raises(seen):
        load_dataset("mnist", tmp_path)
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["train-labels-idx1-ubyte"]


def test_a_download_that_fails_takes_nothing_from_another_process(tmp_path, monkeypatch):
    """Which may do the same at the same time, and be quicker; and one's own comes whole."""

    def write(root):
        for half in ("train", "t10k"):
            write_idx(root / "MNIST/raw" / f"{half}-images-idx3-ubyte", make_images())
            write_idx(root / "MNIST/raw" / f"{half}-labels-idx1-ubyte", np.arange(COUNT))

    def be_late(*_, **__):
        write(tmp_path)
        raise URLError("too late")

    def succeed(*arguments, download=False):
        write(arguments[1])

    with monkeypatch.context() as patch:
        patch.setattr(common.data, "open_with_torchvision", be_late)
        refusal(load_dataset, "mnist", tmp_path)
    assert len(load_dataset("mnist", tmp_path).images) == COUNT
    with monkeypatch.context() as patch:
        patch.setattr(common.data, "open_with_torchvision", succeed)
        common.data.find_files("mnist", tmp_path / "new", "train", "", True)
    assert len(load_dataset("mnist", tmp_path / "new").images) == COUNT
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == ["MNIST"]


@pytest.mark.parametrize("name", ["emnist", "mnist", "fashion", "cifar10", "auto", "glyphs"])
def test_a_resumed_run_makes_nothing_outside_its_folder(name, tmp_path, asked):
    """The data folder of a run may be what a stranger wrote down: no download, no cache."""
    write_emnist(tmp_path, pack=True)
    before = sorted(tmp_path.rglob("*"))
    for folder in (tmp_path, tmp_path / "gone"):
        if name in ("glyphs", "auto"):
            assert load_dataset(name, folder, glyphs=3, download=False).name == "glyphs"
        else:
            message = refusal(load_dataset, name, folder, download=False)
            assert f"{folder}" in message
            assert "--data-dir" in message
    assert not asked
    assert sorted(tmp_path.rglob("*")) == before


def test_auto_says_loudly_that_it_took_glyphs(tmp_path, asked, capsys):
    """Offline, auto goes on with the glyphs, and one loud line says so and how to get EMNIST."""
    data = load_dataset("auto", tmp_path, glyphs=62)
    assert data.name == "glyphs"
    assert any("EMNIST" in address for address in asked)
    (loud,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "INSTEAD of EMNIST" in loud
    assert str(tmp_path / "EMNIST" / "raw") in loud


@pytest.mark.parametrize(("name", "code"), [("auto", 0), ("glyphs", 0), ("emnist", 2)])
def test_processes_load_the_same(name, code, tmp_path):
    """What rank 0 took for auto is everybody's; what is wrong is said once, and all end soon."""
    (tmp_path / "cache").touch()  # in the way of the cache, which costs a warning

    def load(rank):
        set_up(False, 0)
        data = load_dataset(name, tmp_path, glyphs=62)
        (tmp_path / f"{rank}.txt").write_text(f"{data.name} {data.images.sum()}")

    children, logs = group(load, tmp_path)
    ends = [wait(child, 60) for child in children]
    said = [log.read_text() for log in logs]
    assert ends == [code, code], said
    assert said[0].count("error: ") == (1 if code else 0)
    assert said[0].count("WARNING: ") == (1 if name == "auto" else 0)
    assert said[0].count("warning: ") == (0 if code else 1)
    assert said[1] == ""
    if code == 0:
        found = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
        assert found[0].startswith("glyphs ")
        assert found[0] == found[1]


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("halves", [True, False], ids=["train and test", "one folder"])
def test_folder(halves, tmp_path, capsys):
    """A folder of class folders becomes a dataset: classes by name, pictures in any mode."""
    train = tmp_path / "train" if halves else tmp_path
    save_picture(train / "red" / "a.jpg", (250, 0, 0), size=(60, 40))
    save_picture(train / "red" / "deeper" / "b.PNG", (250, 0, 0), size=(40, 60))
    save_picture(train / "blue" / "c.png", (0, 0, 250), mode="P")
    save_picture(train / "grey" / "d.png", (100, 100, 100), mode="L")
    data = load_dataset("folder", tmp_path)
    assert data.classes == ["blue", "grey", "red"]
    assert data.labels.tolist() == [0, 1, 2, 2]
    assert data.images.shape == (4, 3, 32, 32)
    means = data.images.float().mean((2, 3))
    wanted = torch.tensor([[0, 0, 250], [100, 100, 100], [250, 0, 0], [250, 0, 0]])
    assert (means - wanted).abs().max() < 4  # JPEG is not exact
    assert load_dataset("folder", tmp_path, size=28).images.shape == (4, 3, 28, 28)
    if halves:
        save_picture(tmp_path / "test" / "red" / "e.png", (9, 0, 0))
        assert load_dataset("folder", tmp_path, train=False).images[0, 0, 0, 0] == 9
    else:
        assert "test/" in refusal(load_dataset, "folder", tmp_path, train=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folders", "train", "test"),
    [
        (["train/ant", "test/ant", "val/ant"], "train", "test"),
        (["train/.", "test/."], "train", "test"),  # of one class
        (["train", "bus"], ".", None),  # vehicles
        (["test", "bus"], ".", None),
        (["test/ant"], None, "test"),
        (["ant", "bee"], ".", None),
    ],
)
def test_a_class_may_be_called_train(folders, train, test, tmp_path):
    """Halves are told from classes of the same names by what lies beside and in them."""
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for half, wanted in (("train", train), ("test", test)):
        wanted = wanted and tmp_path / wanted
        assert common.data.choose_half(tmp_path, half) == wanted


def test_pictures_are_read_as_photos_are(tmp_path, capsys):
    """Upright, cut to their centre, white where transparent; what 12 bits leave is told of."""
    sky = np.zeros((64, 64, 3), np.uint8)
    sky[:32] = 255  # is up
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise"
    Image.fromarray(np.rot90(sky)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(tmp_path / "c.png")
    for name, brightest in (("d", 4096), ("e", 4095)):
        Image.fromarray(np.full((32, 32), brightest, np.uint16)).save(tmp_path / f"{name}.png")
    images = load_dataset("folder", tmp_path).images
    assert images[0, :, :15].min() > 240
    assert images[0, :, 17:].max() < 15
    assert [(int(x.min()), int(x.max())) for x in images[1:4]] == [(200, 200), (255, 255), (16, 16)]
    error = capsys.readouterr().err
    assert f"{tmp_path / 'e.png'}\n" in error
    assert error.count("\n") == 1


def test_shrinking_is_a_mean(tmp_path):
    """Whole pixels of 4 x 4 each: a sharper filter would overshoot at the edges."""
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    means = pixels.reshape(32, 4, 32, 4, 3).mean((1, 3)).transpose(2, 0, 1)
    (image,) = load_dataset("folder", tmp_path).images
    assert np.abs(image.numpy() - means).max() <= 1


@POSIX
def test_what_is_left_out_of_a_folder(tmp_path, capsys):
    """Hidden files and run folders silently, the rest by a line each; links are followed, once."""
    data = tmp_path / "data"
    save_picture(data / "ant" / "a.png")
    save_picture(tmp_path / "elsewhere" / "b.png")
    (data / "bee").symlink_to(tmp_path / "elsewhere")
    (data / "bee" / "circle").symlink_to(tmp_path / "elsewhere")
    (data / "loop").symlink_to(data)
    save_picture(data / ".hidden" / "c.png")
    save_picture(data / "ant" / "._a.png")  # as a Mac leaves it
    for mark in (".lock", "metrics.json", "checkpoint.pt", "records/arguments.txt"):
        run = data / f"run of {mark[:5]}"
        save_picture(run / "panel.png")
        (run / mark).parent.mkdir(exist_ok=True)
        (run / mark).touch()
    (data / "empty").mkdir()
    (data / "ant" / "notes.txt").touch()
    (data / "ant" / "text.jpg").write_text("no picture")
    (data / "ant" / "gone.png").symlink_to(tmp_path / "gone.png")
    Image.effect_noise((60, 60), 90).save(data / "ant" / "half.jpg")
    os.truncate(data / "ant" / "half.jpg", 500)
    found = load_dataset("folder", data)
    assert found.classes == ["ant", "bee"]
    assert found.labels.tolist() == [0, 1]
    strange, broken, empty = capsys.readouterr().err.splitlines()
    assert strange.endswith(f"{data / 'ant' / 'notes.txt'}")
    assert broken.endswith(f"{data / 'ant' / 'gone.png'} and 2 more")
    assert f"{data / 'empty'}" in empty


def test_what_is_asked_for_is_data(tmp_path):
    """A run was written into the data folder itself; and records are a subject of photos, too."""
    save_picture(tmp_path / "music" / "records" / "a.png")
    save_picture(tmp_path / "bee" / "b.png")
    (tmp_path / "metrics.json").touch()
    assert load_dataset("folder", tmp_path).classes == ["bee", "music"]
    assert load_dataset("folder", tmp_path / "bee").classes == ["bee"]  # a GAN needs no classes


@POSIX
def test_links_come_out_the_same_everywhere(tmp_path):
    """Of several names of one folder the first counts, whatever order the disk has."""
    save_picture(tmp_path / "store" / "a.png")
    (tmp_path / "data").mkdir()
    for name in ("moth", "ant", "zebra", "bee", "newt"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "store")
    found = load_dataset("folder", tmp_path / "data")
    assert found.classes == ["ant"]
    assert len(found.images) == 1


@pytest.mark.parametrize("layout", ["missing", "empty", "a file", "no good picture"])
def test_a_folder_without_pictures_is_refused(layout, tmp_path):
    """The one line names it."""
    folder = tmp_path / "photos"
    if layout == "a file":
        folder.write_text("no folder")
    elif layout != "missing":
        (folder / "ant").mkdir(parents=True)
    if layout == "no good picture":
        (folder / "ant" / "a.png").write_text("no picture")
    assert str(folder) in refusal(load_dataset, "folder", folder)


@pytest.mark.parametrize("place", ["a.png", "ant/a.png", "train/ant/a.png", "test/ant/a.png"])
def test_pictures_are_not_taken_for_another_dataset(place, tmp_path, asked, capsys):
    """Nothing is downloaded beside them; who says glyphs gets glyphs, and a line."""
    save_picture(tmp_path / place)
    for name in ("auto", "mnist", "emnist", "cifar10"):
        assert "--dataset folder" in refusal(load_dataset, name, tmp_path)
    assert not asked
    assert len(load_dataset("glyphs", tmp_path, glyphs=3).images) == 3
    assert capsys.readouterr().err.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == [place.split("/")[0]]  # no cache either


def test_pictures_of_a_run_are_no_data(tmp_path):
    """A run beside the datasets doesn't make their folder one of pictures."""
    save_picture(tmp_path / "run" / "losses.png")
    (tmp_path / "run" / ".lock").touch()
    assert not common.data.holds_pictures(tmp_path)


@pytest.mark.parametrize("folder", ["EMNIST", "MNIST", "FashionMNIST", "cache"])
def test_a_data_folder_may_hold_a_picture(folder, tmp_path):
    """Where datasets lie already, a picture beside them changes nothing."""
    save_picture(tmp_path / "a.png")
    (tmp_path / folder).mkdir()
    assert not common.data.holds_pictures(tmp_path)


# ------------------------------------------------------------------------------------------- glyphs


def test_glyphs(tmp_path, capsys, asked):
    """The built-in data needs nothing; its halves differ, and the first line says what it is."""
    train = load_dataset("glyphs", tmp_path, glyphs=70)
    assert capsys.readouterr().out == "data     glyphs, 70 images, 62 classes\n"
    test = load_dataset("glyphs", tmp_path, train=False, glyphs=70)
    assert train.images.shape == test.images.shape == (70, 1, 28, 28)
    assert len(set(train.labels.tolist())) == 62
    assert train.classes[10] == "A"
    assert not torch.equal(train.images, test.images)
    assert len(load_dataset("glyphs", tmp_path, glyphs=3).images) == 3  # not those in the cache
    assert not asked


CACHES = {  # whole files, of something else
    "other images": lambda images, labels: (images[1:], labels[1:]),
    "other labels": lambda images, labels: (images, labels[1:]),
    "no such class": lambda images, labels: (images, labels + 62),
    "labels of floats": lambda images, labels: (images, labels.float()),
    "images of floats": lambda images, labels: (images.float(), labels),
    "larger images": lambda images, labels: (images.repeat(1, 1, 2, 2), labels),
    "coloured images": lambda images, labels: (images.repeat(1, 3, 1, 1), labels),
}


@pytest.mark.parametrize("damage", ["none", "text", "cut", *CACHES, "a flipped bit", "a pipe"])
def test_a_cache_is_only_a_cache(damage, tmp_path, monkeypatch):
    """The second time the glyphs are read; whatever became of their file, they are drawn anew."""
    good = load_dataset("glyphs", tmp_path, glyphs=20)
    (cache,) = tmp_path.rglob("*.pt")
    content = cache.read_bytes()
    at = content.index(good.images.numpy().tobytes()) + good.images.numel() // 2
    flipped = content[:at] + bytes([content[at] ^ 128]) + content[at + 1 :]
    if damage in CACHES:
        images, labels = CACHES[damage](good.images, good.labels)
        torch.save({"images": images, "labels": labels}, cache)
    elif damage == "a pipe":
        cache.unlink()
        os.mkfifo(cache)
    else:
        cache.write_bytes({"none": content, "text": b"garbage", "cut": content[:5000],
                           "a flipped bit": flipped}[damage])  # fmt: skip
    draw = mock.Mock(wraps=common.glyphs.draw_glyphs)
    monkeypatch.setattr(common.glyphs, "draw_glyphs", draw)
    for _ in range(2):
        again = load_dataset("glyphs", tmp_path, glyphs=20)
        assert torch.equal(again.images, good.images)
        assert torch.equal(again.labels, good.labels)
    assert draw.call_count == (damage != "none")  # and the cache was mended


@pytest.mark.parametrize("obstacle", ["no folder", "full disk"])
def test_no_room_for_a_cache_costs_a_warning(obstacle, tmp_path, full_disk, capsys):
    """A data folder that can't be written to costs time, not the run, and is left clean."""
    wanted = load_dataset("glyphs", tmp_path / "good", glyphs=20).images
    root = tmp_path / "bad"
    root.mkdir()
    if obstacle == "no folder":
        (root / "cache").write_text("a file where the cache folder should be")
        found = load_dataset("glyphs", root, glyphs=20).images
    else:
        with full_disk():
            found = load_dataset("glyphs", root, glyphs=20).images
    assert torch.equal(found, wanted)
    assert capsys.readouterr().err.count("warning: ") == 1
    assert not [file for file in root.rglob("*") if file.is_file() and file.name != "cache"]


# ---------------------------------------------------------------------------------- check_dataset


def test_a_dataset_of_ones_own_is_taken_as_it_is():
    """Tensors, or what torch makes tensors of."""
    images = np.zeros((4, 1, 28, 28), np.uint8)
    found = check_dataset(Dataset("mine", images, [0, 1, 0, 1], ["a", "b"]), 28)
    assert torch.equal(found.images, torch.from_numpy(images))
    assert found.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("shape", "labels", "found"),
    [
        ((4, 28, 28), (4,), "(4, 28, 28)"),
        ((4, 2, 28, 28), (4,), "(4, 2, 28, 28)"),
        ((4, 3, 28, 14), (4,), "(4, 3, 28, 14)"),
        ((4, 3, 32, 32), (4,), "(4, 3, 32, 32)"),
        ((4, 3, 28, 28), (3,), "(3,)"),
        ((4, 3, 28, 28), (4, 1), "(4, 1)"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(shape, labels, found):
    """Wrong shapes, sides, numbers of labels, and floats: what is there is named."""
    images = torch.zeros(shape, dtype=torch.uint8)
    labels = torch.zeros(labels, dtype=torch.int64)
    assert found in refusal(check_dataset, Dataset("mine", images, labels, ["a"]), 28)
    floats = Dataset("mine", torch.zeros(4, 3, 28, 28), torch.zeros(4).long(), ["a"])
    assert "float32" in refusal(check_dataset, floats, 28)
    wide = Dataset("mine", torch.zeros(4, 3, 28, 14).byte(), [0] * 4, ["a"])
    assert "(4, 3, 28, 14)" in refusal(check_dataset, wide)  # where no size is asked for, too
