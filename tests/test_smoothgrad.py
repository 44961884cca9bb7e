"""SmoothGrad: its arithmetic on functions whose gradients are known, and the script around it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import smoothgrad
from common.device import make_rng
from common.errors import Interrupted, UserError
from common.folding import fold
from common.images import add_caption
from common.panels import to_picture
from smoothgrad import Maps, integrated_gradients, over_channels, to_heatmap
from tests.helpers import POSIX, read_metrics
from tests.processes import fork, group, wait, wait_for


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


def make_images(count, side=8, seed=0):
    """Draw random images, (count, 3, side, side), each with a range of values of its own."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, side, side, generator=rng)
    return x * torch.linspace(0.3, 1, count).view(-1, 1, 1, 1)


def average(network, x, target, noise=0.2, samples=20, chunk=8, seed=0, explain=None):
    """Run SmoothGrad to its end.

    :rtype: Maps
    """
    explain = explain or partial(smoothgrad.input_gradient, network)
    rng = make_rng(x.device, seed)
    *_, maps = smoothgrad.smoothgrad(explain, x, target, noise, samples, chunk, rng)
    return maps


def correlate(a, b):
    """Correlate two maps as they are drawn, added up over the channels."""
    a, b = (over_channels(m).flatten().numpy() for m in (a, b))
    return np.corrcoef(a, b)[0, 1]


# -------------------------------------------------------------------------------- the gradient


def test_class_score_is_what_it_says():
    """Logit, softmax and cross-entropy of the asked class, image by image."""
    logits, target = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, -1.0]]), torch.tensor([2, 0])
    e = logits.exp()
    share = torch.stack([e[0, 2] / e[0].sum(), e[1, 0] / e[1].sum()])
    torch.testing.assert_close(
        smoothgrad.class_score(logits, target, "logit"), logits[[0, 1], target]
    )
    torch.testing.assert_close(smoothgrad.class_score(logits, target, "probability"), share)
    torch.testing.assert_close(smoothgrad.class_score(logits, target, "loss"), -share.log())


@pytest.mark.parametrize("kind", ["logit", "probability", "loss"])
def test_input_gradient_is_the_slope_of_the_score(kind):
    """Moving a pixel changes the score by the gradient, also where autograd is switched off."""
    network, x, target = (
        make_network(nn.Tanh).double(),
        make_images(2).double(),
        torch.tensor([1, 4]),
    )
    with torch.no_grad():
        found = smoothgrad.input_gradient(network, x, target, kind)
        step = torch.zeros_like(x)
        step[:, 1, 3, 5] = 1e-6
        up, down = (smoothgrad.class_score(network(x + s), target, kind) for s in (step, -step))
    torch.testing.assert_close(found[:, 1, 3, 5], (up - down) / 2e-6, rtol=1e-5, atol=1e-9)
    assert not x.requires_grad


@pytest.mark.parametrize("method", ["gradient", "guided", "integrated"])
def test_the_network_is_left_as_it_was(method):
    """Parameters get no gradient and stay trainable; values, mode and hooks are untouched."""
    network, x, target = make_network(), make_images(1), torch.tensor([2])
    network[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    gradient = partial(smoothgrad.input_gradient, network)
    explain = {
        "gradient": gradient,
        "guided": partial(smoothgrad.guided_backprop, gradient),
        "integrated": partial(integrated_gradients, gradient, torch.zeros_like(x), 4, 2),
    }[method]
    plain = gradient(x, target)
    average(network, x, target, explain=explain)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in network.parameters())
    assert not any(m.training or m._forward_hooks or m._backward_hooks for m in network.modules())
    assert torch.equal(gradient(x, target), plain)


# ---------------------------------------------------------------------------------- SmoothGrad


