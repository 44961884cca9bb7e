"""Make one page of a finished run, report.html: it opens without a server.

    python report.py runs/train_dcgan/20261123-101500

All that it shows comes from the run folder and is put inside the page: the numbers of
metrics.json, pictures, maps (.npz) and, of train_dcgan.py, walks through the noise,
drawn by the generator in the checkpoint. What is gone or damaged is left out, and the
page says how much that is.

What the page looks like and what its controls do is in report.html beside this file.
"""

import argparse
import base64
import importlib
import io
import json
import re
import shlex
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import common  # isort: skip # noqa: F401 (Ctrl-C while torch is imported: one line)

import matplotlib
import numpy as np
import torch
from PIL import Image

from common.device import make_rng
from common.errors import UserError, exit_code
from common.images import CAPTION, open_picture
from common.run import (
    load_checkpoint,
    read_arrays,
    read_text,
    replacing,
    restore,
    saved_args,
    without_nan,
)

TEMPLATE = Path(__file__).with_name("report.html")
SCRIPTS = {"train_dcgan", "train_classifier", "smoothgrad", "explain_perturb",
           "compare_explanations", "torch_basics"}  # fmt: skip
MOST = {"photos": 50, "grids": 120, "pictures": 40}  # on one page
SIDE = 320  # pixels that a photo or a map has at most
WIDEST = 1600  # pixels that any other picture has at most
WALKS = 16
LEGS = 16  # steps of a walk from one noise vector to the next
# Which columns of a table of epochs are drawn together; any other is drawn alone.
PANELS = (("d_loss", "g_loss"), ("d_real", "d_fake"), ("precision", "recall"),
          ("train_loss", "test_loss"))  # fmt: skip
CURVES = {"curves.png", "losses.png"}  # the same, as the scripts draw them
UNDRAWN = {"epoch", "images_per_second", "class_distance", "largest_class"}
# Entries of metrics.json that have a place of their own; older runs listed their files.
PLACED = {"script", "command", "args", "device", "versions", "seconds", "dataset", "epochs",
          "images", "table", "files"}  # fmt: skip


def try_each(describe, items, what, lost):
    """Describe items one by one; what is gone or damaged leaves itself out, and nothing else.

    :param Callable describe: from an item to plain values
    :param Iterable items: what to describe
    :param str what: their name, in the plural
    :param collections.Counter lost: counts by name what is left out
    :rtype: list
    """
    found = []
    for item in items:
        try:
            found.append(describe(item))
        except Exception:  # whatever damage sets off in the readers of pictures, arrays, weights
            lost[what] += 1
    return found


def thin(items, what, notes):
    """Choose as many as a page holds, evenly, the first and the last included."""
    most = MOST[what]
    if len(items) <= most:
        return items
    notes.append(f"{most} of {len(items)} {what}: a page holds no more, the folder has them all.")
    chosen = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[i] for i in chosen]


