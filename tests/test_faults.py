"""What goes wrong on a shared machine: kills, full disks, other people's files, lost processes.

The long versions, hundreds of kills and of broken files, are in benchmarks/torture.py.
"""

import io
import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common.device
import common.errors
import compare_explanations
import explain_perturb
import smoothgrad
import torch_basics
import train_classifier
import train_dcgan
from common.classifiers import load_classifier
from common.errors import exit_code
from common.run import load_checkpoint, open_run, save_checkpoint
from tests.helpers import POSIX
from tests.processes import group, wait

# A second each: 3 batches an epoch, networks of a few hundred weights.
TINY = ["--dataset", "glyphs", "--glyphs", "50", "--batch-size", "16", "--epochs", "2"]
TRAINERS = {
    train_dcgan: ["--width", "0.03", "--z-dim", "4"],
    train_classifier: ["--width", "0.05", "--size", "12"],
}
EXPLAINERS = {
    smoothgrad: ["--samples", "2", "--noise", "0.1"],
    explain_perturb: ["--iterations", "2", "--pictures", "2", "--mask-size", "4"],
    compare_explanations: ["--methods", "random", "gradient", "--sanity", "0"],
}


def each(*scripts):
    """Make a mark that gives a test one script after the other."""
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.SCRIPT)


BOTH, EXPLAINING = each(*TRAINERS), each(*EXPLAINERS)
# What takes longest, and is of no interest here.
FIGURES = ("plot_curves", "plot_matrix", "plot_images", "save_gif", "draw_panel", "contact_sheet",
           "draw_curves", "draw_cascade", "map_sheet")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Give a data folder in which the glyphs are soon cached."""
    return tmp_path_factory.mktemp("data")


def train(script, folder, data, *options):
    """Train in this process."""
    rest = [*TINY, *TRAINERS[script], "--data-dir", str(data)]
    return script.main([*rest, "--out", str(folder), *options])


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Train each network without any disturbance, and give the run folders by script."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for script in TRAINERS:
        train(script, folder / script.SCRIPT, data)
    return {script: folder / script.SCRIPT for script in TRAINERS}


def explain(script, trained, photos, folder, *options):
    """Explain photos in this process."""
    return script.main(["--model", str(trained), "--image", str(photos), "--out", str(folder),
                        *EXPLAINERS[script], *options])  # fmt: skip


@pytest.fixture
def no_figures(monkeypatch):
    """Let no script draw figures."""
    for script in (*TRAINERS, *EXPLAINERS):
        for name in FIGURES:
            if hasattr(script, name):
                monkeypatch.setattr(script, name, lambda *_, **__: None)


def one_error(function, capsys):
    """Run what must fail for a reason that the user can mend."""
    capsys.readouterr()
    assert exit_code(function) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    assert len(lines) == 1
    assert "error: " in lines[0]
    return lines[0]


def kill(*_, **__):
    """Do to this process what the kernel does when memory is short: it cleans up nothing."""
    os.kill(os.getpid(), signal.SIGKILL)


def nth(function, n, strike=kill):
    """Make a function strike at its n-th call."""
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(args)
        return (strike if len(calls) == n else function)(*args, **kwargs)

    return wrapped


# ------------------------------------------------------------ no room, no permission, no folder


@BOTH
def test_a_full_disk_stops_a_training_in_one_line(
    script, undisturbed, tmp_path, full_disk, capsys, monkeypatch
):
    """The last checkpoint is what it was, and a run with room again goes on from it."""
    shutil.copytree(undisturbed[script], tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    changeable = script.CHANGEABLE_ON_RESUME | {"epochs"}
    monkeypatch.setattr(script, "CHANGEABLE_ON_RESUME", changeable)
    with full_disk():
        line = one_error(
            lambda: script.main(["--resume", str(tmp_path / "run"), "--epochs", "3"]), capsys
        )
    assert "too large" in line or "disk full" in line
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.rglob("*.part*"))
    assert len(script.main(["--resume", str(tmp_path / "run"), "--epochs", "3"])["epochs"]) == 3


def test_a_full_disk_stops_an_explanation_in_one_line(
    trained, photos, tmp_path, full_disk, refused
):
    """No half file is left, and --resume goes on where there is room again."""
    argv = ["--model", str(trained), "--image", str(photos), "--samples", "2"]
    with full_disk():
        assert "too large" in refused(smoothgrad, *argv, "--out", str(tmp_path / "run"))
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or file.name in (".lock", "arguments.txt"), file
    found = smoothgrad.main(["--resume", str(tmp_path / "run")])
    assert len(found["images"]) == 3


@pytest.fixture
def read_only(tmp_path_factory):
    """Give a run folder that this process may read but not write; root becomes a mere user."""
    folder = tmp_path_factory.mktemp("read_only")
    save_checkpoint(folder / "checkpoint.pt", {"script": "s", "w": torch.arange(9.0)})
    parents = [p for p in folder.parents if p.stat().st_uid == os.geteuid() and p != Path("/")]
    modes = {p: p.stat().st_mode for p in parents}
    for parent in parents:
        parent.chmod(modes[parent] | 0o055)
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    for parent in parents:
        parent.chmod(modes[parent])


@POSIX
def test_a_read_only_folder_is_one_line(read_only, capsys):
    """Neither a new run nor the next checkpoint of one leaves a traceback or does harm."""
    assert "Permission denied" in one_error(lambda: open_run("s", read_only / "new"), capsys)
    assert "Permission denied" in one_error(lambda: open_run("s", resume=read_only), capsys)
    line = one_error(lambda: save_checkpoint(read_only / "checkpoint.pt", {"w": 1}), capsys)
    assert "Permission denied" in line
    assert torch.equal(load_checkpoint(read_only, "s")["w"], torch.arange(9.0))


@BOTH
def test_a_folder_deleted_during_the_run_is_one_line(script, data, tmp_path, monkeypatch, capsys):
    """It isn't made anew, without its lock and half empty."""

    epoch = script.train

    def train_and_delete(*args):
        row = epoch(*args)
        shutil.rmtree(tmp_path / "run")
        return row

    monkeypatch.setattr(script, "train", train_and_delete)
    line = one_error(lambda: train(script, tmp_path / "run", data), capsys)
    assert str(tmp_path / "run") in line
    assert not (tmp_path / "run").exists()


