"""Datasets as one uint8 tensor, decoded once by torchvision's readers.

At 28 x 28 pixels, decoding pictures one by one costs more than training on them. So a dataset is
one tensor (N, C, H, W) and a batch is a slice of it; no loader, no worker processes.
"""

import gzip
import os
import shutil
import socket
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from common.device import is_first, share_from_first
from common.errors import UserError
from common.images import crop_square, open_picture, picture_endings
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


def load_dataset(name, data_dir="data", train=True, split="balanced", size=None, glyphs=20_000):
    """Load one half of a dataset: from its files, else from the network.

    :param str name: one of NAMES; "auto" is EMNIST or, where it can't be had, the glyphs
    :param str data_dir: where the files are or go to; for "folder" the folder of class folders,
        or of train/ and test/ with class folders in each
    :param bool train: the training half, or the test half
    :param str split: EMNIST only: which of its splits
    :param int size: side in pixels to resize to; None for as stored (a folder's pictures: 32)
    :param int glyphs: glyphs only: how many to draw
    :return: the dataset
    :rtype: Dataset
    :raises UserError: if it can't be found, downloaded or read; says where its files belong
    """
    options = (Path(data_dir), "train" if train else "test", split, size, glyphs)
    # Rank 0 first: it downloads and fills the cache, and what it takes for "auto" is everybody's.
    dataset = None
    if is_first():
        dataset = load_half(name, *options)
        print(f"{'data' if train else 'test':8s} {dataset.name}, {len(dataset.images):,} images, "
              f"{len(dataset.classes)} classes")  # fmt: skip
    name = share_from_first(dataset and dataset.name)
    return dataset or load_half(name, *options)


def load_half(name, root, half, split, size, glyphs):
    """Do what :func:`load_dataset` says, in one process."""
    if name == "auto":
        try:
            return load_half("emnist", root, half, split, size, glyphs)
        except NotThereError as error:
            print(f"WARNING: using the built-in glyphs INSTEAD of EMNIST: {error}", file=sys.stderr)
            name = "glyphs"
    if name == "glyphs":
        images, labels, classes = load_glyphs(root / "cache", half, glyphs)
    elif name == "folder":
        images, labels, classes = read_folder(root, half, size or 32)
    else:
        find_files(name, root, half, split)
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


def find_files(name, root, half, split):
    """See to it that a dataset's files are there: on disk, as NIST's .gz, else by download.

    :raises NotThereError: if they are not on disk and the download fails
    """
    files = [root / file for file in needed_files(name, half, split)]
    for file in files:
        packed = file.with_name(f"{file.name}.gz")
        if not file.is_file() and packed.is_file():
            unpack(packed, file)
    missing = [file for file in files if not file.is_file()]
    if not missing:
        return
    print(f"{name} isn't in {root}; downloading it", file=sys.stderr)
    patience = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(20)  # seconds without a byte; a dead address may never answer
        open_with_torchvision(name, root, half, split, download=True)
    except BaseException as error:  # whatever a dead address, a changed archive or Ctrl-C raises
        for file in missing:  # half unpacked, it would pass for whole
            file.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        why = (str(error).splitlines() or [type(error).__name__])[-1].strip("<>")
        where = f"put {', '.join(file.name for file in files)} into {files[0].parent}"
        raise NotThereError(f"{name} could not be downloaded ({why}); {where}") from error
    finally:
        socket.setdefaulttimeout(patience)


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

    :return: images uint8 (N, 3, size, size), labels int64 (N,), class names
    :rtype: tuple[torch.Tensor, torch.Tensor, list[str]]
    :raises UserError: if it has no pictures, or one can't be read
    """
    part = root / half if (root / half).is_dir() else root
    if part is root and half == "test":
        raise NotThereError(f"{root} has no folder test/: it needs train/ and test/")
    endings = picture_endings()
    files = sorted(file for file in part.glob("*/**/*") if file.suffix.lower() in endings)
    if not files:
        raise NotThereError(f"{part} has no pictures: it needs one folder of them per class")

    def decode(file):
        pixels = crop_square(open_picture(file), size, resample=Image.Resampling.BOX)
        return (pixels * 255).round().byte()

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes without Python's lock
        pictures = list(threads.map(decode, files))
    images = torch.stack(pictures)
    names = [file.relative_to(part).parts[0] for file in files]
    classes = sorted(set(names))
    return images, torch.tensor([classes.index(name) for name in names]), classes


def load_glyphs(cache, half, count):
    """Draw the built-in characters, or read those that an earlier run has drawn.

    :param pathlib.Path cache: the folder that keeps them
    :param str half: "train" or "test", each from a seed of its own
    :param int count: how many
    :return: images uint8 (N, 1, 28, 28), labels int64 (N,), class names
    :rtype: tuple[torch.Tensor, torch.Tensor, list[str]]
    """
    from common.glyphs import CLASSES, draw_glyphs

    file = cache / f"glyphs-{GLYPHS_VERSION}-{count}-{half}.pt"
    try:
        saved = read_tensors(file)
        images, labels = saved["images"], saved["labels"]
        if images.shape == (count, 1, 28, 28) and images.dtype == torch.uint8:
            return images, labels, CLASSES
    except Exception:  # absent or damaged: it is only a cache
        pass
    images, labels = draw_glyphs(count, seed=0 if half == "train" else 1)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_checkpoint(file, {"images": images, "labels": labels})
    except OSError as error:  # a read-only data folder costs time, not the run
        print(f"warning: no cache written ({error.strerror}: {file})", file=sys.stderr)
    return images, labels, CLASSES
