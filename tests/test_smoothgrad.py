"""SmoothGrad: its arithmetic on functions whose gradients are known, and the script around it."""

import copy
from functools import partial

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack as function_modes

import smoothgrad
from common.device import make_rng
from common.fast import fold
from common.images import add_caption, to_grey
from smoothgrad import (
    RunningMeans,
    average_maps,
    completeness,
    deletion_test,
    gradient,
    gradient_x_input,
    guided_backprop,
    integrated_gradients,
    over_channels,
    to_heatmap,
)
from tests.helpers import left_alone, make_training_network, refusal


def make_images(count, side=8, seed=0):
    """Draw random images, (count, 3, side, side), each with a range of values of its own."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, side, side, generator=rng)
    return x * torch.linspace(0.3, 1, count).view(-1, 1, 1, 1)


X = make_images(2)
TARGET = torch.tensor([1, 4])


class Cubic(nn.Module):
    """The score of class 1 is the sum of all pixels' third powers."""

    def forward(self, x):
        """Map (N, C, H, W) to (N, 2)."""
        score = (x**3).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def make_network(activation=nn.ReLU, seed=0):
    """Build a small network with random weights for images of 3 x 8 x 8, 5 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), activation(), nn.Conv2d(6, 6, 3, stride=2), activation(),
        nn.Flatten(), nn.Linear(54, 5),
    ).eval()  # fmt: skip


def average(network, x=X, target=TARGET, noise=0.2, samples=20, explain=gradient, chunk=8, seed=0):
    """Average the maps of noisy copies."""
    return average_maps(network, x, target, noise, samples, explain, chunk, make_rng("cpu", seed))


def assert_near(a, b, tolerance=1e-6):
    """Compare two maps up to a fraction of the largest value."""
    assert (a - b).abs().max() < tolerance * b.abs().max()


# -------------------------------------------------------------------------------- the gradient


def test_class_score_is_what_it_says():
    """Logit, softmax and cross-entropy of the asked class, image by image."""
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, -1.0]])
    e = logits.exp()
    share = torch.stack([e[0, 2] / e[0].sum(), e[1, 0] / e[1].sum()])
    score = partial(smoothgrad.class_score, logits, torch.tensor([2, 0]))
    assert score().tolist() == score("logit").tolist() == [4, 0]
    torch.testing.assert_close(score("probability"), share)
    torch.testing.assert_close(score("loss"), -share.log())


@pytest.mark.parametrize("score", ["logit", "probability", "loss"])
def test_gradient_is_the_slope_of_the_score(score):
    """Moving a pixel changes the score by the gradient, also where autograd is switched off."""
    network = make_network(nn.Tanh).double()
    x = X.double()
    step = torch.zeros_like(x)
    step[:, 1, 3, 5] = 1e-6
    with torch.no_grad():
        found = gradient(network, x, TARGET, score)
        up = smoothgrad.class_score(network(x + step), TARGET, score)
        down = smoothgrad.class_score(network(x - step), TARGET, score)
    torch.testing.assert_close(found[:, 1, 3, 5], (up - down) / 2e-6, rtol=1e-5, atol=1e-9)
    assert torch.equal(gradient_x_input(network, x, TARGET, score), found * x)
    assert not x.requires_grad


@pytest.mark.parametrize("method", [
    gradient, gradient_x_input, partial(integrated_gradients, steps=4, chunk=3), guided_backprop,
    partial(smoothgrad.smoothgrad, noise=0.1, samples=5),
    partial(smoothgrad.smoothgrad, samples=3, explain=guided_backprop)])  # fmt: skip
def test_a_network_amid_its_training_is_explained_as_in_eval_mode_and_left_alone(method):
    """Whatever BatchNorm and dropout would do in train mode; also after an error."""
    network = make_training_network()
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    x = make_images(2, side=16)
    with left_alone(network):
        found = method(network, x, TARGET)
    assert found.shape == x.shape
    assert torch.equal(found, method(frozen, x, TARGET))

    broken = nn.Sequential(network, nn.Softmax(dim=7))  # no tensor has one
    with left_alone(broken), pytest.raises(IndexError):
        method(broken, x, TARGET)
    assert not function_modes()
    assert torch.equal(gradient(network, x, TARGET), gradient(frozen, x, TARGET))


# ---------------------------------------------------------------------------------- SmoothGrad


def test_a_linear_model_has_its_weights_as_map():
    """Noise changes nothing where the gradient is the same everywhere."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    weight = network[1].weight[TARGET].detach().double().view(2, 3, 8, 8)
    means = average(network, noise=0.7, samples=50)
    torch.testing.assert_close(means.get("signed"), weight)
    torch.testing.assert_close(means.get("abs"), weight.abs())
    torch.testing.assert_close(means.get("squared"), weight**2)
    assert means.get("variance").max() < 1e-7 * weight.abs().max() ** 2
    assert means.reliability("signed").tolist() == pytest.approx([1, 1])


