"""What the two trainings have in common: resume, kills, signals, two processes, mistakes."""

import csv
import json
import os
import shutil
import signal
import time
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_classifier
import train_dcgan
from common.data import load_dataset
from common.errors import Interrupted
from common.run import load_checkpoint
from tests.helpers import assert_same, learnt, read_metrics, refusal
from tests.processes import act_at, fork, group, pause, train_together, wait, wait_for_mark

GLYPHS = ["--dataset", "glyphs", "--glyphs", "32"]
TINY = {  # 2 batches an epoch
    train_dcgan: ["--batch-size", "16", "--width", "0.0625", "--lr", "0.02"],
    train_classifier: ["--batch-size", "16", "--width", "0.125"],
}


class Training(NamedTuple):
    """One of the two scripts, and a run of it of three epochs, which no test may change."""

    script: object
    data: object
    whole: object
    metrics: dict

    @property
    def name(self):
        """The script's name."""
        return self.script.SCRIPT

    def run(self, folder, *words):
        """Run the script in this process; return what main returns."""
        words = [*GLYPHS, *TINY[self.script], "--epochs", "3", *words]
        return self.script.main([*words, "--data-dir", str(self.data), "--out", str(folder)])

    def resume(self, folder, *words):
        """Go on with a run in this process; return what main returns."""
        return self.script.main(["--resume", str(folder), *words])

    def assert_whole(self, folder):
        """Hold a run that was interrupted against the whole one, bit for bit."""
        assert_same(learnt(folder, self.name), learnt(self.whole, self.name))
        table, expected = read_table(folder), read_table(self.whole)
        for row in (*table, *expected):
            del row["images_per_second"]
        assert table == expected
        for file in self.whole.rglob("*.png"):
            assert (folder / file.relative_to(self.whole)).read_bytes() == file.read_bytes()
        assert not list(folder.rglob("*.part*"))

    def epochs(self, folder):
        """Tell how many epochs a checkpoint has seen."""
        return len(load_checkpoint(folder, self.name)["history"])


def read_table(folder):
    """Read metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Give the tests of this file one data folder, so that glyphs are drawn once."""
    folder = tmp_path_factory.mktemp("data")
    load_dataset("glyphs", folder, True, glyphs=32)
    load_dataset("glyphs", folder, False, glyphs=6)
    return folder


@pytest.fixture(scope="module", params=list(TINY), ids=lambda script: script.SCRIPT)
def training(request, data, tmp_path_factory):
    """Train three epochs without interruption."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    training = Training(request.param, data, folder, {})
    return training._replace(metrics=training.run(folder))


# ---------------------------------------------------------------------------- the same, once more


def test_the_record_is_whole(training):
    """metrics.json, metrics.csv and what main returns say the same."""
    saved = read_metrics(training.whole, training.metrics)
    table = [
        {name: float(value) for name, value in row.items()} for row in read_table(training.whole)
    ]
    assert table == saved["epochs"]
    assert [row["epoch"] for row in table] == [1, 2, 3]
    assert saved["dataset"] == "glyphs"
    assert saved["args"]["epochs"] == 3
    assert all(row["images_per_second"] > 0 for row in table)


def test_same_seed_same_bits(training, tmp_path, monkeypatch):
    """Whoever else draws from the global generator."""
    look = training.script.test

    def look_often(*arguments):
        look(*arguments)
        torch.randn(1000)
        np.random.rand(1000)
        return look(*arguments)

    monkeypatch.setattr(training.script, "test", look_often)
    training.run(tmp_path)
    training.assert_whole(tmp_path)


def test_a_clock_that_stands_still_divides_by_nothing(training, tmp_path, monkeypatch):
    """Or jumps back: what depends on it is the speed that is shown."""
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    monkeypatch.setattr(time, "time", iter(range(10**9, 0, -1)).__next__)
    training.run(tmp_path)
    training.assert_whole(tmp_path)


def test_another_seed_is_another_run(training, tmp_path):
    """In every epoch."""
    metrics = training.run(tmp_path, "--seed", "1")
    for row, other in zip(metrics["epochs"], training.metrics["epochs"], strict=True):
        losses = [name for name in row if name.endswith("loss")]
        assert all(row[name] != other[name] for name in losses)


def test_resuming_a_finished_run_makes_its_pictures_again(training, tmp_path):
    """It trains no more, and counts the time of all sessions."""
    folder = tmp_path / "run"
    shutil.copytree(training.whole, folder)
    pictures = list(folder.glob("*.png"))
    for file in pictures:
        file.unlink()
    metrics = training.resume(folder)
    assert pictures
    for file in pictures:
        assert file.read_bytes() == (training.whole / file.name).read_bytes()
    assert metrics["seconds"] >= 0.5 * training.metrics["seconds"]
    training.assert_whole(folder)


def test_tensorboard_shows_the_table(training, tmp_path, monkeypatch):
    """Each number once, also of an epoch that is trained again: its checkpoint wasn't written."""
    save = training.script.save_checkpoint

    def stop(path, state):
        if len(state["history"]) == 2:
            signal.raise_signal(signal.SIGINT)
        save(path, state)

    monkeypatch.setattr(training.script, "save_checkpoint", stop)
    with pytest.raises(Interrupted):
        training.run(tmp_path, "--tensorboard")
    monkeypatch.undo()
    metrics = training.resume(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in metrics["epochs"][0]:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(row["epoch"], pytest.approx(row[name])) for row in metrics["epochs"]]


