"""What holds for every script: --help teaches, a copy runs alone, a mistake is one line."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compare_explanations
import explain_perturb
import smoothgrad
import torch_basics
import train_classifier
import train_dcgan

FILES = {  # what a dry run writes, among others
    train_dcgan: ("epochs.gif", "losses.png", "metrics.csv", "checkpoint.pt"),
    train_classifier: ("confusions.png", "curves.png", "mistakes.png", "checkpoint.pt"),
    smoothgrad: ("coffee.npz", "coffee_noise_10.png", "coffee_panel.png", "metrics.csv"),
    explain_perturb: ("coffee.npz", "coffee_mask.png", "coffee_panel.png", "metrics.csv"),
    compare_explanations: ("table.md", "table.csv", "contact_sheet.png"),
    torch_basics: ("loss_transition.png", "metrics.csv"),
}
EACH = pytest.mark.parametrize("script", FILES, ids=lambda script: script.SCRIPT)
# Each takes a fifth of a second or more to import, and --help needs none of them.
SLOW = ("torchvision", "timm", "matplotlib", "scipy", "skimage", "imageio")


@EACH
def test_every_flag_has_help_and_is_read(script):
    """No flag without a word on it and on its default, and none that is parsed and never used."""
    source = Path(script.__file__).read_text()
    settings = getattr(script, "Settings", None)
    fields = settings._fields if settings else ()
    for action in script.get_parser()._actions:
        assert action.help, action.option_strings
        read = f"args.{action.dest}" in source or f"settings.{action.dest}" in source
        assert read or action.dest == "help", action.option_strings
        assert f"args.{action.dest}" in source or action.dest in (*fields, "help")
        quiet = action.default is None or isinstance(action.default, (bool, str))
        assert quiet or "default" in action.help, action.option_strings


@EACH
def test_help_fits_a_terminal(script, monkeypatch):
    """80 columns, the method and its paper above the flags."""
    monkeypatch.setenv("COLUMNS", "80")
    text = script.get_parser().format_help()
    assert text.startswith(script.__doc__.splitlines()[0])
    assert max(map(len, text.splitlines())) <= 80


def test_importing_a_script_imports_nothing_slow():
    """Torch is enough for --help: torchvision, matplotlib and their like wait until needed."""
    names = ", ".join(script.SCRIPT for script in FILES)
    code = f"import sys, {names}; print([n for n in {SLOW} if n in sys.modules])"
    root = Path(train_dcgan.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("script", [smoothgrad, explain_perturb], ids=lambda script: script.SCRIPT)
def test_explaining_a_photo_imports_nothing_slow(script, tmp_path):
    """From photo to panel; torch._dynamo alone, torch.compile's machinery, takes a second."""
    slow = (*SLOW[:-2], "skimage.io", "torch._dynamo")
    code = (f"import sys, {script.SCRIPT} as script; script.main(sys.argv[1:]); "
            f"print([n for n in {slow} if n in sys.modules])")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, "--dry-run", "--out", tmp_path / "run"],
        cwd=Path(script.__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


@EACH
def test_a_copied_script_runs_alone_from_another_folder(script, tmp_path):
    """Script plus common/, a bare environment: no download, no traceback, and all files there.

    The copy has a name of its own, by which it calls itself.
    """
    name = "my_copy"
    shutil.copy(script.__file__, tmp_path / f"{name}.py")
    if script is compare_explanations:
        for module in (smoothgrad, explain_perturb):
            shutil.copy(module.__file__, tmp_path)
    shutil.copytree(Path(script.__file__).parent / "common", tmp_path / "common")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, tmp_path / f"{name}.py", "--dry-run", "--cuda"],
        env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=elsewhere, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "no usable GPU" in done.stderr
    if script in (smoothgrad, explain_perturb):  # real weights
        assert "sample:coffee: espresso 9" in done.stdout
    (folder,) = (elsewhere / "runs" / name).iterdir()
    assert str(folder.relative_to(elsewhere)) in done.stdout
    for file in (*FILES[script], "metrics.json"):
        assert (folder / file).stat().st_size > 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["command"] == f"python {name}.py --dry-run --cuda"
    assert not [file for file in folder.rglob(".*") if file.name != ".lock"]


@EACH
def test_a_wrong_flag_leaves_no_traceback(script, tmp_path, monkeypatch, capsys):
    """Called as a script: exit code 2, one line on stderr, nothing on disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--seed", "-3"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "error: argument --seed: " in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
