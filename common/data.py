"""Datasets as one uint8 tensor: read once, by torchvision's readers, and cached beside the files.

At 28 x 28 pixels, decoding pictures one by one costs more than training on them. So a dataset is
one tensor (N, C, H, W) and a batch is a slice of it; no loader, no worker processes.
"""

import gzip
import hashlib
import shutil
import socket
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import resize, rgb_to_grayscale

from common.checkpoint import read_tensors, save_checkpoint
from common.device import is_first, share_from_first
from common.errors import UserError
from common.glyphs import CLASSES as GLYPH_CLASSES
from common.glyphs import draw_glyphs
from common.run import replacing

NAMES = ("auto", "emnist", "mnist", "fashion", "cifar10", "folder", "glyphs")
EMNIST_SPLITS = datasets.EMNIST.splits
CACHE_VERSION = 2  # raise it when the same files would give another tensor


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


def load_dataset(
    name, data_dir="data", train=True, split="balanced", size=None, channels=None, glyphs=None
):
    """Load one half of a dataset: from the cache, from its files, else from the network.

    :param str name: one of NAMES; "auto" is EMNIST or, where it can't be had, the glyphs
    :param str data_dir: where the files are or go to; for "folder" the folder of class folders,
        or of train/ and test/ with class folders in each
    :param bool train: the training half, or the test half
    :param str split: EMNIST only: which of its splits
    :param int size: side in pixels to resize to; None for as stored (a folder's pictures: 32)
    :param int channels: 1 or 3; None for as stored
    :param int glyphs: glyphs only: how many; None for 20,000 to train and 4,000 to test
    :return: the dataset
    :rtype: Dataset
    :raises UserError: if it can't be found, downloaded or read; says where its files belong
    """
    rest = (data_dir, train, split, size, channels, glyphs)
    # Rank 0 first: it downloads and fills the cache, and what it takes for "auto" is everybody's.
    first = load_half(name, *rest) if is_first() else None
    name = share_from_first(first and first.name)
    dataset = first or load_half(name, *rest)
    if is_first():
        print(f"{'data' if train else 'test':8s} {name}, {len(dataset.images):,} images, "
              f"{len(dataset.classes)} classes")  # fmt: skip
    return dataset


def load_half(name, data_dir, train, split, size, channels, glyphs):
    """Do what :func:`load_dataset` says, in one process."""
    if name == "auto":
        try:
            return load_half("emnist", data_dir, train, split, size, channels, glyphs)
        except NotThereError as error:
            print(f"WARNING: using the built-in glyphs INSTEAD of EMNIST: {error}", file=sys.stderr)
            return load_half("glyphs", data_dir, train, split, size, channels, glyphs)

    root, half = Path(data_dir), "train" if train else "test"
    if name == "glyphs":
        source = count = glyphs or (20_000 if train else 4_000)
        label = f"glyphs-{count}"
    else:
        files = find_files(name, root, half, split)
        source = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        label = f"emnist-{split}" if name == "emnist" else name
    stamp = hashlib.sha256(repr((CACHE_VERSION, source)).encode()).hexdigest()
    cache = root / "cache" / f"{label}-{half}-{size or 'stored'}-{channels or 'stored'}.pt"
    try:
        saved = read_tensors(cache)
        if saved["stamp"] == stamp:
            return Dataset(name, saved["images"], saved["labels"], saved["classes"])
    except Exception:  # absent, cut short or of another version: it is only a cache
        pass

    if name == "glyphs":
        images, labels = draw_glyphs(count, seed=0 if train else 1)
        classes = list(GLYPH_CLASSES)
    elif name == "folder":
        images, labels, classes = read_folder(folder_of(root, half), files, size or 32)
    else:
        images, labels, classes = read_files(name, root, half, split)
    images = fit(images, size, channels)
    state = {"stamp": stamp, "images": images, "labels": labels, "classes": classes}
    try:
        save_checkpoint(cache, state, keep=False)
    except OSError as error:  # a read-only data folder costs time, not the run
        print(f"warning: no cache written ({error.strerror}: {cache})", file=sys.stderr)
    return Dataset(name, images, labels, classes)


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


def folder_of(root, half):
    """Choose the folder of class folders: train/ or test/ where there is one, else ``root``."""
    return root / half if (root / half).is_dir() else root


