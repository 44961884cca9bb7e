"""Learned masks: the objective by hand, toys of a known answer, and what a user can do wrong."""

import io
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import explain_perturb as script
from common.device import make_rng
from common.errors import UserError
from common.masks import (
    area_penalty,
    count_cells,
    enlarge,
    level_sets,
    smooth_max,
    sum_levels,  # fmt: skip
    total_variation,
)
from tests.helpers import refusal, save_classifier

SIZE, SQUARE = (
    32,
    (..., slice(8, 20), slice(12, 24)),
)  # pictures, and what counts


class Toy(nn.Module):
    """Two classes: log odds of the first are the square's brightness, whatever is elsewhere."""

    def forward(self, x):
        """Map (N, C, 32, 32) to logits, (N, 2)."""
        bright = x[SQUARE].mean((1, 2, 3))
        return torch.stack([20 * bright - 8, 0 * bright], 1)


def arguments(*options):
    """Parse a command line for the toy.

    :rtype: argparse.Namespace
    """
    options = ["--mask-size", "16", "--reference", "mean", "--iterations", "40", *options]
    return script.get_parser().parse_args(options)


def photos(n=1, seed=0):
    """Draw dark photos of noise with a bright square where the toy looks.

    :rtype: torch.Tensor
    """
    x = torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 0.2
    x[SQUARE] += 0.7
    return x


def play(args, x=None, network=None, target=0):
    """Learn the regions of photos.

    :return: the game, its parameters and the trace of objectives, (steps, N)
    :rtype: tuple
    """
    x, rng = photos() if x is None else x, make_rng("cpu", args.seed)
    reference = script.make_reference(args.reference, x, 1.0, rng)
    y = torch.full((len(x),), target)
    game = script.Game(network or Toy(), x, reference, y, args)
    theta = game.start()
    trace = [values for values, _ in script.optimise(game, theta, args, rng)]
    return game, theta.detach(), torch.stack(trace)


def overlap(u):
    """Compare regions, cut at a half, with the square: intersection over union."""
    truth = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    truth[SQUARE] = True
    return float(((u > 0.5) & truth).sum() / ((u > 0.5) | truth).sum())


# ------------------------------------------------------------------------------- the terms by hand


def test_total_variation_by_hand():
    """Three rows, three columns, differences inside the mask only."""
    mask = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.5, 0.5], [1.0, 0.5, 0.0]])
    down = [1.0, 0, 0, 0, 0, 0.5]
    across = [0.5, 0, 0.5, 0, 0.5, 0.5]
    want = sum(d**3 for d in down) / 6 + sum(d**3 for d in across) / 6
    assert float(total_variation(mask, 3)) == pytest.approx(want)
    assert float(total_variation(torch.full((3, 3), 0.7), 3)) == 0


@pytest.mark.parametrize(("game", "sign"), [("deletion", 1), ("preservation", -1)])
def test_objective_is_the_sum_of_its_three_terms(game, sign):
    """l1 mean(1 - m) + l2 mean|grad m|^b + the score, on a mask of 3 x 3 cells."""
    args = arguments("--game", game, "--regularizer", "tv", "--l1", "0.3", "--l2", "0.7",
                     "--beta", "2", "--jitter", "0", "--mask-size", "3", "--score", "logit",
                     "--pictures", "2")  # fmt: skip
    x = photos()
    reference = torch.zeros_like(x)
    found = script.Game(Toy(), x, reference, torch.tensor([0]), args)
    u = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    value = found.objective(u.logit().view(1, 1, 9), found.draw(make_rng("cpu", 0)))
    m = enlarge(1 - u if game == "deletion" else u, SIZE)
    score = float(Toy()(x * m)[0, 0])
    want = 0.3 * 0.5 + 0.7 * (0.3**2 + 0.1**2) + sign * score
    assert float(value) == pytest.approx(want, rel=1e-5)


