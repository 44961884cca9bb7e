"""Pictures: read upright and in their colours, or refused in one line; written whole or not at all.

Where each image of a grid lands, that brightness means the same everywhere, that no name or number
spoils a figure.
"""

import gc
import io
import os
import struct
import zlib

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from common.images import (
    SHEET,
    add_caption,
    add_title,
    contact_sheet,
    crop_square,
    gaussian_blur,
    open_picture,
    plot_curves,
    save_gif,
    save_png,
    side_by_side,
    to_colours,
    to_grey,
    to_grid,
)
from tests.helpers import POSIX, refusal
from tests.hostile import chunk, png, postscript

GREY = 64  # of the lines between the images of a grid
# Four quarters: red, green; blue, white.
QUARTERS = np.zeros((20, 30, 3), np.uint8)
QUARTERS[:10, :15, 0] = QUARTERS[:10, 15:, 1] = QUARTERS[10:, :15, 2] = QUARTERS[10:, 15:] = 255
SRGB = ImageCms.createProfile("sRGB")


def noise(height=24, width=32, seed=0):
    """Make a colour picture without any structure, uint8, (height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def corners(path):
    """Read a picture of 30 x 20 pixels, and return the colours of its corners, row by row."""
    picture = open_picture(path)
    assert picture.mode == "RGB"
    assert picture.size == (30, 20)
    places = ((0, 0), (29, 0), (0, 19), (29, 19))
    return np.array([picture.getpixel(place) for place in places], int)


def assert_quarters(path, tolerance=0):
    """Hold a file against the four quarters."""
    wanted = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert np.abs(corners(path) - wanted).max() <= tolerance


def write_png(path, width, height, bits, kind, values=None):
    """Write a PNG file by hand: of sizes and depths that Pillow doesn't write.

    :param numpy.ndarray values: 16 bits each, (H, W, C); None for a header without its pixels
    """
    rows = () if values is None else values.astype(">u2")
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    data = chunk(b"IDAT", zlib.compress(pixels))
    path.write_bytes(png(width, height, data, depth=bits, kind=kind))


# ------------------------------------------------------------------------------ read: right colours


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_every_exif_orientation_comes_out_upright(orientation, suffix, tmp_path):
    """Cameras store what the sensor saw, and how they were held."""
    turn = Image.Transpose
    stored = (
        turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE,
        turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270,
    )  # fmt: skip
    picture = Image.fromarray(QUARTERS)
    if orientation > 1:
        picture = picture.transpose(stored[orientation - 2])
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    assert_quarters(tmp_path / f"x.{suffix}", tolerance=8 if suffix == "jpg" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage!!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 50]
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_exif_data_cost_no_picture(exif, suffix, tmp_path, recwarn):
    """The pixels are what counts; Pillow's warnings stay out of sight."""
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    Image.fromarray(QUARTERS).save(tmp_path / f"x.{suffix}", exif=exif, **options)
    recwarn.clear()
    assert_quarters(tmp_path / f"x.{suffix}", tolerance=8)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "1"])
def test_modes_of_colour(mode, tmp_path):
    """Palettes, print colours, television colours, black and white: all are RGB in the end."""
    picture = Image.fromarray(QUARTERS)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode, dither=0)
    picture.save(tmp_path / "x.tif")
    if mode == "1":  # green alone is bright enough for white
        assert corners(tmp_path / "x.tif")[:, 0].tolist() == [0, 255, 0, 255]
    else:
        assert_quarters(tmp_path / "x.tif", tolerance=1)


@pytest.mark.parametrize("marker", [True, False], ids=["Adobe's marker", "without it"])
def test_print_colours_in_jpeg(marker, tmp_path):
    """All programs that write such files write them inverted, marked or not."""
    stream = io.BytesIO()
    Image.fromarray(QUARTERS).convert("CMYK").save(stream, "JPEG", quality=95)
    data = stream.getvalue()
    start = data.index(b"\xff\xee")  # the segment that says "Adobe"
    (length,) = struct.unpack(">H", data[start + 2 : start + 4])
    assert b"Adobe" in data[start : start + length]
    rest = data[start:] if marker else data[start + 2 + length :]
    (tmp_path / "x.jpg").write_bytes(data[:start] + rest)
    assert_quarters(tmp_path / "x.jpg", tolerance=8)