def test_a_linear_model_has_its_weights_as_map():
    """Noise changes nothing where the gradient is the same everywhere."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    weight = network[1].weight[3].detach().double().view(1, 3, 8, 8)
    maps = average(network, make_images(1), torch.tensor([3]), noise=0.7, samples=50)
    torch.testing.assert_close(maps.get("signed"), weight)
    torch.testing.assert_close(maps.get("abs"), weight.abs())
    torch.testing.assert_close(maps.get("squared"), weight**2)
    assert maps.get("variance").max() < 1e-7 * weight.abs().max() ** 2
    assert maps.reliability("signed") == pytest.approx(1)


def test_a_cube_has_the_mean_gradient_3x2_plus_3sigma2():
    """Sigma is noise * (max - min) of each image; mean and deviation are those of theory."""
    x, noise, samples = make_images(2), 0.25, 3000
    maps = average(Cubic(), x, torch.tensor([1, 1]), noise, samples, chunk=200)
    x = x.double()
    sigma = noise * (x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True))
    assert sigma[1] > 2 * sigma[0]
    mean, variance = 3 * x**2 + 3 * sigma**2, 9 * (4 * x**2 * sigma**2 + 2 * sigma**4)
    z = (maps.get("signed") - mean) / (variance / samples) ** 0.5  # standard normal, if right
    for image in z:  # 192 pixels each
        assert abs(image.mean()) < 4 / 192**0.5
        assert 0.7 < image.square().mean() < 1.4
    torch.testing.assert_close(maps.get("abs"), maps.get("signed"))  # this gradient is never < 0
    squared = 9 * (x**4 + 6 * x**2 * sigma**2 + 3 * sigma**4)
    assert (maps.get("squared") / squared).mean() == pytest.approx(1, abs=0.01)
    assert (maps.get("variance") / variance).mean() == pytest.approx(1, abs=0.02)


def test_without_noise_one_sample_is_the_gradient():
    """Noise 0 costs one evaluation, however many samples are asked for."""
    network, x, target = make_network(), make_images(2), torch.tensor([0, 3])
    maps = average(network, x, target, noise=0.0, samples=100)
    assert maps.n == 1
    exact = smoothgrad.input_gradient(network, x, target).double()
    torch.testing.assert_close(maps.get("signed"), exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reduce", smoothgrad.REDUCE)
@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_the_chunk_does_not_change_the_map(chunk, reduce):
    """One copy at a time or all at once: the same noise, the same means, the same halves."""
    network, x, target = make_network(), make_images(1), torch.tensor([2])
    one = average(network, x, target, chunk=1)
    many = average(network, x, target, chunk=chunk)
    a, b = one.get(reduce), many.get(reduce)
    assert (a - b).abs().max() < 1e-6 * a.abs().max()
    assert float(one.reliability(reduce)) == pytest.approx(
        float(many.reliability(reduce)), abs=1e-6
    )


def test_the_seed_decides_the_map():
    """Same seed, same bits; another seed, another map; others' random numbers don't matter."""
    network, x, target = make_network(), make_images(1), torch.tensor([2])
    a = average(network, x, target, seed=5).get("signed")
    torch.randn(100)
    assert torch.equal(average(network, x, target, seed=5).get("signed"), a)
    other = average(network, x, target, seed=6).get("signed")
    assert (a - other).abs().max() > 0.01 * a.abs().max()


def test_a_batch_is_its_images_one_by_one():
    """Images don't know of each other, each has a target and a sigma of its own."""
    network, x, target = make_network(), make_images(3), torch.tensor([4, 0, 2])
    together = average(network, x, target, chunk=7)
    for i in range(3):
        alone = average(network, x[i : i + 1], target[i : i + 1], chunk=2)
        a, b = together.get("signed")[i], alone.get("signed")[0]
        assert (a - b).abs().max() < 1e-6 * b.abs().max()
        assert float(together.reliability("abs")[i]) == pytest.approx(
            float(alone.reliability("abs"))
        )


@pytest.mark.parametrize(("samples", "chunk", "sizes"), [(10, 4, [4, 4, 2]), (1, 8, [1])])
def test_every_sample_is_computed_once(samples, chunk, sizes):
    """Chunks of the size asked for, the rest at the end; nothing else grows."""
    seen, grown = [], []

    def explain(x, target):
        seen.append(x.clone())
        return torch.zeros_like(x)

    x = make_images(1)
    for maps in smoothgrad.smoothgrad(
        explain, x, torch.tensor([0]), 0.1, samples, chunk, make_rng("cpu", 0)
    ):
        grown.append((maps.n, sum(maps.counts), maps.sums.shape))
    assert [len(copies) for copies in seen] == sizes
    assert grown == [(n, n, (2, 3, 1, 3, 8, 8)) for n in np.cumsum(sizes)]
    assert len({float(copy.sum()) for copies in seen for copy in copies}) == samples


# -------------------------------------------------------------------------------- reliability


