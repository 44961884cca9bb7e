"""Photos: pictures of every kind come out upright and in their colours; the rest is one line."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from common.errors import UserError
from common.photos import SAMPLES, find_photos, open_photo, read_photo
from tests.helpers import POSIX

# Four quarters: red, green; blue, white.
QUARTERS = np.zeros((20, 30, 3), np.uint8)
QUARTERS[:10, :15, 0] = QUARTERS[:10, 15:, 1] = QUARTERS[10:, :15, 2] = QUARTERS[10:, 15:] = 255
SRGB = ImageCms.createProfile("sRGB")


def corners(path):
    """Read a picture and give the colours of its corners, row by row.

    :return: size, and four colours
    :rtype: tuple
    """
    picture = open_photo(str(path))
    assert picture.mode == "RGB"
    right, bottom = picture.width - 1, picture.height - 1
    places = ((0, 0), (right, 0), (0, bottom), (right, bottom))
    return picture.size, np.array([picture.getpixel(place) for place in places], int)


def assert_quarters(path, tolerance=0):
    """Hold a file against the four quarters."""
    size, found = corners(path)
    assert size == (30, 20)
    wanted = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert np.abs(found - wanted).max() <= tolerance, found.tolist()


def write_png(path, width, height, bits, kind, rows):
    """Write a PNG file by hand: of sizes and depths that Pillow doesn't write."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def as_rows(values):
    """Pack 16-bit values, (H, W, C), as PNG has them."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)


# ------------------------------------------------------------------------------- right colours


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_every_exif_orientation_comes_out_upright(orientation, suffix, tmp_path):
    """Cameras store what the sensor saw, and how they were held."""
    turn = Image.Transpose
    stored = (
        turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE,
        turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270,
    )  # fmt: skip
    picture, exif = Image.fromarray(QUARTERS), Image.Exif()
    exif[0x0112] = orientation
    picture = picture.transpose(stored[orientation - 2]) if orientation > 1 else picture
    picture.save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    assert_quarters(tmp_path / f"x.{suffix}", tolerance=8 if suffix == "jpg" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage!!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\xff" * 50]
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_exif_data_cost_no_photo(exif, suffix, tmp_path, recwarn):
    """The pixels are what counts; Pillow's warnings stay out of sight."""
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {})
    Image.fromarray(QUARTERS).save(tmp_path / f"x.{suffix}", exif=exif, **options)
    recwarn.clear()
    assert_quarters(tmp_path / f"x.{suffix}", tolerance=8)
    assert not recwarn.list


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_modes_of_colour(mode, tmp_path):
    """Palettes, print colours, television colours: all are RGB in the end."""
    picture = Image.fromarray(QUARTERS)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "x.tif")
    assert_quarters(tmp_path / "x.tif", tolerance=1)
    if mode == "CMYK":
        picture.save(tmp_path / "x.jpg", quality=95)  # Adobe's way: inverted, and marked so
        assert_quarters(tmp_path / "x.jpg", tolerance=8)


def test_cmyk_without_adobes_marker_is_read_as_with_it(tmp_path):
    """All programs that write such files write them inverted, as browsers assume, too."""
    stream = io.BytesIO()
    Image.fromarray(QUARTERS).convert("CMYK").save(stream, "JPEG", quality=95)
    data = stream.getvalue()
    start = data.index(b"\xff\xee")  # the segment that says "Adobe"
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    assert b"Adobe" in data[start : start + length]
    (tmp_path / "x.jpg").write_bytes(data[:start] + data[start + 2 + length :])
    assert_quarters(tmp_path / "x.jpg", tolerance=8)


def test_transparency_is_white(tmp_path):
    """In palettes, in grey, in colour, in 8 and in 16 bits; half of it is half white."""
    alpha = np.full((20, 30), 255, np.uint8)
    alpha[:10, :15], alpha[:10, 15:] = 0, 51
    rgba = Image.fromarray(np.dstack([QUARTERS, alpha]))
    rgba.save(tmp_path / "rgba.png")
    wanted = [[255, 255, 255], [204, 255, 204], [0, 0, 255], [255, 255, 255]]
    assert np.abs(corners(tmp_path / "rgba.png")[1] - wanted).max() <= 1
    rgba.convert("LA").save(tmp_path / "la.png")
    assert np.abs(corners(tmp_path / "la.png")[1][0] - 255).max() <= 1
    palette = Image.fromarray(QUARTERS).quantize(4)
    clear = palette.getpixel((0, 0))
    palette.save(tmp_path / "p.png", transparency=clear)
    found = corners(tmp_path / "p.png")[1]
    assert found.tolist() == [[255, 255, 255], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    deep = np.dstack([QUARTERS, alpha]).astype(int) * 257
    write_png(tmp_path / "deep.png", 30, 20, 16, 6, as_rows(deep))
    assert np.abs(corners(tmp_path / "deep.png")[1] - wanted).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_keep_their_greys(suffix, tmp_path):
    """A dark scan isn't white, and a ramp stays a ramp."""
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / f"x.{suffix}")
    picture = np.asarray(open_photo(str(tmp_path / f"x.{suffix}")))
    assert picture[2, :, 1].tolist() == list(range(256))