def test_a_cube_has_the_mean_gradient_3x2_plus_3sigma2():
    """Sigma is noise * (max - min) of each image; mean and deviation are those of theory."""
    samples = 3000
    means = average(Cubic(), X, torch.tensor([1, 1]), 0.25, samples, chunk=200)
    x = X.double()
    sigma = 0.25 * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    assert sigma[1] > 2 * sigma[0]
    mean = 3 * x**2 + 3 * sigma**2
    variance = 9 * (4 * x**2 * sigma**2 + 2 * sigma**4)
    z = (means.get("signed") - mean) / (variance / samples) ** 0.5  # standard normal, if right
    for image in z:  # 192 pixels each
        assert abs(image.mean()) < 4 / 192**0.5
        assert 0.7 < image.square().mean() < 1.4
    torch.testing.assert_close(means.get("abs"), means.get("signed"))  # this gradient is never < 0
    squared = 9 * (x**4 + 6 * x**2 * sigma**2 + 3 * sigma**4)
    assert (means.get("squared") / squared).mean() == pytest.approx(1, abs=0.01)
    assert (means.get("variance") / variance).mean() == pytest.approx(1, abs=0.02)


def test_without_noise_one_sample_is_the_gradient():
    """Noise 0 costs one evaluation, however many samples are asked for."""
    network = make_network()
    means = average(network, noise=0.0, samples=100)
    assert means.n == 1
    assert torch.equal(means.get("signed"), gradient(network, X, TARGET).double())


@pytest.mark.parametrize(("chunk", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (100, [10])])
def test_the_chunk_changes_neither_the_noise_nor_the_map(chunk, sizes):
    """One copy at a time or all at once: the same copies, each once, from a stream of their own."""
    network = make_network()
    x = X[1:]
    seen = []

    def explain(network, x, target):
        seen.append(x)
        return gradient(network, x, target)

    found = average(network, x, TARGET[1:], 0.2, 10, explain, chunk)
    assert [len(copies) for copies in seen] == sizes
    rng = make_rng("cpu", 0)
    noise = torch.cat([torch.randn(x.shape, generator=rng) for _ in range(10)])
    torch.testing.assert_close(torch.cat(seen), x + 0.2 * (x.max() - x.min()) * noise)
    usual = average(network, x, TARGET[1:], 0.2, 10)
    for reduce in smoothgrad.REDUCE:
        assert_near(found.get(reduce), usual.get(reduce))
        torch.testing.assert_close(found.reliability(reduce), usual.reliability(reduce))


@pytest.mark.parametrize("side", [8, 5])  # 75 numbers are drawn in a way of their own
def test_noise_is_the_same_however_it_is_taken(side):
    """One copy at a time or all at once, across the edges of what is drawn at once."""
    x = torch.rand(2, 3, side, side)
    alone = smoothgrad.Noise(x, make_rng("cpu", 4))
    alone = torch.cat([alone.take(1) for _ in range(21)])
    draws = smoothgrad.Noise(x, make_rng("cpu", 4))
    together = [draws.take(count) for count in (3, 0, 17, 1)]
    assert torch.equal(torch.cat(together), alone)
    assert alone.shape == (21, 3, side, side)
    assert alone.std() == pytest.approx(1, abs=0.1)
    assert len(alone.unique()) == alone.numel()


def test_a_batch_is_its_images_one_by_one():
    """Images don't know of each other, each has a target and a sigma of its own."""
    network = make_network()
    together = average(network, chunk=7)
    for i in range(2):
        alone = average(network, X[i : i + 1], TARGET[i : i + 1], chunk=2)
        assert_near(together.get("signed")[i], alone.get("signed")[0])
        torch.testing.assert_close(together.reliability("abs")[i], alone.reliability("abs")[0])