@EXPLAINING
def test_a_folder_deleted_during_an_explanation_is_one_line(
    script, trained, photos, tmp_path, monkeypatch, capsys, no_figures
):
    """No further photo is begun, as it couldn't be saved either."""
    read, seen = script.read_photo, []

    def read_and_delete(*args):
        seen.append(args)
        if len(seen) == 2:
            shutil.rmtree(tmp_path / "run")
        return read(*args)

    monkeypatch.setattr(script, "read_photo", read_and_delete)
    line = one_error(lambda: explain(script, trained, photos, tmp_path / "run"), capsys)
    assert str(tmp_path / "run") in line
    assert len(seen) == 2
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------- checkpoints


def spoil_architecture(state):
    """Claim another width than that of the weights."""
    return state | {"args": state["args"] | {"width": 0.1}}


def spoil_layer(state):
    """Leave out a weight."""
    part = "ema" if "ema" in state else "network"
    return state | {part: dict(list(state[part].items())[1:])}


def spoil_optimizer(state):
    """Give the optimizer the memory of other weights."""
    part = "d_optimizer" if "d_optimizer" in state else "optimizer"
    memory = {
        key: {name: torch.zeros(3, 3, 3) if getattr(value, "ndim", 0) else value
              for name, value in values.items()}
        for key, values in state[part]["state"].items()
    }  # fmt: skip
    return state | {part: state[part] | {"state": memory}}


def spoil_parts(state):
    """Write what an earlier version may have: some parts are missing."""
    return {key: state[key] for key in ("script", "args", "shape") if key in state}


def spoil_args(state):
    """Leave out the arguments."""
    return {key: value for key, value in state.items() if key != "args"}


def spoil_settings(state):
    """Give the optimizer settings that no optimizer has."""
    part = "d_optimizer" if "d_optimizer" in state else "optimizer"
    groups = [group | {"lr": "fast"} for group in state[part]["param_groups"]]
    return state | {part: state[part] | {"param_groups": groups}}


def spoil_value(name, value):
    """Make a function that claims another argument."""
    return lambda state: state | {"args": state["args"] | {name: value}}


SPOILT = [spoil_architecture, spoil_layer, spoil_optimizer, spoil_parts, spoil_args, spoil_settings,
          spoil_value("batch_size", 0), spoil_value("lr", -1.0), spoil_value("lr", "fast"),
          spoil_value("epochs", None), spoil_value("device", 5), spoil_value("amp", 1),
          lambda state: state | {"args": None}, lambda state: state | {"history": 5},
          lambda state: state | {"history": [{}]}, lambda state: state | {"seconds": "long"},
          lambda state: state | {"shape": [3]}]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