def find_files(name, root, half, split):
    """Find a dataset's files: on disk, packed as NIST ships them (.gz), else by download.

    :raises NotThereError: if they are not on disk and the download fails
    """
    if name == "folder":
        part = folder_of(root, half)
        if part is root and half == "test":
            raise NotThereError(f"{root} has no folder test/: it needs train/ and test/")
        files = sorted(f for f in part.glob("*/**/*") if f.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise NotThereError(f"{part} has no pictures: it needs one folder of them per class")
        return files

    names = needed_files(name, half, split)
    files = [root / name for name in names]
    for file in files:
        packed = file.with_name(f"{file.name}.gz")
        if not file.is_file() and packed.is_file():
            unpack(packed, file)
    if not all(file.is_file() for file in files):
        print(f"{name} isn't in {root}; downloading it", file=sys.stderr)
        patience, found = socket.getdefaulttimeout(), [file for file in files if file.is_file()]
        try:
            socket.setdefaulttimeout(20)  # seconds without a byte; a dead address may never answer
            open_with_torchvision(name, root, half, split, download=True)
        except Exception as error:  # whatever a dead address, a proxy or a changed archive raises
            why = (str(error).splitlines() or [type(error).__name__])[-1].strip("<>")
            where = f"put {', '.join(file.name for file in files)} into {files[0].parent}"
            raise NotThereError(f"{name} could not be downloaded ({why}); {where}") from error
        else:
            found = files
        finally:
            socket.setdefaulttimeout(patience)
            for file in set(files) - set(found):  # half unpacked, it would pass for whole
                file.unlink(missing_ok=True)
    return files


def unpack(packed, file):
    """Unpack one .gz file beside itself, whole or not at all."""
    try:
        with replacing(file) as part, gzip.open(packed) as source, open(part, "wb") as target:
            shutil.copyfileobj(source, target)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:  # a full disk is no damage
        raise UserError(f"{packed} is damaged ({error}): delete it and fetch it again") from error


def open_with_torchvision(name, root, half, split, download=False):
    """Open a dataset with torchvision's own class."""
    if name == "emnist":
        return datasets.EMNIST(root, split, train=half == "train", download=download)
    kinds = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    return kinds[name](root, train=half == "train", download=download)


def read_files(name, root, half, split):
    """Decode the files of a dataset that torchvision knows.

    :return: images uint8 (N, C, H, W), labels int64 (N,), class names
    :rtype: tuple[torch.Tensor, torch.Tensor, list[str]]
    :raises UserError: if a file is damaged
    """
    try:
        dataset = open_with_torchvision(name, root, half, split)
        images = torch.as_tensor(dataset.data)
        labels = torch.as_tensor(dataset.targets).long()
    except Exception as error:  # torchvision lets through whatever a damaged file sets off
        images, labels, why = torch.empty(0, 0, 0), torch.empty(0), type(error).__name__
    else:
        why = f"{len(images)} images, {len(labels)} labels"
    # torchvision calls MNIST's classes "0 - zero"
    classes = [name.split(" - ")[0] for name in dataset.classes] if len(images) else []
    if name == "emnist":
        images = images.transpose(-1, -2)  # NIST wrote columns as rows (torchvision issue 8783)
        if split == "letters":  # from 1 in the files, with a class "N/A" at 0
            labels, classes = labels - 1, classes[1:]
    if not 0 < len(images) == len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        files = root / needed_files(name, half, split)[0].rsplit("/", 1)[0]
        raise UserError(f"the {name} files in {files} are damaged ({why}): delete and refetch them")
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous(), labels, classes


def read_folder(part, files, size):
    """Decode a folder of class folders: upright, shorter side resized to ``size``, centre kept."""
    # A folder without pictures is no class: our own cache/ is one.
    pictures, names = [], [file.relative_to(part).parts[0] for file in files]
    classes = sorted(set(names))
    for path in files:
        try:
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                if picture.mode.startswith("I"):  # 16 bits, which convert would clip at 255
                    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
                picture = picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path} is not a readable picture: mend or remove it") from error
        pictures.append(np.asarray(ImageOps.fit(picture, (size, size), Image.Resampling.BOX)))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([classes.index(name) for name in names]), classes


def fit(images, size, channels):
    """Resize to ``size`` x ``size`` and turn to ``channels``, where that is not so already."""
    if channels == 1 and images.shape[1] == 3:
        images = rgb_to_grayscale(images)
    elif channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1).contiguous()
    if size and images.shape[-2:] != (size, size):
        images = torch.cat([resize(chunk, [size, size]) for chunk in images.split(4096)])
    return images