def test_transparency_is_white(tmp_path):
    """In palettes, in grey, in colour, in 8 and in 16 bits; half of it is half white."""
    alpha = np.full((20, 30), 255, np.uint8)
    alpha[:10, :15] = 0
    alpha[:10, 15:] = 51
    rgba = Image.fromarray(np.dstack([QUARTERS, alpha]))
    wanted = [[255, 255, 255], [204, 255, 204], [0, 0, 255], [255, 255, 255]]
    rgba.save(tmp_path / "rgba.png")
    write_png(tmp_path / "deep.png", 30, 20, 16, 6, np.dstack([QUARTERS, alpha]).astype(int) * 257)
    for name in ("rgba.png", "deep.png"):
        assert np.abs(corners(tmp_path / name) - wanted).max() <= 1
    rgba.convert("LA").save(tmp_path / "la.png")
    assert np.abs(corners(tmp_path / "la.png")[0] - 255).max() <= 1
    palette = Image.fromarray(QUARTERS).quantize(4)
    palette.save(tmp_path / "p.png", transparency=palette.getpixel((0, 0)))
    wanted = [[255, 255, 255], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert corners(tmp_path / "p.png").tolist() == wanted


@pytest.mark.parametrize("kind", ["png", "tif", "float up to 1", "float up to 255"])
def test_deep_greys_are_kept(kind, tmp_path):
    """A ramp of 16 bits, or of floats, stays a ramp: not clipped at 255."""
    ramp = np.arange(256).repeat(4).reshape(256, 4).T
    path = tmp_path / ("x.png" if kind == "png" else "x.tif")
    if kind in ("png", "tif"):
        values = (ramp * 257).astype(np.uint16)
    else:
        values = (ramp / (255 if kind == "float up to 1" else 1)).astype(np.float32)
    Image.fromarray(values).save(path)
    assert np.array_equal(np.asarray(open_picture(path))[..., 1], ramp)


def test_deep_colours(tmp_path):
    """16 bits by three; and 12 bits in 16, which leave a picture nearly black, are told of."""
    write_png(tmp_path / "x.png", 30, 20, 16, 2, QUARTERS.astype(int) * 257)
    assert_quarters(tmp_path / "x.png")
    Image.fromarray(np.uint16([[0, 4095]])).save(tmp_path / "dark.png")
    picture = open_picture(tmp_path / "dark.png")
    assert np.asarray(picture).max() == 15
    assert "4095" in picture.info["dark"]


@pytest.mark.parametrize(
    "values",
    [np.float32([[0, 300]]), np.float32([[-0.1, 1]]), np.float32([[0, np.nan]]),
     np.int32([[-5, 70]]), np.int32([[0, 70_000]])],
)  # fmt: skip
def test_numbers_without_a_white_are_refused(values, tmp_path):
    """Nobody knows which of them is white."""
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert "x.tif" in refusal(open_picture, tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_is_its_first_frame(suffix, tmp_path):
    """GIF, APNG, WebP."""
    frames = [Image.fromarray(np.full((20, 30, 3), v, np.uint8)) for v in (200, 10, 90)]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(corners(tmp_path / f"x.{suffix}") - 200).max() <= 2


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_applied(mode, tmp_path):
    """Of a camera whose red is our green; also for colours of a palette, or transparent ones."""
    profile = ImageCms.ImageCmsProfile(SRGB).tobytes()
    for old, new in ((b"rXYZ", b"tXYZ"), (b"gXYZ", b"rXYZ"), (b"tXYZ", b"gXYZ")):
        profile = profile.replace(old, new)
    picture = Image.fromarray(QUARTERS)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "x.png", icc_profile=profile)
    wanted = [[0, 255, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255]]
    assert np.abs(corners(tmp_path / "x.png") - wanted).max() <= 3


@pytest.mark.parametrize("profile", [b"garbage" * 30, b"\0" * 128, "of another mode"])
def test_a_damaged_profile_is_left_aside(profile, tmp_path):
    """The plain colours must do."""
    if profile == "of another mode":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(QUARTERS).save(tmp_path / "x.png", icc_profile=profile)
    assert_quarters(tmp_path / "x.png")


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (200, 10), (2, 3), (700, 700)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_crop_square(size, mode):
    """Whatever goes in, a square of the size and the channels asked for comes out."""
    x = crop_square(Image.effect_noise(size, 90).convert(mode), 32, 0.9)
    assert x.shape == (len(mode), 32, 32)
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1


def test_crop_square_resizes_and_crops_as_torchvision_does():
    """One resampling in place of two steps; on a smooth picture they are alike."""
    from torchvision.transforms.v2 import functional as tv

    y, x = np.mgrid[:200, :300]
    waves = np.stack([np.sin(x / 19), np.cos(y / 17), np.sin((x + y) / 23)], 2)
    picture = Image.fromarray((waves * 100 + 128).astype(np.uint8))
    wanted = tv.center_crop(tv.resize(picture, 64, tv.InterpolationMode.BICUBIC), 56)
    wanted = np.asarray(wanted).transpose(2, 0, 1) / 255
    found = crop_square(picture, 56, 56 / 64).numpy()
    assert np.abs(found - wanted)[:, 2:-2, 2:-2].max() < 0.05
    assert np.abs(found - wanted).mean() < 0.005


@pytest.mark.parametrize(("size", "sigma"), [(224, 10.0), (28, 1.25), (9, 0.2)])
def test_a_blur_is_torchvisions(size, sigma):
    """To the last bit: masks are learned with it."""
    from torchvision.transforms.v2 import functional as tv

    x = torch.rand(2, 3, size, size)
    assert torch.equal(gaussian_blur(x, sigma), tv.gaussian_blur(x, 2 * int(3 * sigma) + 1, sigma))


# --------------------------------------------------------------------------- read: what isn't one


def test_files_that_are_no_pictures(tmp_path, monkeypatch):
    """Text, nothing, a half, a header without its pixels, EPS, which would be executed."""
    run = "PIL.EpsImagePlugin.Ghostscript"
    monkeypatch.setattr(run, lambda *_, **__: pytest.fail("executed"))
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(stream, "JPEG")
    jpeg = stream.getvalue()
    files = {
        "text.jpg": b"no picture",
        "nothing.png": b"",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "start.jpg": jpeg[:30],
        "damaged.jpg": jpeg[:100] + b"\0" * 400 + jpeg[500:600],
        "page.eps": postscript(tmp_path / "harm"),
        "page.jpg": postscript(tmp_path / "harm"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    write_png(tmp_path / "header.png", 9000, 9000, 8, 2)
    for name in [*files, "header.png", "not\nthere.png", "."]:
        message = refusal(open_picture, tmp_path / name)
        assert str(tmp_path / name).replace("\n", " ") in message


@pytest.mark.parametrize("side", [9500, 14000, 50000])
def test_a_decompression_bomb_is_refused_unopened(side, tmp_path, recwarn):
    """From the size that its header declares, with no warning beside the error."""
    write_png(tmp_path / "bomb.png", side, side, 8, 2)
    assert "scale it down" in refusal(open_picture, tmp_path / "bomb.png")
    assert not recwarn.list


@POSIX
@pytest.mark.parametrize("name", ["pipe.jpg", "/dev/zero", "/dev/full"])
def test_what_has_no_end_is_not_read(name, tmp_path):
    """A pipe that nobody writes to, a device that never stops: both would hang."""
    if not name.startswith("/"):
        name = str(tmp_path / name)
        os.mkfifo(name)
    assert "is no file" in refusal(open_picture, name)


# ------------------------------------------------------------------------------------------- grids


def test_grid_puts_every_image_in_its_place():
    """Images run from left to right, then down; each pixel is where it should be."""
    torch.manual_seed(0)
    images = torch.rand(6, 3, 4, 5)
    grid = to_grid(images, columns=3, scale=2, gap=1)
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * (2 * 5 + 1), 2 * (3 * 6 + 1), 3)
    wanted = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(6):
        top = 2 * (i // 3 * 5 + 1)
        left = 2 * (i % 3 * 6 + 1)
        cell = grid[top : top + 8, left : left + 10]
        assert np.array_equal(cell, wanted[i].repeat(2, 0).repeat(2, 1))
        assert (grid[top - 2 : top, left : left + 10] == GREY).all()
        assert (grid[top : top + 8, left - 2 : left] == GREY).all()


def test_grid_has_one_fixed_range():
    """A bright image changes no other, so that the frames of a GIF don't flicker."""
    images = torch.full((4, 1, 3, 3), 0.2, requires_grad=True)
    before = to_grid(images, columns=2, scale=1, gap=0)
    assert (before == 51).all()
    brighter = torch.cat([images[:3], torch.full((1, 1, 3, 3), 7.0)])  # more than white is white
    after = to_grid(brighter, columns=2, scale=1, gap=0)
    assert (after[3:, 3:] == 255).all()
    after[3:, 3:] = 51
    assert np.array_equal(before, after)


def test_grid_fills_an_unfinished_row():
    """Five images in rows of three leave one empty place."""
    grid = to_grid(torch.ones(5, 1, 2, 2), columns=3, scale=1, gap=0)
    wanted = np.full((4, 6, 3), 255)
    wanted[2:, 4:] = GREY
    assert np.array_equal(grid, wanted)


@pytest.mark.parametrize(("side", "shape"), [(224, 224), (32, 224), (300, 300), (100, 200)])
def test_to_grey_keeps_the_values(side, shape):
    """Small maps are enlarged by whole pixels; 0 is black, 1 is white."""
    heat = torch.rand(side, side)
    heat[0, 0] = 0
    heat[-1, -1] = 1
    picture = to_grey(heat)
    assert picture.shape == (shape, shape, 3)
    assert picture.dtype == np.uint8
    wanted = (heat * 255).round().numpy().repeat(shape // side, 0).repeat(shape // side, 1)
    assert all(np.array_equal(picture[..., channel], wanted) for channel in range(3))


def test_caption_is_below_and_readable():
    """The picture stays as it is; below it is a strip that differs from text to text."""
    picture = noise(width=200)
    one = add_caption(picture, "epoch 1")
    assert one.shape == (24 + 22, 200, 3)
    assert np.array_equal(one[:24], picture)
    assert one[24:].max() > 200  # white on
    assert np.median(one[24:]) == 0  # black
    assert not np.array_equal(one, add_caption(picture, "epoch 2"))
    assert (one[[24, -1]] == 0).all()  # not cut off at the top nor at the bottom


# ------------------------------------------------------------------------------------------- files


def test_png_is_exact(tmp_path):
    """What was saved is what is read."""
    save_png(tmp_path / "a.png", noise())
    assert np.array_equal(iio.imread(tmp_path / "a.png"), noise())
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("count", "seconds", "each"), [(4, 1, 250), (3, 100, 500), (60, 1, 40), (1, 12, 2000)]
)
def test_gif_plays_every_frame_for_ever(count, seconds, each, tmp_path):
    """In order and size, neither too fast for viewers nor too slow, with a rest on the last one."""
    frames = [np.full((24, 32, 3), 8 * (9 * i % 32), np.uint8) for i in range(count)]
    save_gif(tmp_path / "a.gif", frames, seconds)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (count, (32, 24), 0)
        for i, frame in enumerate(frames):
            gif.seek(i)
            assert gif.info["duration"] == (each if i < count - 1 else 2000)
            assert abs(np.asarray(gif.convert("RGB")).astype(int) - frame).max() < 8


def test_gif_stays_small(tmp_path):
    """A hundred frames of a grid stay fit for a web page, even of noise, which can't be packed."""
    frames = [to_grid(torch.rand(70, 1, 28, 28), columns=10) for _ in range(8)]
    assert frames[0].shape == (7 * 60 + 4, 604, 3)
    save_gif(tmp_path / "noise.gif", frames)
    assert (tmp_path / "noise.gif").stat().st_size / 8 < 200_000  # 20 MB in a hundred frames
    # What a trained generator draws: strokes, here soft blobs, a little unlike in every frame.
    y, x = np.mgrid[:480, :560] / 40
    blobs = [np.clip(300 * np.sin(x + 0.1 * i) * np.cos(y) - 150, 0, 255) for i in range(8)]
    save_gif(tmp_path / "blobs.gif", [b.astype(np.uint8)[..., None].repeat(3, 2) for b in blobs])
    assert (tmp_path / "blobs.gif").stat().st_size / 8 < 30_000  # 3 MB


@pytest.mark.parametrize("rows", [1, 5])
def test_curves_show_every_column(rows, tmp_path):
    """One panel beside the other, none of them blank, for one epoch too."""
    table = [{"epoch": i + 1, "a": i * 0.5, "b": 1.0, "c": -i} for i in range(rows)]
    table[0]["fid"] = 3.0  # of some rows
    widths = []
    for panels in ([("a", "b"), ("nothing",)], [("a", "b"), ("c",)], [("a",), ("c",), ("fid",)]):
        plot_curves(tmp_path / "a.png", table, panels, floors={"fid": 0.1})
        picture = iio.imread(tmp_path / "a.png")
        widths.append(picture.shape[1])
        for part in np.array_split(picture[..., :3], len(widths), axis=1):
            assert part.std() > 5
            assert np.ptp(part.astype(int), axis=2).max() > 50  # a coloured curve, not axes alone
    assert widths == [widths[0], 2 * widths[0], 3 * widths[0]]


NAMES = ["plain", "$x^", "猫", "line\nbreak", "\udcff", "w" * 500, "", "%s {0}"]


@pytest.mark.parametrize(
    ("values", "floor"),
    [([0.0, 0.0], 1.0), ([np.nan, np.nan], 1.0), ([1e-320, 1e300], 1e-320), ([1.0, 2.0], 0.0),
     ([np.inf, 1.0], 0.5), ([-1.0, 2.0], -1.0), ([1e300, -1e300], None)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow")
def test_numbers_that_cannot_be_drawn_spoil_no_figure(values, floor, tmp_path):
    """A FID of 0, where train and test are the same, has no place on a logarithmic axis."""
    rows = [{"epoch": i, "fid": value} for i, value in enumerate(values, 1)]
    plot_curves(tmp_path / "a.png", rows, [("fid",)], None if floor is None else {"fid": floor})
    assert iio.imread(tmp_path / "a.png").std() > 5


def write_colours(count, folder, size=(60, 40)):
    """Write pictures of one colour each."""
    pictures = {}
    for i in range(count):
        file = folder / f"{i}.png"
        Image.new("RGB", size, (250 - i, 10 + i, 130)).save(file)
        pictures[file] = f"photo {i}"
    return pictures


@pytest.mark.parametrize(
    ("count", "columns", "shape"), [(5, 2, (3, 2)), (1, 4, (1, 1)), (4, 4, (1, 4))]
)
def test_a_contact_sheet_shows_every_picture(count, columns, shape, tmp_path):
    """In rows, in order, with a caption; a missing file is left out."""
    pictures = write_colours(count, tmp_path)
    contact_sheet(tmp_path / "s.png", pictures | {tmp_path / "gone.png": "gone"}, columns, 60)
    sheet = iio.imread(tmp_path / "s.png")
    assert sheet.shape == (shape[0] * 70, shape[1] * 70, 3)
    for i in range(count):
        top = i // columns * 70
        left = i % columns * 70
        assert sheet[top + 45, left + 35].tolist() == [250 - i, 10 + i, 130]
        assert sheet[top : top + 24, left : left + 70].min() < 100  # the caption
    contact_sheet(tmp_path / "none.png", {tmp_path / "gone.png": "gone"})
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_captions_may_be_anything(name, tmp_path):
    """Too long ones are cut at their beginning, and stay within their column."""
    (file,) = write_colours(1, tmp_path, (400, 50))
    contact_sheet(tmp_path / "s.png", {file: name}, side=400)
    sheet = iio.imread(tmp_path / "s.png")
    assert sheet.shape == (80, 410, 3)
    assert (sheet[:24].min() < 100) == bool(name)
    assert sheet[:24, 406:].min() == 255


@POSIX
def test_a_sheet_of_hundreds_gets_no_larger(tmp_path):
    """150 panels: smaller and in more columns, in some 100 MB of memory."""
    import resource

    (file,) = write_colours(1, tmp_path, (700, 410))
    pictures = {tmp_path / f"link{i}.png": f"folder/photo{i}.jpg" for i in range(150)}
    for link in pictures:
        link.symlink_to(file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contact_sheet(tmp_path / "s.png", pictures, columns=2, side=640)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB
    with Image.open(tmp_path / "s.png") as sheet:
        assert 0.3 * SHEET < sheet.width * sheet.height < 1.2 * SHEET
        assert 1000 < sheet.width < sheet.height < 2**16


WRITERS = {
    "a.png": lambda path, seed: save_png(path, noise(seed=seed)),
    "a.gif": lambda path, seed: save_gif(path, [noise(seed=seed), noise(seed=3)]),
    "curves.png": lambda path, seed: plot_curves(path, [{"epoch": 1, "a": seed}], [("a",)]),
}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_the_old_file(name, tmp_path, full_disk):
    """A full disk costs the new picture, and neither the old one nor a heap of halves."""
    WRITERS[name](tmp_path / name, 1)
    before = (tmp_path / name).read_bytes()
    with full_disk(), pytest.raises(OSError, match="too large"):
        WRITERS[name](tmp_path / name, 2)
    gc.collect()  # no writer may try again, and complain, when it is disposed of
    assert [f.name for f in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before


# ----------------------------------------------------------------------------------------- panels


def test_colours_are_matplotlibs_inferno():
    """To two of 255 in each channel."""
    import matplotlib

    heat = torch.linspace(0, 1, 256).view(16, 16)
    wanted = matplotlib.colormaps["inferno"](heat.numpy())[..., :3] * 255
    assert np.abs(to_colours(heat) - wanted).max() < 2


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize(
    "text", ["a", "one\ntwo", "−→ Ж é 猫", "much too long for this picture " * 9]
)
def test_a_title_leaves_its_picture_alone(text, below):
    """Black on white beside it, inside its width if letters of six pixels fit."""
    picture = noise(60, 90)
    found = add_title(picture, text, below=below)
    at, strip = (found[:60], found[60:]) if below else (found[-60:], found[:-60])
    assert np.array_equal(at, picture)
    assert strip.min() < 100
    assert strip.max() == 255
    assert found.shape == (60 + 22 + 18 * text.count("\n"), 90, 3)
    assert len(text) > 30 or (strip[:, [0, -1]] == 255).all()


def test_pictures_of_any_height_stand_side_by_side():
    """Each as it is, white between and below."""
    high, low = noise(20, 8), noise(5, 9)
    row = side_by_side([high, low], gap=4)
    assert row.shape == (20, 8 + 9 + 8, 3)
    assert np.array_equal(row[:, 2:10], high)
    assert np.array_equal(row[:5, 14:23], low)
    assert (row[5:, 10:] == 255).all()
    assert (row[:, 10:14] == 255).all()
