"""compare_explanations.py: metrics on maps whose answer is known, checks, tables and pictures."""

import csv
from argparse import Namespace
from functools import partial

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from torch import nn

import compare_explanations as compare
from compare_explanations import area, max_sensitivity, probability_curve, similarity, smallest_area
from tests.helpers import left_alone, make_training_network

SIDE = 16
SQUARE = (..., slice(4, 8), slice(8, 12))
TARGET = torch.tensor([1])
FILLS = ("blur", "mean")
PERFECT = torch.zeros(SIDE, SIDE)
PERFECT[SQUARE] = 1


class Reader(nn.Module):
    """A classifier that sees one square: class 1 where it is bright, class 0 where it is dark."""

    def forward(self, x):
        """Map (N, C, 16, 16) to logits (N, 2)."""
        bright = x[SQUARE].mean((1, 2, 3))
        return torch.stack([torch.full_like(bright, 6.0), 12 * bright], 1)


@pytest.fixture
def photo():
    """Give a photo whose square is bright, and which is dark elsewhere."""
    x = draw(1, 3, SIDE, SIDE) * 0.2
    x[SQUARE] = 0.95
    return x


@pytest.fixture
def network():
    """Give a convolutional classifier of 5 classes with random weights."""
    return make_training_network().eval()


def draw(*shape, seed=0):
    """Draw uniform numbers."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def measure(photo, heat):
    """Return a map's deletion and insertion area, with a black fill."""
    curve = partial(probability_curve, Reader(), photo, TARGET, heat, torch.zeros_like(photo))
    return np.array([area(curve()), area(curve(insertion=True))])


def measure_chance(photo):
    """Average the deletion and insertion areas of random maps."""
    return np.mean([measure(photo, draw(SIDE, SIDE, seed=i)) for i in range(10)], 0)


def rank(network, x, *names):
    """Make maps as the script does."""
    return compare.rank_pixels(Namespace(methods=names, seed=0), network, x, TARGET)


# ------------------------------------------------------------------------------- curves and areas


def test_the_perfect_map_beats_chance_and_chance_beats_the_inverted_one(photo):
    """Deletion is low and insertion high where the map is right."""
    chance = measure_chance(photo)
    best = measure(photo, PERFECT)
    worst = measure(photo, -PERFECT)
    assert best[0] < chance[0] - 0.2 < worst[0] - 0.3
    assert best[1] > chance[1] + 0.2 > worst[1] + 0.3