def test_preservation_counts_less_than_deletion():
    """With a reference that hides nothing, both halves see the photo; one of them is weighed."""
    args = arguments("--jitter", "0", "--keep-weight", "0.25", "--score", "logit")
    x = photos()
    game = script.Game(Toy(), x, x, torch.tensor([0]), args)  # the reference is the photo itself
    value = game.objective(game.start(), game.draw(make_rng("cpu", 0)))
    assert float(value) == pytest.approx(float(Toy()(x)[0, 0]) * (1 - 0.25) / 2, rel=1e-5)


def test_score_is_averaged_over_the_jitter():
    """With a mask that keeps all, the score is the mean over the shifted photos."""
    args = arguments("--game", "deletion", "--regularizer", "tv", "--l1", "0", "--l2", "0",
                     "--jitter", "28", "--score", "logit", "--pictures", "6")  # fmt: skip
    x = photos()
    game = script.Game(Toy(), x, torch.zeros_like(x), torch.tensor([0]), args)
    draw = game.draw(make_rng("cpu", 3))
    assert len({tuple(s) for s in draw.shifts}) > 1
    assert all(0 <= i < 4 and 0 <= j < 4 for i, j in draw.shifts)  # 28 of 224 are 4 of 32
    padded = torch.nn.functional.pad(x, (0, 3, 0, 3), "replicate")
    shifted = [padded[..., i : i + SIZE, j : j + SIZE] for i, j in draw.shifts]
    want = torch.stack([Toy()(s)[0, 0] for s in shifted]).mean()
    value = game.objective(torch.full_like(game.start(), -30.0), draw)
    assert float(value) == pytest.approx(float(want), rel=1e-5)


def test_scores():
    """Logit, probability and its bounded log odds, which fall as far as they rise."""
    logits, target = torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 0])
    p = logits.softmax(1)[:, 0]
    assert script.class_score(logits, target, "logit").tolist() == [1, 3]
    torch.testing.assert_close(script.class_score(logits, target, "probability"), p)
    odds = ((p + script.FLOOR) / (1 - p + script.FLOOR)).log()
    torch.testing.assert_close(script.class_score(logits, target, "odds"), odds)
    sure = torch.tensor([[6.0, 0.0]], requires_grad=True)  # a probability of 99.75 %
    slopes = [torch.autograd.grad(script.class_score(sure, target[:1], kind), sure)[0][0, 0]
              for kind in ("probability", "odds")]  # fmt: skip
    assert slopes[1] > 40 * slopes[0]


def test_references():
    """The mean has one colour, noise lies about it, the blur has no edges."""
    x, rng = photos(2), make_rng("cpu", 0)
    mean = script.make_reference("mean", x, 3.0, rng)
    assert torch.equal(mean, x.mean((2, 3), keepdim=True).expand_as(x))
    noise = script.make_reference("noise", x, 3.0, rng)
    assert noise.std() > 0.1
    assert (noise - mean).mean().abs() < 0.05
    assert 0 <= noise.min() < noise.max() <= 1
    blurred = script.make_reference("blur", x, 3.0, rng)
    assert total_variation(blurred, 1).max() < 0.3 * total_variation(x, 1).min()


# ----------------------------------------------------------------------------- the building blocks


@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_level_sets_have_the_areas_and_are_nested(scale):
    """Whatever the map, flat or steep, masks have their areas, each within the next."""
    values = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) * scale
    areas = torch.tensor([0.02, 0.3, 0.31, 0.9])
    masks = level_sets(values, areas)
    torch.testing.assert_close(masks.mean((2, 3)), areas.expand(2, -1), atol=2e-3, rtol=0)
    assert (masks.diff(dim=1) >= 0).all()


def test_level_sets_gradient_is_that_of_finite_differences():
    """The threshold moves with the map, and the gradient knows it."""
    values = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    areas = torch.tensor([0.2, 0.6]).double()
    assert torch.autograd.gradcheck(lambda v: level_sets(v, areas),
                                    values.requires_grad_(), atol=1e-4)  # fmt: skip
    masks = level_sets(values, areas)
    (gradient,) = torch.autograd.grad(masks.mean((2, 3)).sum(), values)
    assert gradient.abs().max() < 1e-6  # no change of the map changes an area