def test_running_means_are_numpys():
    """Of all samples and of the even and odd ones, whatever pieces they come in."""
    torch.manual_seed(0)
    samples = torch.randn(11, 2, 3, 4, 4)
    means = RunningMeans(samples[0])
    for piece in samples.split([5, 1, 2, 3]):
        means.add(piece)
    exact = samples.double().numpy()
    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    near(means.get("signed"), exact.mean(0))
    near(means.get("abs"), abs(exact).mean(0))
    near(means.get("squared"), (exact**2).mean(0))
    near(means.get("variance"), exact.var(0))
    even = exact[::2]
    odd = exact[1::2]
    near(means.even, [even.sum(0), abs(even).sum(0), (even**2).sum(0)])
    near(means.odd, [odd.sum(0), abs(odd).sum(0), (odd**2).sum(0)])
    for i, found in enumerate(means.reliability("variance").tolist()):
        maps = even.var(0)[i].sum(0), odd.var(0)[i].sum(0)  # as they are drawn
        r = max(0, np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1])
        assert found == pytest.approx(2 * r / (1 + r), abs=1e-6)


def test_reliability_of_chance_is_0_and_of_certainty_1():
    """Noise agrees by nothing, wherever it is strong; one map or a blank one can't be judged."""
    torch.manual_seed(0)
    for samples, low, high in (
        (torch.randn(40, 1, 1, 100, 100) * torch.rand(100, 100), 0, 0.05),
        (torch.randn(1, 1, 3, 8, 8).repeat(6, 1, 1, 1, 1), 1 - 1e-6, 1 + 1e-6),
        (torch.randn(1, 2, 3, 8, 8), 0, 0),
        (torch.zeros(4, 2, 3, 8, 8), 0, 0),
    ):
        means = RunningMeans(samples[0])
        means.add(samples)
        assert all(low <= r <= high for r in means.reliability("signed").tolist())


@pytest.mark.parametrize("reduce", smoothgrad.REDUCE)
def test_reliability_predicts_how_well_a_second_run_agrees(reduce):
    """Spearman and Brown, held against runs with other seeds."""
    network = make_network(seed=1)
    x = make_images(1)
    runs = [average(network, x, TARGET[:1] + 1, 1.0, 16, seed=seed) for seed in range(16)]
    predicted = np.mean([float(run.reliability(reduce)) for run in runs])
    maps = [run.get(reduce) for run in runs]
    if reduce != "signed":  # which is compared with its signs
        maps = [over_channels(m) for m in maps]
    maps = np.array([m.flatten().numpy() for m in maps])
    found = np.corrcoef(maps)[np.triu_indices(16, 1)].mean()
    assert found < 0.96  # of maps that agree wholly every formula is right
    assert predicted == pytest.approx(found, abs=0.02)


# ------------------------------------------------------------------------- Integrated Gradients


@pytest.mark.parametrize("baseline", [None, make_images(1, seed=9)], ids=["black", "random"])
@pytest.mark.parametrize(
    ("activation", "steps", "gap"), [(nn.Softplus, 64, 1e-4), (nn.ReLU, 512, 5e-3)]
)
def test_integrated_gradients_add_up_to_the_change_of_the_score(activation, steps, gap, baseline):
    """Completeness, for each image of a batch, and as the script reports it."""
    network = make_network(activation).requires_grad_(False)
    found = integrated_gradients(network, X, TARGET, baseline, steps, 50)
    b = torch.zeros_like(X[:1]) if baseline is None else baseline
    change = network(X)[range(2), TARGET] - network(b)[0, TARGET]
    torch.testing.assert_close(found.sum((1, 2, 3)), change, rtol=0, atol=gap)
    high, low, missed = completeness(network, X[:1], TARGET[:1], b, found[0] + 1, "logit")
    assert high - low == pytest.approx(float(change[0]), abs=1e-5)
    assert missed == pytest.approx(192, abs=gap + 1e-3)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_integrated_gradients_use_the_midpoints(steps, chunk):
    """With one step the gradient is taken halfway; with two at a quarter and three quarters."""
    baseline = torch.full((1, 3, 8, 8), 0.2)
    target = torch.tensor([1, 1])
    found = integrated_gradients(Cubic(), X, target, baseline, steps, chunk)
    places = [(i + 0.5) / steps for i in range(steps)]
    slope = sum(3 * (baseline + a * (X - baseline)) ** 2 for a in places) / steps
    torch.testing.assert_close(found, slope * (X - baseline))


def test_baselines():
    """Each hides the photo in its own way, and has its shape."""
    x = make_images(1, side=32)
    kinds = ("black", "mean", "blurred", "noise")
    made = {kind: smoothgrad.make_baseline(kind, x, make_rng("cpu", 0)) for kind in kinds}
    assert all(b.shape == x.shape for b in made.values())
    assert not made["black"].any()
    torch.testing.assert_close(made["mean"], x.mean((2, 3), keepdim=True).expand_as(x))
    assert made["blurred"].std() < 0.5 * x.std()
    assert 0 <= made["noise"].min() < 0.1 < 0.9 < made["noise"].max() <= 1