def test_reliability_of_chance_is_0_and_of_certainty_1():
    """Independent maps agree by nothing, identical ones wholly, a single one can't be judged."""
    torch.manual_seed(0)
    chance, certain = Maps(torch.zeros(1, 1, 100, 100)), Maps(torch.zeros(1, 3, 8, 8))
    chance.add(torch.randn(40, 1, 1, 100, 100))
    certain.add(torch.randn(1, 1, 3, 8, 8).repeat(6, 1, 1, 1, 1))
    assert float(chance.reliability("signed")) < 0.05
    assert float(certain.reliability("signed")) == pytest.approx(1)
    single, blank = Maps(torch.zeros(2, 3, 8, 8)), Maps(torch.zeros(2, 3, 8, 8))
    single.add(torch.randn(1, 2, 3, 8, 8))
    blank.add(torch.zeros(4, 2, 3, 8, 8))
    for maps in (single, blank):
        assert maps.reliability("abs").tolist() == [0, 0]


@pytest.mark.parametrize("reduce", smoothgrad.REDUCE)
def test_reliability_predicts_how_well_a_second_run_agrees(reduce):
    """Spearman and Brown, held against runs with other seeds."""
    network, x, target = make_network(seed=1), make_images(1), torch.tensor([2])
    runs = [average(network, x, target, 1.0, 16, seed=seed) for seed in range(16)]
    predicted = np.mean([float(run.reliability(reduce)) for run in runs])
    maps = [run.get(reduce) for run in runs]
    found = np.mean([correlate(a, b) for i, a in enumerate(maps) for b in maps[:i]])
    assert found < 0.96  # of maps that agree wholly every formula is right
    assert predicted == pytest.approx(found, abs=0.02)


def test_variance_is_numpys():
    """VarGrad is the variance of the samples, of all and of each half."""
    torch.manual_seed(0)
    samples, maps = torch.randn(11, 2, 3, 4, 4), Maps(torch.zeros(2, 3, 4, 4))
    maps.add(samples[:5])
    maps.add(samples[5:])
    wanted = samples.double().numpy()
    np.testing.assert_allclose(maps.get("variance"), wanted.var(0), rtol=1e-5)
    np.testing.assert_allclose(maps.get("variance", 0), wanted[::2].var(0), rtol=1e-5)
    np.testing.assert_allclose(maps.get("signed", 1), wanted[1::2].mean(0), rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------- Integrated Gradients


@pytest.mark.parametrize(
    ("activation", "steps", "gap"), [(nn.Softplus, 64, 1e-4), (nn.ReLU, 512, 5e-3)]
)
def test_integrated_gradients_add_up_to_the_change_of_the_score(activation, steps, gap):
    """Completeness, for each image of a batch, whatever the baseline."""
    network, x, target = make_network(activation), make_images(3), torch.tensor([1, 0, 4])
    baseline = make_images(1, seed=9)
    gradient = partial(smoothgrad.input_gradient, network)
    found = integrated_gradients(gradient, baseline, steps, 50, x, target)
    change = network(x)[range(3), target] - network(baseline)[0, target]
    torch.testing.assert_close(found.sum((1, 2, 3)), change.detach(), rtol=0, atol=gap)


def test_integrated_gradients_use_the_midpoints():
    """With one step the gradient is taken halfway; with two at a quarter and three quarters."""
    x, baseline, target = make_images(1), torch.full((1, 3, 8, 8), 0.2), torch.tensor([1])
    gradient = partial(smoothgrad.input_gradient, Cubic())
    for places in ([0.5], [0.25, 0.75]):
        found = integrated_gradients(gradient, baseline, len(places), 8, x, target)
        slope = sum(3 * (baseline + a * (x - baseline)) ** 2 for a in places) / len(places)
        torch.testing.assert_close(found, slope * (x - baseline))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_integrated_gradients_do_not_depend_on_the_chunk(chunk):
    """Also across the images of a batch."""
    network, x, target = make_network(), make_images(2), torch.tensor([1, 3])
    gradient = partial(smoothgrad.input_gradient, network)
    a, b = (
        integrated_gradients(gradient, torch.zeros(1, 3, 8, 8), 7, size, x, target)
        for size in (5, chunk)
    )
    assert (a - b).abs().max() < 1e-6 * a.abs().max()


def test_baselines():
    """Each hides the photo in its own way, and has its shape."""
    x = make_images(1, side=32)
    made = {k: smoothgrad.make_baseline(k, x, make_rng("cpu", 0))
            for k in ("black", "mean", "blurred", "noise")}  # fmt: skip
    assert all(b.shape == x.shape for b in made.values())
    assert not made["black"].any()
    torch.testing.assert_close(made["mean"][0, :, 3, 4], x.mean((0, 2, 3)))
    assert made["mean"].std((2, 3)).max() < 1e-6
    assert made["blurred"].std() < 0.5 * x.std()
    assert 0 <= made["noise"].min() < 0.1 < 0.9 < made["noise"].max() <= 1


# ---------------------------------------------------------------------- Guided Backpropagation

WAYS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU, in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu, in place": partial(F.relu, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "clamp(0)": lambda x: torch.clamp(x, 0),
    "clamp_min_(0)": lambda x: x.clamp_min_(0.0),
    "clip(0)": lambda x: x.clip(0),
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6, in place": nn.ReLU6(inplace=True),
    "F.hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "clamp(0, 6)": lambda x: x.clamp(0, 6),
}