@BOTH
def test_a_checkpoint_that_does_not_fit_is_one_line(script, spoil, undisturbed, tmp_path, capsys):
    """Other layers, other sizes, missing parts: said by the file's name, and left as it was."""
    (tmp_path / "run").mkdir()
    state = spoil(load_checkpoint(undisturbed[script], script.SCRIPT))
    torch.save(dict(state), tmp_path / "run" / "checkpoint.pt")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    line = one_error(lambda: script.main(["--resume", str(tmp_path / "run")]), capsys)
    assert "start a new run" in line
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


# ----------------------------------------------------------------------------------- dataset files


# ---------------------------------------------------------------------------------- hostile input


@POSIX
@EXPLAINING
def test_hostile_names_stay_in_the_run_folder(
    script, trained, photos, tmp_path, monkeypatch, capsys
):
    """Names with newlines, bytes that are no UTF-8, dots and links lead to plain names inside."""
    source = photos / "ant.png"
    names = [b"a\nb.png", b"\xff\xfe.png", b"-rf.png", b"$(touch x).png", b"%s%n.png",
             "файл🙂.png".encode(), b"x" * 240 + b".png"]  # fmt: skip
    folder = tmp_path / os.fsdecode(b"in\xff\n")
    folder.mkdir()
    for name in names:
        shutil.copy(source, os.fsencode(folder) + b"/" + name)
    (folder / "link.png").symlink_to(source)
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "records.png").mkdir()
    out = tmp_path / "a" / ".." / os.fsdecode(b"out\xff\n..")
    (tmp_path / "a").mkdir()
    before = set(tmp_path.rglob("*"))
    argv = ["--model", str(trained), *EXPLAINERS[script], "--out", str(out)]
    images = [str(folder / "link.png"), f"{folder}/../{folder.name}/./link.png", str(folder)]
    if script is explain_perturb:  # ten photos of many files take longest
        monkeypatch.setattr(script, "draw_panel", lambda *_: None)

    assert exit_code(lambda: script.main([*argv, "--image", *images])) in (0, 1)
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["images"]) == len(names) + 2  # the link is there under two names
    real = out.resolve()
    made = set(tmp_path.rglob("*")) - before
    assert made
    assert all(real == file or real in file.parents for file in made)
    assert source.read_bytes() == (folder / "link.png").read_bytes()
    assert exit_code(lambda: script.main(["--resume", str(out)])) in (0, 1)


def test_a_run_folder_that_is_no_utf8_can_be_resumed(data, tmp_path, capsys, monkeypatch):
    """Its name goes through the checkpoint, metrics.json and the terminal."""
    out = tmp_path / os.fsdecode(b"r\xff\xfen")
    monkeypatch.setattr(train_classifier, "plot_matrix", lambda *_: None)  # takes longest
    assert exit_code(lambda: train(train_classifier, out, data, "--epochs", "1")) == 0
    assert exit_code(lambda: train_classifier.main(["--resume", str(out)])) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["args"]["resume"] == str(out)
    assert r"r\udcff\udcfen" in capsys.readouterr().out


def arguments(script):
    """Make a strategy for command lines of a script: its own flags, and anything else."""
    actions = script.get_parser()._actions
    flags = [flag for action in actions for flag in action.option_strings]
    flags = [flag for flag in flags if flag not in ("-h", "--help")]
    choices = [str(choice) for action in actions for choice in action.choices or ()]
    # What a shell can pass on: any bytes but 0, as Python decodes them; no line breaks, which
    # argparse repeats.
    anything = st.binary(max_size=12).map(lambda b: os.fsdecode(b.translate(None, b"\0\n")))
    numbers = st.one_of(
        st.integers(), st.floats(allow_subnormal=False), st.integers(-(10**40), 10**40)
    ).map(str)
    values = st.one_of(anything, numbers, st.sampled_from([*choices, "", "-", "--", "9" * 5000]))
    joined = st.tuples(st.sampled_from(flags), values).map("=".join)
    return st.lists(st.one_of(st.sampled_from(flags), joined, values), max_size=6)


@each(*TRAINERS, *EXPLAINERS, torch_basics)
def test_any_command_line_is_parsed_or_refused_in_one_line(script):
    """Nothing that can be typed ends in a traceback, and what is accepted is in its range."""

    @settings(derandomize=True, deadline=None, database=None, max_examples=150)
    @given(arguments(script))
    def parse(argv):
        said = io.StringIO()
        with redirect_stderr(said), suppress(SystemExit):
            args = script.get_parser().parse_args(argv)
        if said.getvalue():
            assert said.getvalue().count("\n") == 1
            return
        for value in vars(args).values():
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, (int, float)):
                    assert 0 <= one <= (2**32 - 1 if isinstance(one, int) else sys.float_info.max)

    with redirect_stdout(io.StringIO()):
        parse()