# ---------------------------------------------------------------------- Guided Backpropagation


class Layers(nn.Module):
    """Two layers with an activation, and logits; images are (N, 3, 2, 2)."""

    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(12, 40)
        self.b = nn.Linear(40, 30)
        self.c = nn.Linear(30, 5)
        self.activation = activation

    def forward(self, x):
        """Map images to logits, (N, 5)."""
        first = self.activation(self.a(20 * x.flatten(1)))
        return self.c(self.activation(self.b(first)))


@pytest.mark.parametrize("relu", [
    nn.ReLU(), nn.ReLU(inplace=True), F.relu, partial(F.relu, inplace=True), torch.relu,
    torch.relu_, lambda x: x.relu_(), lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0),
    lambda x: x.clamp_min_(0.0), lambda x: x.clip(0), nn.ReLU6(), nn.ReLU6(inplace=True),
    lambda x: F.hardtanh(x, 0.0, 6.0), lambda x: x.clamp(0, 6)])  # fmt: skip
def test_guided_backprop_is_the_method_by_hand(relu):
    """Two layers, backwards by hand: a gradient passes where it and the ReLU's input are > 0."""
    network = Layers(relu)
    x = make_images(2, side=2)
    found = guided_backprop(network, x, TARGET)

    top = 6 if relu(torch.tensor([9.0])) == 6 else float("inf")
    first = network.a(20 * x.flatten(1))
    second = network.b(first.clamp(0, top))
    assert (first > 6).any()
    g = network.c.weight[TARGET]
    g = g.clamp(min=0) * ((second > 0) & (second < top)) @ network.b.weight
    g = g.clamp(min=0) * ((first > 0) & (first < top)) @ network.a.weight * 20
    torch.testing.assert_close(found.flatten(1), g.detach())
    plain = gradient(network, x, TARGET)
    assert (plain - found).abs().max() > 0.1 * plain.abs().max()  # and afterwards all is as before


def test_guided_backprop_sees_the_relus_that_folding_hides():
    """A convolution that applies its own ReLU is guided like two layers."""
    network = make_training_network().eval()
    x = make_images(2, side=16)
    folded = fold(network, x[:1]).requires_grad_(False)
    wanted = guided_backprop(network, x, TARGET)
    torch.testing.assert_close(guided_backprop(folded, x, TARGET), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [
    nn.Tanh(), nn.LeakyReLU(), nn.Hardtanh(), lambda x: x.clamp(max=0),
    lambda x: x.clamp(-1, 6)])  # fmt: skip
def test_a_network_without_relu_cannot_be_guided(activation):
    """It is said, instead of showing the plain gradient under another name."""
    refused = partial(guided_backprop, Layers(activation), make_images(2, side=2))
    assert "no ReLU" in refusal(refused, TARGET)


# ---------------------------------------------------------------------- heat maps, deletion test


def test_heatmap_uses_the_whole_range():
    """From 0 to 1, the top hundredth cut; the order of the pixels is kept; one image at a time."""
    values = torch.randn(2, 3, 40, 40) * torch.tensor([1.0, 1e-12]).view(-1, 1, 1, 1)
    heat = to_heatmap(values)
    assert heat.shape == (2, 40, 40)
    assert heat.amin((1, 2)).tolist() == [0, 0]
    assert ((heat == 1).float().mean((1, 2)) - 0.01).abs().max() < 2e-3
    total = values[1].abs().sum(0)
    inside = heat[1] < 1
    order = heat[1][inside].argsort()
    assert (total[inside][order].diff() >= -1e-18).all()
    for value in (0.0, -3.0, 1e-300):  # no division by zero
        assert not to_heatmap(torch.full((1, 3, 5, 5), value, dtype=torch.float64)).any()


SIGNS = 1 - 2 * ((torch.arange(20).view(-1, 1) + torch.arange(20)) % 2)
CHECKERED = (SIGNS > 0).float().expand(1, 3, 20, 20).contiguous()
SQUARE = torch.zeros(20, 20, dtype=torch.float64)
SQUARE[2:8, 2:8] = 1