@pytest.mark.parametrize("insertion", [False, True])
def test_curve_and_area_are_those_of_a_loop_over_pixels(insertion, photo, network):
    """From one picture to the other, pixel by pixel, every 28th part of the way."""
    heat = draw(SIDE, SIDE)
    fill = draw(*photo.shape, seed=1)
    order = sorted(range(SIDE * SIDE), key=lambda i: -heat.flatten()[i].item())
    other = photo if insertion else fill
    picture = (fill if insertion else photo).clone()
    found = []
    for count in range(SIDE * SIDE + 1):
        with torch.no_grad():
            found.append(float(network(picture).softmax(1)[0, 1]))
        for i in order[count : count + 1]:
            picture[0, :, i // SIDE, i % SIDE] = other[0, :, i // SIDE, i % SIDE]
    steps = np.linspace(0, SIDE * SIDE, compare.STEPS + 1).round().astype(int)
    curve = probability_curve(network, photo, TARGET, heat, fill, insertion)
    assert curve == pytest.approx(np.array(found)[steps], abs=1e-6)
    assert area(curve) == pytest.approx(trapezoid(curve, dx=1 / compare.STEPS))
    assert area(curve) == pytest.approx(trapezoid(found, dx=1 / SIDE**2), abs=0.005)


def test_smallest_area_of_known_curves():
    """Where a tenth of the probability is left, interpolated."""
    assert smallest_area(np.linspace(1, 0, 29)) == pytest.approx(0.9)
    assert smallest_area(np.ones(29)) == 1
    assert smallest_area(np.zeros(29)) == 1  # a class that is nowhere can't be lost
    # from 0.8 to 0.08, a tenth, in the very first step
    assert smallest_area(np.array([0.8, 0.08, 0.0])) == pytest.approx(0.5)


def test_both_fills_are_averaged(photo):
    """The areas of blur and mean; the smallest area is that of the blur."""
    fills = {name: torch.full_like(photo, 0.3 * i) for i, name in enumerate(FILLS)}
    row = compare.measure_curves(Reader(), photo, TARGET, PERFECT, fills)
    for game in ("deletion", "insertion"):
        for name, fill in fills.items():
            curve = probability_curve(Reader(), photo, TARGET, PERFECT, fill, game == "insertion")
            assert row[f"{game} curve, {name}"] == pytest.approx(curve, abs=1e-5)
            assert row[f"{game}, {name}"] == area(curve)
        assert row[game] == (row[f"{game}, blur"] + row[f"{game}, mean"]) / 2
    assert row["smallest area"] < 16 / 256 + 1 / compare.STEPS


# ---------------------------------------------------------------------------------- sanity checks


def test_sensitivity_is_zero_for_a_constant_and_known_for_a_linear_map(photo):
    """And the worst of the nudges counts."""
    rng = torch.Generator().manual_seed(0)
    nudged = [compare.nudge(photo, rng) for _ in range(2)]
    assert all((n - photo).abs().max() <= 0.02 + 1e-6 for n in nudged)
    constant = torch.ones(SIDE, SIDE)
    assert max_sensitivity(constant, [constant, constant]) == 0
    mean = photo.mean((0, 1))
    found = max_sensitivity(mean, [n.mean((0, 1)) for n in nudged])
    # the mean of three uniform numbers in +-0.02 has the deviation 0.02 / 3
    assert found == pytest.approx(float(0.02 / 3 * SIDE / mean.norm()), rel=0.15)
    assert max_sensitivity(mean, [mean, 3 * mean, mean]) == pytest.approx(2)


def test_randomising_leaves_the_network_alone_and_begins_at_the_top(network):
    """Of three layers one, two, all are drawn anew."""
    changed = []
    with left_alone(network):
        for stage in range(1, compare.STAGES + 1):
            made = compare.randomise(network, stage, torch.Generator().manual_seed(0))
            pairs = zip(network.named_parameters(), made.parameters(), strict=True)
            changed.append({name.split(".")[0] for (name, p), q in pairs if not p.equal(q)})
            assert all(p.isfinite().all() for p in made.parameters())
    assert changed == [{"7"}, {"7", "4"}, {"7", "4", "0"}]


def test_random_weights_keep_mean_and_deviation():
    """So that activations stay finite without BatchNorm."""
    layer = nn.Sequential(nn.Linear(200, 200))
    nn.init.normal_(layer[0].weight, 0.3, 0.1)
    weight = compare.randomise(layer, 1, torch.Generator().manual_seed(0))[0].weight.detach()
    assert float(weight.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(weight.std()) == pytest.approx(0.1, rel=0.05)
    assert abs(np.corrcoef(weight.flatten(), layer[0].weight.detach().flatten())[0, 1]) < 0.05


def test_similarity_of_known_maps():
    """The same, the same order, the opposite one, chance, and one that ranks nothing."""
    heat = draw(SIDE, SIDE)
    assert similarity(heat, heat) == pytest.approx((1, 1))
    assert similarity(heat, heat**3)[0] == pytest.approx(1)
    assert similarity(heat, heat**3)[1] < 0.95
    assert similarity(heat, -heat)[0] == pytest.approx(-1)
    assert abs(similarity(heat, draw(SIDE, SIDE, seed=1))[0]) < 0.2
    assert similarity(heat, torch.ones(SIDE, SIDE)) == (0, 0)


# ---------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", list(compare.METHODS))
def test_every_method_gives_one_finite_map_and_leaves_the_network_alone(name, photo, network):
    """The same noise, the same map."""
    with left_alone(network):
        (heat, _, evaluations), (again, _, _) = (rank(network, photo, name)[name] for _ in range(2))
    assert heat.shape == (SIDE, SIDE)
    assert heat.isfinite().all()
    assert heat.equal(again)
    assert (evaluations == 0) == (name in compare.BLIND)


@pytest.mark.parametrize("name", ["gradient", "SmoothGrad squared", "RISE"])
def test_methods_find_the_square(name, photo):
    """Better than chance, both ways."""
    deletion, insertion = measure(photo, rank(Reader(), photo, name)[name][0])
    chance = measure_chance(photo)
    assert deletion < chance[0]
    assert insertion > chance[1]


def test_methods_that_share_samples_give_what_each_gives_alone(photo, network):
    """And cost together what one costs, but each is said to cost as much as alone."""
    names = ["SmoothGrad signed", "gradient", "SmoothGrad squared", "SmoothGrad abs"]
    images = []
    network[0].register_forward_hook(lambda module, inputs, output: images.append(len(output)))
    together = rank(network, photo, *names)
    assert sum(images) == 50 + 1
    assert list(together) == names
    for name in names:
        alone = rank(network, photo, name)[name]
        assert alone[0].equal(together[name][0])
        assert alone[2] == together[name][2] == (1 if name == "gradient" else 50)


def test_rise_shows_nothing_of_its_masks_where_the_network_sees_nothing(photo):
    """A probability of a half everywhere is a map of a half."""

    class Undecided(nn.Module):
        def forward(self, x):
            return torch.zeros(len(x), 2)

    heat = compare.rise(Undecided(), photo, TARGET, torch.Generator())
    assert heat.numpy() == pytest.approx(np.full((SIDE, SIDE), 0.5), abs=1e-5)


def test_grad_cam_by_hand():
    """Gradients 3 and 1 weigh the maps 2x and -x, and not those of a branch that others pass by."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)
            self.conv.weight.data = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)
            self.branch = nn.Identity()

        def forward(self, x):
            maps = self.conv(x)
            left = self.branch(3 * maps[:, :1]).sum((2, 3))
            right = self.branch(maps[:, 1:]).sum((2, 3))
            return torch.cat([left + right, left], 1)

    x = torch.arange(16.0).view(1, 1, 4, 4)
    heat = compare.grad_cam(Net(), x, torch.tensor([0]))
    assert heat == pytest.approx((3 * 2 - 1) * x[0, 0])


def test_the_checks_compare_with_nudges_random_weights_and_another_class(photo, network):
    """Centre and edges never see the network; the gradient does."""
    args = Namespace(methods=["centre", "edges", "gradient"], seed=0)
    found = compare.rank_pixels(args, network, photo, TARGET)
    rows = compare.check_sanity(args, network, photo, TARGET, torch.tensor([4]), found)
    for row in rows.values():
        assert len(row["random weights, rank"]) == len(row["random weights, SSIM"]) == 3
        assert row["random weights"] == row["random weights, rank"][-1]
    assert rows["centre"]["sensitivity"] == 0 < rows["edges"]["sensitivity"]
    for name in ("centre", "edges"):
        assert rows[name]["random weights"] == rows[name]["other class"] == pytest.approx(1)
    assert rows["gradient"]["sensitivity"] > 0
    assert rows["gradient"]["random weights"] < 0.9
    assert rows["gradient"]["other class"] < 0.99


# ------------------------------------------------------------------------------ tables and pictures

COLUMNS = {"deletion": "low", "insertion": "high", "sensitivity": "low", "evaluations": "low"}
IMAGES = [
    {"methods": {"chance": {"deletion": 0.0, "insertion": 0.9, "evaluations": 0},
                 "a": {"deletion": 0.2, "insertion": 0.6, "sensitivity": 0.5, "evaluations": 10},
                 "b": {"deletion": 0.25, "insertion": 0.9, "evaluations": 20}}},
    {"methods": {"chance": {"deletion": 0.0, "insertion": 0.9, "evaluations": 0},
                 "a": {"deletion": 0.4, "insertion": 0.6, "evaluations": 10}}},
]  # fmt: skip


def test_means_errors_and_numbers_of_photos():
    """Of those photos that have a number."""
    table = compare.summarise(IMAGES, list(COLUMNS))
    # 0.2 and 0.4 deviate by 0.1 * sqrt(2) from their mean, which is thus known to 0.1
    assert table["a"]["deletion"] == pytest.approx((0.3, 0.1, 2))
    assert table["a"]["sensitivity"] == pytest.approx((0.5, 0, 1))
    assert table["b"]["insertion"] == pytest.approx((0.9, 0, 1))
    assert "sensitivity" not in table["b"]


def test_tables_are_written_and_the_best_is_bold_but_one_that_is_blind(tmp_path, capsys):
    """As Markdown and as CSV, without checks that the first method has not."""
    table = compare.summarise(IMAGES, list(COLUMNS))
    compare.write_tables(tmp_path, table, COLUMNS, ("chance", "centre"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "| method | deletion | insertion | evaluations |",
        "|---|---|---|---|",
        "| chance | 0.000 ± 0.000 | 0.900 ± 0.000 | 0 |",
        "| a | 0.300 ± 0.100 | 0.600 ± 0.000 | **10** |",
        "| b | **0.250** | **0.900** | 20 |",  # one photo has no error
    ]
    assert (tmp_path / "table.md").read_text().splitlines() == lines[:-1]
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["chance", "a", "b"]
    assert float(rows[1]["deletion error"]) == pytest.approx(0.1)
    assert rows[1]["deletion n"] == "2"


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_shows_every_map_of_every_photo(channels, tmp_path):
    """Photos of the same class, too: of n bright maps, n times as much of the sheet is bright."""
    heat = np.zeros((32, 32), np.float32)
    heat[:16] = 1
    photo = np.full((channels, 32, 32), 0.5, np.float32)
    bright = []
    files = {}
    for i in range(4):
        np.savez(tmp_path / f"{i}.npz", photo=photo, **{"Grad-CAM": heat, "one, smooth": heat.T})
        files[tmp_path / f"{i}.npz"] = "$ the_same_class\n\udcff"
        compare.map_sheet(tmp_path / "sheet.png", files)
        sheet = iio.imread(tmp_path / "sheet.png")[..., :3].astype(int)
        bright.append((abs(sheet - [252, 255, 164]).max(2) < 12).sum())  # where inferno ends
    assert bright[0] > 2000
    assert bright == pytest.approx(bright[0] * np.arange(1, 5), rel=0.1)


def test_curves_are_drawn_and_the_cascade_where_there_is_one(tmp_path):
    """The mean over photos and fills; a photo without the check is left out."""
    keys = [f"{game} curve, {fill}" for game in ("deletion", "insertion") for fill in FILLS]
    plain, low, high = ({key: [p, 0.0] for key in keys} for p in (0.5, 0.0, 1.0))
    checked = {**plain, "random weights": 0.0, "random weights, rank": [0.5, 0.0],
               "random weights, SSIM": [0.0, 0.0]}  # fmt: skip
    pictures = []
    for rows in ([low, high], [plain], [checked], [plain, checked]):
        images = [{"methods": {"$a_method$": row}} for row in rows]
        compare.draw_curves(tmp_path / "curves.png", images)
        compare.draw_cascade(tmp_path / "cascade.png", images)
        pictures.append([iio.imread(file) for file in sorted(tmp_path.glob("*.png"))])
    assert [len(some) for some in pictures] == [1, 1, 2, 2]
    assert np.array_equal(pictures[0][0], pictures[1][0])
    assert np.array_equal(pictures[2], pictures[3])
    assert all(picture.std() > 20 for picture in (*pictures[0], *pictures[2]))
