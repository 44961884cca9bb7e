"""Handwriting that needs no download: EMNIST's 62 characters, written along the bones of fonts.

A font is typed, and we want it written. So only the skeleton of a letter is kept, as a cloud of
points, and every picture is drawn anew from that cloud:

1. **Bones.** The letter is set large and thinned to lines one pixel wide. This takes away what
   makes it typed: weight, contrast and, with every branch too short to be a stroke, most serifs.
   What is left is the path that a hand would follow.
2. **Hand.** Long waves bend the points and vary the pressure; then the letter is tapered, slanted,
   turned and stretched, so that no two are alike. Points, not pixels: moving them blurs nothing.
3. **Pen.** Each point lays down a small Gaussian. Beside a line their sum falls off as
   exp(-d^2 / 2 s^2), so its logarithm tells the distance d to the line, and ink is where d is less
   than the pen's radius. A Gaussian is a product of one in x and one in y, so that a batch of
   pictures is one matrix product and needs no GPU. As with a real pen, ink pools where lines meet.
4. **Box.** As NIST did for MNIST: the longer side of the ink is 20 pixels, in proportion, and whole
   pixels move its centre of mass to the centre of 28 x 28.
"""

from functools import lru_cache
from math import pi
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase, digits

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import convolve, gaussian_filter, label
from skimage.morphology import skeletonize
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

CLASSES = list(digits + ascii_uppercase + ascii_lowercase)

# Fonts of matplotlib whose bones differ, each with the characters that it must not lend. The other
# fonts there are bolder or slanted twins of these, whose bones are the same, or hold symbols only.
SERIFED = "AEFHKLMNTUXY"  # have serifs as long as strokes, and would still look typed
FONTS = {
    "DejaVuSans": "",
    "DejaVuSans-Bold": "f",  # so stout that the bar is shorter than a serif
    "DejaVuSansMono": "0",  # a dot inside, which makes it another letter
    "DejaVuSerif-Italic": SERIFED + "f",  # an italic f has hardly a bar
    "STIXGeneralItalic": SERIFED + "f",
    "cmss10": "",
    "cmtt10": "EFHRTX" + "fghiklmnpruwx",
    "cmti10": SERIFED + "fv",  # this v curls up to an o
    "cmmi10": SERIFED + "fv",
}

SIDE, BOX = 28, 20  # pixels: of the picture, and of the longer side of the ink in it
LARGE = 96  # pixels of the longer side of a letter to be thinned
SPUR = 0.12  # of that side: a branch that is shorter is a serif or a fork of the thinning
BRUSH = 0.7  # pixels, s of step 3; larger pools more ink where lines meet
CHUNK = 128  # pictures drawn at once; so few that their brushes stay in the cache


def prune(bones):
    """Take off the branches that are too short to be strokes.

    :param numpy.ndarray bones: skeleton, bool, (H, W)
    :return: the skeleton without its spurs; parts that touch no other, such as dots, stay
    :rtype: numpy.ndarray
    """
    block = np.ones((3, 3), int)

    def near(mask):
        return convolve(mask.astype(int), block, mode="constant")

    for _ in range(2):  # a fork at the end of a serif hides that the serif itself is short
        knots = near((near(bones) > 3) & bones) > 0
        ends = (near(bones) == 2) & bones
        branches, count = label(bones & ~knots, block)
        for branch in (branches == index + 1 for index in range(count)):
            is_spur = (branch & ends).any() and (near(branch) * knots).any()
            if is_spur and branch.sum() < SPUR * LARGE:
                bones = bones & ~branch
        bones = skeletonize(bones)  # what is left of a knot becomes a line again
    return bones


def trace(font, char):
    """Find the path of the pen (step 1).

    :param str font: one of `FONTS`
    :param str char: one character
    :return: points x, y (y down), the longer side from -1 to 1, (P, 2), and the ink of each, (P, 1)
    :rtype: tuple[torch.Tensor, torch.Tensor]
    """
    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf"))
    left, top, right, bottom = ImageFont.truetype(path, LARGE).getbbox(char)
    face = ImageFont.truetype(path, LARGE * LARGE / max(right - left, bottom - top))
    canvas = Image.new("L", (2 * LARGE, 2 * LARGE))
    ImageDraw.Draw(canvas).text((LARGE, LARGE), char, fill=255, font=face, anchor="mm")
    bones = prune(skeletonize(np.asarray(canvas) > 127))
    # A diagonal has fewer pixels than an upright of the same length, and a dot has one only: share
    # out the ink so that the brush finds a sum of about 1 everywhere on the path.
    spread = BRUSH * LARGE / BOX
    crowd = 2 * pi * spread**2 * gaussian_filter(bones.astype(np.float32), spread)[bones]
    points = torch.from_numpy(np.argwhere(bones)[:, ::-1].astype(np.float32))
    low, high = points.amin(0), points.amax(0)
    return (2 * points - low - high) / (high - low).max(), torch.from_numpy(1 / crowd)[:, None]


