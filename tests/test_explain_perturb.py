"""Learned masks: the objectives by hand, toys of a known answer, and what is drawn."""

import copy
import itertools

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch import nn

import explain_perturb as script
from common.device import make_rng
from explain_perturb import (
    Game,
    Settings,
    area_penalty,
    enlarge,
    find_answer,
    find_regions,
    learn_mask,
    level_sets,
    make_reference,
    minimise,
    smooth_max,
    start_maps,
    sum_levels,
    total_variation,
)
from tests.helpers import left_alone, make_training_network, refusal

SIZE = 32  # of the photos
SQUARE = (..., slice(8, 20), slice(12, 24))  # what counts
AREA = 12 * 12 / 32**2
EACH_GAME = pytest.mark.parametrize("game", ["deletion", "preservation", "both"])
EACH_REGULARIZER = pytest.mark.parametrize("regularizer", script.OBJECTIVES)
QUICK = {"mask_size": 16, "reference": "mean", "iterations": 40}


class Toy(nn.Module):
    """Two classes: log odds of the first are the square's brightness, whatever is elsewhere."""

    def forward(self, x):
        """Map (N, C, 32, 32) to logits, (N, 2)."""
        bright = x[SQUARE].mean((1, 2, 3))
        return torch.stack([20 * bright - 8, 0 * bright], 1)


def make_photos(n=1, seed=0):
    """Draw dark photos of noise with a bright square where the toy looks."""
    x = torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 0.2
    x[SQUARE] += 0.7
    return x


def make_game(x=None, network=None, **settings):
    """Make a game about class 0 of photos, the toy's by default."""
    x = make_photos() if x is None else x
    target = torch.zeros(len(x), dtype=torch.long)
    return Game(network or Toy(), x, target, Settings(**{**QUICK, **settings}))


def play(**options):
    """Learn the regions of photos; parameters as of :func:`make_game`."""
    game = make_game(**options)
    found = list(minimise(game))
    return game, found[-1][0], torch.stack([values[0] for _, values in found])


# --------------------------------------------------------------------------------- building blocks


@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_level_sets_have_the_areas_and_are_nested(scale):
    """Whatever the map, flat or steep, regions have their areas, each within the next."""
    values = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(1)) * scale
    areas = torch.tensor([0.02, 0.3, 0.31, 0.9])
    regions = level_sets(values, areas)
    torch.testing.assert_close(regions.mean((2, 3)), areas.expand(2, -1), atol=2e-3, rtol=0)
    assert (regions.diff(dim=1) >= 0).all()


def test_level_sets_gradient_is_that_of_finite_differences():
    """The threshold moves with the map, and the gradient knows it."""
    values = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    values.requires_grad_()
    areas = torch.tensor([0.2, 0.6]).double()
    assert torch.autograd.gradcheck(lambda v: level_sets(v, areas), values, atol=1e-4)
    (slope,) = torch.autograd.grad(level_sets(values, areas).mean((2, 3)).sum(), values)
    assert slope.abs().max() < 1e-6  # no change of the map changes an area


def test_levels_add_up():
    """Each map counts as if enlarged on its own; maps of other sides than powers of 2 as well."""
    for side, sides in ((2, [2]), (3, [3]), (7, [7, 3]), (28, [28, 14, 7, 3])):
        shapes = [tuple(m.shape) for m in start_maps(2, 5, side, "cpu")]
        assert shapes == [(2, 5, s, s) for s in sides]
    fine = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    coarse = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    large = sum_levels([fine, coarse]) - fine
    torch.testing.assert_close(large[..., 0, 0], coarse[..., 0, 0])
    upper = 0.25 * coarse[..., 0, 0] + 0.75 * coarse[..., 0, 1]
    lower = 0.25 * coarse[..., 1, 0] + 0.75 * coarse[..., 1, 1]
    torch.testing.assert_close(large[..., 1, 2], 0.75 * upper + 0.25 * lower)


def test_smooth_max_grows_a_cell_into_a_disc():
    """A single cell reaches two cells far; a large mask stays what it is inside."""
    mask = torch.zeros(1, 1, 9, 9)
    mask[0, 0, 4, 4] = 1
    grown = smooth_max(mask)[0, 0]
    assert grown[4, 4] == pytest.approx(1, abs=1e-3)
    assert grown[4, 2] > 0.5
    assert grown[4, 1] == 0
    assert smooth_max(torch.ones(1, 1, 9, 9)).min() > 0.9