@pytest.mark.parametrize("block", [
    lambda m: enlarge(m, 7), smooth_max, lambda m: total_variation(m, 3),
    lambda m: area_penalty(m, torch.tensor([0.2, 0.5]))])  # fmt: skip
def test_gradients_of_the_blocks(block):
    """Autograd against finite differences, in double precision."""
    rng = torch.Generator().manual_seed(0)
    masks = torch.rand(1, 2, 3, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, masks)


@pytest.mark.parametrize("regularizer", ["tv", "area", "nested"])
def test_gradient_of_the_objective(regularizer):
    """Through masks, references, jitter, noise and network, in double precision."""
    args = arguments("--regularizer", regularizer, "--image-noise", "0.1", "--mask-size", "4",
                     "--pictures", "4")  # fmt: skip
    x = photos(2).double()
    game = script.Game(Toy(), x, torch.zeros_like(x), torch.tensor([0, 1]), args)
    game.areas = game.areas.double()
    draw = game.draw(make_rng("cpu", 0))
    theta = torch.randn_like(game.start(), dtype=torch.float64).requires_grad_()
    draw = draw._replace(areas=draw.areas.double(), noise=draw.noise.double())
    assert torch.autograd.gradcheck(lambda t: game.objective(t, draw), theta, atol=1e-4)


def test_enlarge_keeps_constants_and_range():
    """A mean of cells: no new extremes, whatever the sizes."""
    masks = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    large = enlarge(masks, 33)
    assert large.shape == (2, 3, 33, 33)
    assert masks.min() <= large.min() < large.max() <= masks.max()
    torch.testing.assert_close(enlarge(torch.full((4, 4), 0.3), 9), torch.full((9, 9), 0.3))


def test_levels_add_up():
    """Each map counts as if enlarged on its own; maps of other sides than powers of 2 as well."""
    assert [count_cells(side) for side in (2, 3, 7, 28)] == [4, 9, 49 + 9, 784 + 196 + 49 + 9]
    cells = torch.randn(2, 3, count_cells(6), generator=torch.Generator().manual_seed(0))
    fine, coarse = cells[..., :36].view(2, 3, 6, 6), cells[..., 36:].view(2, 3, 3, 3)
    summed = sum_levels(cells, 6)
    torch.testing.assert_close((summed - fine)[..., 0, 0], coarse[..., 0, 0])
    torch.testing.assert_close(
        (summed - fine)[..., 1, 2], 0.75 * (0.25 * coarse[..., 0, 0] + 0.75 * coarse[..., 0, 1])
        + 0.25 * (0.25 * coarse[..., 1, 0] + 0.75 * coarse[..., 1, 1]))  # fmt: skip


def test_smooth_max_grows_a_cell_into_a_disc():
    """A single cell reaches two cells far; a large mask stays what it is inside."""
    mask = torch.zeros(1, 1, 9, 9)
    mask[0, 0, 4, 4] = 1
    grown = smooth_max(mask)[0, 0]
    assert grown[4, 4] == pytest.approx(1, abs=1e-3)
    assert grown[4, 2] > 0.5
    assert grown[4, 1] == 0
    assert smooth_max(torch.ones(1, 1, 9, 9)).min() > 0.9


def test_area_penalty_by_hand():
    """Sorted values against zeros and ones."""
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.2], [0.9, 0.0]]]])
    penalty = area_penalty(masks, torch.tensor([0.25, 0.5]))
    want = [[0.0, (0.2**2 + 0.5**2 + 0.1**2) / 4]]
    torch.testing.assert_close(penalty, torch.tensor(want))


# ------------------------------------------------------------------------- toys of a known answer