class Corner(nn.Module):
    """A classifier that reads one square: class 1 if its pixels are checkered."""

    def forward(self, x):
        """Map (N, C, 20, 20) to (N, 2)."""
        self.x = x
        score = 20 * (x.mean(1) * SIGNS * SQUARE).sum((1, 2)) / SQUARE.sum()
        return torch.stack([torch.zeros_like(score), score], 1)


def test_a_perfect_map_beats_chance_and_a_wrong_one_does_not():
    """Taking the square away takes the class away; taking others leaves it as it was."""
    network = Corner()

    def delete(heat):
        blurred = smoothgrad.blur(CHECKERED)
        rng = torch.Generator().manual_seed(0)
        return deletion_test(network, CHECKERED, blurred, 1, heat, rng)

    before = float(network(CHECKERED).softmax(1)[0, 1])
    assert before > 0.99
    right, chance = delete(SQUARE)
    wrong, same = delete(1 - SQUARE)
    assert chance == same  # the random pixels don't depend on the map
    assert right < 0.6 < chance < 1
    assert wrong == pytest.approx(before, abs=1e-6)
    for scale in (1e-30, 1e-60):  # squares of small gradients vanish in single precision
        assert delete(scale * (1 + SQUARE)) == (right, chance)

    changed = (network.x != CHECKERED).any(1, keepdim=True)  # of the map and 8 random choices
    assert changed.sum((1, 2, 3)).tolist() == [40] * 9
    assert len({tuple(c.flatten().tolist()) for c in changed}) == 9
    blurred = smoothgrad.blur(CHECKERED)
    torch.testing.assert_close(network.x, torch.where(changed, blurred, CHECKERED))