def test_penalties_by_hand():
    """Differences inside the mask only; sorted values against zeros and ones."""
    mask = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.5, 0.5], [1.0, 0.5, 0.0]])
    down = [1.0, 0, 0, 0, 0, 0.5]
    across = [0.5, 0, 0.5, 0, 0.5, 0.5]
    wanted = sum(d**3 for d in down) / 6 + sum(d**3 for d in across) / 6
    assert float(total_variation(mask, 3)) == pytest.approx(wanted)
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.5, 0.2], [0.9, 0.0]]]])
    penalty = area_penalty(masks, torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(penalty, torch.tensor([[0, (0.2**2 + 0.5**2 + 0.1**2) / 4]]))


def test_enlarge_keeps_constants_and_range():
    """A mean of cells: no new extremes, whatever the sizes."""
    masks = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    large = enlarge(masks, 33)
    assert large.shape == (2, 3, 33, 33)
    assert masks.min() <= large.min() < large.max() <= masks.max()
    torch.testing.assert_close(enlarge(torch.full((4, 4), 0.3), 9), torch.full((9, 9), 0.3))


def test_references():
    """The mean has one colour, noise lies about it, the blur has no edges."""
    x = make_photos(2)
    mean, noise, blurred = (
        make_reference(kind, x, 3.0, make_rng("cpu", 0)) for kind in ("mean", "noise", "blur")
    )
    assert torch.equal(mean, x.mean((2, 3), keepdim=True).expand_as(x))
    assert noise.std() > 0.1
    assert (noise - mean).mean().abs() < 0.05
    assert 0 <= noise.min() < noise.max() <= 1
    assert total_variation(blurred, 1).max() < 0.3 * total_variation(x, 1).min()


def test_scores():
    """Logit, probability and its bounded log odds, which have a slope near 1."""
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [6.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 0, 0])
    p = logits.softmax(1)[:, 0]
    assert script.class_score(logits, target, "logit").tolist() == [1, 3, 6]
    probability = script.class_score(logits, target, "probability")
    torch.testing.assert_close(probability, p)
    odds = script.class_score(logits, target)
    torch.testing.assert_close(odds, ((p + 0.02) / (1 - p + 0.02)).log())
    slopes = [torch.autograd.grad(s[2], logits)[0][2, 0] for s in (probability, odds)]
    assert slopes[1] > 40 * slopes[0]


def test_draws_are_stratified():
    """In each step an area of each stratum of the logarithm; in both games the same strata."""
    for game, pictures, strata in (("both", 8, 4), ("deletion", 8, 8), ("both", 5, 3)):
        found = make_game(game=game, pictures=pictures, areas=(0.05, 0.2, 0.8))
        draws = torch.stack([found.draw().areas for _ in range(200)])
        place = (draws / 0.05).log() / torch.tensor(0.8 / 0.05).log() * strata
        games = 2 if game == "both" else 1
        assert (place.floor() == torch.arange(pictures) // games).all()
        assert (place % 1).mean() == pytest.approx(0.5, abs=0.05)
        assert found.keeps.tolist() == [game == "both" and i % 2 == 1 for i in range(pictures)]


# --------------------------------------------------------------------------- objectives by hand

U = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])


def score_by_hand(u, keep, reference=0):
    """Return the toy's logit of a photo of which a region u is deleted, or alone is kept."""
    m = enlarge(u if keep else 1 - u, SIZE)
    return float(Toy()(m * make_photos() + (1 - m) * reference)[0, 0])


def evaluate(u, draw=None, **settings):
    """Evaluate the objective of a mask of 3 x 3 cells, with a black reference and logits."""
    game = make_game(mask_size=3, jitter=0, score="logit", **settings)
    game.padded = torch.cat([game.x, 0 * game.x], 1)  # jitter needs no padding
    objective = script.OBJECTIVES[game.settings.regularizer]
    return float(objective(game, [u.logit().view(1, -1, 3, 3)], draw or game.draw()))