@pytest.mark.parametrize("game", ["deletion", "preservation", "both"])
@pytest.mark.parametrize("regularizer", ["nested", "tv", "area"])
def test_the_square_is_found(game, regularizer):
    """The regions are the square that the classifier looks at."""
    options = ["--game", game, "--regularizer", regularizer, "--score", "probability"]
    if regularizer == "tv":
        options += ["--l1", "1", "--l2", "0", "--lr", "0.5", "--iterations", "80"]
    if regularizer == "area":
        options += ["--areas", "0.14", "--iterations", "80", "--lr", "0.5"]
    game, theta, _ = play(arguments(*options))
    truth = (SQUARE[1].stop - SQUARE[1].start) ** 2 / SIZE**2
    u = enlarge(game.regions(theta, torch.tensor([truth]))[0, 0], SIZE)
    assert overlap(u) >= 0.6


def test_the_area_is_met():
    """With the area constraint each mask has its area, and its values are near 0 or 1."""
    areas = ["0.1", "0.2", "0.4"]
    args = arguments("--regularizer", "area", "--areas", *areas, "--iterations", "100",
                     "--lr", "0.3", "--area-weight", "3000")  # fmt: skip
    game, theta, _ = play(args)
    masks = game.regions(theta, None)
    torch.testing.assert_close(masks.mean((2, 3))[0], game.areas, atol=0.04, rtol=0)
    assert ((masks < 0.2) | (masks > 0.8)).float().mean() > 0.75


class Convex(script.Game):
    """An objective with one minimum: squared distance to a map, the same in every draw."""

    def objective(self, theta, draw):
        wanted, weights = (torch.linspace(*ends, theta.shape[-1]) for ends in ((-1, 1), (1, 5)))
        return ((theta - wanted) ** 2 * weights).mean((1, 2)) + 2


def test_lbfgs_and_adam_reach_the_same_minimum():
    """On a convex objective, and L-BFGS in fewer evaluations."""
    ends, counts = [], []
    for optimizer, steps in (("adam", "300"), ("lbfgs", "8")):
        args = arguments("--optimizer", optimizer, "--iterations", steps, "--lr", "0.1")
        game = Convex(Toy(), photos(), photos(), torch.tensor([0]), args)
        theta = game.start()
        trace = list(script.optimise(game, theta, args, make_rng("cpu", 0)))
        ends.append(float(trace[-1][0]))
        counts.append(trace[-1][1])
    assert ends == pytest.approx([2, 2], abs=1e-4)
    assert counts[1] < counts[0] / 3


def test_lbfgs_finds_the_square_too():
    """Draws are fixed within a step: the line search sees one function."""
    args = arguments("--optimizer", "lbfgs", "--iterations", "8", "--score", "probability")
    game, theta, _ = play(args)
    assert overlap(enlarge(game.regions(theta, torch.tensor([0.14]))[0, 0], SIZE)) >= 0.6


def test_lbfgs_that_fails_falls_back(capfd):
    """NaN in the line search: said once, the parameters put back, and Adam goes on."""

    class Broken(script.Game):
        calls = 0

        def objective(self, theta, draw):
            Broken.calls += 1
            return super().objective(theta, draw) * (torch.nan if Broken.calls == 2 else 1)

    args = arguments("--optimizer", "lbfgs", "--iterations", "6")
    x = photos()
    game = Broken(Toy(), x, torch.zeros_like(x), torch.tensor([0]), args)
    theta = game.start()
    list(script.optimise(game, theta, args, make_rng("cpu", 0)))
    assert theta.isfinite().all()
    assert theta.abs().max() > 0


def test_optimiser_stops_when_nothing_moves():
    """Once ten steps change nothing, as in a converged convex problem, it ends."""
    args = arguments("--iterations", "1000", "--lr", "0.5", "--tolerance", "1e-3")
    game = Convex(Toy(), photos(), photos(), torch.tensor([0]), args)
    steps = len(list(script.optimise(game, game.start(), args, make_rng("cpu", 0))))
    assert 20 <= steps < 200


@pytest.mark.parametrize("tolerance", ["0", "0.1"])
def test_a_batch_gives_what_single_photos_give(tolerance):
    """Also when one photo has converged before the other."""
    args, x = arguments("--tolerance", tolerance), photos(3, seed=5)
    x[1] *= 0.6
    _, together, _ = play(args, x)
    apart = [play(args, x[i : i + 1])[1] for i in range(3)]
    assert not torch.allclose(together[0], together[1], atol=0.1)
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-3, rtol=1e-3)


