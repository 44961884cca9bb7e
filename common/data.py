"""Datasets as one uint8 tensor, decoded once by torchvision's readers.

At 28 x 28 pixels, decoding pictures one by one costs more than training on them. So a dataset is
one tensor (N, C, H, W) and a batch is a slice of it; no loader, no worker processes.
"""

import gzip
import itertools
import os
import shutil
import socket
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from common.device import is_first, share_from_first
from common.errors import MARKS, UserError, plain
from common.images import crop_square, open_photo, picture_endings
from common.run import read_tensors, replacing, save_checkpoint

NAMES = ("auto", "emnist", "mnist", "fashion", "cifar10", "folder", "glyphs")
EMNIST_SPLITS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
GLYPHS_VERSION = 1  # raise it when the same seed would draw other glyphs


class Dataset(NamedTuple):
    """A dataset in memory.

    ``name`` says which one it is ("auto" resolved), ``images`` are uint8 (N, C, H, W), upright,
    ``labels`` int64 (N,), from 0, and ``classes`` holds the name of each label.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: list


class NotThereError(UserError):
    """The dataset is neither on disk nor to be had from the network."""


def load_dataset(name, data_dir="data", train=True, split="balanced", size=None, glyphs=20_000,
                 download=True):  # fmt: skip
    """Load one half of a dataset: from its files, else from the network.

    :param str name: one of NAMES; "auto" is EMNIST or, where it can't be had, the glyphs
    :param str data_dir: where the files are or go to; for "folder" the folder of class folders,
        or of train/ and test/ with class folders in each
    :param bool train: the training half, or the test half
    :param str split: EMNIST only: which of its splits
    :param int size: side in pixels to resize to; None for as stored (a folder's pictures: 32)
    :param int glyphs: glyphs only: how many to draw
    :param bool download: write into ``data_dir`` what is missing there: downloads, unpacked files,
        a cache; not for a resumed run, whose ``data_dir`` may be what a stranger wrote down
    :return: the dataset
    :rtype: Dataset
    :raises UserError: if it can't be found, downloaded or read; says where its files belong
    """
    options = (Path(data_dir), "train" if train else "test", split, size, glyphs, download)
    # Rank 0 first: it downloads and fills the cache, and what it takes for "auto" is everybody's.
    dataset = None
    if is_first():
        dataset = load_half(name, *options)
        count = len(dataset.classes)
        classes = "1 class" if count == 1 else f"{count} classes"
        half = "data" if train else "test"
        print(f"{half:8s} {dataset.name}, {len(dataset.images):,} images, {classes}")
    name = share_from_first(dataset and dataset.name)
    return dataset or load_half(name, *options)


def load_half(name, root, half, split, size, glyphs, download):
    """Do what :func:`load_dataset` says, in one process."""
    if name in ("auto", "glyphs") and holds_pictures(root):
        line = f"{root} holds pictures: to train on them, say --dataset folder"
        if name == "auto":
            raise UserError(line)
        if is_first():
            print(f"warning: {line}", file=sys.stderr)
    if name == "auto":
        try:
            return load_half("emnist", root, half, split, size, glyphs, download)
        except NotThereError as error:
            print(f"WARNING: using the built-in glyphs INSTEAD of EMNIST: {error}", file=sys.stderr)
            name = "glyphs"
    if name == "glyphs":
        images, labels, classes = load_glyphs(root / "cache", half, glyphs, download)
    elif name == "folder":
        images, labels, classes = read_folder(root, half, size or 32)
    else:
        find_files(name, root, half, split, download)
        images, labels, classes = read_files(name, root, half, split)
    if size and images.shape[-2:] != (size, size):
        from torchvision.transforms.v2.functional import resize

        images = torch.cat([resize(chunk, [size, size]) for chunk in images.split(4096)])
    return Dataset(name, images, labels, classes)


# ----------------------------------------------------------------------- what torchvision can read


def needed_files(name, half, split):
    """List the files of a dataset, relative to the data folder, as torchvision expects them."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    if name == "emnist":
        return [f"EMNIST/raw/emnist-{split}-{half}-{kind}" for kind in kinds]
    if name in ("mnist", "fashion"):
        folder = "MNIST" if name == "mnist" else "FashionMNIST"
        return [f"{folder}/raw/{part}-{kind}" for part in ("train", "t10k") for kind in kinds]
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]
    return [f"cifar-10-batches-py/{batch}" for batch in batches]