@pytest.mark.parametrize(("game", "sign"), [("deletion", 1), ("preservation", -1)])
def test_objective_2017_is_the_sum_of_its_three_terms(game, sign):
    """l1 mean(1 - m) + l2 mean|grad m|^b + the score."""
    found = evaluate(U, regularizer="tv", game=game, l1=0.3, l2=0.7, beta=2.0)
    score = sign * score_by_hand(U, game == "preservation")
    assert found == pytest.approx(0.3 * 0.5 + 0.7 * (0.3**2 + 0.1**2) + score, rel=1e-5)


def test_objective_2019_is_the_score_and_the_distance_from_the_areas():
    """A mask for each area, each deleted and kept; the penalty grows with the square of time."""
    masks = torch.stack([U, U.T**2])
    areas = (0.2, 0.5)
    draw = make_game(regularizer="area").draw(0.5)._replace(shifts=torch.zeros(4, 2, dtype=int))
    found = evaluate(masks, draw, regularizer="area", game="both", areas=areas, keep_weight=0.25)
    u = smooth_max(masks.unsqueeze(0))
    deleted = sum(score_by_hand(one, False) for one in u[0])
    kept = sum(score_by_hand(one, True) for one in u[0])
    penalty = float(area_penalty(u, torch.tensor(areas)).mean())
    assert found == pytest.approx((deleted - 0.25 * kept) / 4 + 300 * 0.25 * penalty, rel=1e-5)


def test_objective_nested_is_the_mean_score_of_its_level_sets():
    """Of four areas, two are deleted and two kept, which count less."""
    areas = torch.tensor([0.1, 0.3, 0.6, 0.8])
    draw = script.Draw(torch.zeros(4, 2, dtype=torch.long), areas, torch.tensor(1.0))
    found = evaluate(U, draw, game="both", keep_weight=0.25)
    u = level_sets(U.logit().view(1, 1, 3, 3), areas)[0]
    deleted = score_by_hand(u[0], False) + score_by_hand(u[2], False)
    kept = score_by_hand(u[1], True) + score_by_hand(u[3], True)
    assert found == pytest.approx((deleted - 0.25 * kept) / 4, rel=1e-5)


def test_score_is_averaged_over_the_jitter():
    """With a mask that keeps all, the score is the mean over the shifted photos."""
    game = make_game(game="deletion", regularizer="tv", l1=0, l2=0, jitter=28, score="logit",
                     pictures=6)  # fmt: skip
    draw = game.draw()
    shifts = draw.shifts.tolist()
    assert len({tuple(s) for s in shifts}) > 1
    assert all(0 <= i < 4 and 0 <= j < 4 for i, j in shifts)  # 28 of 224 are 4 of 32
    padded = nn.functional.pad(game.x, (0, 3, 0, 3), "replicate")
    shifted = [padded[..., i : i + SIZE, j : j + SIZE] for i, j in shifts]
    wanted = torch.stack([Toy()(s)[0, 0] for s in shifted]).mean()
    value = script.objective_2017(game, [torch.full((1, 1, 3, 3), -30.0)], draw)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)


@EACH_REGULARIZER
def test_gradient_of_the_objective(regularizer):
    """Through masks, references, jitter and network, of two photos, in double precision."""
    game = make_game(make_photos(2).double(), regularizer=regularizer, mask_size=4)
    game.target[1] = 1
    maps = [torch.randn_like(m, dtype=torch.float64).requires_grad_()
            for m in start_maps(2, 5 if regularizer == "area" else 1, 4, "cpu")]  # fmt: skip
    draw = game.draw()
    objective = script.OBJECTIVES[regularizer]
    assert torch.autograd.gradcheck(lambda *m: objective(game, m, draw), maps, atol=1e-4)


# ------------------------------------------------------------------------- toys of a known answer


METHODS = {
    "nested": {},
    "nested, L-BFGS": {"optimizer": "lbfgs", "iterations": 8},  # sees one function in each step
    "tv": {"regularizer": "tv", "l1": 1.0, "l2": 0.0, "lr": 0.5, "iterations": 80},
    "area": {"regularizer": "area", "areas": (0.14,), "lr": 0.5, "iterations": 80},
}