# ---------------------------------------------------------------------------- killed and stopped


# Calls that fall into an epoch: of average_gradients, all of them; of fsync, from the first file
# after the first checkpoint to the last checkpoint.
CALLS = {
    train_dcgan: {"average_gradients": (1, 12), "fsync": (3, 11)},
    train_classifier: {"average_gradients": (1, 6), "fsync": (2, 7)},
}


@pytest.mark.parametrize("place", ["average_gradients", "fsync"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_run_resumes_bit_exactly(place, seed, training, tmp_path):
    """SIGKILL amid a step, or amid the writing of a file, costs one epoch at most."""
    low, high = CALLS[training.script][place]
    call = int(np.random.default_rng(seed).integers(low, high, endpoint=True))
    module = os if place == "fsync" else training.script
    folder = tmp_path / "run"

    def main():
        act_at(module, place, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
        training.run(folder)

    assert wait(fork(main, tmp_path / "log")) == -signal.SIGKILL
    assert training.epochs(folder) < 3
    training.resume(folder)
    training.assert_whole(folder)


def second_epoch(training):
    """Return the number of a call of average_gradients that falls into epoch 2."""
    return CALLS[training.script]["average_gradients"][1] // 3 + 1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_with_their_code(signum, training, tmp_path):
    """130 or 143, one line that names --resume; the last whole epoch's checkpoint is intact."""
    folder = tmp_path / "run"
    mark = tmp_path / "mark"

    def main():
        act_at(training.script, "average_gradients", second_epoch(training), lambda: pause(mark))
        training.run(folder)

    child = fork(main, tmp_path / "log")
    wait_for_mark(mark)
    os.kill(child, signum)
    os.kill(child, signum)  # who is impatient must not do harm
    assert wait(child) == 128 + signum
    lines = (tmp_path / "log").read_text().splitlines()
    assert f"{training.name}.py --resume {folder}" in lines[-1]
    assert sum("--resume" in line for line in lines) == 1
    assert training.epochs(folder) == 1
    training.resume(folder)
    training.assert_whole(folder)


def test_a_signal_in_a_notebook_is_a_keyboard_interrupt(training, tmp_path, monkeypatch):
    """Who calls main from Python gets an exception, and the handlers back."""
    before = signal.getsignal(signal.SIGINT)

    def stop(model):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.script, "average_gradients", stop)
    with pytest.raises(KeyboardInterrupt):
        training.run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    training.resume(tmp_path)
    training.assert_whole(tmp_path)


# --------------------------------------------------------------------------------- two processes


def test_two_processes_train_one_model_and_resume_it(training, tmp_path, monkeypatch):
    """They agree on every weight, the first alone writes and prints, and both can go on."""
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    words = ["--batch-size", "8"]
    train_together(training.script, lambda: training.run(whole, *words), tmp_path, monkeypatch)
    monkeypatch.undo()
    saved = json.loads((whole / "metrics.json").read_text())
    assert [row["epoch"] for row in saved["epochs"]] == [1, 2, 3]

    def stopped(rank):
        call, mark = second_epoch(training), tmp_path / f"mark{rank}"
        act_at(training.script, "average_gradients", call, lambda: pause(mark))
        training.run(cut, *words)

    children, logs = group(stopped, tmp_path)
    for rank in range(2):
        wait_for_mark(tmp_path / f"mark{rank}")
    for child in children:
        os.kill(child, signal.SIGTERM)
    assert [wait(child) for child in children] == [143, 143]
    assert [log.read_text().count("--resume") for log in logs] == [1, 0]
    assert training.epochs(cut) == 1

    children, logs = group(lambda rank: training.resume(cut), tmp_path)
    ends = [wait(child) for child in children]
    assert ends == [0, 0], "".join(log.read_text() for log in logs)
    assert_same(learnt(cut, training.name), learnt(whole, training.name))


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 0",
        "--epochs ten",
        "--lr nan",
        "--lr -1",
        "--batch-size 1",
        "--width 0",
        "--seed -1",
        "--dataset imagenet",
        "--no-such-flag",
        "--batch-size 65 --dataset glyphs --glyphs 64",
        "--resume nowhere",
        "--dataset folder --data-dir nowhere",
    ],
)
def test_bad_arguments_are_one_line(words, training, tmp_path, monkeypatch, refused):
    """A mistake ends in exit code 2 and one line that names it; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    error = refused(training.script, *words.split())
    assert words.split()[0] in error or "nowhere" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["--batch-size", "8"], ["--epochs", "2"], ["--seed", "1"]])
def test_resume_keeps_the_settings_of_the_run(words, training, refused):
    """A resumed run can't quietly become another experiment, nor lose epochs."""
    before = (training.whole / "checkpoint.pt").read_bytes()
    assert words[0] in refused(training.script, "--resume", str(training.whole), *words)
    assert (training.whole / "checkpoint.pt").read_bytes() == before


