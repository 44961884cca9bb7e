"""Pictures: one way to read them, and grids, captions, curves, PNG and GIF, each written whole."""

import contextlib
import functools
import io
import os
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps
from torch.nn import functional as F

from common.errors import UserError
from common.run import replacing

# Of all that Pillow opens, what pictures come as; not EPS, for instance, which it hands to another
# program to be executed.
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"]
MOST_PIXELS = 89_478_485  # a quarter of a GiB; Pillow's own limit, from which on it only warns
LONGEST = 20  # times the shorter side
CAPTION = 22  # pixels of the strip below a picture
SHEET = 24_000_000  # pixels of a contact sheet; with captions and gaps some 100 MB of memory
# Matplotlib's colour map of that name, every fifth of its 256 colours: importing it takes longer
# than drawing.
INFERNO = bytes.fromhex(
    "00000402020c0504170a072210092d160b391e0c45260c512f0a5b380962400a67490b6a510e6c"
    "59106e61136e69166e71196e781c6d801f6c88226a902568982766a02a63a82e5fb0315bb73557"
    "bf3952c63d4dcc4248d34743d94d3ddf5337e45a31e9612bed6925f1711ff47918f78212f98b0b"
    "fa9407fb9d07fca60cfcb014fbba1ffac42af8cd37f6d746f4e156f2ea69f2f27df5f992fcffa4"
)


# ---------------------------------------------------------------------------------------- reading


def picture_endings():
    """Return the endings, in lower case, of the files that :func:`open_picture` reads."""
    Image.init()
    return {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}


def open_picture(path):
    """Open a picture of any kind as 8-bit sRGB, upright.

    Rotated as its EXIF data say; transparency on white; colour profiles (of CMYK files, of
    cameras) applied; of 16 bits the upper 8; of an animation the first frame. Where 12 bits in 16
    leave it nearly black, ``info["dark"]`` says so.

    :param str path: the file
    :return: the picture, mode RGB
    :rtype: PIL.Image.Image
    :raises UserError: if it can't be read, or has too many pixels
    """
    if not os.path.isfile(path):  # nor a pipe, which might never be filled
        raise UserError(f"{path} is no file: give a picture")
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels are what counts
            with Image.open(path, formats=known) as file:
                if file.width * file.height > MOST_PIXELS:
                    size = f"{file.width} x {file.height}"
                    raise UserError(f"{path} has {size} pixels: scale it down")
                profile = file.info.get("icc_profile")
                file.load()
                picture = file
                with contextlib.suppress(Exception):  # damaged EXIF data cost no picture
                    picture = ImageOps.exif_transpose(file)
                return to_rgb(picture, profile)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels: scale it down") from error
    except MemoryError as error:
        raise UserError(f"{path} needs more memory than there is: scale it down") from error
    except Exception as error:  # Pillow's readers let through whatever damage sets off in them
        why = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{path} is not a readable picture ({why}): convert or remove it"
        ) from error


def open_photo(path):
    """Open a picture by :func:`open_picture`, but refuse one of which a crop would show nothing."""
    picture = open_picture(path)
    if max(picture.size) > LONGEST * min(picture.size):
        size = f"{picture.width} x {picture.height}"
        raise UserError(f"{path} is {size}, too long to crop: cut out a part of it")
    return picture


def open_as_it_is(path):
    """Open a picture of a library, which needs no second look; its profile isn't applied."""
    return Image.open(path)


def to_rgb(picture, profile=None):
    """Convert a picture of any mode to 8-bit sRGB.

    :param PIL.Image.Image picture: upright
    :param bytes profile: its ICC profile, None for sRGB
    :return: mode RGB
    :rtype: PIL.Image.Image
    :raises ValueError: if it isn't clear which number is white
    """
    if picture.mode[0] in "IF":  # Pillow's convert would clip at 255
        picture = to_8_bits(np.asarray(picture))
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


def crop_square(picture, size, fraction=1.0, resample=Image.Resampling.BICUBIC):
    """Cut a square out of a picture's centre, resize it, and turn it into a tensor.

    One resampling of the part that is wanted: a long picture is never enlarged as a whole.

    :param PIL.Image.Image picture: mode L or RGB
    :param int size: side to resize to, in pixels
    :param float fraction: side of the square, as a fraction of the picture's shorter side
    :param PIL.Image.Resampling resample: the filter
    :return: (1 or 3, size, size), float32, in [0, 1]
    :rtype: torch.Tensor
    """
    side = min(picture.size) * fraction
    left = (picture.width - side) / 2
    top = (picture.height - side) / 2
    picture = picture.resize((size, size), resample, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(picture)).view(size, size, -1)
    return pixels.permute(2, 0, 1).float() / 255