@EACH_GAME
@pytest.mark.parametrize("method", METHODS)
def test_the_square_is_found(game, method):
    """The region of the square's area is the square that the classifier looks at."""
    found, maps, _ = play(game=game, score="probability", **METHODS[method])
    u = enlarge(find_regions(maps, found.settings, torch.tensor([AREA])), SIZE)[0, 0] > 0.5
    truth = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    truth[SQUARE] = True
    assert (u & truth).sum() / (u | truth).sum() >= 0.6


def test_the_area_is_met():
    """With the area constraint each mask has its area, and its values are near 0 or 1."""
    game, maps, _ = play(regularizer="area", areas=(0.1, 0.2, 0.4), iterations=100, lr=0.3,
                         area_weight=3000.0)  # fmt: skip
    masks = find_regions(maps, game.settings, None)
    torch.testing.assert_close(masks.mean((2, 3))[0], game.areas, atol=0.04, rtol=0)
    assert ((masks < 0.2) | (masks > 0.8)).float().mean() > 0.75


def test_lbfgs_and_adam_reach_the_same_minimum(monkeypatch):
    """On a convex objective, and L-BFGS in fewer evaluations."""

    def convex(game, maps, draw):
        wanted = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
        weights = torch.linspace(1, 5, 256).view(1, 1, 16, 16)
        rest = sum(m.square().mean() for m in maps[1:])
        return ((maps[0] - wanted) ** 2 * weights).mean((1, 2, 3)) + rest + 2

    monkeypatch.setitem(script.OBJECTIVES, "tv", convex)
    game = make_game(regularizer="tv", lr=0.1)
    first = next(minimise(game))[0][0].detach()
    assert float(first.abs().max()) == pytest.approx(0.1)  # Adam's first step is the rate
    evaluations = {}
    for optimizer, steps in (("adam", 300), ("lbfgs", 8)):
        game = make_game(regularizer="tv", optimizer=optimizer, iterations=steps, lr=0.1)
        trace = [value for _, values in minimise(game) for value in values]
        assert float(trace[-1]) == pytest.approx(2, abs=1e-4)
        evaluations[optimizer] = len(trace)
    assert evaluations["adam"] == 300
    assert evaluations["lbfgs"] < 100


def test_maps_that_become_infinite_are_said(monkeypatch):
    """Instead of an answer that means nothing."""

    def infinite(game, maps, draw):
        return sum(m.sum() for m in maps) * torch.nan

    monkeypatch.setitem(script.OBJECTIVES, "tv", infinite)
    assert "no longer finite" in refusal(lambda: list(minimise(make_game(regularizer="tv"))))