def plausible(script):
    """Make a strategy for command lines of a script whose values might be meant."""
    given_here = {"help", "out", "data_dir", "dataset", "image", "model", "arch", "classes",
                  "resume", "sample", "fid", "cuda", "device", "tensorboard", "width",
                  "dry_run"}  # fmt: skip
    actions = [a for a in script.get_parser()._actions if a.dest not in given_here]
    numbers = ["0", "1", "2", "3", "17", "64", "0.001", "0.5", "0.99", "1e-12", "1e30", "-1"]

    def words(action):
        """Make the words that set one option."""
        flags = st.sampled_from(action.option_strings)
        if action.nargs == 0:
            return st.tuples(flags)
        values = [str(choice) for choice in action.choices or ()]
        values = values or (numbers if action.type else ["0", "green", "Red", "3", "", "violet"])
        many = st.lists(st.sampled_from(values), min_size=1, max_size=2 if action.nargs else 1)
        return st.tuples(flags, many).map(lambda pair: (pair[0], *pair[1]))

    some = st.lists(st.sampled_from(actions), max_size=4, unique_by=lambda action: action.dest)
    return some.flatmap(lambda chosen: st.tuples(*map(words, chosen))).map(
        lambda parts: [word for part in parts for word in part]
    )


@each(*TRAINERS, *EXPLAINERS)
def test_any_settings_run_or_say_in_one_line_why_not(
    script, data, trained, photos, tmp_path, capsys, no_figures
):
    """What the parser lets through may still not go together; no combination is a traceback."""
    argv = ["--dry-run", "--out", str(tmp_path / "run")]
    if script in TRAINERS:
        argv += ["--data-dir", str(data), "--dataset", "glyphs", "--width", "0.03"]
    else:
        argv += ["--model", str(trained), "--image", str(photos / "ant.png")]
    ends = []

    @settings(derandomize=True, deadline=None, database=None, max_examples=12)
    @given(plausible(script))
    def go(options):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        capsys.readouterr()
        try:
            code = exit_code(lambda: script.main([*argv, *options]))
        except SystemExit as stop:  # argparse's own way
            code = stop.code
        ends.append(code)
        assert code in (0, 2)
        assert capsys.readouterr().err.count("error: ") == (1 if code else 0)
        assert not list(tmp_path.rglob("*.part*"))
        assert {f.name for f in tmp_path.iterdir()} <= {"run"}

    go()
    assert ends.count(0) >= 3  # not all of them are refused


# ------------------------------------------------------------------------------ numbers and memory


def test_out_of_memory_is_one_line(capsys):
    """Where a smaller chunk is no way out, the line says what is."""
    line = one_error(lambda: torch.empty(2**45), capsys)
    assert "out of memory" in line
    assert "--batch-size" in line
    line = one_error(lambda: train_dcgan.main(["--dry-run", "--z-dim", str(2**31 - 1)]), capsys)
    assert "out of memory" in line


def test_a_batch_that_is_too_large_is_halved(
    trained, photos, tmp_path, monkeypatch, capsys, no_figures
):
    """The photos are explained as if fewer at once had been asked for; all that follow, too."""
    load = explain_perturb.load_classifier

    def limited(*args):
        classifier = load(*args)
        classifier.network.register_forward_pre_hook(
            lambda _, inputs: torch.empty(2**43) if len(inputs[0]) > 8 else None
        )
        return classifier

    batch = ["--pictures", "6", "--batch"]
    one = explain(explain_perturb, trained, photos, tmp_path / "one", *batch, "1")
    capsys.readouterr()
    monkeypatch.setattr(explain_perturb, "load_classifier", limited)
    run = explain(explain_perturb, trained, photos, tmp_path / "run", *batch, "3")
    said = capsys.readouterr()
    assert said.err.count("warning: out of memory: going on with --batch 1\n") == 1
    for image in run["images"]:
        assert said.out.count(f"{image['path']}: ") == 1
    for ours, expected in zip(run["images"], one["images"], strict=True):
        assert ours["trace"] == expected["trace"]


# -------------------------------------------------------------------------------------- torchrun


