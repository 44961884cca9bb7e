"""--tensorboard: what a run writes is what TensorBoard shows."""

import builtins

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_classifier
from common.errors import UserError
from common.gallery import explain_photos
from common.images import save_png
from common.run import open_run, write_csv


def shown(folder):
    """Read back what was shown.

    :return: the steps and values of each column, and the steps of each kind of picture
    :rtype: tuple[dict, dict]
    """
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    numbers = {
        name: [(event.step, round(event.value, 6)) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    return numbers, {n: [e.step for e in events.Images(n)] for n in events.Tags()["images"]}


def write_epoch(folder, rows, epoch):
    """Write what a training writes after an epoch."""
    save_png(folder / f"samples/epoch_{epoch:03d}.png", np.full((4, 6, 3), epoch, np.uint8))
    save_png(folder / "data.png", np.zeros((4, 6, 3), np.uint8))  # of no epoch
    rows.append({"epoch": epoch, "loss": 1 / 2**epoch} | ({"fid": 3.0} if epoch == 2 else {}))
    write_csv(folder / "metrics.csv", rows)


def test_rows_and_pictures_are_shown_once(tmp_path):
    """Every row of the table and every sample has its epoch as step."""
    folder, rows = open_run("s", tmp_path / "run", tensorboard=True), []
    for epoch in (1, 2):
        write_epoch(folder, rows, epoch)
    numbers, pictures = shown(folder)
    assert numbers == {"loss": [(1, 0.5), (2, 0.25)], "fid": [(2, 3.0)]}
    assert pictures == {"samples/epoch": [1, 2]}


def test_a_resumed_run_is_shown_from_its_beginning(tmp_path):
    """Nothing is shown twice, and nothing is lost, also what nobody watched at the time."""
    folder, rows = open_run("s", tmp_path / "run"), []
    write_epoch(folder, rows, 1)
    assert not (folder / "tensorboard").exists()
    for epoch in (2, 3):
        write_epoch(open_run("s", resume=folder, tensorboard=True), rows, epoch)
    numbers, pictures = shown(folder)
    assert numbers["loss"] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert pictures == {"samples/epoch": [1, 2, 3]}


def test_a_training_can_be_watched(tmp_path):
    """The flag shows the losses that metrics.json holds."""
    metrics = train_classifier.main(
        ["--dry-run", "--tensorboard", "--width", "0.05", "--data-dir", str(tmp_path / "data"),
         "--out", str(tmp_path / "run")]
    )  # fmt: skip
    (row,) = metrics["epochs"]
    numbers, _ = shown(tmp_path / "run")
    assert numbers["test_loss"] == [(1, pytest.approx(row["test_loss"], rel=1e-5))]
    assert numbers.keys() == row.keys() - {"epoch"}


def explain_one(folder, name):
    """Write what explain_perturb.py writes of a photo, as the only new one of its run."""

    def explain(pairs):
        ((photo, stem),) = pairs
        save_png(folder / f"{stem}_mask.png", np.zeros((4, 6, 3), np.uint8))
        save_png(folder / f"{stem}_cam.png", np.zeros((4, 6, 3), np.uint8))
        return [{"path": photo, "trace": [{"evaluations": 4, "objective": 0.5},
                                          {"evaluations": 8, "objective": 0.25}]}]  # fmt: skip

    explain_photos([name], folder, explain)


def test_masks_and_their_traces_are_shown_once(tmp_path):
    """Each photo has a name of its own, also those of before a run was resumed, or not watched."""
    folder = open_run("s", tmp_path / "run")
    explain_one(folder, "a")
    for name in ("b", "c"):
        folder = open_run("s", resume=tmp_path / "run", tensorboard=True)
        explain_one(folder, name)
    numbers, pictures = shown(folder)
    assert numbers == {f"{name}/objective": [(4, 0.5), (8, 0.25)] for name in "abc"}
    assert pictures == {f"{name}/mask": [0] for name in "abc"}


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    """Who doesn't watch doesn't need the package; who does is told its name."""
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match="pip install tensorboard"):
        open_run("s", tmp_path / "run", tensorboard=True)
    assert open_run("s", tmp_path / "other").is_dir()
