"""Charts of a classifier: readable for few and for many classes, of grey and of colour."""

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from common.charts import plot_matrix, plot_pictures


@pytest.mark.parametrize("n", [2, 10, 62])
def test_plot_matrix_is_dark_on_the_diagonal(n, tmp_path):
    """A perfect classifier's picture has one dark cell per class, one below the other."""
    names = [f"a long name {i}" if n == 2 else str(i) for i in range(n)]
    plot_matrix(tmp_path / "matrix.png", 9 * np.eye(n, dtype=int), names)
    picture = imageio.imread(tmp_path / "matrix.png")[..., :3].astype(int)
    blue = (picture[..., 2] - picture[..., 0] > 60) & (picture[..., 0] < 40)
    rows, columns = blue.nonzero()
    assert np.corrcoef(rows, columns)[0, 1] > 0.7
    assert len(np.unique(rows)) > 0.5 * min(picture.shape[:2])


def test_plot_matrix_survives_a_class_without_pictures(tmp_path):
    """A row of zeros is no division by zero."""
    plot_matrix(tmp_path / "matrix.png", np.array([[3, 1], [0, 0]]), ["a", "b"])
    assert imageio.imread(tmp_path / "matrix.png").std() > 5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 9])
def test_plot_pictures_draws_them(channels, count, tmp_path):
    """One picture or more than a row of them, black and white ones included."""
    images = torch.zeros(count, channels, 8, 8, dtype=torch.uint8)
    images[:, :, 2:6] = 255
    plot_pictures(tmp_path / "some.png", images, [f"title {i}" for i in range(count)])
    picture = imageio.imread(tmp_path / "some.png")
    dark = (picture[..., :3].max(2) < 10).mean()  # half of each of the 8 or 16 places
    assert dark == pytest.approx(0.4 * count / (8 if count == 1 else 16), rel=0.3)


def test_plot_pictures_of_nothing_writes_nothing(tmp_path):
    """Without a mistake there is no picture of mistakes."""
    plot_pictures(tmp_path / "none.png", torch.zeros(0, 1, 8, 8, dtype=torch.uint8), [])
    assert list(tmp_path.iterdir()) == []