def to_8_bits(values):
    """Convert grey values of 16 or 32 bits, or floats, (H, W), to a picture.

    White is 1 for floats up to 1, 255 for other floats, and 65,535 for integers.

    :raises ValueError: if a value lies outside
    """
    is_float = values.dtype.kind == "f"
    white = 2**16 - 1
    if is_float:
        white = 1 if values.max() <= 1 else 255
    if not 0 <= values.min() <= values.max() <= white:  # also refuses NaN
        raise ValueError(f"values from {values.min():g} to {values.max():g}")
    if is_float:
        return Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    picture = Image.fromarray((values >> 8).astype(np.uint8))
    if values.max() < 2**12:
        picture.info["dark"] = f"nearly black, as {values.max()} of {white} is its brightest"
    return picture


# ---------------------------------------------------------------------------------------- writing


def to_grid(images, columns, scale=2, gap=2):
    """Lay images out in rows, on one fixed range, so that two grids can be compared.

    :param torch.Tensor images: (N, C, H, W), in [0, 1], C 1 or 3
    :param int columns: images in a row; an unfinished last row is filled up with grey
    :param int scale: side of one image's pixel, in pixels
    :param int gap: grey pixels around each image, before scaling
    :return: the picture, uint8, (H', W', 3)
    :rtype: numpy.ndarray
    """
    from torchvision.utils import make_grid

    grid = make_grid(images.detach().float().cpu().clamp(0, 1), columns, gap, pad_value=0.25)
    picture = (grid * 255).round().byte().permute(1, 2, 0).numpy()
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def to_grey(heat):
    """Turn a map in [0, 1] into a grey picture: (H, W) to uint8 (H', W', 3), 224 pixels or more."""
    return to_pixels(heat.unsqueeze(0))