def test_16_bits_of_colour(tmp_path):
    """Also by three."""
    write_png(tmp_path / "x.png", 30, 20, 16, 2, as_rows(QUARTERS.astype(int) * 257))
    assert_quarters(tmp_path / "x.png")


def test_1_bit(tmp_path):
    """Black and white."""
    Image.fromarray(QUARTERS[:, :, 0] > 0).save(tmp_path / "x.png")
    assert corners(tmp_path / "x.png")[1][:, 0].tolist() == [255, 0, 0, 255]


@pytest.mark.parametrize("kind", ["float", "negative", "32 bits"])
def test_numbers_without_a_white_are_refused(kind, tmp_path):
    """Nobody knows which of them is white."""
    values = {"float": np.float32([[0, 0.5], [1, 3]]), "negative": np.int32([[-5, 0], [9, 70]]),
              "32 bits": np.int32([[0, 70000], [9, 2**31 - 1]])}[kind]  # fmt: skip
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif is not a readable picture"):
        open_photo(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_is_its_first_frame(suffix, tmp_path):
    """GIF, APNG, WebP."""
    frames = [Image.fromarray(np.full((20, 30, 3), v, np.uint8)) for v in (200, 10, 90)]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert np.abs(corners(tmp_path / f"x.{suffix}")[1] - 200).max() <= 2


def swapped_profile():
    """Make an ICC profile of a camera that takes red for green: sRGB with two columns swapped."""
    data = ImageCms.ImageCmsProfile(SRGB).tobytes()
    return data.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_applied(mode, tmp_path):
    """Its red is our green, also where the colours are a palette's or have transparency."""
    picture = Image.fromarray(QUARTERS)
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "x.png", icc_profile=swapped_profile())
    found = corners(tmp_path / "x.png")[1]
    wanted = [[0, 255, 0], [255, 0, 0], [0, 0, 255], [255, 255, 255]]
    assert np.abs(found - wanted).max() <= 3


@pytest.mark.parametrize("profile", [b"garbage" * 30, b"\0" * 128, "of another mode"])
def test_a_damaged_profile_is_left_aside(profile, tmp_path):
    """The plain colours must do."""
    if profile == "of another mode":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(QUARTERS).save(tmp_path / "x.png", icc_profile=profile)
    assert_quarters(tmp_path / "x.png")


def test_samples_need_no_file():
    """Each is a colour picture that comes with scikit-image."""
    for name in SAMPLES:
        assert np.asarray(open_photo(f"sample:{name}")).std() > 20


# --------------------------------------------------------------------------- what isn't a photo


