"""One page per run, report.html: all that it shows is inside, so that it opens without a server.

The page itself, its layout and what its controls do, is report.html beside this file; here the
run's data are made small and put into it.
"""

import base64
import io
import json
import shlex
import zipfile
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from common.images import CAPTION, interpolate
from common.run import replacing, without_nan

TEMPLATE = Path(__file__).with_name("report.html")
MOST_PHOTOS, MOST_FRAMES = 50, 120  # on one page
MOST_BYTES = 20_000_000  # of its pictures: no photo is begun past that
SIDE = 320  # pixels that a photo or a map has at most
LEGS = 16  # steps of a walk from one noise vector to the next


def to_uri(picture, lossy=False):
    """Put a picture into a data URI.

    :param numpy.ndarray picture: from 0 to 255, (H, W), (H, W, 1) or (H, W, 3)
    :param bool lossy: as JPEG, for photos; tiny ones stay PNG, in which every pixel can be told
    :rtype: str
    """
    lossy, file = lossy and min(picture.shape[:2]) > 64, io.BytesIO()
    if picture.ndim == 3 and (picture == picture[..., :1]).all():
        picture = picture[..., 0]  # grey
    image = Image.fromarray(np.ascontiguousarray(picture.round(), np.uint8))
    if lossy:
        image.save(file, "JPEG", quality=88)
    else:
        image.save(file, "PNG", optimize=True)
    kind = "jpeg" if lossy else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def shrink(values):
    """Average over squares of pixels, (H, W, ...), until no side is longer than SIDE."""
    k = -(-max(values.shape[:2]) // SIDE)
    rows, columns = (length // k * k for length in values.shape[:2])
    cells = values[:rows, :columns].reshape(rows // k, k, columns // k, k, *values.shape[2:])
    return cells.mean((1, 3))


def to_levels(heat, low, high):
    """Quantise a map for the page, which cuts it at any percentile: roots leave small values apart.

    :param numpy.ndarray heat: (H, W)
    :param float low: what becomes 0
    :param float high: what becomes 255
    :return: uint8, (H, W): 255 times the root of the part of the way from low to high
    :rtype: numpy.ndarray
    """
    part = (heat.astype(np.float64) - low) / max(high - low, 1e-300)
    return np.sqrt(part.clip(0, 1) * 65025).round().astype(np.uint8)


def repeat_command(script, args, parser):
    """Write the command that repeats a run from its beginning, whether or not it was resumed.

    :param str script: name of the script, without .py
    :param argparse.Namespace args: all arguments
    :param argparse.ArgumentParser parser: a new one, with the script's own defaults
    :return: the command, with the images and all that differs from the defaults, but no folder
    :rtype: str
    """
    words, defaults = ["python", f"{script}.py"], vars(parser.parse_args([]))
    for name, value in vars(args).items():
        default = value == defaults[name] and name != "image"  # what was explained is always named
        if value is None or default or name in ("out", "resume"):
            continue
        flag = ("--" if len(name) > 1 else "-") + name.replace("_", "-")
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [flag.replace("--", "--no-", 1)] if value is False else [flag, *values]
    return shlex.join(map(str, words))


def write_page(folder, script, args, parser, **data):
    """Write report.html atomically.

    The page makes text of the data by ``textContent`` only; they are JSON in which no character
    can end the element that holds them.

    :param pathlib.Path folder: the run folder
    :param object data: what the page shows, plain values; the other parameters are as in
        :func:`repeat_command`
    """
    data |= {
        "script": f"{script}.py",
        "lead": parser.description.partition("\n")[0],
        "command": repeat_command(script, args, parser),
        "arguments": {name.replace("_", "-"): value for name, value in vars(args).items()},
    }
    text = json.dumps(without_nan(data), allow_nan=False)  # ASCII: whatever names hold
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)
    with replacing(folder / "report.html") as part:
        part.write_text(page, encoding="utf-8")


# ------------------------------------------------------------------------------- photos and maps


def photos_page(folder, script, args, parser, images):
    """Write the page of a run that explained photos, from its files.

    :param list[dict] images: the photos' records in metrics.json; a record with "maps" is of
        smoothgrad.py, one with a "curve" of explain_perturb.py. A photo whose files are gone, or
        that is one too many for a page, is left out, which the page says
    """
    photos, size = [], 0
    for image in images:
        if len(photos) < MOST_PHOTOS and size < MOST_BYTES:
            with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
                photos.append(describe_photo(folder, image))
                size += len(json.dumps(photos[-1]))
    inferno = (matplotlib.colormaps["inferno"](range(256))[:, :3] * 255).round()
    colours = base64.b64encode(inferno.astype(np.uint8)).decode()
    write_page(folder, script, args, parser, photos=photos, count=len(images), colours=colours)


def describe_photo(folder, image):
    """Collect what the page shows of one photo.

    :return: plain values; pictures as data URIs
    :rtype: dict
    """
    stem = image["panel"].removesuffix("_panel.png")
    with np.load(folder / f"{stem}.npz") as file:
        arrays = dict(file)
    masked, shown = "curve" in image, {}
    if masked:
        after = np.asarray(Image.open(folder / f"{stem}_perturbed.png"))
        shown["after"] = to_uri(shrink(after), lossy=True)
    photo = arrays["photo"] if masked else arrays["photo"].transpose(1, 2, 0)
    maps, lines, marks = (describe_mask if masked else describe_maps)(image, arrays)
    chart = {"x": "deleted area" if masked else "noise", "y": "probability of the class",
             "lines": lines, "levels": {"the photo": image["probability"]}, "marks": marks,
             "percent": True}  # fmt: skip
    maps = [{"name": name, "facts": facts, "levels": to_uri(to_levels(shrink(heat), low, high))}
            for name, facts, heat, low, high in maps]  # fmt: skip
    pixels = shrink(photo * 255).clip(0, 255)
    return shown | {"path": image["path"], "name": image["class_name"], "side": len(pixels),
                    "photo": to_uri(pixels, lossy=True), "maps": maps, "chart": chart}  # fmt: skip


def describe_maps(image, arrays):
    """Describe the maps of smoothgrad.py.

    :return: of each map its name, its facts, its values, (H, W), and their range; the chart's
        lines; the points that belong to the maps
    :rtype: tuple[list, dict, list]
    """
    maps, left, chance = [], [], []
    for found in image["maps"]:
        noise = f"{found['noise'] * 100:g}"
        heat = np.abs(arrays[f"noise_{noise}"].astype(np.float64)).sum(0)
        left.append([found["noise"], found["probability_left"]])
        chance.append([found["noise"], found["probability_left_random"]])
        facts = {
            "probability of the class": percent(image["probability"]),
            "without the top 10 % of pixels": percent(found["probability_left"]),
            "without random 10 %": percent(found["probability_left_random"]),
            # A map without noise is the same each time; the rows stay, so that nothing jumps.
            "reliability of the map": f"{found['reliability']:.3f}" if found["noise"] else "–",
            "samples": f"{found['samples']:,}" if found["noise"] else "–",
        }
        name = f"{noise} %" if found["noise"] else "none"
        maps.append((name, facts, heat, heat.min(), heat.max()))
    return maps, {"without the top 10 % of pixels": left, "without random 10 %": chance}, left


def describe_mask(image, arrays):
    """Describe the mask and the ranking of explain_perturb.py, as :func:`describe_maps` does."""
    facts = {
        "probability of the class": percent(image["probability"]),
        "after the mask": percent(image["probability_after"]),
        "deleted area": percent(image["area"]),
        "pictures evaluated": f"{image['evaluations']:,}",
    }
    ranking, mark = arrays["ranking"], [image["area"], image["probability_after"]]
    maps = [
        ("what was deleted", facts, 1 - arrays["mask"], 0, 1),
        ("ranking of the pixels", facts, ranking, ranking.min(), ranking.max()),
    ]
    return maps, {"probability of the class": image["curve"]}, [mark, mark]


def percent(part):
    """Write a part of 1 for people."""
    return f"{100 * part:.1f} %"


# ----------------------------------------------------------------------------------- the GAN


def make_walks(z, latent):
    """Walk from each noise vector to two others and back again.

    :param torch.Tensor z: (N, z_dim)
    :param str latent: the noise's distribution, "normal" or "uniform"
    :return: step by step all N walks, (steps * N, z_dim)
    :rtype: torch.Tensor
    """
    stops = [z, z.roll(1, 0), z.roll(3, 0), z]
    legs = [[interpolate(a, b, LEGS + 1, latent)[:-1] for a, b in zip(*pair, strict=True)]
            for pair in pairwise(stops)]  # fmt: skip
    steps = torch.cat([torch.stack(leg, 1) for leg in legs])  # (3 LEGS, N, z_dim)
    return torch.cat([steps, z[None]]).flatten(0, 1)


def gan_page(folder, script, args, parser, epochs, panels, levels, walks):
    """Write the page of a GAN's training, from the grids in its folder.

    :param list[dict] epochs: the table of the training, one row per epoch
    :param list[tuple[str]] panels: which of its columns are drawn together
    :param dict levels: by column, a value to mark
    :param torch.Tensor walks: drawings of :func:`make_walks`, (steps * N, C, H, W), in [0, 1]
    """
    files = sorted((folder / "samples").glob("epoch_*.png"))
    picked = np.linspace(0, len(files) - 1, min(len(files), MOST_FRAMES)).round().astype(int)
    frames = []
    for file in [files[i] for i in picked]:
        grid = np.asarray(Image.open(file).convert("RGB"))[:-CAPTION]
        small = grid[::2, ::2]
        if np.array_equal(small.repeat(2, 0).repeat(2, 1), grid):
            grid = small  # each pixel was four: nothing is lost
        number = int(file.stem.removeprefix("epoch_"))
        frames.append({"epoch": number, "picture": to_uri(grid)})
    columns = len(walks) // (3 * LEGS + 1)
    rows = (walks.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = rows.reshape(-1, columns, *rows.shape[1:]).swapaxes(1, 2)  # (steps, H, N, W, C)
    strip = rows.reshape(-1, columns * rows.shape[3], rows.shape[4])
    walk = {"picture": to_uri(strip), "columns": columns, "leg": LEGS, "side": rows.shape[1]}
    panels = [names for names in panels if any(set(names) & set(row) for row in epochs)]
    size = grid.shape[1::-1] if frames else (1, 1)
    write_page(folder, script, args, parser, frames=frames, size=size, count=len(files),
               epochs=epochs, panels=panels, levels=levels or {}, walk=walk)  # fmt: skip
