"""Pictures: grids, captions, curves, PNG and GIF; each file written whole or not at all."""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from common.run import replacing
from common.watch import show_picture

CAPTION = 22  # pixels of the strip below a picture


def to_grid(images, columns, scale=2, gap=2):
    """Lay images out in rows, on one fixed range, so that two grids can be compared.

    :param torch.Tensor images: (N, C, H, W), in [0, 1], C 1 or 3
    :param int columns: images in a row; an unfinished last row is filled up with black
    :param int scale: side of one image's pixel, in pixels
    :param int gap: grey pixels around each image, before scaling
    :return: the picture, uint8, (H', W', 3)
    :rtype: numpy.ndarray
    """
    n, _, height, width = images.shape
    rows = -(-n // columns)
    images = images.detach().float().cpu().clamp(0, 1)
    grid = torch.full((rows * columns, 3, height + gap, width + gap), 0.25)
    grid[:, :, gap:, gap:] = 0
    grid[:n, :, gap:, gap:] = images  # one channel is spread over three
    grid = grid.view(rows, columns, 3, height + gap, width + gap)
    grid = grid.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), columns * (width + gap), 3)
    grid = (grid * 255).round().to(torch.uint8).numpy()
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


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
        Image.fromarray(picture).save(part)
    show_picture(path, picture)


def save_gif(path, frames, seconds=12):
    """Write an animation that repeats for ever and rests on its last frame; atomically.

    :param pathlib.Path path: the file
    :param list frames: pictures of one size, uint8 arrays (H, W, 3) or their files; files that are
        not there are left out
    :param float seconds: length of one round, without the rest; a frame takes at most half a second
    """
    files = [f for f in frames if isinstance(f, np.ndarray) or f.is_file()]
    frames = [f if isinstance(f, np.ndarray) else np.asarray(Image.open(f)) for f in files]
    if not frames:
        return
    each = min(500, max(40, 1000 * seconds / len(frames)))  # milliseconds; viewers slow down < 40
    durations = [each] * (len(frames) - 1) + [2000]
    # 32 greys are enough for strokes, and keep a hundred frames below 3 MB.
    first, *rest = [Image.fromarray(frame // 8 * 8) for frame in frames]
    with replacing(path) as part:
        first.save(part, save_all=True, append_images=rest, duration=durations, loop=0)


def interpolate(a, b, n, latent):
    """Walk from one noise vector of a generator to another, both ends included.

    Normal noise lies near a sphere, so its walk follows the sphere; a straight line would lead
    through lengths that the generator has never seen (White 2016, arXiv 1609.04468).

    :param torch.Tensor a: (z_dim,)
    :param torch.Tensor b: (z_dim,)
    :param int n: number of steps
    :param str latent: the noise's distribution, "normal" or "uniform"
    :return: (n, z_dim)
    :rtype: torch.Tensor
    """
    t = torch.linspace(0, 1, n, device=a.device)[:, None]
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if latent == "uniform" or angle.sin() < 1e-3:
        return (1 - t) * a + t * b
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def plot_curves(path, rows, panels, levels=None):
    """Plot columns of a table against its first one; atomically.

    :param pathlib.Path path: the PNG file
    :param list[dict] rows: one per epoch or step
    :param list[tuple[str]] panels: the columns to draw, panel by panel; a row may
        lack some, and a panel that no row has anything for is left out
    :param dict levels: by column, a value to mark by a dashed line; that panel's axis is then
        logarithmic, as for a distance that should go down to it
    """
    panels = [names for names in panels if any(name in row for row in rows for name in names)]
    figure = Figure(figsize=(4.5 * len(panels), 3.2), layout="constrained")
    against = next(iter(rows[0]))
    for axes, names in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            values = [row.get(name, np.nan) for row in rows]
            axes.plot([row[against] for row in rows], values, marker=".", label=name)
            if name in (levels or {}):
                axes.axhline(levels[name], linestyle="--", color="grey", label=f"{name}, floor")
                axes.set_yscale("log")
        axes.set_xlabel(against)
        axes.legend()
    with replacing(path) as part:
        figure.savefig(part, dpi=120)