@lru_cache(maxsize=1)
def masters():
    """Trace every character in every font, once in a process, in about 2 seconds.

    :return: points (M, P, 2), ink (M, P, 1), and for each class its first row and its number of
        rows, (62,) each; shorter paths are filled up with points in the middle that have no ink
    :rtype: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    """
    lenders = [[font for font, kept in FONTS.items() if char not in kept] for char in CLASSES]
    paths = [trace(f, char) for char, fonts in zip(CLASSES, lenders, strict=True) for f in fonts]
    points, ink = (pad_sequence(part, batch_first=True) for part in zip(*paths, strict=True))
    count = torch.tensor([len(fonts) for fonts in lenders])
    return points, ink, count.cumsum(0) - count, count


def bend(points, ink, generator):
    """Move the points, and press the pen, as an unsteady hand would (step 2).

    :param torch.Tensor points: (N, P, 2), the longer side from -1 to 1
    :param torch.Tensor ink: ink of each point, (N, P, 1)
    :param torch.Generator generator: where the chance comes from
    :return: moved points, (N, P, 2), and their ink, (N, P, 1)
    :rtype: tuple[torch.Tensor, torch.Tensor]
    """

    def chance(*shape):
        return torch.randn(len(points), *shape, generator=generator)

    phases = 2 * pi * torch.rand(len(points), 1, 6, generator=generator)
    waves = (points @ (1.8 * chance(2, 6)) + phases).sin()  # (N, P, 6)
    points = points + waves @ (0.055 * chance(6, 2))
    ink = ink * (waves @ (0.1 * chance(6, 1))).exp()
    points = points * (1 + 0.1 * chance(1, 2) * points.flip(-1))  # taper: wider at one side
    turn, wide = 0.1 * chance(1), (0.15 * chance(1)).exp()
    slant = 0.2 * chance(1) - 0.1  # most people lean to the right, where y is up and negative
    matrix = torch.cat([wide * turn.cos(), turn.sin(), slant - turn.sin(), turn.cos()], 1)
    return points @ matrix.view(-1, 2, 2), ink


def write(points, ink, generator):
    """Draw one picture along each path (steps 2 to 4).

    :param torch.Tensor points: paths, (N, P, 2), the longer side from -1 to 1
    :param torch.Tensor ink: ink of each point, (N, P, 1)
    :param torch.Generator generator: where the chance comes from
    :return: pictures, uint8, (N, 1, 28, 28), white on black
    :rtype: torch.Tensor
    """
    points, ink = bend(points, ink, generator)
    radius = 1.2 * (0.28 * torch.randn(len(points), 1, 1, generator=generator)).exp()
    radius = radius.clamp(0.9, 2.2)  # a finer pen is only grey, a stouter one fills the eye of an e

    low, high = points.amin(1, True), points.amax(1, True)
    scale = (BOX - 2 * radius) / (high - low).amax(2, True)
    middle = (SIDE - 1) / 2
    points = (points - (low + high) / 2) * scale + middle

    pixels = torch.arange(SIDE)
    brush = (-0.5 * ((points[..., None] - pixels) / BRUSH) ** 2).exp()  # (N, P, 2, 28)
    sums = (brush[:, :, 1] * ink).transpose(1, 2) @ brush[:, :, 0]  # (N, 28, 28)
    distance = BRUSH * (-2 * sums.log()).clamp(min=0).sqrt()
    images = (radius - distance + 0.5).clamp(0, 1)  # an edge one pixel soft

    margin = (SIDE - BOX) // 2  # moving no further keeps all ink in the picture
    mass = torch.stack([images.sum(2), images.sum(1)], 1)  # (N, 2, 28): of rows, of columns
    offset = (mass * (pixels - middle)).sum(2) / mass.sum(2)
    window = offset.round().long().clamp(-margin, margin)[..., None] + margin + pixels
    rows, columns = window[:, 0, :, None], window[:, 1, None]  # (N, 28, 1), (N, 1, 28)
    images = pad(images, [margin] * 4)[torch.arange(len(images))[:, None, None], rows, columns]
    return (255 * images).round().to(torch.uint8)[:, None]


def draw_glyphs(n, seed=0):
    """Write characters, every class as often as any other, give or take one, in random order.

    :param int n: number of pictures, 0 or more
    :param int seed: same seed, same pictures; torch's global generator is neither used nor moved
    :return: pictures, uint8, (n, 1, 28, 28), white on black; and indices in `CLASSES`, int64, (n,)
    :rtype: tuple[torch.Tensor, torch.Tensor]
    """
    generator = torch.Generator().manual_seed(seed)
    points, ink, first, count = masters()
    order = torch.randperm(len(CLASSES), generator=generator)  # who comes once more is chance, too
    labels = order[torch.randperm(n, generator=generator) % len(CLASSES)]
    images = torch.empty(n, 1, SIDE, SIDE, dtype=torch.uint8)
    for start in range(0, n, CHUNK):
        part = labels[start : start + CHUNK]
        fonts = (torch.rand(len(part), generator=generator) * count[part]).long()
        rows = first[part] + fonts
        images[start : start + CHUNK] = write(points[rows], ink[rows], generator)
    return images, labels
