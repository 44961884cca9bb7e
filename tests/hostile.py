"""What strangers hand over: broken files, files that want to be large, values that can't be."""

import contextlib
import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">&lt;\u2028\udcff{{data}}'
ODD = [None, True, -1, 0, 1e308, 10**400, float("nan"), "", "../../x", "a\0b", HOSTILE, "a" * 10**5,
       [], {}, [[]], {"a": {"b": [{}]}}, [None, "b", 3]]  # fmt: skip
# Of classes and files; what a terminal would obey, a spreadsheet execute, matplotlib typeset.
NAMES = ["US$_$", "$\\frac{", os.fsdecode(b"\xff\xfe"), "\x1b[2J\x07", "\u202eabc", "=1+1", "-2+3",
         "@SUM(A1)", "a\nb", "n" * 240, "猫"]  # fmt: skip


def chunk(kind, content):
    """Build a chunk of a PNG file."""
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width, height, *chunks, depth=8, kind=2):
    """Build a PNG file that says what size it is, whatever its chunks hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def postscript(file):
    """Build a page that, where somebody executes it, leaves a file."""
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    return f"{head}({file}) (w) file closefile showpage\n".encode()


def make_bombs():
    """Build small files that want to become large ones, as bytes."""
    packer = zlib.compressobj(9)  # a GiB of zeros, a thousand to one
    large = b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()
    data = chunk(b"IDAT", large)
    bmp = struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6)
    gif = b"\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    jpeg = b"\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x11\0\x02\x11\x01\x03\x11\x01\xff\xd9"
    bombs = [
        png(30_000, 30_000, data),
        png(9_400, 9_400, data),
        png(2**31 - 1, 1, data),
        png(9_000, 9_000, data, depth=16),
        png(9_000, 9_000, chunk(b"IDAT", b"")),
        png(4, 4, data),
        png(64, 64, chunk(b"zTXt", b"a\0\0" + large), data),
        png(64, 64, chunk(b"iCCP", b"a\0\0" + large), data),
        png(64, 64, *[chunk(b"IDAT", b"")] * 100_000),
        b"P6 9000 9000 255\n" + bytes(1000),
        b"P5 1000000000 1 255\n" + bytes(1000),
        b"P6 " + b"9" * 1_000_000,
        b"BM" + bmp,
        b"GIF89a" + gif,
        b"\xff\xd8\xff\xc0" + jpeg,
        b"PK\3\4" + large[:1000],
        b"",
        bytes(1_000_000),
    ]
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "TIFF")
    tiff = file.getvalue()
    for tag in (256, 257, 258, 273):  # width, height, bits, strips
        at = tiff.index(struct.pack("<H", tag)) + 4
        for value in (0, 1, 65_535, 2**31 - 1, 2**32 - 1):
            for entry in (struct.pack("<II", 1, value), struct.pack("<II", value, 8)):
                bombs.append(tiff[:at] + entry + tiff[at + 8 :])
    return bombs


def write_pictures(rng):
    """Write one small picture in every format and mode that Pillow writes, as bytes."""
    noise = np.frombuffer(rng.randbytes(48 * 64 * 3), np.uint8).reshape(48, 64, 3)
    colour = Image.fromarray(noise).resize((96, 72))
    compressions = ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "group4", "packbits")
    extras = {
        "TIFF": [{"compression": name} for name in compressions],
        "JPEG": [{"progressive": True}, {"exif": Image.Exif()}, {"subsampling": 0}],
        "GIF": [{"save_all": True, "append_images": [colour.rotate(90)]}],
        "WEBP": [{"lossless": True}],
        "JPEG2000": [{"irreversible": True}],
    }
    Image.init()  # all formats
    found = []
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff complains of what it doesn't write
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"):
            for extra in [{}, *extras.get(kind, [])]:
                file = io.BytesIO()
                try:
                    first = colour.convert("L") if mode in ("I;16", "I", "F") else colour
                    first.convert(mode).save(file, kind, **extra)
                except Exception:  # not every format has every mode
                    continue
                found.append(file.getvalue())
    os.dup2(stderr, 2)
    return found


def mutate(content, rng):
    """Spoil a file in one of the ways in which files are spoilt."""
    data = bytearray(content or b"\0")
    way = rng.choice(("bits", "header", "cut", "huge", "repeat", "splice"))
    at = rng.randrange(len(data))
    if way == "bits":
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "header":
        for _ in range(3):
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    elif way == "cut":
        del data[at:]
    elif way == "huge":  # lengths, widths and offsets are of four bytes in most formats
        at = min(at, rng.randrange(200))
        values = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xff\xff", b"\0" * 4)
        data[at : at + 4] = rng.choice(values)
    elif way == "repeat":
        data[at:at] = data[: rng.randrange(len(data)) + 1] * 3
    else:
        data[at:] = rng.randbytes(len(data) - at)
    return bytes(data)


def spoil_value(tree, rng, odd=ODD):
    """Replace or remove something in a tree of dicts and lists, in place."""
    while tree:
        key = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree[key], (dict, list)) and rng.random() < 0.9:
            tree = tree[key]
        elif rng.random() < 0.2:
            del tree[key]
            return
        else:
            tree[key] = rng.choice(odd)
            return


def replace_file(file, rng, others=()):
    """Put something else in a file's place, and say what.

    :param list[bytes] others: contents that may be put there
    """
    content = file.read_bytes()
    file.unlink()
    way = rng.choice(("content", "content", "gone", "folder", "link", "pipe", "bomb"))
    if way == "content":
        file.write_bytes(mutate(content, rng))
    elif way == "bomb" and others:
        file.write_bytes(rng.choice(others))
    elif way == "folder":
        file.mkdir()
    elif way == "link":
        file.symlink_to(rng.choice(("/dev/zero", "/dev/null", file.name, "/etc/passwd", "gone")))
    elif way == "pipe":
        os.mkfifo(file)
    return f"{way} {file.name}"


def share(depth):
    """Make a list that seems to hold 2 ** depth lists, and holds one of each size."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