def lose_one(main, victim, tmp_path):
    """Start two processes of which one is killed: the other ends soon, in one line at most."""
    children, logs = group(main, tmp_path)
    assert wait(children[victim]) == -signal.SIGKILL
    assert wait(children[1 - victim], 60) == 2  # within a minute
    said = logs[1 - victim].read_text()
    assert "Traceback" not in said
    assert said.count("error: another process has ended") == (1 if victim == 1 else 0)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others(victim, data, tmp_path, monkeypatch):
    """The survivor doesn't wait for ever, and has no traceback: one line at most."""

    def main(rank):
        if rank == victim:  # in the second batch of epoch 2
            monkeypatch.setattr(torch.Tensor, "backward", nth(torch.Tensor.backward, 5))
        return train(train_classifier, tmp_path / "run", data, "--batch-size", "8")

    lose_one(main, victim, tmp_path)
    assert len(load_checkpoint(tmp_path / "run", "train_classifier")["history"]) == 1


def test_processes_complain_once_and_leave_their_group(data, tmp_path):
    """A wrong flag is one line for all; and a good run ends without torch's warning."""
    wrong = ["--resume", str(tmp_path)]
    children, logs = group(lambda rank: train_classifier.main(wrong), tmp_path)
    assert wait(children[0]) == 2
    os.kill(children[1], signal.SIGTERM)  # as torchrun does when one has failed
    assert wait(children[1]) == -signal.SIGTERM
    assert logs[0].read_text().count("error: ") == 1
    assert not logs[1].exists() or logs[1].read_text() == ""  # it may die before it has a log

    children, logs = group(
        lambda rank: train(train_classifier, tmp_path / "run", data, "--batch-size", "8"), tmp_path
    )
    assert [wait(child) for child in children] == [0, 0]
    assert logs[0].read_text().count("epoch   1") == 1
    assert logs[1].read_text() == ""


def test_what_only_one_process_lacks_is_said(trained, photos, tmp_path, monkeypatch):
    """A photo that isn't on its machine: the first one can't know, and torchrun wouldn't say."""
    monkeypatch.setattr(common.errors, "PATIENCE", 0.1)
    monkeypatch.setattr(common.device, "JOINING", 1)

    def main(rank):
        images = photos if rank == 0 else photos / "gone.png"
        return explain(smoothgrad, trained, images, tmp_path / "run")

    children, logs = group(main, tmp_path)
    assert [wait(child) for child in children] == [2, 2]
    assert "process 1: no picture at" in logs[1].read_text()
    assert logs[0].read_text().count("error: ") == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_an_explanation(
    victim, trained, photos, tmp_path, monkeypatch, no_figures
):
    """What is done stays done; one process goes on where one of two was killed."""

    def main(rank):
        if rank == victim:  # before its first record is in its place
            monkeypatch.setattr(smoothgrad, "save_png", kill)
        return explain(smoothgrad, trained, photos, tmp_path / "run")

    lose_one(main, victim, tmp_path)
    done = {f.stem for f in (tmp_path / "run" / "records").glob("*.json")}
    assert done == ({"ant", "cat"} if victim == 1 else {"bee"})
    assert len(smoothgrad.main(["--resume", str(tmp_path / "run")])["images"]) == 3


# --------------------------------------------------------------------------- network and watching


def test_nothing_is_sent_anywhere(no_network, trained, photos, data, tmp_path):
    """No script talks to the network unless a dataset or weights are asked for by name."""
    training = ["--dry-run", "--data-dir", str(data), "--width", "0.05"]
    train_dcgan.main([*training, "--out", str(tmp_path / "1")])
    train_classifier.main([*training, "--out", str(tmp_path / "2")])
    explaining = ["--dry-run", "--model", str(trained), "--image", str(photos / "ant.png")]
    for n, script in enumerate((smoothgrad, explain_perturb, compare_explanations)):
        script.main([*explaining, "--out", str(tmp_path / f"explained{n}")])
    torch_basics.main(["--dry-run", "--out", str(tmp_path / "basics")])
    load_classifier("efficientnet_lite0", torch.device("cpu"))
    assert not no_network


def test_progress_bars_show_rate_and_time_left(data, tmp_path, monkeypatch, no_figures):
    """On a terminal each epoch has a bar; where the output is a file there are plain lines only."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread: later tests fork
    for script in TRAINERS:
        for stream, bars in ((Terminal(), True), (io.StringIO(), False)):
            monkeypatch.setattr(sys, "stderr", stream)
            folder = tmp_path / f"{script.SCRIPT}-{bars}"
            train(script, folder, data)
            text = stream.getvalue()
            assert ("epoch 1: " in text) == bars
            assert ("/s]" in text or "s/it]" in text or "?it/s" in text) == bars
            assert ("<" in text) == bars
