"""The tour, the three ways to train, the experiment: every claim that the script prints."""

import csv
import math
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import torch_basics
from common.errors import UserError
from tests.helpers import read_metrics, refusal


@pytest.fixture(scope="module")
def told():
    """Run the tour, and give its answers by line; of a line that comes twice, the last."""
    return dict(torch_basics.tour(torch.device("cpu")))


@pytest.fixture(scope="module")
def drawn():
    """Draw data and weights: x, y and the two starts."""
    return torch_basics.draw(0, torch.device("cpu"))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Run all four parts, but only 40 epochs, and without torch.compile."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        patch.setattr(torch_basics, "ROUNDS", 1)
        return folder, torch_basics.main(["--epochs", "40", "--out", str(folder)])


# ------------------------------------------------------------------------------------- the tour


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("type(x), x.shape, x.dtype", "(<class 'torch.Tensor'>, torch.Size([6]), torch.float32)"),
        ("torch.zeros(2, dtype=torch.int64, device=device)", "tensor([0, 0])"),
        ("x.reshape(2, -1).shape, x[None, :].shape", "(torch.Size([2, 3]), torch.Size([1, 6]))"),
        ("x.reshape(2, 3).reshape(-1)", "tensor([0., 1., 2., 3., 4., 5.])"),
        ("torch.mm(a, b).shape, (a @ b).shape", "(torch.Size([2, 4]), torch.Size([2, 4]))"),
        ("(torch.ones(3, 1) + torch.ones(4)).shape", "torch.Size([3, 4])"),
        ("torch.arange(4).flip(0)", "tensor([3, 2, 1, 0])"),
        ("n.strides, n.copy().strides", "((-8,), (8,))"),
        ("torch.from_numpy(n.copy())", "tensor([3, 2, 1, 0])"),
        ("n", "array([7., 1., 1., 1.])"),
        ("w.grad.clone(), w.grad.zero_()", "(tensor([6., 6.]), tensor([0., 0.]))"),
        ("w, w.grad", "(tensor([0., 0.], requires_grad=True), tensor([0., 0.]))"),
        ("type(Variable(x))", "<class 'torch.Tensor'>"),
        ("(x > 0).dtype", "torch.bool"),
        ("torch.tensor([1, 2]) / 2", "tensor([0.5000, 1.0000])"),
        ("l.weight.grad is None", "True"),
    ],
)
def test_the_tour_answers(told, line, answer):
    """Each claim of part 1 is what torch says today."""
    (found,) = [a for full, a in told.items() if full.split("  #")[0].strip() == line]
    assert found == answer


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("torch.mm(a, a)", "RuntimeError", ["(2x3 and 2x3)"]),
        ("torch.mm(a, torch.ones(3))", "RuntimeError", ["must be a matrix"]),
        ("torch.arange(4)[::-1]", "ValueError", ["step must be greater than zero"]),
        ("torch.from_numpy(n)", "ValueError", ["negative strides", "copy"]),
        ("w.sub_(1)", "RuntimeError", ["leaf", "in-place"]),
        ("e.sum().backward()", "RuntimeError", ["modified by an inplace operation"]),
        ("Variable(x, volatile=True)", "UserWarning", ["no_grad"]),
        ("x.sum().data[0]", "IndexError", ["item()"]),
        ("nn.MSELoss(size_average=False)", "UserWarning", ["reduction='sum'"]),
    ],
)
def test_the_tour_shows_real_errors_and_warnings(told, line, kind, words):
    """What is refused is refused by torch itself, in its own words."""
    (found,) = [a for full, a in told.items() if full.split("  #")[0].strip() == line]
    assert found.startswith(kind + ": ")
    assert all(word in found for word in words)


def test_the_tour_has_no_other_errors(told):
    """Only the lines above fail: no typing mistake of ours passes for a lesson."""
    failing = [
        line for line, answer in told.items() if "Error: " in answer or "Warning: " in answer
    ]
    assert len(failing) == 9


# -------------------------------------------------------------------------- three ways to train


def test_starts_are_what_they_say(drawn):
    """N(0, 1), and nn.Linear's own distribution: bounded by, and filling, 1 / sqrt(fan_in)."""
    x, y, starts = drawn
    assert [tuple(t.shape) for t in (x, y, *starts["randn"])] == list(torch_basics.SHAPES.values())
    assert all(t.dtype == torch.float64 for t in (x, y, *starts["randn"], *starts["uniform"]))
    assert starts["randn"][0].std().item() == pytest.approx(1, rel=0.02)
    model = torch_basics.SimpleNNModel()
    for ours, layer in zip(starts["uniform"], model.children(), strict=True):
        bound = 1 / math.sqrt(layer.in_features)
        assert 0.99 * bound < ours.abs().max() <= bound
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.T.shape == ours.shape
        assert ours.std().item() == pytest.approx(layer.weight.std().item(), rel=0.05)
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("gradients", ["by_hand", "by_func", "by_sample"])
@pytest.mark.parametrize("start", ["randn", "uniform"])
def test_all_gradients_agree(drawn, gradients, start):
    """By hand, by torch.func and per sample, the gradients are autograd's to 1e-10."""
    x, y, starts = drawn
    leaves = [w.clone().requires_grad_() for w in starts[start]]
    loss = torch_basics.squared_error(x, y, *leaves)
    loss.backward()
    found = getattr(torch_basics, gradients)(x, y, *starts[start])
    for value, expected in zip(found, (loss, *(w.grad for w in leaves)), strict=True):
        assert value.shape == expected.shape
        assert (value - expected).norm() <= 1e-10 * expected.norm()


