"""Read photos: find them, turn them upright, bring them to sRGB, crop them to a tensor."""

import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageCms, ImageOps

from common.errors import UserError

SAMPLES = {  # CC0, they come with scikit-image
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
}
# Of all that Pillow opens, what photos come as; not EPS, for instance, which it hands to another
# program to be executed.
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
Image.init()
FORMATS &= Image.OPEN.keys()
MOST_PIXELS = 89_478_485  # a quarter of a GiB; Pillow's own limit, from which on it only warns
LONGEST = 20  # times the shorter side: from a longer picture the crop would show next to nothing


def find_photos(paths):
    """List the pictures that are meant by files, folders and ``sample:NAME``.

    :param list[str] paths: files are taken as they are; of a folder all files that are named as
        pictures, sorted, without its subfolders
    :return: files and samples, each as it would be given, in order, without repetition
    :rtype: list[str]
    :raises UserError: if one isn't there, or a folder has no pictures
    """
    known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = {}
    for path in map(str, paths):
        if path.startswith("sample:"):
            if path[7:] not in SAMPLES:
                raise UserError(f"no {path}: there are sample:" + ", sample:".join(SAMPLES))
            found[path] = None
        elif os.path.isdir(path):
            files = [f for f in sorted(Path(path).iterdir()) if f.suffix.lower() in known]
            files = [str(f) for f in files if not f.is_dir()]
            if not files:
                raise UserError(f"{path} has no pictures: give a folder of .jpg or .png files")
            found |= dict.fromkeys(files)
        elif os.path.exists(path):
            found[path] = None
        else:
            raise UserError(f"no picture at {path}: give a file, a folder or sample:coffee")
    return list(found)


def open_photo(path):
    """Open a picture of any kind as 8-bit sRGB, upright.

    Rotated as its EXIF data say; transparency on white; colour profiles (of CMYK files, of
    cameras) applied; of 16 bits the upper 8; of an animation the first frame.

    :param str path: a file, or ``sample:NAME``
    :return: the picture, mode RGB
    :rtype: PIL.Image.Image
    :raises UserError: if it can't be read, or is too large to be a photo
    """
    sample = path.removeprefix("sample:")
    if sample != path and sample in SAMPLES:
        return Image.fromarray(SAMPLES[sample]())
    if not os.path.isfile(path):  # nor a pipe, which might never be filled
        raise UserError(f"{path} is no file: give a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are what counts
            with Image.open(path, formats=list(FORMATS)) as file:
                if file.width * file.height > MOST_PIXELS:
                    size = f"{file.width} x {file.height}"
                    raise UserError(f"{path} has {size} pixels: scale it down")
                profile, picture = file.info.get("icc_profile"), file
                file.load()
                with contextlib.suppress(Exception):  # damaged EXIF data cost no photo
                    picture = ImageOps.exif_transpose(file)
                return to_rgb(picture, profile)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels for a photo: scale it down") from error
    except MemoryError as error:
        raise UserError(f"{path} needs more memory than there is: scale it down") from error
    except Exception as error:  # Pillow's readers let through whatever damage sets off in them
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{path} is not a readable picture ({why}): convert or remove it"
        ) from error


def to_rgb(picture, profile=None):
    """Convert a picture of any mode to 8-bit sRGB.

    :param PIL.Image.Image picture: upright
    :param bytes profile: its ICC profile, None for sRGB
    :return: mode RGB
    :rtype: PIL.Image.Image
    :raises ValueError: for a mode without a defined white, as floating point is
    """
    if picture.mode[0] in "IF":  # Pillow's convert would clip at 255
        values = np.asarray(picture)
        if picture.mode == "F" or values.min() < 0 or values.max() >= 2**16:
            raise ValueError("no defined white")
        picture = Image.fromarray((values >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    if picture.mode == "P":  # its profile is that of its palette's colours
        picture = picture.convert("RGB")
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a damaged profile, or one of another mode: the plain conversion must do
    return picture.convert("RGB")


def read_photo(path, resize, size, channels=3):
    """Read a picture as a classifier wants it: shorter side resized, centre cropped.

    :param str path: a file, or ``sample:NAME``
    :param int resize: what the shorter side is resized to, in pixels
    :param int size: side of the square that is cut out of its centre, in pixels
    :param int channels: 3 for sRGB, 1 for grey
    :return: (1, channels, size, size), float32, in [0, 1]
    :rtype: torch.Tensor
    :raises UserError: if it can't be read, or there is nothing to see
    """
    picture = open_photo(path).convert("RGB" if channels == 3 else "L")
    width, height = picture.size
    if max(width, height) > LONGEST * min(width, height):
        raise UserError(f"{path} is {width} x {height}, too long to crop: cut out a part of it")
    # One resampling of the part that is wanted: a long picture is never enlarged as a whole.
    side = min(width, height) * size / resize
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(picture)).view(size, size, channels)
    if pixels.min() == pixels.max():
        raise UserError(f"{path} is of one colour, there is nothing to explain: leave it out")
    return pixels.permute(2, 0, 1)[None].float() / 255