def test_resume_wants_the_same_data(training, tmp_path, refused):
    """As many images of the same shape."""
    state = dict(load_checkpoint(training.whole, training.name))
    state["shape"][-1] += 1
    torch.save(state, tmp_path / "checkpoint.pt")
    assert "data" in refused(training.script, "--resume", str(tmp_path))


def test_another_scripts_checkpoint_is_refused(training, tmp_path, refused):
    """Whose it is, is said."""
    state = dict(load_checkpoint(training.whole, training.name))
    torch.save({**state, "script": "smoothgrad"}, tmp_path / "checkpoint.pt")
    assert "smoothgrad.py" in refused(training.script, "--resume", str(tmp_path))


def test_a_used_folder_is_refused(training):
    """--out never writes over another run."""
    before = (training.whole / "checkpoint.pt").read_bytes()
    refusal(training.run, training.whole)
    assert (training.whole / "checkpoint.pt").read_bytes() == before


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(training, tmp_path, monkeypatch):
    """NaN ends the run with one line that says when; the last good checkpoint stays."""
    train = training.script.train

    def spoil(*arguments):
        row = train(*arguments)
        if row["epoch"] < 2:
            return row
        return {name: value if name == "epoch" else np.nan for name, value in row.items()}

    monkeypatch.setattr(training.script, "train", spoil)
    assert "epoch 2" in refusal(training.run, tmp_path)
    assert len(read_table(tmp_path)) == 1
    monkeypatch.undo()
    training.resume(tmp_path)
    training.assert_whole(tmp_path)


@pytest.mark.parametrize("options", [[], ["--amp"], ["--width", "0.02"]], ids=str)
def test_a_dry_run_is_one_batch(options, training, tmp_path):
    """Of finite losses; the rest is as in any run."""
    metrics = training.run(tmp_path, "--dry-run", *options)
    (row,) = metrics["epochs"]
    assert all(np.isfinite(value) for value in row.values())
    assert training.epochs(tmp_path) == 1