@pytest.mark.parametrize("way", WAYS)
def test_guided_backprop_is_the_method_by_hand(way):
    """Two layers, backwards by hand: a gradient passes where it and the ReLU's input are > 0."""
    torch.manual_seed(0)
    a, b, c = nn.Linear(12, 40), nn.Linear(40, 30), nn.Linear(30, 3)
    relu, top = WAYS[way], 6 if "6" in way or "hardtanh" in way else float("inf")

    def network(x):
        return c(relu(b(relu(a(x.flatten(1) * 20)))))

    x, target = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    gradient = partial(smoothgrad.input_gradient, network)
    found = smoothgrad.guided_backprop(gradient, x, target)

    first = a(x.flatten(1) * 20)
    second = b(first.clamp(0, top))
    assert (first > 6).any()
    g = c.weight[target]
    g = g.clamp(min=0) * ((second > 0) & (second < top)) @ b.weight
    g = g.clamp(min=0) * ((first > 0) & (first < top)) @ a.weight * 20
    torch.testing.assert_close(found.flatten(1), g.detach())
    plain = gradient(x, target)
    assert (plain - found).abs().max() > 0.1 * plain.abs().max()  # and afterwards all is as before


def test_guided_backprop_sees_the_relus_that_folding_hides():
    """A convolution that applies its own ReLU is guided like two layers."""
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU6(),
        nn.Flatten(), nn.Linear(32, 3),
    ).eval()  # fmt: skip
    x, target = make_images(2), torch.tensor([0, 2])
    folded = fold(network, x[:1]).requires_grad_(False)
    a, b = (
        smoothgrad.guided_backprop(partial(smoothgrad.input_gradient, n), x, target)
        for n in (network, folded)
    )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Tanh, nn.LeakyReLU, nn.Hardtanh])
def test_a_network_without_relu_cannot_be_guided(activation):
    """It is said, instead of showing the plain gradient under another name."""
    gradient = partial(smoothgrad.input_gradient, make_network(activation))
    with pytest.raises(UserError, match="no ReLU"):
        smoothgrad.guided_backprop(gradient, make_images(1), torch.tensor([1]))


def test_an_error_leaves_no_guidance_behind():
    """Whatever happens in the network, the next gradient is a plain one."""
    network, x, target = make_network(), make_images(1), torch.tensor([1])
    gradient = partial(smoothgrad.input_gradient, network)
    plain = gradient(x, target)

    def fail(x, target):
        gradient(x, target)
        raise MemoryError

    with pytest.raises(MemoryError):
        smoothgrad.guided_backprop(fail, x, target)
    assert torch.equal(gradient(x, target), plain)
    assert not any(
        isinstance(m, TorchFunctionMode) for m in torch.overrides._get_current_function_mode_stack()
    )


# -------------------------------------------------------------------------------- heat maps


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


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-300])
def test_a_map_of_one_value_is_black(value):
    """No division by zero."""
    assert to_heatmap(torch.full((1, 3, 5, 5), value, dtype=torch.float64)).tolist() == [
        [[0.0] * 5] * 5
    ]


# ------------------------------------------------------------------------------------ the script


@pytest.fixture
def run(trained, photos):
    """Give a function that runs the script in this process, by default on all three photos."""

    def start(out, *options, images=(photos,)):
        command = ["--model", trained, "--image", *images, "--samples", 12, "--out", out, *options]
        return smoothgrad.main([str(word) for word in command])

    return start


def read_maps(folder):
    """Read all arrays of a run: by file and name."""
    return {(f.name, k): v for f in sorted(folder.glob("*.npz")) for k, v in np.load(f).items()}