def find_files(name, root, half, split, download):
    """See to it that a dataset's files are there: on disk, as NIST's .gz, else by download.

    :raises NotThereError: if they are not on disk and can't be downloaded, or shall not be
    """
    files = [root / file for file in needed_files(name, half, split)]
    where = f"put {', '.join(file.name for file in files)} into {files[0].parent}"
    for file in files:
        packed = file.with_name(f"{file.name}.gz")
        if download and not file.is_file() and packed.is_file():
            unpack(packed, file)
    if all(file.is_file() for file in files):
        return
    if not download:
        raise NotThereError(f"the {name} of this run isn't in {root}; {where}, or say --data-dir")
    if holds_pictures(root):
        raise UserError(f"{root} holds pictures, not {name}: say --dataset folder")
    print(f"{name} isn't in {root}; downloading it", file=sys.stderr)
    patience = socket.getdefaulttimeout()
    root.mkdir(parents=True, exist_ok=True)
    try:
        socket.setdefaulttimeout(20)  # seconds without a byte; a dead address may never answer
        # Half unpacked, a file would pass for whole; and another process may do the same.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as part:
            open_with_torchvision(name, Path(part), half, split, download=True)
            move_files(Path(part), root)
    except Exception as error:  # whatever a dead address or a changed archive raises
        why = (str(error).splitlines() or [type(error).__name__])[-1].strip("<>")
        raise NotThereError(f"{name} could not be downloaded ({why}); {where}") from error
    finally:
        socket.setdefaulttimeout(patience)


def move_files(source, target):
    """Move all files of a folder and its subfolders into those of another, each at once."""
    for file in sorted(file for file in source.rglob("*") if file.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def holds_pictures(root):
    """Tell whether a data folder is one of pictures, and not one that datasets go into."""
    if any((root / name).is_dir() for name in ("EMNIST", "MNIST", "FashionMNIST", "cache")):
        return False
    endings = picture_endings()
    patterns = ("*.*", "*/*.*", "train/*/*.*", "test/*/*.*")
    files = itertools.chain.from_iterable(root.glob(pattern) for pattern in patterns)
    return any(f.suffix.lower() in endings and not (f.parent != root and is_run(f.parent))
               for f in files)  # fmt: skip


def unpack(packed, file):
    """Unpack one .gz file beside itself, whole or not at all."""
    try:
        with replacing(file) as part, gzip.open(packed) as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # a full disk is no damage
        raise UserError(f"{packed} is damaged ({error}): delete it and fetch it again") from error


def open_with_torchvision(name, root, half, split, download=False):
    """Open a dataset with torchvision's own class."""
    from torchvision import datasets

    train = half == "train"
    if name == "emnist":
        return datasets.EMNIST(root, split, train=train, download=download)
    kinds = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    return kinds[name](root, train=train, download=download)


def read_files(name, root, half, split):
    """Decode the files of a dataset that torchvision knows.

    :return: images uint8 (N, C, H, W), labels int64 (N,), class names
    :rtype: tuple[torch.Tensor, torch.Tensor, list[str]]
    :raises UserError: if a file is damaged
    """
    where = (root / needed_files(name, half, split)[0]).parent
    advice = "delete them and fetch them again"
    try:
        dataset = open_with_torchvision(name, root, half, split)
        images = torch.as_tensor(dataset.data)
        labels = torch.as_tensor(dataset.targets).long()
    except Exception as error:  # torchvision lets through whatever a damaged file sets off
        why = type(error).__name__
        raise UserError(f"the {name} files in {where} are damaged ({why}): {advice}") from error
    # torchvision calls MNIST's classes "0 - zero"
    classes = [name.split(" - ")[0] for name in dataset.classes]
    if name == "emnist":
        images = images.transpose(-1, -2)  # NIST wrote columns as rows (torchvision issue 8783)
        if split == "letters":  # from 1 in the files, with a class "N/A" at 0
            labels = labels - 1
            classes = classes[1:]
    if not 0 < len(images) == len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        why = f"{len(images)} images, {len(labels)} labels"
        raise UserError(f"the {name} files in {where} are damaged ({why}): {advice}")
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), labels, classes


# ------------------------------------------------------------------------------ folders and glyphs


def read_folder(root, half, size):
    """Decode a folder of class folders: upright, shorter side resized to ``size``, centre kept.

    Links are followed. Hidden files and folders, and run folders, are no data. What else is left
    out is said in one line.

    :return: images uint8 (N, 3, size, size), labels int64 (N,), class names
    :rtype: tuple[torch.Tensor, torch.Tensor, list[str]]
    :raises UserError: if it has no picture that can be read
    """
    part = choose_half(root, half)
    if part is None:
        raise NotThereError(f"{root} has no folder test/: it needs train/ and test/")
    files, strange = list_pictures(part)
    dark = []

    def decode(file):
        try:
            picture = open_photo(file)
        except UserError:
            return None
        if "dark" in picture.info:
            dark.append(file)
        pixels = crop_square(picture, size, resample=Image.Resampling.BOX)
        return (pixels * 255).round().byte()

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
        images = list(threads.map(decode, files))
    # Pictures that lie in the folder itself, not in a folder of their class, are one class.
    names = [
        file.relative_to(part).parts[0] if file.parent != part else part.name for file in files
    ]
    good = [i for i, image in enumerate(images) if image is not None]
    broken = [file for file, image in zip(files, images, strict=True) if image is None]
    classes = sorted({names[i] for i in good})
    labels = torch.tensor([classes.index(names[i]) for i in good])
    empty = [folder for folder in visible_folders(part) if folder.name not in classes]
    warn_of("left out, no picture by its ending", strange)
    warn_of("left out, can't be read", broken)
    warn_of("left out, no picture in it", [folder for folder in empty if not is_run(folder)])
    warn_of("nearly black, 12 bits or fewer of 16", sorted(dark))
    if not good:
        raise NotThereError(f"{part} has no pictures: it needs one folder of them per class")
    return torch.stack([images[i] for i in good]), labels, [plain(name) for name in classes]