def test_by_hand_passes_gradcheck():
    """The formulas themselves, not only autograd, agree with finite differences."""

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            loss, *ctx.gradients = torch_basics.by_hand(*tensors)
            return loss

        @staticmethod
        def backward(ctx, grad):
            return None, None, *(grad * g for g in ctx.gradients)

    rng = torch.Generator().manual_seed(0)
    sizes = ((8, 6), (8, 4), (6, 5), (5, 4))
    x, y, *weights = (torch.randn(s, generator=rng, dtype=torch.float64) for s in sizes)
    weights = [w.requires_grad_() for w in weights]
    assert torch.autograd.gradcheck(Loss.apply, (x, y, *weights))
    assert torch.autograd.gradcheck(torch_basics.squared_error, (x, y, *weights))


def test_three_ways_give_one_curve(drawn, monkeypatch):
    """From the same weights the losses coincide, also across a halving; these stay as they are."""
    monkeypatch.setattr(torch_basics, "HALVE_EVERY", 5)
    x, y, starts = drawn
    before = [w.clone() for w in starts["randn"]]
    curves = [
        torch_basics.descend(torch_basics.by_hand, x, y, starts["randn"], 3e-7, 12),
        torch_basics.descend_with_autograd(x, y, starts["randn"], 3e-7, 12),
        torch_basics.descend_with_optim(x, y, starts["randn"], 3e-7, 12),
    ]
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-10, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(before, starts["randn"], strict=True))
    monkeypatch.setattr(torch_basics, "HALVE_EVERY", 50)
    unhalved = torch_basics.descend_with_autograd(x, y, starts["randn"], 3e-7, 12)
    torch.testing.assert_close(unhalved[:6], curves[0][:6], rtol=1e-10, atol=0)
    assert unhalved[-1] < 0.9 * curves[0][-1]


def test_nesterov_and_weight_decay_are_the_optimizers(drawn):
    """One step more of momentum, one step less of the weights: checked against the formulas."""
    x, y, starts = drawn
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 100.0}
    lr = 3e-7
    found = torch_basics.descend_with_optim(x, y, starts["randn"], lr, 4, **options)
    weights = [w.clone() for w in starts["randn"]]
    velocities = [0, 0]
    losses = []
    for _ in range(4):
        loss, *gradients = torch_basics.by_hand(x, y, *weights)
        losses.append(loss)
        for i in range(2):
            gradient = gradients[i] + 100.0 * weights[i]
            velocities[i] = 0.9 * velocities[i] + gradient
            weights[i] = weights[i] - lr * (gradient + 0.9 * velocities[i])
    torch.testing.assert_close(found, torch.stack(losses), rtol=1e-10, atol=0)


def test_curvature_is_the_largest_second_derivative(drawn):
    """Equal to power iteration on the block of W2, and within 10 % of all weights' together."""
    x, y, starts = drawn
    for weights in starts.values():
        found = torch_basics.curvature(x, weights)
        v = torch_basics.by_hand(x, y, *weights)[1:]
        for _ in range(20):
            length = math.sqrt(sum(part.square().sum() for part in v))
            v = tuple(part / length for part in v)
            _, v = torch.autograd.functional.vhp(
                lambda a, b: torch_basics.squared_error(x, y, a, b), tuple(weights), v
            )
        everything = math.sqrt(sum(part.square().sum() for part in v))
        assert 0.9 * everything < found <= everything * 1.001
    # It bounds the learning rate: a little below 2 / curvature the loss falls, well above it grows.
    below, above = (
        torch_basics.descend(torch_basics.by_hand, x, y, weights, factor / found, 5)
        for factor in (1.5, 4)
    )
    assert below[-1] < below[0]
    assert above[1] > above[0]


# ------------------------------------------------------------------------------- the experiment