def assert_same_maps(a, b):
    """Compare the arrays of two runs bit for bit."""
    a, b = read_maps(a), read_maps(b)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a)


def test_a_run_leaves_what_it_promises(run, tmp_path, capsys):
    """Panels, maps, arrays and numbers of each photo; the list of files is the folder's."""
    folder = tmp_path / "run"
    metrics = run(folder)
    said, warned = capsys.readouterr()
    assert warned == ""
    saved = read_metrics(folder, metrics)
    assert saved["failed"] == {}
    assert [Path(i["path"]).stem for i in saved["images"]] == ["ant", "bee", "cat"]
    for image in saved["images"]:
        assert {"target", "class_name", "probability", "seconds", "evaluations"} <= set(image)
        assert image["evaluations"] == 1 + 12 + 12
        shares = [p for _, p in image["top5"]]
        assert len(shares) == 3
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert image["top5"][0] == [image["class_name"], image["probability"]]
        assert image["class_name"] == ["red", "green", "blue"][image["target"]]
        assert [m["noise"] for m in image["maps"]] == [0, 0.1, 0.3]
        assert [m["samples"] for m in image["maps"]] == [1, 12, 12]
        for found in image["maps"]:
            assert 0 < found["reliability"] <= 1
            assert 0 < found["probability_left"] < 1
            assert 0 < found["probability_left_random"] < 1
        stem = Path(image["path"]).stem
        with np.load(folder / f"{stem}.npz") as arrays:
            assert set(arrays) == {"photo", "noise_0", "noise_10", "noise_30"}
            assert all(a.shape == (3, 16, 16) and a.dtype == np.float32 for a in arrays.values())
            assert arrays["noise_10"].min() < 0 < arrays["noise_10"].max()  # signed
            heat = to_heatmap(torch.tensor(arrays["noise_10"])[None])[0]
        picture = imageio.imread(folder / f"{stem}_noise_10.png")
        assert np.abs(picture.astype(int) - to_picture(heat)).max() <= 1
        panel = imageio.imread(folder / f"{stem}_panel.png")
        assert panel.shape[1] > 4 * 200
        assert panel.std() > 20
        assert said.count(image["path"]) == 1
    sheet = imageio.imread(folder / "contact_sheet.png")
    assert sheet.std() > 20
    assert not list(folder.rglob("*.part*"))