def test_files_that_are_no_pictures(tmp_path):
    """Text, nothing, a half, a header without its pixels: one line that names the file."""
    stream = io.BytesIO()
    Image.effect_noise((200, 200), 60).save(stream, "JPEG")
    jpeg = stream.getvalue()
    write_png(tmp_path / "header.png", 9000, 9000, 8, 2, b"")
    files = {
        "text.jpg": b"no picture",
        "nothing.png": b"",
        "half.jpg": jpeg[: len(jpeg) // 2],
        "start.jpg": jpeg[:30],
        "damaged.jpg": jpeg[:100] + b"\0" * 400 + jpeg[500:600],
        "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "header.png"]:
        with pytest.raises(UserError, match=f"{name} is not a readable picture") as error:
            read_photo(str(tmp_path / name), 256, 224)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("side", [9500, 14000, 50000])
def test_a_decompression_bomb_is_refused_unopened(side, tmp_path, recwarn):
    """From the size that its header declares, with no warning beside the error."""
    write_png(tmp_path / "bomb.png", side, side, 8, 2, b"")
    with pytest.raises(UserError, match=r"bomb.png has .* pixels.*: scale it down"):
        open_photo(str(tmp_path / "bomb.png"))
    assert not recwarn.list


@pytest.mark.parametrize(("size", "why"), [((20000, 10), "too long"), ((10, 20000), "too long"),
                                           ((1, 1), "one colour")])  # fmt: skip
def test_shapes_with_nothing_to_see_are_refused(size, why, tmp_path):
    """The reason is given."""
    Image.effect_noise(size, 60).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=why):
        read_photo(str(tmp_path / "x.png"), 256, 224)


@POSIX
@pytest.mark.parametrize("name", ["pipe.jpg", "/dev/zero", "/dev/full"])
def test_what_has_no_end_is_not_read(name, tmp_path):
    """A pipe that nobody writes to, a device that never stops: both would hang."""
    if not name.startswith("/"):
        name = str(tmp_path / name)
        os.mkfifo(name)
    assert find_photos([name]) == [name]
    with pytest.raises(UserError, match="is no file"):
        open_photo(name)


# ------------------------------------------------------------------------------------ find_photos


@POSIX
def test_a_folder_is_its_pictures(tmp_path):
    """By name, in order, in capitals too; no folders, no papers, nothing twice."""
    names = ["b.JPG", "a.png", "c.webp", "d.Tiff", "notes.txt", "paper.pdf", "film.mpg", "e.eps"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.png")
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "gone.png")
    wanted = ["a.png", "b.JPG", "broken.jpg", "c.webp", "d.Tiff", "link.jpg"]
    wanted = [str(tmp_path / name) for name in wanted]
    assert find_photos([tmp_path]) == wanted
    assert find_photos([tmp_path, tmp_path, tmp_path / "a.png"]) == wanted
    with pytest.raises(UserError, match=r"broken\.jpg is no file"):
        open_photo(wanted[2])


def test_photos_are_taken_in_the_order_given(tmp_path):
    """Files whatever they are called, samples and folders mixed."""
    (tmp_path / "photo").touch()
    given = ["sample:rocket", str(tmp_path / "photo"), "sample:cat"]
    assert find_photos(given) == given


@POSIX
@pytest.mark.parametrize(
    "name",
    ["line\nbreak.png", "it's \"this\" $x$.png", b"\xff\xfe.png", "..hidden...png", "-x.png",
     "*.png", "sample:coffee.png", "猫.png"],
)  # fmt: skip
def test_any_name_will_do(name, tmp_path, monkeypatch):
    """Found in its folder and read, whatever it is called."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(QUARTERS).save("x.png")
    os.rename("x.png", name)
    (found,) = find_photos(["."])
    assert found == os.fsdecode(name)
    assert_quarters(found)


@pytest.mark.parametrize("path", ["nowhere", "nowhere/x.jpg", "x" * 5000, "sample:dog", "empty"])
def test_nothing_found_is_one_line(path, tmp_path, monkeypatch):
    """A wrong name, a name too long, an unknown sample, a folder without pictures."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(UserError, match=path):
        find_photos([path])


# ------------------------------------------------------------------------------------ read_photo


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (200, 10), (2, 3), (700, 700)])
@pytest.mark.parametrize("channels", [1, 3])
def test_read_photo_gives_a_square(size, channels, tmp_path):
    """The centre, of the size and in the channels that the classifier wants."""
    Image.effect_noise(size, 90).save(tmp_path / "x.png")
    x = read_photo(str(tmp_path / "x.png"), 40, 32, channels)
    assert x.shape == (1, channels, 32, 32)
    assert x.dtype == torch.float32
    assert 0 <= x.min() < x.max() <= 1


def test_read_photo_resizes_and_crops_as_torchvision_does(tmp_path):
    """One resampling in place of two steps; on a smooth picture they are alike."""
    from torchvision.transforms.v2 import functional as tv

    y, x = np.mgrid[:200, :300]
    waves = np.stack([np.sin(x / 19), np.cos(y / 17), np.sin((x + y) / 23)], 2)
    picture = Image.fromarray((waves * 100 + 128).astype(np.uint8))
    picture.save(tmp_path / "x.png")
    wanted = tv.center_crop(tv.resize(picture, 64, tv.InterpolationMode.BICUBIC), 56)
    wanted = np.asarray(wanted).transpose(2, 0, 1) / 255
    found = read_photo(str(tmp_path / "x.png"), 64, 56)[0].numpy()
    assert np.abs(found - wanted)[:, 2:-2, 2:-2].max() < 0.05
    assert np.abs(found - wanted).mean() < 0.005