def nest(depth):
    """Make lists in lists."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


# By name, what a file of a few kB can claim to hold.
CLAIMS = {
    "shared": share(40),
    "wide": share(9) * 1000,
    "deep": nest(60),
    "long": [0] * 2_000_000,
    "stride 0": torch.ones(1).expand(10**9),
    "sparse": torch.ones(3).to_sparse(),
    "meta": torch.empty(10**6, device="meta"),
    "a set": {1, 2},
    "bytes": bytearray(5),
    "complex": 1j,
    "a type": torch.float16,
}


def list_files(folder, but=()):
    """Describe all files in a folder, so that it is seen if one was changed, made or removed.

    :param tuple[pathlib.Path] but: folders and files that don't matter
    """
    found = {}
    for file in Path(folder).rglob("*"):
        if not any(place == file or place in file.parents for place in but):
            status = file.lstat()
            found[str(file)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return {name: seen for name, seen in found.items() if seen[0] >> 12 != 4}  # but folders' times


def claim(state, name, rng):
    """Let the checkpoint of a classifier claim to be much, and say what."""
    sizes = {"shape": [rng.choice((1, 3)), 10**5, 10**5], "classes": ["a"] * rng.randrange(10**5),
             "args": {"width": rng.uniform(1, 100)}, "std": [0.0] * 3,
             "mean": [1e300] * 3}  # fmt: skip
    entry = rng.choice(list(state))
    if rng.random() < 0.5:
        state[entry] = CLAIMS[name]
    elif rng.random() < 0.5:
        entry = rng.choice(list(sizes))
        state[entry] = sizes[entry]
    else:
        layer = rng.choice(list(state["network"]))
        state["network"] = state["network"] | {layer: CLAIMS[name]}
        entry = layer
    return entry


def spoil_json(file, rng, odd):
    """Replace or remove something in a record."""
    with contextlib.suppress(ValueError):  # spoilt already
        value = json.loads(file.read_text())
        spoil_value(value, rng, odd)
        file.write_text(json.dumps(value))


def spoil_checkpoint(file, rng, odd):
    """Replace or remove something in a checkpoint."""
    try:
        state = torch.load(file)
        spoil_value(state, rng, odd)
        torch.save(state, file)
    except Exception:  # spoilt already, or of values that can't be pickled
        return


def spoil_run(folder, bombs, places, rng):
    """Spoil something in a run folder, and say what was done.

    :param list places: outside, where nothing may be made
    """
    odd = [*ODD[:-1], *map(str, places), "timm/resnet18", "resnet18"]
    files = sorted(file for file in folder.rglob("[!.]*") if file.is_file())
    way = rng.choice(("record", "record", "checkpoint", "file", "link"))
    records = [file for file in files if file.suffix in (".json", ".txt")]
    if way == "record" and records:
        file = rng.choice(records)
        spoil_json(file, rng, odd)
        return f"a value in {file.name}"
    if way == "checkpoint" and folder / "checkpoint.pt" in files:
        odd += [torch.ones(2), torch.ones(3, 3, 3, 3)]
        spoil_checkpoint(folder / "checkpoint.pt", rng, odd)
        return "a value in the checkpoint"
    if way == "link":
        place = folder / rng.choice((".lock", "samples", "records", "maps", "tensorboard", "a/b"))
        place.parent.mkdir(exist_ok=True)
        if place.is_dir():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        place.symlink_to(rng.choice(places))
        return f"link {place.name}"
    return replace_file(rng.choice(files), rng, bombs)
