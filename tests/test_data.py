"""Datasets: read as they lie on disk, cached, and refused in one line that says what to do.

No test reads real data or reaches the network: each writes a few pictures in the dataset's own
format, byte by byte, so that the readers are tested against the format and not against themselves.
"""

import gzip
import os
import struct
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import common.data
from common.data import load_dataset
from tests.helpers import refusal

COUNT = 5  # pictures in the small datasets here
# An L: a long stroke down its left side, a short one along its foot. Transposing it gives
# a stroke along the top, so that no other orientation passes for it.
UPRIGHT = np.zeros((28, 28), np.uint8)
UPRIGHT[4:24, 6:9] = 255
UPRIGHT[21:24, 6:18] = 200


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Cut the network off below torchvision.

    :return: the addresses that were asked for
    :rtype: list[str]
    """
    addresses = []

    def refuse(request, *_, **__):
        addresses.append(getattr(request, "full_url", request))
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return addresses


def pictures(count=COUNT):
    """Make pictures that differ: the L, brighter from one to the next, in one more corner pixel.

    :rtype: numpy.ndarray
    """
    images = np.stack([UPRIGHT // (i + 1) for i in range(count)])
    images[np.arange(count), 0, np.arange(count)] = 9
    return images


def write_idx(path, array, magic=None, pack=False):
    """Write NIST's format: big-endian magic number and sizes, then the bytes.

    :param numpy.ndarray array: uint8, pictures (N, H, W) or labels (N,)
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


def emnist_files(root, split="balanced", half="train"):
    """Name the two files of one half of EMNIST.

    :rtype: tuple[pathlib.Path, pathlib.Path]
    """
    start = f"emnist-{split}-{half}"
    raw = root / "EMNIST" / "raw"
    return raw / f"{start}-images-idx3-ubyte", raw / f"{start}-labels-idx1-ubyte"


def write_emnist(root, images, labels, split="balanced", half="train", pack=False):
    """Write one half of EMNIST, each picture transposed, as NIST did."""
    images_file, labels_file = emnist_files(root, split, half)
    write_idx(images_file, images.transpose(0, 2, 1), pack=pack)
    write_idx(labels_file, np.array(labels), pack=pack)


def write_mnist(root, folder="MNIST"):
    """Write both halves of MNIST or Fashion-MNIST; the test half is the other way round."""
    for half, step in (("train", 1), ("t10k", -1)):
        raw = root / folder / "raw"
        write_idx(raw / f"{half}-images-idx3-ubyte", pictures()[::step])
        write_idx(raw / f"{half}-labels-idx1-ubyte", np.arange(COUNT)[::step])