def test_a_run_leaves_what_it_promises(short_run):
    """Figure, table and metrics.json are there, and the numbers in them fit together."""
    folder, metrics = short_run
    figure = imageio.imread(folder / "loss_transition.png")
    assert min(figure.shape[:2]) > 400
    assert figure.std() > 5
    # each panel shows blue and orange
    for part in np.array_split(figure[..., :3].astype(int), 3, axis=1):
        assert ((part[..., 2] - part[..., 0]) > 60).sum() > 100
        assert ((part[..., 0] - part[..., 2]) > 60).sum() > 100

    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 41))
    saved = read_metrics(folder, metrics)
    assert {file.name for file in folder.glob("[!.]*")} == {
        "loss_transition.png", "metrics.csv", "metrics.json"}  # fmt: skip
    assert saved["gaps"]["gradcheck"] == 0
    assert max(saved["gaps"].values()) < 1e-10
    assert len(saved["losses"]) == 9
    for name, (first, last) in saved["losses"].items():
        assert [float(rows[0][name]), float(rows[-1][name])] == [first, last]
        assert last < first
    (times,) = saved["milliseconds"].values()
    assert len(times) == 6
    assert all(value > 0 for value in times.values())


def test_the_answer_follows_from_the_losses(short_run):
    """Decades are those between the last losses; Nesterov and the uniform start both help."""
    losses, decades = short_run[1]["losses"], short_run[1]["decades"]
    last = {name: math.log10(end) for name, (_, end) in losses.items()}
    assert decades["initialisation"] == pytest.approx(
        [last["randn_plain"] - last["uniform_plain_fitted"],
         last["randn_nesterov"] - last["uniform_nesterov_fitted"]])  # fmt: skip
    assert decades["momentum"] == pytest.approx(
        [last["randn_plain"] - last["randn_nesterov"],
         last["uniform_plain_fitted"] - last["uniform_nesterov_fitted"]])  # fmt: skip
    assert decades["weight_decay"] == pytest.approx(
        last["uniform_nesterov_fitted"] - last["uniform_nesterov_weight_decay_fitted"]
    )
    assert min(decades["initialisation"] + decades["momentum"]) > 0.5


def test_same_seed_same_losses(short_run, tmp_path):
    """A second run is equal bit for bit; another seed is another run."""
    keys = ["losses", "decades", "gaps"]
    runs = [
        torch_basics.main(["--dry-run", "--seed", seed, "--out", str(tmp_path / name)])
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))
    ]
    assert [runs[0][key] for key in keys] == [runs[1][key] for key in keys]
    assert runs[0]["losses"]["randn_plain"] != runs[2]["losses"]["randn_plain"]
    with open(tmp_path / "a" / "metrics.csv") as a, open(tmp_path / "b" / "metrics.csv") as b:
        assert a.read() == b.read()


@pytest.mark.parametrize("lr", ["1e-6", "1e-3", "1e30"])
def test_a_diverging_lr_is_one_line_and_no_figure(lr, tmp_path, refused):
    """Exit code 2, and a smaller lr that works; no plot of NaN."""
    out = tmp_path / "run"
    error = refused(torch_basics, "--lr", lr, "--epochs", "30", "--out", str(out))
    assert not list(out.glob("[!.]*"))
    better = error.split("--lr, ")[1].strip()
    assert float(better) < float(lr)
    torch_basics.main(["--lr", better, "--dry-run", "--out", str(tmp_path / "better")])


def test_a_wrong_formula_is_found(tmp_path, monkeypatch):
    """A sign as in the post's formulas ends the script with a line that says so."""

    def wrong(*tensors, by_hand=torch_basics.by_hand):
        loss, dw1, dw2 = by_hand(*tensors)
        return loss, -dw1, dw2

    monkeypatch.setattr(torch_basics, "by_hand", wrong)
    with pytest.raises(UserError, match="by hand and by autograd"):
        torch_basics.main(["--dry-run", "--out", str(tmp_path / "run")])
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_nan_is_never_within_the_limit():
    """Neither first nor last: what isn't a number doesn't hide behind one that is small."""
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    for found in ([bad, good], [good, bad]):
        with pytest.raises(UserError, match="nan"):
            torch_basics.check("order", found, [good, good])


def test_without_a_compiler_one_line_says_so(drawn, monkeypatch, capsys):
    """Where torch.compile fails, the table goes without it, and no traceback is printed."""

    def fail(function):
        raise RuntimeError("No working C++ compiler found\nand a page of advice")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(torch_basics, "ROUNDS", 1)
    monkeypatch.setattr(torch_basics, "STEPS", 1)
    x, y, starts = drawn
    times = torch_basics.time_steps(x, y, starts["randn"], 3e-7, False)
    assert len(times) == 5
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "No working C++ compiler found" in printed


# ----------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "words",
    ["--epochs 0", "--epochs many", "--lr nan", "--lr inf", "--lr -1", "--seed -1", "--nothing",
     f"--out {torch_basics.__file__}", f"--out {Path(torch_basics.__file__).parent}"],
)  # fmt: skip
def test_bad_arguments_are_one_line(words, tmp_path, monkeypatch, refused):
    """A mistake ends in exit code 2 and one line that names it; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert words.split()[0] in refused(torch_basics, *words.split())
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused(short_run):
    """--out never writes over another run."""
    before = (short_run[0] / "metrics.json").read_bytes()
    refusal(torch_basics.main, ["--dry-run", "--out", str(short_run[0])])
    assert (short_run[0] / "metrics.json").read_bytes() == before
