"""Charts of a classifier: its confusion matrix, and pictures with a title each."""

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from common.run import replacing


def plot_matrix(path, matrix, names):
    """Draw a confusion matrix, with each class's accuracy beside its name; atomically.

    :param pathlib.Path path: the PNG file
    :param numpy.ndarray matrix: counts, (K, K), in row i what class i was taken for
    :param list[str] names: of the K classes
    """
    share = matrix / matrix.sum(1, keepdims=True).clip(1)
    few, n = len(names) <= 20, len(names)
    side = min(16, 3 + (0.5 if few else 0.2) * n)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    # One mistake in a hundred should be seen beside the diagonal: hence the power.
    axes.imshow(share, cmap="Blues", norm=PowerNorm(0.4, 0, 1))
    rows = [f"{name}   {100 * share[i, i]:.1f} %" for i, name in enumerate(names)]
    axes.set_yticks(range(n), rows, fontsize=9 if few else 7)
    upright = max(map(len, names)) <= 2
    axes.set_xticks(range(n), names, fontsize=9 if few else 7, rotation=0 if upright else 90)
    axes.set(xlabel="taken for", ylabel="what it is, and the share that was seen as such")
    for i, j in zip(*matrix.nonzero(), strict=True):
        color = "white" if share[i, j] > 0.3 else "black"
        size = 8 if few else 5
        axes.text(j, i, matrix[i, j], ha="center", va="center", color=color, fontsize=size)
    with replacing(path) as part:
        figure.savefig(part, dpi=100)


def plot_pictures(path, images, titles, columns=8):
    """Draw pictures with a title each; atomically. Without a picture nothing is written.

    :param pathlib.Path path: the PNG file
    :param torch.Tensor images: uint8, (N, C, H, W), C 1 or 3
    :param list[str] titles: one for each
    :param int columns: pictures in a row
    """
    if not titles:
        return
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(1.4 * columns, 1.85 * rows), layout="constrained")
    for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
        axes.axis("off")
    for axes, image, title in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=8)
    with replacing(path) as part:
        figure.savefig(part, dpi=100)