def test_a_batch_gives_what_single_photos_give():
    """Photos share neither parameters nor statistics, only what is drawn from the seed."""
    x = make_photos(3, seed=5)
    x[1] *= 0.6
    _, _, together = play(x=x)
    apart = torch.cat([play(x=x[i : i + 1])[2] for i in range(3)], 1)
    torch.testing.assert_close(together, apart, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(together[:, 0], together[:, 1], atol=0.1)
    assert not torch.allclose(play(x=x, seed=1)[2], together, atol=1e-3)


def test_learn_mask_deletes_the_square_and_little_else():
    """The signature of the notebook, also where autograd is off: a small mask takes the class."""
    x = make_photos(2)
    with torch.no_grad():
        mask = learn_mask(Toy(), x, torch.tensor([0, 0]), reference="mean", mask_size=16)
    assert mask.shape == (2, SIZE, SIZE)
    assert 0 <= mask.min() < mask.max() <= 1
    masked = mask.unsqueeze(1) * x + (1 - mask.unsqueeze(1)) * x.mean((2, 3), keepdim=True)
    assert Toy()(x).softmax(1)[:, 0].min() > 0.99
    assert Toy()(masked).softmax(1)[:, 0].max() < 0.06
    assert (1 - mask).mean((1, 2)).max() < 2 * AREA
    assert mask[SQUARE].mean() < 0.3


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_a_network_amid_its_training_is_explained_as_in_eval_mode_and_left_alone(optimizer):
    """Whatever BatchNorm and dropout would do in train mode; also after an error."""
    network = make_training_network()
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    x = make_photos()[..., 8:24, 8:24]
    target = torch.tensor([2])
    quick = {"iterations": 2, "mask_size": 4, "optimizer": optimizer}
    with left_alone(network):
        mask = learn_mask(network, x, target, reference="blur", **quick)
    assert torch.equal(mask, learn_mask(frozen, x, target, reference="blur", **quick))
    network.append(nn.Softmax(dim=7))  # no tensor has one
    with left_alone(network), pytest.raises(IndexError):
        learn_mask(network, x, target, **quick)


# --------------------------------------------------------------------------------------- the answer


@EACH_GAME
def test_answer_is_the_smallest_that_is_enough(game):
    """And its probability is that of the picture as saved, in 8 bits."""
    found, maps, _ = play(game=game)
    before = float(Toy()(found.x).softmax(1)[0, 0])
    m, ranking, picture, facts = find_answer(found, 0, maps, before)
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
        worse = [p < 0.95 * before for a, p in facts["curve"] if a > facts["area"] + 1e-6]
    else:
        assert saved <= 0.05 * before
        worse = [p > 0.05 * before for a, p in facts["curve"] if a < facts["area"] - 1e-6]
    assert worse
    assert all(worse)
    areas = [area for area in facts["smallest_areas"].values() if area is not None]
    assert all(a <= b for a, b in itertools.pairwise(areas))
    assert ranking[SQUARE].mean() > 2 * ranking.mean()


def test_the_smallest_of_several_masks_is_taken():
    """Also if a larger one comes first."""
    maps = torch.full((1, 3, SIZE, SIZE), -9.0)
    maps[0, 0] = 9.0
    maps[(0, 1, *SQUARE[1:])] = 9.0
    game = make_game(regularizer="area", game="deletion")
    answer = find_answer(game, 0, [maps], 0.99)
    assert answer.facts["area"] < 2 * AREA
    assert answer.mask[SQUARE].max() < 0.5


def test_a_class_that_cannot_go_is_said():
    """Where no area is enough, the best is shown and "reached" is false."""

    class Always(nn.Module):
        def forward(self, x):
            bright = 0.1 * x.mean((1, 2, 3))
            return torch.stack([bright, 0 * bright], 1)

    game, maps, _ = play(network=Always(), iterations=2, suppress=0.954)
    facts = find_answer(game, 0, maps, 0.51).facts
    assert not facts["reached"]
    # --suppress comes beside the 95 %, not in their place.
    assert facts["smallest_areas"] == dict.fromkeys(("80%", "90%", "95%", "95.4%", "99%"))
    assert facts["probability_after"] == min(p for _, p in facts["curve"])


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_a_photo(channels, tmp_path, recwarn):
    """For grey and colour, whatever the class is called; what is deleted is seen."""
    photo = torch.rand(channels, SIZE, SIZE)
    mask = torch.ones(SIZE, SIZE)
    mask[8:20, 12:24] = 0
    perturbed = (photo * mask * 255).byte()
    answer = script.Answer(mask, 1 - mask, perturbed, {})
    record = {"class_name": "$x^\n猫 \udcff", "probability": 0.9, "probability_after": 0.1,
              "area": AREA, "curve": [[0.0, 0.9], [AREA, 0.1], [1.0, 0.0]]}  # fmt: skip
    script.write_pictures(tmp_path, "a", photo, answer, record)
    found = {f.stem: iio.imread(f)[..., :3].astype(int) for f in tmp_path.glob("*.png")}
    assert np.array_equal(found["a_mask"][3::7, 3::7, 0], 255 * mask.numpy())
    shown = np.broadcast_to(perturbed.permute(1, 2, 0).numpy(), (SIZE, SIZE, 3))
    assert np.array_equal(found["a_perturbed"], shown)
    overlay = found["a_overlay"]
    assert overlay.shape == (224, 224, 3)
    white = np.abs(overlay - [252, 255, 164]).max(2) < 5  # where inferno ends
    assert np.array_equal(white[3::7, 3::7], mask.numpy() == 0)
    assert found["a_panel"].shape[1] > 3 * found["a_panel"].shape[0]
    assert found["a_panel"].std() > 30
    assert not recwarn.list