def test_maps_are_smoothgrads_own(run, trained, photos, tmp_path):
    """What the script writes is what the functions compute, of the class that was asked for."""
    run(tmp_path / "run", "--target", "blue", "--noise", "0.2", images=[photos / "bee.png"])
    network = smoothgrad.load_classifier(str(trained)).network
    with np.load(tmp_path / "run" / "bee.npz") as arrays:
        x, found = torch.tensor(arrays["photo"])[None], arrays["noise_20"]
    rng = make_rng("cpu", 0, 0)
    gradient = partial(smoothgrad.input_gradient, network)
    *_, maps = smoothgrad.smoothgrad(gradient, x, torch.tensor([2]), 0.2, 12, 8, rng)
    np.testing.assert_allclose(found, maps.get("signed")[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "options",
    [["--method", "integrated", "--steps", "6"], ["--method", "guided"],
     ["--method", "gradient-x-input"], ["--reduce", "abs"], ["--reduce", "squared"],
     ["--reduce", "variance"], ["--score", "loss"], ["--score", "probability"],
     ["--baseline", "noise", "--method", "integrated", "--steps", "6"], ["--seed", "7"]],
    ids=" ".join,
)  # fmt: skip
def test_variants_differ_from_the_default(options, run, photos, tmp_path):
    """Every choice changes the map, and its chunk doesn't."""
    images = [photos / "ant.png"]
    run(tmp_path / "plain", "--noise", "0.2", images=images)
    metrics = run(tmp_path / "run", "--noise", "0.2", *options, images=images)
    run(tmp_path / "chunk", "--noise", "0.2", "--chunk", "1", *options, images=images)
    plain, found, same = (
        read_maps(tmp_path / name)["ant.npz", "noise_20"] for name in ("plain", "run", "chunk")
    )
    assert np.isfinite(found).all()
    assert np.abs(found - plain).max() > 0.01 * np.abs(plain).max()
    assert np.abs(found - same).max() < 1e-5 * np.abs(found).max()
    assert metrics["images"][0]["evaluations"] == (72 if "integrated" in options else 12)


def test_integrated_gradients_report_their_gap(run, photos, tmp_path):
    """Score, baseline's score and gap are in metrics.json, and are those of the map."""
    options = ["--method", "integrated", "--steps", "400", "--noise", "0"]
    metrics = run(tmp_path / "run", *options, images=[photos / "ant.png"])
    found = metrics["images"][0]["maps"][0]
    total = read_maps(tmp_path / "run")["ant.npz", "noise_0"].sum()
    change = found["score"] - found["baseline_score"]
    assert found["completeness_gap"] == pytest.approx(total - change, abs=1e-4)
    assert abs(found["completeness_gap"]) < 0.05 * abs(change)


def test_converge_stops_when_the_map_is_reliable(run, photos, tmp_path, capsys):
    """As many samples as it takes, and the number is said; if it takes too many, that is said."""
    one = {"images": [photos / "ant.png"]}
    options = ["--noise", "0", "0.3", "--chunk", "4", "--converge"]
    metrics = run(tmp_path / "run", *options, "0.95", **one)
    _, found = metrics["images"][0]["maps"]
    assert 16 <= found["samples"] < 5000
    assert found["samples"] % 4 == 0
    assert found["reliability"] >= 0.95
    assert f"n = {found['samples']}: reliability" in capsys.readouterr().out
    fewer = found["samples"] - 4 if found["samples"] > 16 else 15
    metrics = run(tmp_path / "less", *options, "0.95", "--max-samples", fewer, **one)
    assert metrics["images"][0]["maps"][1]["samples"] == fewer
    warned = capsys.readouterr().err
    if metrics["images"][0]["maps"][1]["reliability"] < 0.95:
        assert warned.count("\n") == 1
        assert "--max-samples" in warned
    strict = run(tmp_path / "strict", *options, "0.99", **one)
    assert strict["images"][0]["maps"][1]["samples"] > found["samples"]


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_gif_ends_with_all_samples(chunk, run, photos, tmp_path):
    """Its last frame is the map that is written, with the number of its samples."""
    options = ["--gif", "--chunk", chunk, "--noise", "0", "0.3", "--reduce", "abs"]
    run(tmp_path / "run", *options, images=[photos / "cat.png"])
    assert not (tmp_path / "run" / "cat_noise_0.gif").exists()
    frames = imageio.imread(tmp_path / "run" / "cat_noise_30.gif", index=None)
    assert len(frames) == {1: 11, 5: 3, 100: 1}[chunk]
    last = add_caption(imageio.imread(tmp_path / "run" / "cat_noise_30.png"), "30 % noise, n = 12")
    assert np.abs(frames[-1].astype(int) - last).max() <= 8  # few greys keep the file small
    if len(frames) > 1:
        assert np.abs(frames[0].astype(int) - last).max() > 20


def test_noise_levels_that_look_alike_do_not_overwrite_each_other(run, photos, tmp_path):
    """10.1 % and 10.4 % are two maps, 0.1 given twice is one."""
    levels = ["0.101", "0.104", "0.1", "0.1", "0"]
    metrics = run(tmp_path / "run", "--noise", *levels, images=[photos / "ant.png"])
    assert [m["noise"] for m in metrics["images"][0]["maps"]] == [0.101, 0.104, 0.1, 0]
    names = {name for _, name in read_maps(tmp_path / "run")}
    assert names == {"photo", "noise_10.1", "noise_10.4", "noise_10", "noise_0"}


def test_dry_run_takes_two_samples(run, tmp_path):
    """Everything is written, in an instant."""
    metrics = run(tmp_path / "run", "--dry-run", "--converge", "0.9", "--method", "integrated")
    assert all(i["evaluations"] == 2 * (1 + 2 + 2) for i in metrics["images"])
    assert (tmp_path / "run" / "contact_sheet.png").exists()


# ----------------------------------------------------------------------- what may go wrong


def test_a_broken_photo_costs_no_other(run, photos, trained, tmp_path, monkeypatch, capsys):
    """It is named on stderr, exit code 1; mended, --resume does what is missing, and only that."""
    shutil.copytree(photos, tmp_path / "photos")
    whole = (tmp_path / "photos" / "bee.png").read_bytes()
    (tmp_path / "photos" / "bee.png").write_bytes(whole[:300])
    monkeypatch.chdir(tmp_path)
    command = ["smoothgrad.py", "--image", "photos", "--model", str(trained), "--samples", "12"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", "run"])
    assert smoothgrad.exit_code(smoothgrad.main) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert "bee.png" in error[0]
    assert "1 of 3" in error[1]
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert len(metrics["images"]) == 2
    assert list(metrics["failed"]) == ["photos/bee.png"]
    assert not Path("run/bee.npz").exists()

    Path("photos/bee.png").write_bytes(whole)
    before = Path("run/ant.npz").stat().st_mtime_ns
    metrics = smoothgrad.main(["--resume", "run"])
    assert [i["path"] for i in metrics["images"]] == [
        f"photos/{n}.png" for n in ("ant", "bee", "cat")
    ]
    assert metrics["failed"] == {}
    assert Path("run/ant.npz").stat().st_mtime_ns == before
    run(tmp_path / "whole", images=["photos"])
    assert_same_maps(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("names", [["bad.png"], ["bad.png", "worse.png"]])
def test_only_broken_photos_are_an_error(names, run, tmp_path):
    """Exit code 2; a single one is the error itself."""
    for name in names:
        (tmp_path / name).write_text("no picture")
    with pytest.raises(UserError, match="bad.png is not" if len(names) == 1 else "2 of 2") as error:
        run(tmp_path / "run", images=[tmp_path / name for name in names])
    assert error.value.code == 2


def test_resume_goes_on_after_a_signal(run, tmp_path, monkeypatch):
    """Stopped within the second photo; the resumed run's files are those of a whole one."""
    read, seen = smoothgrad.read_photo, []

    def read_and_stop(path, *arguments):
        seen.append(path)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return read(path, *arguments)

    monkeypatch.setattr(smoothgrad, "read_photo", read_and_stop)
    with pytest.raises(Interrupted, match=f"--resume {tmp_path / 'cut'}") as stop:
        run(tmp_path / "cut")
    assert stop.value.signum == signal.SIGTERM
    assert sorted(f.name for f in (tmp_path / "cut").glob("*.npz")) == ["ant.npz"]
    monkeypatch.undo()
    resumed = smoothgrad.main(["--resume", str(tmp_path / "cut"), "--chunk", "3"])
    metrics = run(tmp_path / "whole", "--chunk", "3")
    assert len(resumed["images"]) == len(metrics["images"]) == 3
    pair = [read_maps(tmp_path / name) for name in ("cut", "whole")]
    assert pair[0].keys() == pair[1].keys()
    for key, found in pair[0].items():
        np.testing.assert_allclose(found, pair[1][key], rtol=1e-4, atol=1e-5 * np.abs(found).max())


def test_resume_with_other_photos_takes_none_for_another(run, photos, tmp_path):
    """A photo of the same name from another folder is explained, not taken as done."""
    (tmp_path / "other").mkdir()
    other = str(shutil.copy(photos / "bee.png", tmp_path / "other" / "ant.png"))
    run(tmp_path / "run", images=[photos / "ant.png"])
    metrics = smoothgrad.main(["--resume", str(tmp_path / "run"), "--image", other])
    assert [i["path"] for i in metrics["images"]] == [other]
    a, b = (read_maps(tmp_path / "run")[name, "photo"] for name in ("ant.npz", "ant_2.npz"))
    assert not np.array_equal(a, b)


def test_resume_keeps_the_runs_settings(run, photos, tmp_path):
    """Another seed would make a run of two halves; another script's run is none of ours."""
    run(tmp_path / "run", images=[photos / "ant.png"])
    with pytest.raises(UserError, match="--seed"):
        smoothgrad.main(["--resume", str(tmp_path / "run"), "--seed", "1"])
    with pytest.raises(UserError, match="no run of smoothgrad"):
        smoothgrad.main(["--resume", str(tmp_path)])
    file = tmp_path / "run" / "records" / "arguments.txt"
    file.write_text(
        file.read_text().replace('"script": "smoothgrad"', '"script": "explain_perturb"')
    )
    with pytest.raises(UserError, match="written by explain_perturb"):
        smoothgrad.main(["--resume", str(tmp_path / "run")])


def test_memory_that_runs_out_makes_the_chunks_smaller(run, photos, tmp_path, monkeypatch, capsys):
    """One warning, for all photos that follow; the map is the same."""
    gradient = smoothgrad.input_gradient

    def limited(network, x, *arguments, **options):
        if len(x) > 3:
            raise MemoryError
        return gradient(network, x, *arguments, **options)

    two = {"images": [photos / "ant.png", photos / "bee.png"]}
    run(tmp_path / "whole", "--chunk", "2", **two)
    capsys.readouterr()
    monkeypatch.setattr(smoothgrad, "input_gradient", limited)
    run(tmp_path / "run", **two)
    assert capsys.readouterr().err.count("\n") == 2  # 8, 4, 2
    assert_same_maps(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "nan"], "--noise"),
        (["--noise", "-1"], "--noise"),
        (["--noise", "inf"], "--noise"),
        (["--noise"], "--noise"),
        (["--samples", "0"], "--samples"),
        (["--samples", "1.5"], "--samples"),
        (["--samples", "nan"], "--samples"),
        (["--chunk", "0"], "--chunk"),
        (["--converge", "1"], "--converge"),
        (["--converge", "0"], "--converge"),
        (["--converge", "nan"], "--converge"),
        (["--max-samples", "-5"], "--max-samples"),
        (["--steps", "0"], "--steps"),
        (["--steps", "1e9"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--method", "lime"], "--method"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--image", "-x.jpg"], "--image"),
        (["--image", "sample:dog"], "sample:coffee"),
        (["--image", "."], "no pictures"),
        pytest.param(["--image", "/dev/zero"], "/dev/zero", marks=POSIX),
        (["--model", "no-such-model"], "no-such-model"),
        (["--target", "grene"], "did you mean green"),
        (["--target", "3"], "there are 3"),
        (["--target", "-1"], "-1"),
        (["--target", "9" * 5000], "there are 3"),
        (["--resume", "nowhere"], "nowhere"),
        (["--out", "a-file"], "is a file"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(
    arguments, message, trained, photos, tmp_path, monkeypatch, refused
):
    """A mistake ends in exit code 2 and one line that names it; nothing is left behind."""
    (tmp_path / "a-file").touch()
    monkeypatch.chdir(tmp_path)
    command = ["--model", str(trained), "--image", str(photos / "ant.png")]
    command = [] if "--resume" in arguments else command
    assert message in refused(smoothgrad, *command, *arguments)
    if "/dev/zero" not in arguments:
        assert not (tmp_path / "runs").exists()


def test_a_network_without_relu_is_said_before_anything_is_written(trained, run, photos, tmp_path):
    """--method guided on a network of tanh: one line, no folder."""
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    text = json.dumps(state["layers"]).replace('["ReLU", {"inplace": false}]', '["Tanh", {}]')
    assert "Tanh" in text
    state["layers"] = json.loads(text)
    (tmp_path / "tanh").mkdir()
    torch.save(state, tmp_path / "tanh" / "checkpoint.pt")
    with pytest.raises(UserError, match="no ReLU"):
        run(tmp_path / "run", "--method", "guided", "--model", tmp_path / "tanh")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- as a subprocess


def test_torchrun_shares_the_photos(trained, photos, run, tmp_path):
    """Two processes, each photo once, every line whole; the files are those of one process."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "broken.png").write_text("no picture")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         smoothgrad.__file__, "--model", str(trained), "--samples", "12", "--image", "photos",
         "--out", "run"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert sum("2 processes" in line for line in lines) == 1
    for name in ("ant", "bee", "cat"):
        of_photo = [line for line in lines if line.startswith(f"photos/{name}.png: ")]
        assert len(of_photo) == 4
        assert sum("reliability" in line for line in of_photo) == 2
    assert sum(line.startswith("wrote    run/metrics.json") for line in lines) == 1
    assert done.stderr.count("broken.png is not") == 1
    assert done.stderr.count("1 of 4") == 1
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    names = [Path(i["path"]).stem for i in metrics["images"]]
    assert names == ["ant", "bee", "cat"]
    run(tmp_path / "one")
    assert_same_maps(tmp_path / "run", tmp_path / "one")


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_stops_within_a_photo(count, run, tmp_path):
    """Exit code 130 and one line that resumes the run, in the middle of millions of samples."""

    def main(rank=0):
        run(tmp_path / "run", "--samples", 100_000_000, "--noise", 0, 0.1)

    if count == 1:
        children, logs = [fork(main, tmp_path / "log")], [tmp_path / "log"]
    else:
        children, logs = group(main, tmp_path)
    for child, log in zip(children, logs, strict=True):
        wait_for(child, log, "gradient: ")
    for child in children:
        os.kill(child, signal.SIGINT)
    assert [wait(child) for child in children] == [130] * count
    said = "".join(log.read_text() for log in logs)
    assert said.count(f"--resume {tmp_path / 'run'}") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.json").exists()
