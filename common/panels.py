"""Pictures of explanations: maps as pictures, panels, contact sheets; each written whole or not."""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from common.run import replacing


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
    figure.suptitle(title, fontsize=11)
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
    with replacing(path) as part:
        figure.savefig(part, dpi=110)


def contact_sheet(path, pictures, columns=4, side=280):
    """Show many pictures at once; atomically.

    :param pathlib.Path path: the PNG file
    :param dict[pathlib.Path, str] pictures: captions by file; missing files are left out
    :param int columns: pictures in a row
    :param int side: of one picture's longer side, in pixels
    """
    pictures = {file: caption for file, caption in pictures.items() if file.is_file()}
    if not pictures:
        return
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    thumbs = []
    for file in pictures:
        with Image.open(file) as picture:
            picture.thumbnail((side, side))
            thumbs.append(np.asarray(picture.convert("RGB")))
    height, width = (max(t.shape[i] for t in thumbs) for i in (0, 1))
    size = (columns * (width + 10) / 100, rows * (height + 34) / 100)
    figure = Figure(figsize=size, dpi=100)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, thumb, caption in zip(grid, thumbs, pictures.values(), strict=False):
        axes.imshow(thumb)
        axes.set_title(caption, fontsize=8, pad=2)
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 24 / 100 / size[1], 0.02, 24 / height)
    with replacing(path) as part:
        figure.savefig(part)
