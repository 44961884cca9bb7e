"""compare_explanations.py: metrics on maps whose answer is known, sanity checks, resuming."""

import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import trapezoid
from torch import nn

import compare_explanations as compare
from common.deletion import STEPS
from common.errors import UserError
from common.run import Stop
from tests.helpers import save_classifier

SIDE = 16
SQUARE = (slice(None), slice(None), slice(4, 8), slice(8, 12))


class Reader(nn.Module):
    """A classifier that sees one square: class 1 where it is bright, class 0 where it is dark."""

    def forward(self, x):
        """Map (N, C, 16, 16) to logits (N, 2)."""
        bright = x[SQUARE].mean((1, 2, 3))
        return torch.stack([torch.full_like(bright, 6.0), 12 * bright], 1)


@pytest.fixture
def photo():
    """Give a photo whose square is bright, and which is dark elsewhere."""
    x = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.2
    x[SQUARE] = 0.95
    return x


@pytest.fixture
def perfect():
    """Give the map that is 1 on the square."""
    heat = torch.zeros(SIDE, SIDE)
    heat[SQUARE[2:]] = 1
    return heat


TARGET = torch.tensor([1])


def areas(photo, heat):
    """Give a map's deletion and insertion area, with a black fill."""
    black = torch.zeros_like(photo)
    return [
        compare.area(compare.probability_curve(Reader(), photo, TARGET, heat, black, insertion))
        for insertion in (False, True)
    ]


def test_the_perfect_map_beats_random_and_random_beats_the_inverted_one(photo, perfect):
    rng = torch.Generator().manual_seed(1)
    randoms = [areas(photo, torch.rand(SIDE, SIDE, generator=rng)) for _ in range(10)]
    best, worst, chance = areas(photo, perfect), areas(photo, -perfect), np.mean(randoms, 0)
    assert best[0] < chance[0] - 0.2 < worst[0] - 0.3
    assert best[1] > chance[1] + 0.2 > worst[1] + 0.3


def test_curves_begin_with_one_picture_and_end_with_the_other(photo, perfect):
    fill = torch.zeros_like(photo)
    with torch.no_grad():
        p_photo, p_fill = Reader()(torch.cat([photo, fill])).softmax(1)[:, 1].tolist()
    curve = compare.probability_curve(Reader(), photo, TARGET, perfect, fill)
    assert len(curve) == STEPS + 1
    assert curve[[0, -1]] == pytest.approx([p_photo, p_fill])
    curve = compare.probability_curve(Reader(), photo, TARGET, perfect, fill, insertion=True)
    assert curve[[0, -1]] == pytest.approx([p_fill, p_photo])


def test_each_step_of_a_curve_takes_its_share_of_the_pixels():
    counts = []

    def count(pictures):
        counts.extend((pictures[:, 0] == 0).flatten(1).sum(1).tolist())
        return torch.zeros(len(pictures), 2)

    heat = torch.arange(SIDE * SIDE).view(SIDE, SIDE).float()
    x = torch.ones(1, 3, SIDE, SIDE)
    compare.probability_curve(count, x, TARGET, heat, torch.zeros_like(x))
    wanted = torch.linspace(0, SIDE * SIDE, STEPS + 1).round()
    assert counts == wanted.int().tolist()


