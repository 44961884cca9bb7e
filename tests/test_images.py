"""Pictures: where each image lands, that brightness means the same everywhere, whole files."""

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from common.images import add_caption, plot_curves, save_gif, save_png, to_grid

GREY = 64  # of the lines between the images


def noise(count=1, height=24, width=32, seed=0):
    """Make colour pictures without any structure.

    :return: uint8, (count, height, width, 3)
    :rtype: numpy.ndarray
    """
    shape = (count, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def animate(path, frames, **options):
    """Save an animation the way scripts do: from pictures on the disk.

    :param numpy.ndarray frames: uint8, (N, H, W, 3)
    """
    names = [path.parent / "frames" / f"{i:03d}.png" for i in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        save_png(name, frame)
    save_gif(path, names, **options)


# -------------------------------------------------------------------------------------------- grid


def test_grid_puts_every_image_in_its_place():
    """Images run from left to right, then down; each pixel is where it should be."""
    torch.manual_seed(0)
    images = torch.rand(6, 3, 4, 5)
    grid = to_grid(images, columns=3, scale=2, gap=1)
    assert grid.dtype == np.uint8
    assert grid.shape == (2 * (4 + 1) * 2, 3 * (5 + 1) * 2, 3)
    wanted = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for i in range(6):
        top, left = 2 * (i // 3 * 5 + 1), 2 * (i % 3 * 6 + 1)
        cell = grid[top : top + 8, left : left + 10]
        for dy in (0, 1):  # each pixel is four, all the same
            for dx in (0, 1):
                assert np.array_equal(cell[dy::2, dx::2], wanted[i])
        assert (grid[top - 2 : top, left : left + 10] == GREY).all()
        assert (grid[top : top + 8, left - 2 : left] == GREY).all()


def test_grid_has_one_fixed_range():
    """A bright image changes no other, so that the frames of a GIF don't flicker."""
    images = torch.full((4, 1, 3, 3), 0.2)
    before = to_grid(images, columns=2, scale=1, gap=0)
    assert (before == 51).all()
    images[3] = 7.0  # more than white is white
    after = to_grid(images, columns=2, scale=1, gap=0)
    assert (after[3:, 3:] == 255).all()
    after[3:, 3:] = 51
    assert np.array_equal(before, after)


def test_grid_fills_an_unfinished_row():
    """Five images in rows of three leave one black place."""
    grid = to_grid(torch.ones(5, 1, 2, 2), columns=3, scale=1, gap=0)
    assert grid.shape == (4, 6, 3)
    assert (grid[2:, 4:] == 0).all()
    assert (grid[:2] == 255).all()
    assert (grid[2:, :4] == 255).all()


def test_grid_of_one_channel_is_grey():
    """One channel becomes three equal ones; a tensor with a gradient is taken as well."""
    images = torch.rand(2, 1, 3, 3, requires_grad=True)
    grid = to_grid(images, columns=2)
    assert (grid == grid[..., :1]).all()
    assert images.grad is None


def test_caption_is_below_and_readable():
    """The picture stays as it is; below it is a strip that differs from text to text."""
    picture = noise(width=200)[0]
    one, two = add_caption(picture, "epoch 1"), add_caption(picture, "epoch 2")
    assert one.shape == (24 + 22, 200, 3)
    assert np.array_equal(one[:24], picture)
    assert one[24:].max() > 200  # white on
    assert np.median(one[24:]) == 0  # black
    assert not np.array_equal(one, two)
    assert (one[24] == 0).all()  # not cut off at the top
    assert (one[-1] == 0).all()  # nor at the bottom


# ------------------------------------------------------------------------------------------- files


def test_png_is_exact(tmp_path):
    """What was saved is what is read, in a folder that is made on the way."""
    save_png(tmp_path / "new" / "a.png", noise()[0])
    assert np.array_equal(imageio.imread(tmp_path / "new" / "a.png"), noise()[0])
    assert [f.name for f in tmp_path.rglob("*.*")] == ["a.png"]


def test_gif_plays_every_frame_for_ever(tmp_path):
    """All frames are there in order and size, run for ever, and rest on the last one."""
    frames = [np.full((24, 32, 3), 80 * i, np.uint8) for i in range(4)]
    animate(tmp_path / "a.gif", frames, seconds=1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (4, (32, 24), 0)
        durations = []
        for i in range(4):
            gif.seek(i)
            durations.append(gif.info["duration"])
            assert abs(np.asarray(gif.convert("RGB")).astype(int) - frames[i]).max() < 8
    assert durations == [250, 250, 250, 2000]


@pytest.mark.parametrize(("count", "each"), [(3, 500), (60, 40)])
def test_gif_is_neither_too_slow_nor_too_fast(count, each, tmp_path):
    """A frame takes at most half a second, and never less than viewers can show."""
    seconds = 100 if count == 3 else 1
    animate(tmp_path / "a.gif", noise(count, 4, 4), seconds=seconds)
    assert imageio.immeta(tmp_path / "a.gif")["duration"] == each


def test_gif_of_one_frame(tmp_path):
    """A run of one epoch has an animation, too."""
    animate(tmp_path / "a.gif", noise())
    gif = imageio.imread(tmp_path / "a.gif", index=None)
    assert gif.shape == (1, 24, 32, 3)
    assert gif.std() > 50


def test_gif_leaves_out_frames_that_are_not_there(tmp_path):
    """A sample that was deleted, or never drawn, doesn't cost the animation."""
    animate(tmp_path / "a.gif", noise(3))
    save_gif(tmp_path / "b.gif", [tmp_path / "frames" / f"{i:03d}.png" for i in (0, 7, 2)])
    assert imageio.imread(tmp_path / "b.gif", index=None).shape == (2, 24, 32, 3)


def test_gif_stays_small(tmp_path):
    """A hundred frames of a grid stay fit for a web page, even of noise, which can't be packed."""
    frames = [to_grid(torch.from_numpy(noise(70, 28, 28, seed)[..., 0])[:, None] / 255, columns=10)
              for seed in range(8)]  # fmt: skip
    assert frames[0].shape == (7 * 60, 600, 3)
    animate(tmp_path / "noise.gif", frames)
    assert imageio.imread(tmp_path / "noise.gif", index=None).shape[0] == 8
    assert (tmp_path / "noise.gif").stat().st_size / 8 < 200_000  # 20 MB in a hundred frames
    # What a trained generator draws: strokes, here soft blobs, a little unlike in every frame.
    y, x = np.mgrid[:480, :560] / 40
    blobs = [np.clip(300 * np.sin(x + 0.1 * i) * np.cos(y) - 150, 0, 255).astype(np.uint8)
             for i in range(8)]  # fmt: skip
    animate(tmp_path / "blobs.gif", [blob[..., None].repeat(3, 2) for blob in blobs])
    assert imageio.imread(tmp_path / "blobs.gif", index=None).shape[0] == 8
    assert (tmp_path / "blobs.gif").stat().st_size / 8 < 30_000  # 3 MB


@pytest.mark.parametrize("rows", [1, 5])
def test_curves_show_every_column(rows, tmp_path):
    """One panel beside the other, none of them blank, for one epoch too."""
    table = [{"epoch": i + 1, "a": i * 0.5, "b": 1.0, "c": -i} for i in range(rows)]
    sizes = []
    for panels in ([("a", "b")], [("a", "b"), ("c",)]):
        plot_curves(tmp_path / "a.png", table, panels)
        picture = imageio.imread(tmp_path / "a.png")
        sizes.append(picture.shape[1])
        for part in np.array_split(picture[..., :3], len(panels), axis=1):
            assert part.std() > 5
            assert np.ptp(part.astype(int), axis=2).max() > 50  # a coloured curve, not axes alone
    assert sizes[1] == 2 * sizes[0]


@pytest.mark.parametrize("name", ["a.png", "a.gif", "curves.png"])
def test_a_failed_write_leaves_the_old_file(name, tmp_path, full_disk):
    """A full disk costs the new picture, and neither the old one nor a heap of halves."""

    def write(seed):
        if name == "curves.png":
            plot_curves(tmp_path / name, [{"epoch": 1, "loss": seed}], [("loss",)])
        elif name == "a.gif":
            save_gif(tmp_path / name, [frames / f"{seed}.png", frames / "3.png"])
        else:
            save_png(tmp_path / name, noise(seed=seed)[0])

    frames = tmp_path / "frames"
    for seed in (1, 2, 3):
        save_png(frames / f"{seed}.png", noise(seed=seed)[0])
    write(1)
    before = (tmp_path / name).read_bytes()
    with full_disk(), pytest.raises(OSError, match="too large"):
        write(2)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([name, "frames"])
    assert (tmp_path / name).read_bytes() == before
