"""Pictures of explanations: maps as pictures, panels, contact sheets; each written whole or not."""

import warnings

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from common.run import replacing

SHEET = 24_000_000  # pixels of a contact sheet; with captions and gaps some 100 MB of memory


def to_picture(heat):
    """Turn a heat map into a grey picture: (H, W) to uint8 (H', W', 3), of at least 224 pixels."""
    scale = max(1, 224 // heat.shape[-1])
    grey = (heat * 255).round().to(torch.uint8).cpu().numpy()
    return grey.repeat(scale, 0).repeat(scale, 1)[..., None].repeat(3, 2)


def draw_panel(path, photo, heats, lines, title):
    """Draw the photo and each map; below, each map laid over the photo, and what it is worth.

    :param pathlib.Path path: the PNG file
    :param numpy.ndarray photo: (H, W, C), in [0, 1]
    :param dict[str, numpy.ndarray] heats: maps in [0, 1], (H, W), by caption
    :param list[str] lines: text under each map
    :param str title: the class and its probability
    """
    columns = len(heats) + 1
    figure = Figure(figsize=(2.6 * columns, 6.1), layout="constrained")
    figure.suptitle(to_line(title), fontsize=11, parse_math=False)  # a $ is a $
    grid = figure.subplots(2, columns)
    for axes in grid.flat:
        axes.axis("off")
    style = {"vmin": 0, "vmax": 1, "interpolation": "nearest"}
    grey = photo.mean(2)
    grid[0, 0].imshow(photo.squeeze(), cmap="gray", **style)
    grid[0, 0].set_title("photo", fontsize=10)
    words = "below: probability left\nwhen the top 10 %\nof pixels are blurred\n(random 10 %)"
    grid[1, 0].text(0.5, 0.5, words, ha="center", va="center", fontsize=9)
    for column, (caption, heat) in enumerate(heats.items(), 1):
        grid[0, column].imshow(heat, cmap="gray", **style)
        grid[0, column].set_title(caption, fontsize=10)
        grid[1, column].imshow(grey * 0.6 + 0.3, cmap="gray", **style)
        grid[1, column].imshow(heat, cmap="inferno", alpha=heat**0.5, **style)
        grid[1, column].set_title(lines[column - 1], fontsize=8, y=-0.16)
    with replacing(path) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in letters that the font hasn't got
        figure.savefig(part, dpi=110)


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
    columns, side = min(round(columns * shrink), len(pictures)), int(side / shrink)
    sizes = []
    for file in pictures:
        with Image.open(file) as picture:
            scale = min(1, side / max(picture.size))
            sizes.append([max(1, round(scale * length)) for length in picture.size])
    width, height = (max(lengths) for lengths in zip(*sizes, strict=True))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 10), rows * (height + 30)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for i, (file, caption) in enumerate(pictures.items()):
        left, top = i % columns * (width + 10) + 5, i // columns * (height + 30)
        caption = to_line(caption)
        while caption and draw.textlength(caption, font) > width:
            caption = "…" + caption[2:]  # the end of a path says more than its beginning
        draw.text((left, top + 6), caption, "black", font)
        with Image.open(file) as picture:
            small = picture.convert("RGB").resize(sizes[i], Image.Resampling.LANCZOS)
        sheet.paste(small, (left, top + 26))
    with replacing(path) as part:
        sheet.save(part)


def to_line(text):
    """Turn a name into one line that can be drawn: names of files may hold anything."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def map_sheet(path, files):
    """Show photos in columns and the maps of each method in rows; atomically.

    :param pathlib.Path path: the PNG file, of 256 colours
    :param dict[pathlib.Path, str] files: captions by .npz file, whose "photo" is (C, H, W) in
        [0, 1] and whose other arrays are maps, (H, W)
    """
    photos = []
    for file in files:
        with np.load(file) as arrays:
            photos.append(dict(arrays))
    names = [name for name in photos[0] if name != "photo"]
    blocks = max(1, round((len(names) / (len(photos) + 1.3)) ** 0.5))  # nearly a square
    rows = -(-len(names) // blocks)
    size = blocks * (len(photos) + 1.5), rows + 1.4
    figure = Figure(figsize=size, layout="constrained")
    for i, block in enumerate(figure.subfigures(1, blocks, squeeze=False)[0]):
        grid = block.subplots(rows + 1, len(photos), squeeze=False)
        some = ["photo", *names[i * rows : (i + 1) * rows]]
        for line, name in zip(grid, some, strict=False):  # the last block may have fewer
            for axes, arrays in zip(line, photos, strict=True):
                values = arrays[name]
                if name == "photo":
                    axes.imshow(values.transpose(1, 2, 0).squeeze(), cmap="gray")
                else:
                    high = np.percentile(values, 99)
                    axes.imshow(values, cmap="inferno", vmin=values.min(), vmax=high)
                axes.set(xticks=[], yticks=[])
            label = name.replace(", ", ",\n").replace(" Back", "\nBack")
            line[0].set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
        for axes in grid[len(some) :].flat:
            axes.set_visible(False)
        for axes, caption in zip(grid[0], files.values(), strict=True):
            axes.set_title(to_line(caption), fontsize=7, parse_math=False)
    with replacing(path) as part:
        figure.savefig(part, dpi=110)
        with Image.open(part) as picture:
            small = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        small.save(part, optimize=True)


def draw_curves(path, images):
    """Draw each method's mean deletion and insertion curve; atomically.

    :param pathlib.Path path: the PNG file
    :param list[dict] images: the records of compare_explanations.py
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    for axes, game in zip(
        figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True
    ):
        for i, name in enumerate(images[0]["methods"]):
            keys = [f"{game} curve, {fill}" for fill in ("blur", "mean")]
            curves = [image["methods"][name][key] for image in images for key in keys]
            part, style = np.linspace(0, 1, len(curves[0])), ("-", "--", ":")[i // 10]
            axes.plot(part, np.mean(curves, 0), style, label=name, color=f"C{i % 10}")
        axes.set(xlabel=f"part of the pixels, {game}", ylabel="probability of the class")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def draw_cascade(path, images):
    """Draw how alike maps stay while more and more layers get random weights; atomically.

    :param pathlib.Path path: the PNG file
    :param list[dict] images: the records of compare_explanations.py; only those with the check
    """
    images = [i for i in images if any("random weights" in m for m in i["methods"].values())]
    if not images:
        return
    figure = Figure(figsize=(13, 5), layout="constrained")
    pair = zip(figure.subplots(1, 2, sharey=True), ("rank", "SSIM"), strict=True)
    for axes, kind in pair:
        for i, name in enumerate(images[0]["methods"]):
            lines = [image["methods"][name][f"random weights, {kind}"] for image in images]
            mean, style = [1, *np.mean(lines, 0)], ("-", "--", ":")[i // 10]
            axes.plot(np.linspace(0, 1, len(mean)), mean, style, marker=".", label=name,
                      color=f"C{i % 10}")  # fmt: skip
        axes.set(xlabel="part of the layers that is random, from the top",
                 ylabel=f"likeness to the true map: {kind}")  # fmt: skip
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    with replacing(path) as part:
        figure.savefig(part, dpi=110)