@pytest.mark.parametrize("side", [32, 224])
def test_blur_is_a_gaussian_of_the_sides_width(side):
    """A dot becomes a bell of the right width; brightness stays, edges do not darken."""
    x = torch.zeros(1, 1, side, side)
    x[0, 0, side // 2, side // 2] = 1
    row = smoothgrad.blur(x)[0, 0].sum(0)
    place = torch.arange(side) - side // 2
    assert float(row.sum()) == pytest.approx(1, abs=1e-3)
    assert float((row * place**2).sum() ** 0.5) == pytest.approx(10 / 224 * side, rel=0.05)
    white = torch.ones(2, 3, side, side)
    torch.testing.assert_close(smoothgrad.blur(white), white)


# ------------------------------------------------------------------------------------ the script


@pytest.fixture
def run(trained, photos, tmp_path, monkeypatch):
    """Give a function that explains one photo by a network with ReLUs, without drawing panels.

    It takes options and returns the maps' records and the arrays.
    """
    network = make_training_network().eval().requires_grad_(False)
    classifier = smoothgrad.load_classifier(str(trained))
    classifier = classifier._replace(network=network, classes=list("abcde"))
    monkeypatch.setattr(smoothgrad, "load_classifier", lambda *_: classifier)
    monkeypatch.setattr(smoothgrad, "draw_panel", lambda *_: None)

    def start(*options, out="run"):
        command = ["--image", photos / "ant.png", "--samples", 12, "--out", tmp_path / out]
        metrics = smoothgrad.main([str(word) for word in [*command, *options]])
        (image,) = metrics["images"]
        points = 6 if "integrated" in options else 1
        assert image["evaluations"] == points * sum(found["samples"] for found in image["maps"])
        with np.load(tmp_path / out / "ant.npz") as arrays:
            return image["maps"], {name: torch.from_numpy(a) for name, a in arrays.items()}

    start.network = network
    return start


def test_maps_are_smoothgrads_own(run):
    """What the script writes is what the functions compute, of the class that was asked for."""
    _, arrays = run("--target", "d", "--noise", "0.2", "0")
    explained = (run.network, arrays["photo"].unsqueeze(0), torch.tensor([3]))
    wanted = smoothgrad.smoothgrad(*explained, noise=0.2, samples=12)
    assert_near(arrays["noise_20"], wanted[0], 1e-5)
    assert_near(arrays["noise_0"], gradient(*explained)[0], 1e-5)


@pytest.mark.parametrize("options", [
    "--method integrated --steps 6", "--method guided", "--method gradient-x-input",
    "--method integrated --steps 6 --baseline noise", "--reduce abs", "--reduce squared",
    "--reduce variance", "--score loss", "--score probability", "--seed 7"])  # fmt: skip
def test_every_choice_changes_the_map_and_its_chunk_does_not(options, run):
    """Also from black to noise as the baseline."""
    other = "--method integrated --steps 6" if "baseline" in options else ""
    _, plain = run("--noise", "0.2", *other.split(), out="plain")
    _, found = run("--noise", "0.2", *options.split())
    _, small = run("--noise", "0.2", *options.split(), "--chunk", "1", out="small")
    assert found["noise_20"].isfinite().all()
    assert_near(small["noise_20"], found["noise_20"], 1e-5)
    with pytest.raises(AssertionError):
        assert_near(plain["noise_20"], found["noise_20"], 0.01)


def test_integrated_gradients_report_their_gap(run):
    """Score, baseline's score and gap are in metrics.json, and are those of the map."""
    (found,), arrays = run("--method", "integrated", "--steps", "6", "--noise", "0")
    gap = float(arrays["noise_0"].sum()) - (found["score"] - found["baseline_score"])
    assert found["completeness_gap"] == pytest.approx(gap, abs=1e-5)


def test_converge_stops_when_the_map_is_reliable(run, monkeypatch, capsys):
    """As many samples as it takes, and the number is said; if it takes too many, a warning."""
    options = ("--noise", "0", "0.3", "--converge")
    (single, found), _ = run(*options, "0.95")
    assert single["samples"] == 1
    assert found["samples"] in (16, 20, 25, 31, 38, 47, 58, 72, 90, 112)
    assert found["reliability"] >= 0.95
    out, warned = capsys.readouterr()
    assert f"n = {found['samples']}" in out
    assert warned == ""
    (_, other), _ = run(*options, "0.95", "--chunk", "3", out="other")
    assert other["samples"] == found["samples"]
    (_, strict), _ = run(*options, "0.99", out="strict")
    assert strict["samples"] > found["samples"]
    monkeypatch.setattr(smoothgrad, "MAX_SAMPLES", 18)
    (_, cut), _ = run(*options, "0.9999", out="cut")
    assert cut["samples"] == 18
    assert capsys.readouterr().err.count("warning: ") == 1


@pytest.mark.parametrize(("chunk", "count"), [(1, 11), (5, 3), (100, 1)])
def test_the_gif_ends_with_all_samples(chunk, count, run, tmp_path):
    """Its last frame is the map that is written, with the number of its samples."""
    _, arrays = run("--gif", "--chunk", chunk, "--noise", "0", "0.3", "--reduce", "abs")
    assert not (tmp_path / "run" / "ant_noise_0.gif").exists()
    frames = iio.imread(tmp_path / "run" / "ant_noise_30.gif", index=None)
    assert len(frames) == count
    picture = iio.imread(tmp_path / "run" / "ant_noise_30.png")
    heat = to_heatmap(arrays["noise_30"].unsqueeze(0))[0]
    assert np.abs(picture.astype(int) - to_grey(heat)).max() <= 1
    last = add_caption(picture, "30 % noise, n = 12")
    assert np.abs(frames[-1].astype(int) - last).max() <= 8  # few greys keep the file small
    assert count == 1 or np.abs(frames[0].astype(int) - last).max() > 20


def test_noise_levels_that_look_alike_do_not_overwrite_each_other(run):
    """10.1 % and 10.4 % are two maps, 0.1 given twice is one."""
    maps, arrays = run("--noise", "0.101", "0.104", "0.1", "0.1", "0")
    assert [found["noise"] for found in maps] == [0.101, 0.104, 0.1, 0]
    assert list(arrays) == ["photo", "noise_10.1", "noise_10.4", "noise_10", "noise_0"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["$x^ a $\\frac{1$", "猫\nline \udcff %s"])
def test_a_panel_is_drawn(name, channels, tmp_path, recwarn):
    """For grey and colour, whatever the class is called; without a warning."""
    heat = torch.zeros(32, 32)
    heat[4:12, 20:28] = 1
    records = [{"noise": noise, "samples": 9, "reliability": 0.5, "probability_left": 0.1,
                "probability_left_random": 0.8} for noise in (0, 0.1)]  # fmt: skip
    heats = torch.stack([heat, heat.T])
    photo = torch.rand(channels, 32, 32)
    smoothgrad.draw_panel(tmp_path / "x.png", photo, heats, records, name, "gradient")
    picture = iio.imread(tmp_path / "x.png")[..., :3].astype(int)
    assert picture.shape[1] > picture.shape[0]
    assert picture.std() > 30
    warm = (picture[..., 0] - picture[..., 2]) > 60  # the overlay has colours of its own
    assert warm[picture.shape[0] // 2 :].mean() > (0.002 if channels == 1 else 0)
    assert not recwarn.list