def to_text(value):
    """Write a plain value for people; a list's values one after the other."""
    if isinstance(value, list):
        return ", ".join(map(to_text, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def percent(share):
    """Write a share of 1 for people."""
    return "–" if share is None else f"{100 * share:.1f} %"


# --------------------------------------------------------------------------------------- pictures


def to_uri(picture, lossy=False):
    """Put a picture into a data URI.

    :param numpy.ndarray picture: from 0 to 255, (H, W), (H, W, 1) or (H, W, 3)
    :param bool lossy: as JPEG, for photos; tiny ones stay PNG, in which every pixel can be told
    :rtype: str
    """
    if picture.ndim == 3 and (picture == picture[..., :1]).all():
        picture = picture[..., 0]  # grey
    image = Image.fromarray(np.ascontiguousarray(picture.round(), np.uint8))
    file = io.BytesIO()
    kind = "jpeg" if lossy and min(image.size) > 64 else "png"
    image.save(file, kind, quality=88, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def shrink(values):
    """Average over squares of pixels, (H, W, ...), until no side is longer than SIDE."""
    k = -(-max(values.shape[:2]) // SIDE)
    rows = values.shape[0] // k
    columns = values.shape[1] // k
    whole = values[: rows * k, : columns * k]
    return whole.reshape(rows, k, columns, k, *values.shape[2:]).mean((1, 3))


def to_levels(heat, low, high):
    """Quantise a map for the page, which cuts it at any percentile: roots keep small values apart.

    :param numpy.ndarray heat: (H, W)
    :param float low: what becomes 0
    :param float high: what becomes 255
    :return: the picture, 255 times the root of the way from low to high, as a data URI
    :rtype: str
    :raises ValueError: if not all values are finite
    """
    if heat.ndim != 2 or not np.isfinite(heat).all():
        raise ValueError("no map")
    way = (shrink(heat) - low) / max(high - low, 1e-300)
    return to_uri(255 * np.sqrt(way.clip(0, 1)))


def describe_picture(file):
    """Describe a picture that has no controls; an animation stays one."""
    picture = open_picture(file)
    picture.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
    uri = to_uri(np.asarray(picture))
    if file.suffix.lower() == ".gif":
        uri = f"data:image/gif;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"name": file.name, "picture": uri, "width": picture.width, "height": picture.height}


# --------------------------------------------------------------------------------- photos and maps


def describe_photo(folder, image, model, lost):
    """Describe one photo of smoothgrad.py or, with a "curve", of explain_perturb.py.

    :param pathlib.Path folder: the run folder
    :param dict image: the photo's record
    :param str model: the run's
    :param collections.Counter lost: counts the maps and pictures that are left out
    :return: plain values; pictures as data URIs
    :rtype: dict
    :raises Exception: if there is nothing to show
    """
    masked = "curve" in image
    stem = Path(image["panel"]).name.removesuffix("_panel.png")
    arrays = read_arrays(folder / f"{stem}.npz")
    photo = arrays["photo"]
    maps, lines = (describe_mask if masked else describe_maps)(image, arrays, lost)
    if photo.shape[-1] not in (1, 3):
        photo = photo.transpose(1, 2, 0)  # (H, W, C)
    if not maps or not np.isfinite(photo).all():
        raise ValueError("nothing to show")
    pixels = shrink(photo * 255).clip(0, 255)
    files = [folder / f"{stem}_perturbed.png"] if masked else []
    after = try_each(lambda file: shrink(np.asarray(open_picture(file))), files, "pictures", lost)
    return {
        "path": ", ".join(filter(None, [str(image["path"]), model])),
        "name": str(image["class_name"]),
        "side": len(pixels),
        "photo": to_uri(pixels, lossy=True),
        "masked": masked,
        "after": to_uri(after[0], lossy=True) if after else None,
        "maps": maps,
        "chart": {"x": "deleted area" if masked else "noise", "y": "probability of the class",
                  "lines": lines, "levels": {"the photo": image["probability"]}, "percent": True},
    }  # fmt: skip


def describe_maps(image, arrays, lost):
    """Describe the maps of smoothgrad.py.

    :param dict image: the photo's record
    :param Mapping arrays: its .npz file
    :param collections.Counter lost: counts the maps that are left out
    :return: of each map its name, facts, picture and place in the chart; the lines of the chart
    :rtype: tuple[list[dict], dict]
    """
    left = "without the top 10 % of pixels"
    left_random = "without random 10 %"
    lines = {left: [], left_random: []}

    def describe(found):
        noise = f"{found['noise'] * 100:g}"
        noisy = found["noise"] > 0
        heat = np.abs(arrays[f"noise_{noise}"].astype(np.float64)).sum(0)
        levels = to_levels(heat, heat.min(), heat.max())
        mark = [found["noise"], found["probability_left"]]
        # A map without noise is the same each time; the rows stay, so that nothing jumps.
        facts = {
            "probability of the class": percent(image["probability"]),
            left: percent(found["probability_left"]),
            left_random: percent(found["probability_left_random"]),
            "reliability of the map": f"{found['reliability']:.3f}" if noisy else "–",
            "samples": f"{found['samples']:,}" if noisy else "–",
        }
        lines[left].append(mark)
        lines[left_random].append([found["noise"], found["probability_left_random"]])
        return {"name": f"{noise} %" if noisy else "none", "facts": facts, "levels": levels,
                "mark": mark}  # fmt: skip

    return try_each(describe, image["maps"], "maps", lost), lines


def describe_mask(image, arrays, lost):
    """Describe the mask and the ranking of explain_perturb.py, as :func:`describe_maps` does."""
    facts = {
        "probability of the class": percent(image["probability"]),
        "after the mask": percent(image["probability_after"]),
        "deleted area": percent(image["area"]),
        "evaluations": f"{image['evaluations']:,}",
    }

    def describe(name):
        heat = arrays[name].astype(np.float64)
        if name == "mask":
            title = "what was deleted"
            levels = to_levels(1 - heat, 0, 1)
        else:
            title = "ranking of the pixels"
            levels = to_levels(heat, heat.min(), heat.max())
        return {"name": title, "facts": facts, "levels": levels,
                "mark": [image["area"], image["probability_after"]]}  # fmt: skip

    maps = try_each(describe, ("mask", "ranking"), "maps", lost)
    return maps, {"probability of the class": image["curve"]}


# ----------------------------------------------------------------------------------------- the GAN


def find_grids(folder):
    """List the pictures of a GAN's epochs as pairs (epoch, file); a renamed copy is none."""
    files = list((folder / "samples").glob("epoch_*.png"))
    matches = [re.fullmatch("epoch_([0-9]{1,9})[.]png", file.name) for file in files]
    return sorted((int(m[1]), file) for m, file in zip(matches, files, strict=True) if m)


def describe_grid(grid):
    """Describe the samples after one epoch, a pair of :func:`find_grids`."""
    epoch, file = grid
    picture = np.asarray(open_picture(file))[:-CAPTION]
    small = picture[::2, ::2]
    if np.array_equal(small.repeat(2, 0).repeat(2, 1), picture):
        picture = small  # each pixel was four: nothing is lost
    return {"epoch": epoch, "picture": to_uri(picture), "size": picture.shape[1::-1]}


def make_walks(z, interpolate):
    """Walk from each noise vector to two others and back again.

    :param torch.Tensor z: (N, z_dim)
    :param Callable interpolate: that of train_dcgan.py
    :return: step by step all N walks, (steps * N, z_dim)
    :rtype: torch.Tensor
    """
    legs = []
    for starts, ends in pairwise([z, z.roll(1, 0), z.roll(3, 0), z]):
        ways = [interpolate(a, b, LEGS + 1)[:-1] for a, b in zip(starts, ends, strict=True)]
        legs.append(torch.stack(ways, 1))  # (LEGS, N, z_dim)
    return torch.cat([*legs, z[None]]).flatten(0, 1)


def describe_walks(folder):
    """Let the generator in the checkpoint of a run of train_dcgan.py walk through the noise."""
    import train_dcgan

    state = load_checkpoint(folder, "train_dcgan")
    args = saved_args(train_dcgan.get_parser(), state["args"])
    classes = len(state["class_counts"])
    with torch.device("meta"):  # the memory is that of the checkpoint's tensors
        generator, _ = train_dcgan.make_networks(args, state["shape"][1], classes)
    restore({"ema": generator}, state)
    z = train_dcgan.draw_z(64, args, make_rng("cpu", args.seed))  # that of the grids
    walks = make_walks(z[:WALKS], train_dcgan.interpolate)
    labels = torch.arange(len(walks)) % WALKS % classes  # of each walk one, that stays
    samples = torch.cat(list(train_dcgan.generate(generator, walks, labels)))
    pixels = (samples * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (steps * N, H, W, C)
    steps = pixels.reshape(-1, WALKS, *pixels.shape[1:]).swapaxes(1, 2)  # (steps, H, N, W, C)
    strip = steps.reshape(-1, WALKS * pixels.shape[2], pixels.shape[3])
    return {"picture": to_uri(strip), "columns": WALKS, "leg": LEGS, "side": pixels.shape[1]}


# --------------------------------------------------------------------------------------- numbers


def choose_panels(epochs):
    """List the charts of a table of epochs; of each the columns that it draws."""
    columns = dict.fromkeys(column for row in epochs for column in row if column not in UNDRAWN)
    panels = [next((p for p in PANELS if column in p), (column,)) for column in columns]
    return list(dict.fromkeys(panels))


def find_floor(metrics):
    """Return what the FID should go down to, or None."""
    value = metrics.get("fid")
    for name in ("floor", "fid"):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def describe_table(table):
    """Describe the table of compare_explanations.py: mean, error, photos, by method and column."""
    columns = dict.fromkeys(column for row in table.values() for column in row)
    rows = [[name] for name in table]
    for column in columns:
        found = [row.get(column) or (None, None, 0) for row in table.values()]
        whole = all(mean is None or mean == round(mean) for mean, _, _ in found)
        for row, (mean, error, count) in zip(rows, found, strict=True):
            if mean is None or whole:
                row.append("–" if mean is None else f"{mean:,.0f}")
            else:
                row.append(f"{mean:.3f}" + (f" ± {error:.3f}" if count > 1 else ""))
    return {"head": ["method", *columns], "rows": rows}


def is_nested(value):
    """Tell whether a value of metrics.json holds others."""
    return isinstance(value, (dict, list))


def flatten(value, names=()):
    """Yield what an entry of metrics.json holds as [name, text], but for long or nested lists."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from flatten(part, (*names, name))
    elif not isinstance(value, list) or (len(value) <= 8 and not any(map(is_nested, value))):
        yield [", ".join(names), to_text(value)]


def describe_numbers(metrics):
    """Collect what has no place of its own on the page: [name, text], by the entry's name."""
    groups = {}
    for name, value in metrics.items():
        if name in PLACED or value is None:
            continue
        title = name.replace("_", " ")
        rows = [[label or title, text] for label, text in flatten(value)]
        if rows:
            groups.setdefault(title if isinstance(value, dict) else "results", []).extend(rows)
    return groups


# ---------------------------------------------------------------------------------------- the page


def read_metrics(folder):
    """Read the record of a run.

    :param pathlib.Path folder: the run folder
    :return: what metrics.json holds; script, args, epochs and images are there in any case
    :rtype: dict
    :raises UserError: if there is none, or it is damaged
    """
    file = folder / "metrics.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of a finished run")
    if not file.is_file():
        raise UserError(f"{folder} has no metrics.json: give the folder of a finished run")
    try:
        metrics = dict(without_nan(json.loads(read_text(file))))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: run the script again") from error
    for name, kind in (("args", dict), ("epochs", list), ("images", list)):
        if not isinstance(metrics.get(name), kind):
            metrics[name] = kind()
    if not isinstance(metrics.get("script"), str):  # an older run: python train_dcgan.py ...
        words = str(metrics.get("command", "")).split()
        metrics["script"] = Path(words[1]).stem if len(words) > 1 else ""
    return metrics


def repeat_command(metrics):
    """Write the command that repeats a run from its beginning, whether or not it was resumed.

    :param dict metrics: the record of the run
    :return: the command, with the images and all that differs from the defaults, but no folder;
        what was typed, if the script isn't one of ours or had other flags; and the script's own
        first line about itself
    :rtype: tuple[str, str]
    """
    typed = str(metrics.get("command", ""))
    if metrics["script"] not in SCRIPTS:
        return typed, ""
    try:
        parser = importlib.import_module(metrics["script"]).get_parser()
    except ImportError:  # of a library that this machine lacks
        return typed, ""
    lead = parser.description.partition("\n")[0]
    defaults = vars(parser.parse_args([]))
    words = ["python", f"{metrics['script']}.py"]
    for name, value in metrics["args"].items():
        default = value == defaults.get(name) and name != "image"  # which is always named
        if default or value is None or name in ("out", "resume"):
            continue
        if name not in defaults:  # a flag of another version
            if value is False:
                continue
            return typed, lead
        flag = ("--" if len(name) > 1 else "-") + name.replace("_", "-")
        if value is False:
            flag = flag.replace("--", "--no-", 1)
        words.append(flag)
        if not isinstance(value, bool):
            words += value if isinstance(value, list) else [value]
    return shlex.join(map(str, words)), lead


def describe_run(folder, metrics):
    """Collect what the page shows of a run.

    :param pathlib.Path folder: the run folder
    :param dict metrics: its record, as :func:`read_metrics` returns it
    :return: plain values; pictures as data URIs
    :rtype: dict
    """
    lost = Counter()
    notes = []
    args = metrics["args"]
    command, lead = repeat_command(metrics)

    images = try_each(dict, metrics["images"], "images", lost)
    images = [i for i in images if "curve" in i or isinstance(i.get("maps"), list)]
    images = thin(images, "photos", notes)
    model = str(metrics.get("model") or args.get("model") or "")
    photos = try_each(lambda i: describe_photo(folder, i, model, lost), images, "photos", lost)

    grids = thin(find_grids(folder), "grids", notes)
    frames = try_each(describe_grid, grids, "grids", lost)
    epochs = try_each(dict, metrics["epochs"], "epochs", lost)
    # Of a copy under another name the networks may be others.
    runs = [folder] if metrics["script"] == "train_dcgan" and epochs else []
    walks = try_each(describe_walks, runs, "walks", lost)

    tables = [metrics["table"]] if metrics.get("table") else []
    tables = try_each(describe_table, tables, "tables", lost)
    files = sorted(f for f in folder.glob("[!.]*") if f.suffix.lower() in (".png", ".gif"))
    if photos or frames:
        files = []  # the page shows the same
    elif epochs:
        files = [f for f in files if f.name not in CURVES]
    files = thin(files, "pictures", notes)
    pictures = try_each(describe_picture, files, "pictures", lost)

    facts = {"device": metrics.get("device"), "seconds": metrics.get("seconds"),
             "data": metrics.get("dataset"), "versions": metrics.get("versions")}  # fmt: skip
    gone = ", ".join(f"{count} of the {what}" for what, count in lost.items())
    if gone:
        notes.append(f"Left out, because it is gone or damaged: {gone}.")
    inferno = matplotlib.colormaps["inferno"](range(256))[:, :3] * 255
    return {
        "title": f"{metrics['script']}.py" if metrics["script"] else folder.resolve().name,
        "lead": lead,
        "notes": notes,
        "photos": photos,
        "colours": base64.b64encode(inferno.round().astype(np.uint8)).decode(),
        "frames": frames,
        "epochs": epochs,
        "panels": choose_panels(epochs),
        "levels": {"fid": find_floor(metrics)},
        "walks": walks,
        "tables": tables,
        "pictures": pictures,
        "numbers": describe_numbers(metrics),
        "command": command,
        "arguments": [["-" * (1 + (len(name) > 1)) + name.replace("_", "-"), to_text(value)]
                      for name, value in args.items()],
        "facts": list(flatten(facts)),
    }  # fmt: skip


def write_page(path, data):
    """Write the page atomically.

    It makes text of the data by ``textContent`` only; they are JSON in which no character can end
    the element that holds them.

    :param pathlib.Path path: the file
    :param dict data: what the page shows, plain values
    """
    text = json.dumps(data, allow_nan=False)  # ASCII: whatever names hold
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)
    with replacing(path) as part:
        part.write_text(page, encoding="utf-8")


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", metavar="FILE", help="the page (default: RUN/report.html)")
    return parser


def main(argv=None):
    """Make the page of a run.

    :param list[str] argv: the command line; None for sys.argv
    :return: what the page shows
    :rtype: dict
    :raises UserError: if there is no finished run, or the page can't be written
    """
    args = get_parser().parse_args(argv)
    folder = Path(args.run)
    path = Path(args.out or folder / "report.html")
    metrics = read_metrics(folder)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{path} can't be written: give a file to --out, in a folder that exists")
    data = describe_run(folder, metrics)
    write_page(path, data)
    for note in data["notes"]:
        print(note)
    print(f"look at  {path}")
    return data


if __name__ == "__main__":
    sys.exit(exit_code(main))