def warn_of(what, paths):
    """Count and name in one line the files that something is wrong with, if there are any."""
    if paths and is_first():
        also = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        print(f"warning: {what}: {plain(str(paths[0]))}{also}", file=sys.stderr)


def choose_half(root, half):
    """Return ROOT/train or ROOT/test if these are halves; a class may have such a name, too.

    :return: ``root`` itself if it has no halves; None if it has but not this one
    :rtype: pathlib.Path
    """
    folders = {folder.name for folder in visible_folders(root)}
    other = "train" if half == "test" else "test"
    only_halves = bool(folders) and folders <= {"train", "test", "val", "valid"}
    if half in folders and (only_halves or visible_folders(root / half)):
        return root / half
    if half == "test" or (only_halves and other in folders):
        return None
    return root


def visible_folders(root):
    """List the folders in a folder that are not hidden, links included, sorted."""
    if not root.is_dir():
        return []
    return [f for f in sorted(root.iterdir()) if not f.name.startswith(".") and f.is_dir()]


def is_run(folder):
    """Tell whether a folder is one that a script writes, or has written, its results into."""
    return any((folder / mark).exists() for mark in (*MARKS, "metrics.json", ".lock"))


def list_pictures(part):
    """List the files in a folder and its subfolders, but hidden ones.

    :param pathlib.Path part: links in it are followed, each folder once
    :return: pictures, by their endings, and the others, both sorted
    :rtype: tuple[list[pathlib.Path], list[pathlib.Path]]
    """
    endings = picture_endings()
    pictures = []
    others = []
    seen = set()
    for folder, folders, files in os.walk(part, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or (Path(folder) != part and is_run(Path(folder))):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(folder, name) for name in files if not name.startswith(".")):
            (pictures if file.suffix.lower() in endings else others).append(file)
    return sorted(pictures), sorted(others)


def check_dataset(dataset, size=None):
    """Refuse a dataset, perhaps one that a user has put together, that can't be trained on.

    :param Dataset dataset: of any kind
    :param int size: the side that images must have; None for any
    :return: the same
    :rtype: Dataset
    :raises UserError: if the images aren't uint8, (N, 1 or 3, size, size), or the labels don't fit
    """
    images = torch.as_tensor(dataset.images)
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3)
    if not fits or images.shape[2] != images.shape[3] or size not in (None, images.shape[3]):
        side = size or "side"
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        wanted = f"uint8, from 0 to 255, (N, 1 or 3, {side}, {side})"
        raise UserError(f"the images of {dataset.name} are {found}: make them {wanted}")
    labels = torch.as_tensor(dataset.labels)
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"{dataset.name} has {len(images)} images, and labels {tuple(labels.shape)}"
        )
    return dataset._replace(images=images, labels=labels)


def load_glyphs(cache, half, count, keep):
    """Draw the built-in characters, or read those that an earlier run has drawn.

    :param pathlib.Path cache: the folder that keeps them
    :param str half: "train" or "test", each from a seed of its own
    :param int count: how many
    :param bool keep: keep those that are drawn now
    :return: images uint8 (N, 1, 28, 28), labels int64 (N,), class names
    :rtype: tuple[torch.Tensor, torch.Tensor, list[str]]
    """
    from common.glyphs import CLASSES, draw_glyphs

    file = cache / f"glyphs-{GLYPHS_VERSION}-{count}-{half}.pt"
    try:
        saved = read_tensors(file)
        images, labels = saved["images"], saved["labels"]
        fits = images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8
        fits = fits and labels.shape == (count,) and labels.dtype == torch.int64
        if fits and labels.min() >= 0 and labels.max() < len(CLASSES):
            return images, labels, CLASSES
    except Exception:  # absent or damaged: it is only a cache
        pass
    images, labels = draw_glyphs(count, seed=0 if half == "train" else 1)
    if not keep or holds_pictures(cache.parent):
        return images, labels, CLASSES
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_checkpoint(file, {"images": images, "labels": labels})
    except OSError as error:  # a read-only data folder costs time, not the run
        if is_first():
            print(f"warning: no cache written ({error.strerror}: {file})", file=sys.stderr)
    return images, labels, CLASSES