def to_pixels(photo):
    """Turn a photo in [0, 1] into a picture: (C, H, W) to uint8 (H', W', 3), 224 pixels or more."""
    pixels = (photo * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return magnify(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def magnify(picture):
    """Repeat the pixels of a small picture, (H, W, 3), until it has about 224 a side."""
    scale = max(1, 224 // picture.shape[1])
    return picture.repeat(scale, 0).repeat(scale, 1)


def to_colours(heat):
    """Colour a map in [0, 1] from black over red to bright yellow: (H, W) to float (H, W, 3)."""
    colours = np.frombuffer(INFERNO, np.uint8).reshape(-1, 3)
    places = np.linspace(0, 1, len(colours))
    heat = heat.cpu().numpy()
    return np.stack([np.interp(heat, places, channel) for channel in colours.T], axis=2)


def lay_over(photo, heat):
    """Lay a map, (H, W), in colours over its greyed photo, (C, H, W); both in [0, 1].

    :return: uint8, (H', W', 3), of at least 224 pixels
    :rtype: numpy.ndarray
    """
    strength = heat.sqrt().unsqueeze(2).cpu().numpy()
    grey = (photo.mean(0) * 0.6 + 0.3).unsqueeze(2).cpu().numpy() * 255
    mixed = strength * to_colours(heat) + (1 - strength) * grey
    return magnify(mixed.round().astype(np.uint8))


def gaussian_blur(x, sigma):
    """Blur images, (N, C, H, W), by a Gaussian of that many pixels, reflected at the border.

    What torchvision's gaussian_blur computes, whose import takes longer.
    """
    radius = int(3 * sigma)
    # The last bits depend on the way to write it: this is torchvision's.
    place = torch.linspace(-radius * 2**-0.5, radius * 2**-0.5, 2 * radius + 1, device=x.device)
    weights = (place / sigma).square().neg().softmax(0)
    kernel = (weights.view(-1, 1) * weights).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, [radius] * 4, mode="reflect"), kernel, groups=x.shape[1])


@functools.cache
def get_font(size):
    """Load the font of the panels, matplotlib's, whose letters are those of many languages."""
    folder = Path(find_spec("matplotlib").origin).parent  # without importing it
    return ImageFont.truetype(str(folder / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def add_title(picture, text, size=13, below=False):
    """Write centred lines of black text on a white strip above a picture, or below.

    :param numpy.ndarray picture: uint8, (H, W, 3)
    :param str text: one line or more
    :param int size: of the font, in pixels; smaller for lines that are too long
    :param bool below: where the strip is
    :return: uint8, (H', W, 3)
    :rtype: numpy.ndarray
    """
    height, width = picture.shape[:2]
    lines = text.split("\n")
    strip = (size + 5) * len(lines) + 4
    canvas = Image.new("RGB", (width, height + strip), "white")
    canvas.paste(Image.fromarray(picture), (0, 0 if below else strip))
    middle = (width / 2, height + strip / 2 if below else strip / 2)
    draw = ImageDraw.Draw(canvas)
    while size > 6 and max(draw.textlength(line, get_font(size)) for line in lines) > width:
        size -= 1
    draw.multiline_text(middle, text, "black", get_font(size), "mm", 5, align="center")
    return np.asarray(canvas)


def side_by_side(pictures, gap=10):
    """Join pictures, uint8, (H, W, 3), in a row; the lower ones are filled up with white below."""
    height = max(len(picture) for picture in pictures)
    cells = []
    for picture in pictures:
        missing = height - len(picture)
        margin = ((0, missing), (gap // 2, gap // 2), (0, 0))
        cells.append(np.pad(picture, margin, constant_values=255))
    return np.concatenate(cells, axis=1)


def add_caption(picture, text):
    """Write a line of text on a strip below a picture.

    :param numpy.ndarray picture: uint8, (H, W, 3)
    :param str text: one line
    :return: uint8, (H + CAPTION, W, 3)
    :rtype: numpy.ndarray
    """
    height, width = picture.shape[:2]
    canvas = Image.new("RGB", (width, height + CAPTION))
    canvas.paste(Image.fromarray(picture))
    ImageDraw.Draw(canvas).text((6, height + 3), text, "white", ImageFont.load_default(14))
    return np.asarray(canvas)


def save_png(path, picture):
    """Write a picture atomically.

    :param pathlib.Path path: the file
    :param numpy.ndarray picture: uint8, (H, W, 3)
    """
    with replacing(path) as part:
        Image.fromarray(picture).save(part, compress_level=3)  # half the time of 6, as small


def save_gif(path, frames, seconds=12):
    """Write an animation that repeats for ever and rests on its last frame; atomically.

    :param pathlib.Path path: the file
    :param list[numpy.ndarray] frames: pictures of one size, uint8, (H, W, 3)
    :param float seconds: length of one round, without the rest; a frame takes at most half a second
    """
    import imageio.v3 as iio

    each = min(500, max(40, 1000 * seconds / len(frames)))  # milliseconds; viewers slow down < 40
    durations = [each] * (len(frames) - 1) + [2000]
    if len(frames) == 1:
        durations = 2000  # of one picture Pillow wants a number
    frames = [frame // 8 * 8 for frame in frames]  # 32 greys do, and keep a hundred below 3 MB
    # Given a file, imageio would write once more, and complain, while it is thrown away.
    options = {"extension": ".gif", "plugin": "pillow", "duration": durations, "loop": 0}
    with replacing(path) as part:
        part.write_bytes(iio.imwrite("<bytes>", frames, **options))


def save_figure(path, figure, dpi=110):
    """Write a figure of matplotlib atomically.

    :param pathlib.Path path: the PNG file
    :param matplotlib.figure.Figure figure: what to draw
    :param int dpi: pixels of an inch
    """
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font hasn't got
        figure.savefig(part, dpi=dpi)


def plot_curves(path, rows, panels, floors=None):
    """Plot columns of a table against its first one; atomically.

    :param pathlib.Path path: the PNG file
    :param list[dict] rows: one per epoch or step
    :param list[tuple[str]] panels: the columns to draw, panel by panel; a row may
        lack some, and a panel that no row has anything for is left out
    :param dict floors: by column, a value to mark by a dashed line; that panel's axis is then
        logarithmic, as for a distance that should go down to it
    """
    from matplotlib.figure import Figure

    panels = [names for names in panels if any(name in row for row in rows for name in names)]
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    first = next(iter(rows[0]))
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            values = [row.get(name, np.nan) for row in rows]
            axes.plot([row[first] for row in rows], values, marker=".", label=name)
            if floors and name in floors:
                axes.axhline(floors[name], linestyle="--", color="grey", label=f"{name}, floor")
                axes.set_yscale("log")
        axes.set_xlabel(first)
        axes.legend()
    save_figure(path, figure, dpi=120)


def contact_sheet(path, pictures, columns=4, side=280):
    """Show many pictures at once; atomically.

    :param pathlib.Path path: the PNG file
    :param dict[pathlib.Path, str] pictures: captions by file; missing files are left out
    :param int columns: pictures in a row; of hundreds there are more columns, of smaller ones
    :param int side: of one picture's longer side, in pixels
    """
    pictures = {file: caption for file, caption in pictures.items() if file.is_file()}
    if not pictures:
        return
    shrink = max(1, (len(pictures) * side**2 / SHEET) ** 0.5)
    columns = min(round(columns * shrink), len(pictures))
    side = int(side / shrink)
    thumbnails = []
    for file in pictures:
        thumbnail = open_picture(file)
        thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
        thumbnails.append(thumbnail)
    width = max(thumbnail.width for thumbnail in thumbnails)
    height = max(thumbnail.height for thumbnail in thumbnails)
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 10), rows * (height + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for i, (thumbnail, caption) in enumerate(zip(thumbnails, pictures.values(), strict=True)):
        left = i % columns * (width + 10) + 5
        top = i // columns * (height + 30)
        caption = to_line(caption)
        while caption and draw.textlength(caption, font) > width:
            caption = "…" + caption[2:]  # the end of a path says more than its beginning
        draw.text((left, top + 6), caption, "black", font)
        sheet.paste(thumbnail, (left, top + 26))
    save_png(path, np.asarray(sheet))


def to_line(text, most=None):
    """Turn a name into one line that can be drawn: names of files may hold anything.

    :param str text: the name
    :param int most: characters that there is room for; None for any number
    """
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return line if most is None or len(line) <= most else line[: most - 1] + "…"
