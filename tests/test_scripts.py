"""What holds for every script: --help teaches, a copy runs alone, a mistake is one line."""

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
    smoothgrad: ("coffee.npz", "coffee_noise_10.png", "coffee_panel.png"),
    explain_perturb: ("coffee.npz", "coffee_mask.png", "coffee_panel.png"),
    compare_explanations: ("table.md", "table.csv", "contact_sheet.png"),
    torch_basics: ("loss_transition.png", "metrics.csv"),
}
EACH = pytest.mark.parametrize("script", FILES, ids=lambda script: script.SCRIPT)


@EACH
def test_every_flag_has_help_and_is_read(script):
    """No flag without a word on it, and none that is parsed and never used."""
    source = Path(script.__file__).read_text()
    for action in script.get_parser()._actions:
        assert action.help, action.option_strings
        assert f"args.{action.dest}" in source or action.dest == "help", action.option_strings
    assert source.count("\n") <= 450


@EACH
def test_a_copied_script_runs_alone_from_another_folder(script, tmp_path):
    """Script plus common/, a bare environment: no download, no traceback, and all files named."""
    measured = (smoothgrad, explain_perturb) if script is compare_explanations else ()
    for module in (script, *measured):
        shutil.copy(module.__file__, tmp_path)
    shutil.copytree(Path(script.__file__).parent / "common", tmp_path / "common")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, tmp_path / f"{script.SCRIPT}.py", "--dry-run", "--cuda"],
        env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=elsewhere, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "no usable GPU" in done.stderr
    if script in (smoothgrad, explain_perturb):  # real weights
        assert "sample:coffee: espresso 9" in done.stdout
    if script is torch_basics:  # pages to read
        assert max(map(len, done.stdout.splitlines())) <= 100
    (folder,) = (elsewhere / "runs" / script.SCRIPT).iterdir()
    for name in (*FILES[script], "metrics.json"):
        assert f"wrote    {folder.relative_to(elsewhere) / name}\n" in done.stdout
        assert (folder / name).stat().st_size > 0


@EACH
def test_a_wrong_flag_leaves_no_traceback(script, tmp_path, monkeypatch, capsys):
    """Called as a script: exit code 2, one line on stderr, nothing on disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__file__, "--seed", "-3"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script.__file__, run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument --seed: ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