@pytest.mark.parametrize("insertion", [False, True])
def test_curve_and_area_are_those_of_a_loop_over_pixels(insertion, photo):
    rng = torch.Generator().manual_seed(0)
    network, heat = small_network(), torch.rand(SIDE, SIDE, generator=rng)
    fill = torch.rand(photo.shape, generator=rng)
    order = sorted(range(SIDE * SIDE), key=lambda i: -heat.flatten()[i].item())
    picture, other = (fill, photo) if insertion else (photo, fill)
    picture, found = picture.clone(), []
    for count in range(SIDE * SIDE + 1):
        with torch.no_grad():
            found.append(float(network(picture).softmax(1)[0, 1]))
        for i in order[count : count + 1]:
            picture[0, :, i // SIDE, i % SIDE] = other[0, :, i // SIDE, i % SIDE]
    steps = np.linspace(0, SIDE * SIDE, STEPS + 1).round().astype(int)
    curve = compare.probability_curve(network, photo, TARGET, heat, fill, insertion)
    assert curve == pytest.approx(np.array(found)[steps], abs=1e-6)
    assert compare.area(curve) == pytest.approx(trapezoid(curve, dx=1 / STEPS))
    assert compare.area(curve) == pytest.approx(trapezoid(found, dx=1 / SIDE**2), abs=0.005)


def test_area_of_known_curves():
    assert compare.area(np.ones(29)) == pytest.approx(1)
    assert compare.area(np.linspace(1, 0, 29)) == pytest.approx(0.5)


def test_smallest_area_of_known_curves():
    assert compare.smallest_area(np.linspace(1, 0, 29)) == pytest.approx(0.9)
    assert compare.smallest_area(np.ones(29)) == 1
    # from 0.8 to 0.08, a tenth, in the very first step
    assert compare.smallest_area(np.array([0.8, 0.08, 0.0])) == pytest.approx(0.5)


def test_the_smallest_area_of_the_perfect_map_is_the_square(photo, perfect):
    black = torch.zeros_like(photo)
    curve = compare.probability_curve(Reader(), photo, TARGET, perfect, black)
    assert compare.smallest_area(curve) < 16 / 256 + 1 / STEPS


def test_sensitivity_is_zero_for_a_constant_and_known_for_a_linear_map(photo):
    rng = torch.Generator().manual_seed(0)
    heat, nudged = torch.ones(SIDE, SIDE), [compare.nudge(photo, rng) for _ in range(2)]
    assert all((n - photo).abs().max() <= compare.NUDGE + 1e-6 for n in nudged)
    assert compare.max_sensitivity(heat, [heat, heat]) == 0
    mean = photo.mean((0, 1))
    found = compare.max_sensitivity(mean, [n.mean((0, 1)) for n in nudged])
    # the mean of three uniform numbers in +-0.02 has the deviation 0.02 / 3
    wanted = compare.NUDGE / 3 * SIDE / mean.norm()
    assert found == pytest.approx(float(wanted), rel=0.15)
    assert compare.max_sensitivity(mean, [mean, 3 * mean]) == pytest.approx(2)  # the worst counts


def small_network():
    """Build a convolutional classifier of 8 classes with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 8),
    ).eval()  # fmt: skip


def test_randomising_leaves_the_network_alone_and_begins_at_the_top():
    network = small_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    changed = []
    for stage in range(1, compare.STAGES + 1):
        copy = compare.randomise(network, stage, torch.Generator().manual_seed(0))
        changed.append(
            {n.split(".")[0] for n, v in copy.state_dict().items() if not v.equal(before[n])}
        )
        assert all(v.isfinite().all() for v in copy.state_dict().values())
    assert changed == [{"7"}, {"7", "3"}, {"7", "3", "0"}]
    for name, value in network.state_dict().items():
        assert value.equal(before[name])


def test_random_weights_keep_mean_and_deviation():
    layer = nn.Sequential(nn.Linear(200, 200))
    nn.init.normal_(layer[0].weight, 0.3, 0.1)
    weight = compare.randomise(layer, 1, torch.Generator().manual_seed(0))[0].weight.detach()
    assert float(weight.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(weight.std()) == pytest.approx(0.1, rel=0.05)


def test_similarity_of_known_maps():
    heat = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    assert compare.similarity(heat, heat) == pytest.approx((1, 1))
    assert compare.similarity(heat, heat**3)[0] == pytest.approx(1)  # the ranks stay
    assert compare.similarity(heat, -heat)[0] == pytest.approx(-1)
    other = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    assert abs(compare.similarity(heat, other)[0]) < 0.2
    assert compare.similarity(heat, torch.ones(SIDE, SIDE)) == (0, 0)


@pytest.mark.parametrize("name", list(compare.METHODS))
def test_every_method_gives_one_finite_map_and_leaves_the_network_alone(name, photo):
    network = small_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    maps = [
        compare.METHODS[name](network, photo, TARGET, torch.Generator().manual_seed(0))
        for _ in range(2)
    ]
    assert maps[0].shape == (SIDE, SIDE)
    assert maps[0].isfinite().all()
    assert maps[0].equal(maps[1])  # the same noise, the same map
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", ["gradient", "SmoothGrad squared", "RISE"])
def test_methods_find_the_square(name, photo):
    heat = compare.METHODS[name](Reader(), photo, TARGET, torch.Generator().manual_seed(0))
    deletion, insertion = areas(photo, heat)
    rng = torch.Generator().manual_seed(1)
    chance = np.mean([areas(photo, torch.rand(SIDE, SIDE, generator=rng)) for _ in range(5)], 0)
    assert deletion < chance[0]
    assert insertion > chance[1]


def test_methods_that_share_samples_give_what_each_gives_alone(photo):
    shared = ["SmoothGrad signed", "gradient", "SmoothGrad squared", "SmoothGrad abs"]
    network, calls = small_network(), []
    network[0].register_forward_hook(lambda *_: calls.append(1))
    args = SimpleNamespace(methods=shared, seed=0)
    together = compare.rank_pixels(args, None, Stop(), network, photo, TARGET)
    count = len(calls)
    assert list(together) == shared
    for name in shared:
        calls.clear()
        args.methods = [name]
        (alone,) = compare.rank_pixels(args, None, Stop(), network, photo, TARGET).values()
        assert alone[0].equal(together[name][0])
        assert alone[2] == together[name][2] == (1 if name == "gradient" else 50)
    assert count == len(calls) + 1  # the three of them cost as much as one, and the gradient
    assert not network._forward_pre_hooks


def test_rise_shows_nothing_of_its_masks_where_the_network_sees_nothing(photo):
    def blind(x):
        return torch.zeros(len(x), 2)

    heat = compare.rise(blind, photo, TARGET, torch.Generator().manual_seed(0))
    assert heat.numpy() == pytest.approx(np.full((SIDE, SIDE), 0.5), abs=1e-5)


def test_grad_cam_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)
            self.conv.weight.data = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)

        def forward(self, x):
            maps = self.conv(x)
            return torch.stack([maps[:, 0].sum((1, 2)) * 3 + maps[:, 1].sum((1, 2)),
                                maps[:, 0].sum((1, 2))], 1)  # fmt: skip

    x = torch.arange(16.0).view(1, 1, 4, 4)
    heat = compare.grad_cam(Net(), x, torch.tensor([0]), None)
    assert heat == pytest.approx((3 * 2 - 1) * x[0, 0])  # gradients 3 and 1 weigh maps 2x and -x


# ------------------------------------------------------------------------------------ the script


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint as train_classifier.py does, of a small network on 16 x 16 pixels."""
    save_classifier(tmp_path / "model", small_network(), "abcdefgh", [3, SIDE, SIDE])
    return str(tmp_path / "model")


CHEAP = ["random", "gradient", "SmoothGrad abs", "Grad-CAM"]


def run(checkpoint, photos, out, *more):
    """Run the script in this process."""
    return compare.main(["--model", checkpoint, "--image", str(photos), "--methods", *CHEAP,
                         "--out", str(out), *more])  # fmt: skip


def test_a_run_writes_tables_pictures_and_records(checkpoint, photos, tmp_path, capsys):
    found = run(checkpoint, photos, tmp_path / "run", "--sanity", "2")
    assert [Path(i["path"]).name for i in found["images"]] == ["ant.png", "bee.png", "cat.png"]
    for image in found["images"]:
        assert {"target", "class_name", "probability", "seconds", "evaluations"} <= set(image)
        assert list(image["methods"]) == CHEAP
    assert found["images"][0]["methods"]["gradient"]["evaluations"] == 1
    assert found["images"][0]["methods"]["SmoothGrad abs"]["evaluations"] == 50
    assert found["images"][0]["methods"]["random"]["random weights"] == pytest.approx(1)
    assert "sensitivity" not in found["images"][2]["methods"]["gradient"]
    for name in ("table.md", "table.csv", "curves.png", "random_weights.png", "contact_sheet.png"):
        assert name in found["files"]
        assert (tmp_path / "run" / name).stat().st_size > 100
    sheet = np.asarray(Image.open(tmp_path / "run/contact_sheet.png").convert("L"))
    assert sheet.std() > 20
    rows = [i["methods"]["gradient"]["deletion"] for i in found["images"]]
    mean, error, count = found["table"]["gradient"]["deletion"]
    assert (mean, error, count) == pytest.approx((np.mean(rows), np.std(rows, ddof=1) / 3**0.5, 3))
    table = (tmp_path / "run/table.md").read_text()
    assert f"{mean:.3f} ± {error:.3f}" in table
    lines = {line.split(" | ")[0][2:]: line for line in table.splitlines()[2:]}
    assert "**" not in lines["random"]  # it never changes, but that is no merit
    assert "| method | deletion |" in capsys.readouterr().out


def test_a_resumed_run_measures_only_what_is_missing(checkpoint, photos, tmp_path, monkeypatch):
    out = tmp_path / "run"
    whole = run(checkpoint, photos, out)
    (out / "records/bee.json").unlink()
    seen, original = [], compare.explain_photo
    monkeypatch.setattr(compare, "explain_photo", lambda *a: seen.append(a[-1]) or original(*a))
    again = compare.main(["--resume", str(out)])
    assert seen == ["bee"]
    for a, b in zip(whole["images"], again["images"], strict=True):
        for name in CHEAP:
            assert a["methods"][name]["deletion"] == b["methods"][name]["deletion"]


def test_without_checks_there_are_tables_all_the_same(checkpoint, photos, tmp_path):
    found = run(checkpoint, photos, tmp_path / "run", "--sanity", "0")
    assert "sensitivity" not in found["table"]["gradient"]
    assert "table.csv" in found["files"]
    assert "random_weights.png" not in found["files"]


def test_a_broken_photo_costs_no_other(checkpoint, photos, tmp_path, capsys):
    photos = shutil.copytree(photos, tmp_path / "photos")
    (photos / "bee.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        run(checkpoint, photos, tmp_path / "run")
    assert error.value.code == 1
    assert len(json.loads((tmp_path / "run/metrics.json").read_text())["images"]) == 2
    assert "bee.png" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [
    ["--methods", "magic"], ["--sanity", "-1"], ["--image", "no-such-file"], ["--model", "magic"],
    ["--target", "unicorn"], ["--seed", "1.5"],
])  # fmt: skip
def test_mistakes_are_said_in_one_line(arguments, tmp_path, refused):
    refused(compare, *arguments, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_signal_stops_between_methods(checkpoint, photos, tmp_path, monkeypatch):
    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)
        return torch.rand(SIDE, SIDE)

    monkeypatch.setitem(compare.METHODS, "random", interrupt)
    line = f"stopped; go on: python compare_explanations.py --resume {tmp_path / 'run'}"
    with pytest.raises(compare.Interrupted, match=f"^{re.escape(line)}$") as stopped:
        run(checkpoint, photos, tmp_path / "run")
    assert stopped.value.signum == signal.SIGINT