def test_seed():
    """Same seed, same map; another seed, another."""
    a, b, c = (play(arguments("--seed", s, "--iterations", "5"))[1] for s in "778")
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-3)


def test_network_is_left_as_it_was():
    """Frozen or not, its parameters get no gradient."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Linear(256, 2)).eval()
    play(arguments("--iterations", "2"), network=network)
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("game", ["deletion", "preservation", "both"])
def test_answer_is_the_smallest_that_is_enough(game):
    """And its probability is that of the picture as saved, in 8 bits."""
    args = arguments("--game", game)
    found, theta, _ = play(args)
    before = float(Toy()(found.x).softmax(1)[0, 0])
    m, ranking, picture, facts = script.find_answer(found, 0, theta, before)
    assert picture.dtype == torch.uint8
    saved = float(Toy()(picture[None] / 255).softmax(1)[0, 0])
    assert facts["probability_after"] == pytest.approx(saved, abs=1e-6)
    z = found.reference[0] + m * (found.x[0] - found.reference[0])
    assert (z * 255 - picture).abs().max() <= 0.51
    assert facts["reached"]
    assert facts["area"] == pytest.approx(float(1 - m.mean()))
    assert [facts["area"], facts["probability_after"]] in facts["curve"]
    if game == "preservation":
        assert saved >= 0.95 * before
    else:
        assert saved <= 0.05 * before
        smaller = [p for a, p in facts["curve"] if a < facts["area"] - 1e-6]
        assert all(p > 0.05 * before for p in smaller)
        areas = [a for a in facts["smallest_areas"].values() if a is not None]
        assert all(a <= b for a, b in itertools.pairwise(areas))
    assert ranking[SQUARE].mean() > 2 * ranking.mean()


def test_each_part_of_the_probability_has_its_own_area():
    """--suppress 0.954 comes beside the 95 %, not in their place."""
    found, theta, _ = play(arguments("--iterations", "2", "--suppress", "0.954"))
    areas = script.find_answer(found, 0, theta, 0.99)[3]["smallest_areas"]
    assert list(areas) == ["80%", "90%", "95%", "95.4%", "99%"]


def test_a_class_that_cannot_go_is_said():
    """Where no area is enough, the best is shown and "reached" is false."""

    class Always(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)) * 0 + 5, x.mean((1, 2, 3)) * 0], 1)

    found, theta, _ = play(arguments("--iterations", "2"), network=Always())
    assert not script.find_answer(found, 0, theta, 0.99)[3]["reached"]


# -------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Make a checkpoint of a small classifier, and photos, one of them broken."""
    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                            nn.Linear(32, 3))  # fmt: skip
    save_classifier(folder, network, ["ash", "beech", "fir"], [3, SIZE, SIZE])
    (folder / "photos").mkdir()
    for i, photo in enumerate(photos(3, seed=9)):
        pixels = (photo.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    return folder


def run(material, out, *options, image="photos"):
    """Run the script in this process on the small classifier."""
    return script.main(["--model", str(material / "checkpoint.pt"), "--image",
                        str(material / image), "--out", str(out), "--mask-size", "8",
                        "--iterations", "4", "--pictures", "4", *options])  # fmt: skip


def test_run_writes_what_it_says(material, tmp_path, capsys):
    """All pictures, arrays and numbers; a contact sheet for several photos; a GIF if asked for."""
    metrics = run(material, tmp_path / "run", "--gif", "--batch", "2", "--target", "beech")
    said = capsys.readouterr().out
    for stem, image in zip("012", metrics["images"], strict=True):
        for end in ("perturbed.png", "mask.png", "heatmap.png", "cam.png", "panel.png",
                    "objective.png"):  # fmt: skip
            name = f"{stem}_{end}"
            assert name in metrics["files"]
            assert str(tmp_path / "run" / name) in said
            assert np.asarray(Image.open(tmp_path / "run" / name)).std() > 1, name
        assert f"{stem}.gif" in metrics["files"]
        assert image["target"] == 1
        assert image["class_name"] == "beech"
        assert image["evaluations"] == 16 == image["trace"][-1]["evaluations"]
        assert (
            f"{image['probability']:.2%}, after the mask {image['probability_after']:.2%}" in said
        )
        with np.load(tmp_path / "run" / f"{stem}.npz") as arrays:
            assert image["area"] == pytest.approx(1 - arrays["mask"].mean(), abs=1e-5)
            assert arrays["mask"].shape == arrays["ranking"].shape == (SIZE, SIZE)
        perturbed = np.asarray(Image.open(tmp_path / "run" / f"{stem}_perturbed.png"))
        x = torch.from_numpy(perturbed.copy()).permute(2, 0, 1)[None] / 255
        network = script.load_classifier(str(material / "checkpoint.pt")).network
        assert float(network(x).softmax(1)[0, 1]) == pytest.approx(
            image["probability_after"], abs=1e-5)  # fmt: skip
    assert "contact_sheet.png" in metrics["files"]
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["images"] == metrics["images"]


def test_lines_are_written_in_one_piece(material, tmp_path, monkeypatch):
    """Those about photos: under torchrun other processes write between two pieces."""

    class Pieces(io.StringIO):
        def write(self, text):
            pieces.append(text)

    pieces = []
    monkeypatch.setattr(sys, "stdout", Pieces())
    monkeypatch.setattr(sys, "stderr", Pieces())
    run(material, tmp_path / "run", "--reference", "noise")
    lines = [text for text in pieces if "after the mask" in text or "no area is enough" in text]
    assert len(lines) > 3
    assert all(text.endswith("\n") for text in lines)


def test_resumed_run_does_only_what_is_missing(material, tmp_path):
    """A photo with a record is not explained again."""
    first = run(material, tmp_path / "run")
    (tmp_path / "run" / "records" / "1.json").unlink()
    kept = tmp_path / "run" / "records" / "0.json"
    before = kept.stat().st_mtime_ns
    second = script.main(["--resume", str(tmp_path / "run")])
    assert kept.stat().st_mtime_ns == before
    for a, b in zip(first["images"], second["images"], strict=True):
        assert a["probability_after"] == pytest.approx(b["probability_after"])
    with pytest.raises(UserError, match="--score"):
        script.main(["--resume", str(tmp_path / "run"), "--score", "logit"])


def test_broken_photo_costs_no_other(material, tmp_path):
    """It is reported at the end, in a batch as well, with exit code 1."""
    folder = material / "with_broken"
    folder.mkdir()
    for i in (0, 1):
        (folder / f"{i}.png").write_bytes((material / "photos" / f"{i}.png").read_bytes())
    (folder / "0b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="1 of 3") as caught:
        run(material, tmp_path / "run", "--batch", "3", image="with_broken")
    assert caught.value.code == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["images"]) == 2
    assert list(metrics["failed"]) == [str(folder / "0b.png")]


@pytest.mark.parametrize("options", [
    ["--image", "nowhere.jpg"], ["--image", "sample:nothing"], ["--lr", "nan"], ["--lr", "0"],
    ["--areas", "0"], ["--areas", "1.5"], ["--suppress", "1"], ["--iterations", "0"],
    ["--mask-size", "1"], ["--pictures", "1"], ["--target", "unicorn"], ["--target", "99"],
    ["--optimizer", "lbfgs", "--batch", "2"], ["--beta", "inf"], ["--blur", "0"],
    ["--model", "no_such_model"], ["--image-noise", "-1"], ["--game", "chess"]])  # fmt: skip
def test_mistakes_are_said_in_one_line(material, tmp_path, options):
    """And leave no run folder behind that looks like a result."""
    refusal(run, material, tmp_path / "run", *options)
    assert not (tmp_path / "run" / "metrics.json").exists()