def pickle_of_python_2(value):
    """Pickle as the Python 2 that wrote CIFAR-10 did: byte strings, and arrays made of them.

    :rtype: bytes
    """
    if isinstance(value, dict):
        items = b"".join(pickle_of_python_2(x) for pair in value.items() for x in pair)
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(pickle_of_python_2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, np.ndarray):
        shape = b"(" + b"".join(map(pickle_of_python_2, value.shape)) + b"t"
        dtype = (b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN"
                 b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb")  # fmt: skip
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        return (
            empty
            + b"(K\x01"
            + shape
            + dtype
            + b"\x89"
            + pickle_of_python_2(value.tobytes())
            + (b"tb")
        )
    value = value if isinstance(value, bytes) else value.encode()
    return b"T" + struct.pack("<i", len(value)) + value


def write_cifar10(root, monkeypatch):
    """Write CIFAR-10, two pictures a batch, and have torchvision accept their checksums.

    :return: the pictures of the training half, then those of the test half, uint8, (2, 3, 32, 32)
    :rtype: list[numpy.ndarray]
    """
    monkeypatch.setattr(torchvision.datasets.utils, "check_md5", lambda *_, **__: True)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng, batches = np.random.default_rng(0), []
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        batches.append(rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
        batch = {"data": batches[-1].reshape(2, -1), "labels": [i, 9], "batch_label": name}
        (folder / name).write_bytes(b"\x80\x02" + pickle_of_python_2(batch) + b".")
    names = [f"class{k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(
        b"\x80\x02" + pickle_of_python_2({"label_names": names}) + b"."
    )
    return batches


def save_picture(path, color, size=(40, 40), mode="RGB"):
    """Save a picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


# ---------------------------------------------------------------------- EMNIST, MNIST and Fashion


@pytest.mark.parametrize("pack", [False, True], ids=["files", "only .gz"])
def test_emnist_comes_out_upright(pack, tmp_path, asked):
    """Letters stand up although the files hold them transposed; packed or not, and unasked."""
    write_emnist(tmp_path, pictures(), [0, 10, 46, 3, 3], pack=pack)
    data = load_dataset("emnist", tmp_path)
    assert data.name == "emnist"
    assert (data.images.shape, data.images.dtype) == ((COUNT, 1, 28, 28), torch.uint8)
    assert np.array_equal(data.images[:, 0].numpy(), pictures())
    assert data.labels.tolist() == [0, 10, 46, 3, 3]
    assert data.labels.dtype == torch.int64
    assert [data.classes[i] for i in (0, 10, 46)] == ["0", "A", "t"]
    assert len(data.classes) == 47
    assert not asked


def test_emnist_letters_start_at_0(tmp_path):
    """The letters split, whose labels run from 1 in the files, has 26 classes from 0."""
    write_emnist(tmp_path, pictures(3), [1, 2, 26], split="letters")
    data = load_dataset("emnist", tmp_path, split="letters")
    assert data.labels.tolist() == [0, 1, 25]
    assert data.classes == list("abcdefghijklmnopqrstuvwxyz")


def test_emnist_test_half(tmp_path):
    """The test half comes from its own files, without those of the training half."""
    write_emnist(tmp_path, pictures()[::-1], [4, 3, 2, 1, 0], half="test")
    data = load_dataset("emnist", tmp_path, train=False)
    assert np.array_equal(data.images[:, 0].numpy(), pictures()[::-1])
    assert data.labels.tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("mnist", "MNIST", "0"), ("fashion", "FashionMNIST", "T-shirt/top")],
)
def test_mnist_and_fashion(name, folder, first, tmp_path, asked):
    """Both are upright in their files already, and have plain class names."""
    write_mnist(tmp_path, folder)
    for train, step in ((True, 1), (False, -1)):
        data = load_dataset(name, tmp_path, train=train)
        assert data.name == name
        assert np.array_equal(data.images[:, 0].numpy(), pictures()[::step])
        assert data.labels.tolist() == list(range(COUNT))[::step]
        assert data.classes[0] == first
        assert len(data.classes) == 10
    assert not asked


def test_cifar10(tmp_path, monkeypatch, asked, recwarn):
    """CIFAR-10's pickles give colour pictures, channels first, and no warning."""
    *train, test = write_cifar10(tmp_path, monkeypatch)
    data = load_dataset("cifar10", tmp_path)
    assert np.array_equal(data.images.numpy(), np.concatenate(train))
    assert data.images.is_contiguous()
    assert data.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert data.classes == [f"class{k}" for k in range(10)]
    data = load_dataset("cifar10", tmp_path, train=False)
    assert np.array_equal(data.images.numpy(), test)
    assert data.labels.tolist() == [5, 9]
    assert not asked
    assert not [str(w.message) for w in recwarn]


def test_size_and_channels(tmp_path, monkeypatch):
    """Any dataset comes in the size and the number of channels that a model needs."""
    write_mnist(tmp_path)
    stored = load_dataset("mnist", tmp_path).images
    colour = load_dataset("mnist", tmp_path, channels=3).images
    assert torch.equal(colour, stored.expand(-1, 3, -1, -1))
    small = load_dataset("mnist", tmp_path, size=14).images
    assert small.shape == (COUNT, 1, 14, 14)
    means = torch.nn.functional.avg_pool2d(stored.float(), 2)
    assert (small.float() - means).abs().mean() < 8  # the same picture, a little softer
    write_cifar10(tmp_path, monkeypatch)
    grey = load_dataset("cifar10", tmp_path, size=28, channels=1).images
    assert (grey.shape, grey.dtype) == ((10, 1, 28, 28), torch.uint8)


# ----------------------------------------------------------------------------------------- folder


@pytest.mark.parametrize("halves", [True, False], ids=["train and test", "one folder"])
def test_folder(halves, tmp_path):
    """A folder of class folders becomes a dataset: classes by name, pictures in any mode."""
    train = tmp_path / "train" if halves else tmp_path
    save_picture(train / "red" / "a.jpg", (250, 0, 0), size=(60, 40))
    save_picture(train / "red" / "deeper" / "b.PNG", (250, 0, 0), size=(40, 60))
    save_picture(train / "blue" / "c.png", (0, 0, 250), mode="P")
    save_picture(train / "grey" / "d.png", (100, 100, 100), mode="L")
    (train / "grey" / "notes.txt").write_text("no picture")
    data = load_dataset("folder", tmp_path)
    assert data.classes == ["blue", "grey", "red"]
    assert data.labels.tolist() == [0, 1, 2, 2]
    assert data.images.shape == (4, 3, 32, 32)
    means = data.images.float().mean((2, 3))
    wanted = torch.tensor([[0, 0, 250], [100, 100, 100], [250, 0, 0], [250, 0, 0]])
    assert (means - wanted).abs().max() < 4  # JPEG is not exact
    grey = load_dataset("folder", tmp_path, size=28, channels=1)
    assert grey.images.shape == (4, 1, 28, 28)
    assert (grey.images[1].int() - 100).abs().max() <= 1  # torchvision rounds down
    if halves:
        save_picture(tmp_path / "test" / "red" / "e.png", (9, 0, 0))
        assert load_dataset("folder", tmp_path, train=False).images[0, 0, 0, 0] == 9
    else:
        assert "test/" in refusal(load_dataset, "folder", tmp_path, train=False)


def test_folder_turns_photos_upright(tmp_path):
    """A phone's photo, stored on its side with a note in EXIF, is shown as it was taken."""
    upright = np.zeros((64, 64, 3), np.uint8)
    upright[:32] = 255  # the sky is up
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees clockwise"
    (tmp_path / "sky").mkdir()
    Image.fromarray(np.rot90(upright)).save(tmp_path / "sky" / "a.jpg", exif=exif, quality=95)
    (image,) = load_dataset("folder", tmp_path).images
    assert image[:, :15].min() > 240
    assert image[:, 17:].max() < 15


def test_folder_keeps_proportions(tmp_path):
    """A wide photo is cut to its centre and not squeezed."""
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200  # just the centre is bright
    (tmp_path / "wide").mkdir()
    Image.fromarray(wide).save(tmp_path / "wide" / "a.png")
    assert (load_dataset("folder", tmp_path).images == 200).all()


def test_folder_with_a_new_picture(tmp_path):
    """A picture that is added is seen, and our own cache folder never becomes a class."""
    save_picture(tmp_path / "ants" / "a.png", (1, 1, 1))
    save_picture(tmp_path / "dogs" / "b.png", (2, 2, 2))
    assert load_dataset("folder", tmp_path).labels.tolist() == [0, 1]
    save_picture(tmp_path / "dogs" / "c.png", (3, 3, 3))
    data = load_dataset("folder", tmp_path)
    assert data.labels.tolist() == [0, 1, 1]
    assert data.images[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert data.classes == ["ants", "dogs"]


# ------------------------------------------------------------------------------- glyphs and auto


def test_glyphs(tmp_path, capsys, asked):
    """The built-in data needs nothing; its halves differ, and the first line says what it is."""
    train = load_dataset("glyphs", tmp_path, glyphs=70)
    assert capsys.readouterr().out == "data     glyphs, 70 images, 62 classes\n"
    test = load_dataset("glyphs", tmp_path, train=False, glyphs=70)
    assert train.images.shape == test.images.shape == (70, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert len(set(train.labels.tolist())) == 62
    assert train.classes[10] == "A"
    assert not torch.equal(train.images, test.images)
    assert not asked


def test_auto_prefers_emnist(tmp_path, asked, capsys):
    """Where EMNIST's files are, auto takes them and asks nobody."""
    write_emnist(tmp_path, pictures(), range(COUNT))
    assert load_dataset("auto", tmp_path, glyphs=62).name == "emnist"
    assert not asked
    assert capsys.readouterr().err == ""


def test_auto_says_loudly_that_it_took_glyphs(tmp_path, asked, capsys):
    """Offline, auto goes on with the glyphs, and one loud line says so and how to get EMNIST."""
    data = load_dataset("auto", tmp_path, glyphs=62)
    assert (data.name, len(data.images)) == ("glyphs", 62)
    assert asked
    assert "EMNIST" in asked[0]
    (loud,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "INSTEAD of EMNIST" in loud
    assert str(tmp_path / "EMNIST" / "raw") in loud


@pytest.mark.parametrize("pack", [False, True], ids=["files", "only .gz"])
def test_auto_refuses_damaged_emnist(pack, tmp_path):
    """Who has EMNIST wants EMNIST: damage is an error, and no reason for other data."""
    write_emnist(tmp_path, pictures(), range(COUNT), pack=pack)
    for file in (tmp_path / "EMNIST" / "raw").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    message = refusal(load_dataset, "auto", tmp_path, glyphs=62)
    assert "damaged" in message
    assert str(tmp_path / "EMNIST" / "raw") in message


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "place", "file"),
    [
        ("emnist", "EMNIST/raw", "emnist-balanced-train-images-idx3-ubyte"),
        ("mnist", "MNIST/raw", "train-images-idx3-ubyte"),
        ("fashion", "FashionMNIST/raw", "train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py", "data_batch_1"),
    ],
)
def test_a_dead_address_says_where_the_files_belong(name, place, file, tmp_path, asked):
    """Without files and network, the one line names the files and their place."""
    message = refusal(load_dataset, name, tmp_path)
    assert asked  # it did try
    assert f"put {file}" in message
    assert str(tmp_path / place) in message


def spoil_cut(images, labels):
    """Cut the pictures short, as a broken download does."""
    images.write_bytes(images.read_bytes()[:-100])


def spoil_long(images, labels):
    """Let bytes follow that the header knows nothing of."""
    images.write_bytes(images.read_bytes() + b"more")


def spoil_empty(images, labels):
    """Leave nothing in the file of the labels."""
    labels.write_bytes(b"")


def spoil_magic(images, labels):
    """Write a magic number that stands for another kind of file."""
    write_idx(images, pictures(), magic=0x50D03)


def spoil_page(images, labels):
    """Put a web page where the pictures should be, as a login to a network does."""
    images.write_bytes(b"<!DOCTYPE html><html>Please log in</html>")


def spoil_count(images, labels):
    """Leave one label out."""
    write_idx(labels, np.arange(COUNT - 1))


def spoil_label(images, labels):
    """Write a label for which there is no class."""
    write_idx(labels, np.array([0, 1, 2, 3, 47]))


def spoil_all(images, labels):
    """Write files with a header and no pictures."""
    write_idx(images, np.zeros((0, 28, 28)))
    write_idx(labels, np.zeros(0))


@pytest.mark.parametrize(
    "spoil",
    [spoil_cut, spoil_long, spoil_empty, spoil_magic, spoil_page, spoil_count, spoil_label,
     spoil_all],
)  # fmt: skip
def test_damaged_files_are_refused(spoil, tmp_path, asked):
    """Whatever is wrong with a file, one line says which folder to clear; nothing is cached."""
    write_emnist(tmp_path, pictures(), range(COUNT))
    spoil(*emnist_files(tmp_path))
    message = refusal(load_dataset, "emnist", tmp_path)
    assert "emnist" in message
    assert "damaged" in message
    assert str(tmp_path / "EMNIST" / "raw") in message
    assert not list(tmp_path.rglob("*.pt"))
    assert not asked


def test_letters_without_a_class_are_refused(tmp_path):
    """In the letters split a label 0 stands for no letter."""
    write_emnist(tmp_path, pictures(2), [0, 1], split="letters")
    assert "damaged" in refusal(load_dataset, "emnist", tmp_path, split="letters")


def test_a_damaged_cifar10_is_refused(tmp_path, monkeypatch):
    """Files whose checksums are wrong never reach pickle."""
    write_cifar10(tmp_path, monkeypatch)
    monkeypatch.undo()
    evil = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "harmed") + b"'\ntR."
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(evil)
    message = refusal(load_dataset, "cifar10", tmp_path)
    assert str(tmp_path / "cifar-10-batches-py") in message
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_a_damaged_archive_is_named(damage, tmp_path):
    """A .gz that can't be unpacked is named, and leaves no half-unpacked file."""
    write_emnist(tmp_path, pictures(), range(COUNT), pack=True)
    packed = emnist_files(tmp_path)[0].with_name("emnist-balanced-train-images-idx3-ubyte.gz")
    good = packed.read_bytes()
    flipped = good[:-6] + bytes([good[-6] ^ 1]) + good[-5:]  # in the checksum at the end
    bad = {"cut": good[:-20], "flipped": flipped, "not gzip": b"<html>"}[damage]
    packed.write_bytes(bad)
    before = set(packed.parent.iterdir())
    message = refusal(load_dataset, "emnist", tmp_path)
    assert str(packed) in message
    assert "fetch it again" in message
    assert set(packed.parent.iterdir()) == before


def test_a_full_disk_is_no_damaged_archive(tmp_path, full_disk):
    """Nobody is told to delete a good archive because there was no room to unpack it."""
    write_emnist(tmp_path, pictures(), range(COUNT), pack=True)
    before = set((tmp_path / "EMNIST" / "raw").iterdir())
    with full_disk(), pytest.raises(OSError, match="too large"):
        load_dataset("emnist", tmp_path)
    assert set((tmp_path / "EMNIST" / "raw").iterdir()) == before


@pytest.mark.parametrize("layout", ["missing", "empty", "no class folders", "a file"])
def test_a_folder_without_pictures_is_refused(layout, tmp_path):
    """The one line says what a folder should look like."""
    folder = tmp_path / "photos"
    if layout == "a file":
        folder.write_text("no folder")
    elif layout != "missing":
        folder.mkdir()
    if layout == "no class folders":
        save_picture(folder / "a.png", (1, 2, 3))
    message = refusal(load_dataset, "folder", folder)
    assert str(folder) in message
    assert "one folder of them per class" in message


@pytest.mark.parametrize("kind", ["cut", "text"])
def test_a_broken_picture_is_named(kind, tmp_path):
    """One bad picture among many is named, so that it can be removed."""
    save_picture(tmp_path / "a" / "good.png", (1, 2, 3))
    bad = tmp_path / "a" / "bad.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(bad)
    bad.write_bytes(bad.read_bytes()[:500] if kind == "cut" else b"no picture")
    assert str(bad) in refusal(load_dataset, "folder", tmp_path)


# ------------------------------------------------------------------------------------------- cache


@pytest.fixture
def reads(monkeypatch):
    """Count how often a dataset's files are decoded.

    :rtype: list
    """
    calls, read = [], common.data.read_files
    monkeypatch.setattr(common.data, "read_files", lambda *a: calls.append(a) or read(*a))
    return calls


def test_the_second_time_comes_from_the_cache(tmp_path, reads):
    """Files are decoded once for each size and number of channels, and give the same tensors."""
    write_emnist(tmp_path, pictures(), range(COUNT))
    first, second = (load_dataset("emnist", tmp_path) for _ in range(2))
    assert len(reads) == 1
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.labels, second.labels)
    assert (first.name, first.classes) == (second.name, second.classes)
    assert load_dataset("emnist", tmp_path, size=14, channels=3).images.shape[1:] == (3, 14, 14)
    assert len(reads) == 2


def test_a_changed_file_is_read_again(tmp_path, reads):
    """A file of the same size and another time is another file."""
    write_emnist(tmp_path, pictures(), range(COUNT))
    load_dataset("emnist", tmp_path)
    write_emnist(tmp_path, pictures()[::-1], range(COUNT))
    for file in emnist_files(tmp_path):
        os.utime(file, (1, 1))  # a clock may be too coarse to tell the two writes apart
    images = load_dataset("emnist", tmp_path).images
    assert np.array_equal(images[:, 0].numpy(), pictures()[::-1])
    assert len(reads) == 2


@pytest.mark.parametrize("garbage", ["text", "cut", "another dict"])
def test_a_damaged_cache_is_made_anew(garbage, tmp_path, reads):
    """A cache is only a cache: whatever became of it, the run goes on and mends it."""
    write_emnist(tmp_path, pictures(), range(COUNT))
    load_dataset("emnist", tmp_path)
    (cache,) = tmp_path.rglob("*.pt")
    good = cache.read_bytes()
    if garbage == "another dict":
        torch.save({"stamp": "old"}, cache)
    else:
        cache.write_bytes(b"garbage" if garbage == "text" else good[: len(good) // 2])
    images = load_dataset("emnist", tmp_path).images
    assert np.array_equal(images[:, 0].numpy(), pictures())
    assert len(reads) == 2
    load_dataset("emnist", tmp_path)
    assert len(reads) == 2


@pytest.mark.parametrize("obstacle", ["no folder", "full disk"])
def test_no_room_for_a_cache_costs_a_warning(obstacle, tmp_path, full_disk, capsys):
    """A data folder that can't be written to costs time, not the run, and is left clean."""
    write_emnist(tmp_path, pictures(), range(COUNT))
    if obstacle == "no folder":
        (tmp_path / "cache").write_text("a file where the cache folder should be")
        data = load_dataset("emnist", tmp_path)
    else:
        with full_disk():
            data = load_dataset("emnist", tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), pictures())
    error = capsys.readouterr().err
    assert error.startswith("warning: no cache written (")
    assert error.count("\n") == 1
    assert str(tmp_path / "cache") in error
    left = {f.relative_to(tmp_path) for f in tmp_path.rglob("*") if f.is_file()}
    assert left - {Path("cache")} == {f.relative_to(tmp_path) for f in emnist_files(tmp_path)}


def test_glyphs_of_another_number_are_not_taken_from_the_cache(tmp_path):
    """Asking for more glyphs gives more."""
    assert len(load_dataset("glyphs", tmp_path, glyphs=3).images) == 3
    assert len(load_dataset("glyphs", tmp_path, glyphs=4).images) == 4
    assert len(load_dataset("glyphs", tmp_path, glyphs=3).images) == 3


def test_a_16_bit_picture_keeps_its_greys(tmp_path):
    """Scans with 16 bits a pixel come out grey, not clipped to white."""
    folder = tmp_path / "scans" / "a"
    folder.mkdir(parents=True)
    ramp = np.linspace(0, 65535, 28 * 28).reshape(28, 28).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "ramp.png")
    images = load_dataset("folder", tmp_path / "scans", size=28, channels=1).images
    assert np.abs(images[0, 0].numpy().astype(int) - ramp // 257).max() <= 1
