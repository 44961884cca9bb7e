"""The pages are executable: every command in them parses, and every path in them exists."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "results/README.md", "benchmarks/README.md", "tests/README.md"]


def commands():
    """Collect the lines of all shell blocks, without comments."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            lines = [line.split(" #")[0].strip() for line in lines if not line.startswith("#")]
            found += [(page, line) for line in lines if line]
    return found


def load(script):
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_parse(page, command):
    """A command names a script or a make target that is there, with flags that it knows."""
    words = shlex.split(command)
    words = [word for word in words if not re.fullmatch(r"\w+=\S*", word)]  # VARIABLE=value
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        assert words[0] in ("git", "cd", "pip", ".venv/bin/pip", "python", "python3", "source")
        return
    parser = load(words[scripts[0]]).get_parser()
    arguments = words[scripts[0] + 1 :]
    try:
        parser.parse_args(arguments)
    except SystemExit as stop:
        pytest.fail(f"{command}: exit code {stop.code}")


def test_runs_that_commands_take_up_are_made_before():
    """Whatever --resume and --sample name is the --out of a command further up, or comes along."""
    made = {"pretrained"}
    for _, command in commands():
        words = shlex.split(command)
        for flag, value in itertools.pairwise(words):
            if flag in ("--resume", "--sample"):
                assert value in made, command
        made |= {v for flag, v in itertools.pairwise(words) if flag == "--out"}


def test_the_example_of_a_script_of_ones_own(tmp_path, monkeypatch):
    """The README's changes, made to a copy of train_dcgan.py, train on squares and resume."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = (ROOT / "train_dcgan.py").read_text()
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
        old, new = (re.sub("^.", "", lines, flags=re.MULTILINE) for lines in (old, new))
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    (tmp_path / "train_lsgan.py").write_text(script)
    squares = np.zeros((40, 1, 28, 28), np.uint8)
    squares[:, :, 8:20, 8:20] = 255
    np.save(tmp_path / "squares.npy", squares)

    monkeypatch.chdir(tmp_path)
    main = load(tmp_path / "train_lsgan.py").main
    tiny = ["--width", "0.05", "--batch-size", "8"]
    assert len(main([*tiny, "--epochs", "1", "--out", "run"])["epochs"]) == 1
    assert len(main(["--resume", "run", "--epochs", "2"])["epochs"]) == 2


def python_blocks():
    """Collect the README's blocks of Python."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_notebook_example():
    """The README's lines run as they stand, for any network, which stays as it was."""
    (code,) = [block for block in python_blocks() if "learn_mask" in block]
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2),
    )  # fmt: skip
    names = {"network": network, "x": torch.rand(2, 3, 32, 32), "target": torch.tensor([0, 1])}
    exec(code, names)
    assert names["heat"].shape == (2, 3, 32, 32)
    assert names["mask"].shape == (2, 32, 32)
    assert network.training
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("script", ["smoothgrad", "explain_perturb"])
def test_the_example_of_a_network_of_ones_own(script, tmp_path, monkeypatch):
    """With the README's function in place of an import, a copy explains a ResNet of two classes."""
    (code,) = [block for block in python_blocks() if "def load_classifier" in block]
    source = (ROOT / f"{script}.py").read_text()
    line = "from common.classifiers import find_class, load_classifier\n"
    assert source.count(line) == 1
    (tmp_path / f"{script}.py").write_text(source.replace(line, code))
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=2).state_dict(), tmp_path / "my.pth")

    monkeypatch.chdir(tmp_path)
    words = ["--image", "sample:cat", "--target", "dog", "--dry-run", "--out", "run"]
    (record,) = load(tmp_path / f"{script}.py").main(words)["images"]
    assert (record["class_name"], record["target"]) == ("dog", 1)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Pictures and files that a page points to are in the repository."""
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [t for t in targets if not t.startswith("http")]
    assert local, "a page without a single link or picture"
    for target in local:
        assert ((ROOT / page).parent / target).exists(), target
