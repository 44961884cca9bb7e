"""Pictures of learned masks: what was deleted from a photo; each written whole or not at all."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from common.images import plot_curves, save_gif, save_png
from common.panels import to_picture
from common.run import replacing


def write_mask(folder, stem, x, m, ranking, perturbed, record, frames):
    """Write all pictures and the arrays of one photo.

    :param pathlib.Path folder: the run folder
    :param str stem: what the files are called
    :param torch.Tensor x: the photo, (C, H, W), in [0, 1]
    :param torch.Tensor m: the mask, 1 where the photo stays, (H, W)
    :param torch.Tensor ranking: of the pixels, (H, W), large where the class is
    :param torch.Tensor perturbed: the photo with the mask applied, uint8, (C, H, W)
    :param dict record: of metrics.json
    :param list[numpy.ndarray] frames: of the animation; none without one
    """
    photo, perturbed = (v.permute(1, 2, 0).cpu().numpy() for v in (x, perturbed))
    m, ranking = m.cpu(), ranking.cpu().numpy()
    deleted = (1 - m).numpy()
    save_png(folder / f"{stem}_perturbed.png", np.broadcast_to(perturbed, (*m.shape, 3)))
    save_png(folder / f"{stem}_mask.png", to_picture(m))
    save_png(folder / f"{stem}_cam.png", to_cam(photo, deleted))
    draw_mask(folder / f"{stem}_heatmap.png", deleted)
    draw_outcome(folder / record["panel"], photo, perturbed, deleted, record)
    plot_curves(folder / f"{stem}_objective.png", record["trace"], [("objective",)])
    save_gif(folder / f"{stem}.gif", frames, seconds=5)
    with replacing(folder / f"{stem}.npz") as part:
        np.savez_compressed(part, photo=photo, mask=m.numpy(), ranking=ranking)


def to_cam(photo, deleted):
    """Lay a mask in colours over its photo, as class activation maps are shown.

    :param numpy.ndarray photo: (H, W, C), in [0, 1]
    :param numpy.ndarray deleted: (H, W), in [0, 1]
    :return: uint8, (H', W', 3), of at least 224 pixels
    :rtype: numpy.ndarray
    """
    colours = matplotlib.colormaps["jet"](deleted)[..., :3]
    mixed = 0.5 * colours + 0.5 * photo.mean(2, keepdims=True)
    scale = max(1, 224 // photo.shape[0])
    return (mixed * 255).round().astype(np.uint8).repeat(scale, 0).repeat(scale, 1)


def draw_mask(path, deleted):
    """Draw a mask with a colour bar.

    :param pathlib.Path path: the PNG file
    :param numpy.ndarray deleted: 1 - m, (H, W), in [0, 1]
    """
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    add_mask(figure, figure.subplots(), deleted)
    with replacing(path) as part:
        figure.savefig(part, dpi=100)


def add_mask(figure, axes, deleted):
    """Draw a mask and its colour bar into a figure's axes."""
    image = axes.imshow(deleted, cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.046, ticks=[0, 0.5, 1])
    bar.set_label("deleted (1 − m)")
    axes.axis("off")


def draw_outcome(path, photo, perturbed, deleted, record):
    """Draw the photo, what was deleted from it, what is left, and probability against area.

    :param pathlib.Path path: the PNG file
    :param numpy.ndarray photo: (H, W, C), in [0, 1]
    :param numpy.ndarray perturbed: uint8, (H, W, C)
    :param numpy.ndarray deleted: 1 - m, (H, W), in [0, 1]
    :param dict record: of metrics.json: class_name, probability, probability_after, area, curve
    """
    figure = Figure(figsize=(13.2, 3.3), layout="constrained")
    left, mask, right, chart = figure.subplots(1, 4)
    for axes, picture, title in (
        (left, photo, f"{record['class_name']}, {record['probability']:.1%}"),
        (right, perturbed, f"{record['class_name']}, {record['probability_after']:.2%}"),
    ):
        axes.imshow(picture.squeeze(), cmap="gray", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    add_mask(figure, mask, deleted)
    mask.set_title(f"{record['area']:.1%} deleted", fontsize=10)
    areas, probabilities = zip(*record["curve"], strict=True)
    chart.plot(areas, probabilities, marker=".")
    chart.plot(record["area"], record["probability_after"], "o", label="the mask shown")
    chart.axhline(record["probability"], linestyle="--", color="grey", label="photo")
    chart.set(xlabel="deleted area", ylabel="probability of the class", xlim=(0, 1), ylim=(0, 1))
    chart.legend(fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, dpi=100)
