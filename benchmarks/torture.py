"""What kills, full disks, damaged files, strangers' runs and odd settings do to the scripts.

    python benchmarks/torture.py               # a quarter of an hour of CPU time
    python benchmarks/torture.py --divide 25   # a look: two minutes

The long version of tests/test_faults.py: every part draws its moments and places from --seed.
Everything runs in processes of its own, so that what a kill, a crash or a lack of memory takes
along is no more than it would be for a user.

Nothing should be in the table's column "bad"; the exit code is 1 if something is. Linux only.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import hypothesis
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import explain_perturb
import report
import smoothgrad
import torch_basics
import train_classifier
import train_dcgan
from common.classifiers import Classifier, load_classifier
from common.errors import UserError
from common.photos import read_photo
from tests.helpers import (
    find_hole,
    find_unreadable,
    halves,
    learnt,
    same,
    save_classifier,
    write_photos,
)
from tests.hostile import (
    CLAIMS,
    NAMES,
    claim,
    list_files,
    make_bombs,
    mutate,
    postscript,
    spoil_run,
    write_pictures,
)
from tests.processes import describe_end, finish, start
from tests.test_faults import EXPLAINERS, TRAINERS, plausible

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--dataset", "glyphs", "--glyphs", "200", "--batch-size", "16", "--epochs", "4"]
COUNTS = {  # by part, how often
    "kills": 50,  # of each training
    "ranks": 6,
    "checkpoints": 500,
    "claims": 25,
    "disks": 12,
    "pictures": 2000,  # mutated ones
    "settings": 40,  # of each script
    "photos": 500,  # for smoothgrad.py; explain_perturb.py gets a fifth of them
    "runs": 500,  # of all scripts, somebody else's
    "pages": 500,
    "names": 25,
}
LONGEST = 10.0  # seconds of CPU that a picture may take
LONGEST_RUN = 60.0  # and a run of --dry-run, a page, or processes whose group has lost one
LONGEST_CLAIM = 2.0  # and a checkpoint of a few kB
MOST_MEMORY = 2 * 2**30  # bytes that a picture may take beyond what the process has already


class Row:
    """A row of the table: what came of many tries.

    :param str name: what was tried
    """

    def __init__(self, name):
        self.name = name
        self.count = 0
        self.ends = Counter()  # how often what came of it
        self.bad = []  # what went wrong, a line each
        self.figures = {}

    def add(self, end, what, *lines):
        """Count one try; lines that aren't None say what was bad about it."""
        self.count += 1
        self.ends[end] += 1
        self.bad += [f"{self.name}: {what}: {line}" for line in lines if line]

    def found(self):
        """Say in a line what came of all."""
        parts = [f"{n} {what}" for what, n in sorted(self.ends.items())]
        return ", ".join(parts + [f"{name} {value}" for name, value in self.figures.items()])


def must(script, argv, log):
    """Run a script that has to succeed."""
    code, _ = finish(start(script.main, argv, log))
    if code != 0:
        raise RuntimeError(f"{script.__name__}: {log.read_text()}")


# ----------------------------------------------------------------------------------------- kills


def train_options(script, work):
    """Return the command line of a training, but for its folder."""
    return [*TINY, *TRAINERS[script], "--data-dir", work / "data"]


def whole_run(script, work):
    """Train without any disturbance, if that hasn't been done yet, and return the folder.

    In this process: what it imports on the way, child processes needn't import once more.
    """
    folder = work / f"{script.SCRIPT}-whole"
    if not folder.exists():
        with contextlib.redirect_stdout(io.StringIO()):
            script.main([str(a) for a in [*train_options(script, work), "--out", folder]])
    return folder


def kill_trainings(work, count, rng):
    """Kill trainings at random moments, resume them, and compare all that was learnt."""
    for script in TRAINERS:
        row = Row(f"{script.SCRIPT}.py killed and resumed")
        kill_training(work, script, count, rng, row)
        yield row


def kill_training(work, script, kills, rng, row):
    """Kill one of the trainings; every third time also while it goes on."""
    expected = learnt(whole_run(script, work), script.SCRIPT)
    run = work / "run"
    log = work / "log"

    def go_on():  # or begin, where there is nothing to go on with
        if (run / "checkpoint.pt").exists():
            return start(script.main, ["--resume", run], log)
        shutil.rmtree(run, ignore_errors=True)
        return start(script.main, [*train_options(script, work), "--out", run], log)

    shutil.rmtree(run, ignore_errors=True)  # the other training's
    began = time.monotonic()
    must(script, [*train_options(script, work), "--out", run], log)
    seconds = time.monotonic() - began
    while row.count < kills:
        shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        code, _ = finish(go_on(), rng.uniform(0, seconds))
        if code == 0:  # it was quicker than the kill, which then doesn't count
            seconds = min(seconds, max(0.1, time.monotonic() - began))
            continue
        moment = find_moment(run)
        lines = find_unreadable(run, script)
        if row.count % 3 == 0:
            code, _ = finish(go_on(), rng.uniform(0, seconds))
            lines += find_unreadable(run, script)
        lines += [log.read_text()[-300:]] * (code not in (0, -signal.SIGKILL))
        code, _ = finish(go_on())
        if code != 0:
            lines.append(f"not resumed: {log.read_text()[-300:]}")
        elif not same(learnt(run, script.SCRIPT), expected):
            lines.append("other weights")
        row.add(moment, f"kill {row.count}", *lines, *halves(run))


def find_moment(run):
    """Tell from what is in a run folder what its process was doing when it was killed."""
    kinds = {".pt": "in a checkpoint", ".gif": "in the GIF", ".png": "in a picture"}
    for part in run.rglob(".*.part*"):
        return kinds.get(part.suffix, "in a table")
    saved = (run / "checkpoint.pt").exists()
    return "between two files" if saved else "before the first checkpoint"


def kill_ranks(work, count, rng):
    """Kill one of torchrun's processes; it starts them again, or one less goes on."""
    row = Row("one of torchrun's processes killed")
    folder = work / "ranks"
    log = work / "log"
    table = folder / "metrics.csv"

    def launch(processes, argv, *options):
        options = ["--standalone", "--nproc-per-node", str(processes), *options]
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        with open(log, "w") as file:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            command += [ROOT / "train_classifier.py", *argv]
            return subprocess.Popen(command, stdout=file, stderr=file, env=one_thread).pid

    for n in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        argv = [*train_options(train_classifier, work), "--epochs", "60", "--out", folder]
        restart = n % 2
        parent = launch(2 + n % 3, argv, "--max-restarts", str(restart))
        while not table.exists() and Path(f"/proc/{parent}/task").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
        began = time.monotonic()
        code, _ = finish(parent)
        said = log.read_text()
        late = time.monotonic() - began > LONGEST_RUN and not restart
        wrong = (code == 0) != restart or 'train_classifier.py", line' in said or "SIGABRT" in said
        lines = [f"exit code {code}: {said[-300:]}"] * (wrong or late)
        if not restart:
            code, _ = finish(launch(1 + n % 3, ["--resume", folder]))
        if code != 0 or len(table.read_text().splitlines()) != 61:
            lines.append(f"not resumed: {log.read_text()[-300:]}")
        row.add("started again" if restart else "one less went on", f"kill {n}", *lines)
    yield row


# ----------------------------------------------------------------------------- disks, checkpoints


def fill_disks(work, count, rng):
    """Train on disks that are too small, one after the other; needs the right to mount."""
    row = Row("disks that are too small")
    disk = work / "disk"
    disk.mkdir()
    for _ in range(count):
        size = rng.randrange(20, 2000)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            row.add("not allowed to mount", "")
            continue
        try:
            argv = [*train_options(train_dcgan, work), "--out", disk / "run"]
            code, _ = finish(start(train_dcgan.main, argv, work / "log"))
            end, wrong = describe_end(code, work / "log")
            lines = [wrong, *halves(disk), *find_unreadable(disk, train_dcgan)]
            row.add(end, f"{size} kB", *lines)
        finally:
            subprocess.run(["umount", disk], check=True)
    yield row


def damage_checkpoints(work, count, rng):
    """Flip a bit at many places of a checkpoint, and cut it at as many."""
    row = Row("damaged checkpoints")
    folder = whole_run(train_dcgan, work)
    good = (folder / "checkpoint.pt").read_bytes()
    expected = learnt(folder, "train_dcgan")
    file = work / "checkpoint.pt"
    for n in range(count):
        place = rng.randrange(len(good))
        content = bytearray(good)
        if n % 2:
            what = "cut"
            del content[place:]
        else:
            what = "flipped"
            content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        try:
            end = "unharmed" if same(learnt(file, "train_dcgan"), expected) else "other weights"
        except UserError:
            end = "refused"
        except Exception as error:
            end = repr(error)
        wrong = None if end in ("unharmed", "refused") else end
        row.add(f"{what}: {end}", f"at {place}", wrong)
    yield row


def claim_much(work, count, rng):
    """Load classifiers of a few kB that claim to hold much."""
    row = Row("small checkpoints that claim much")
    folder = work / "claims"
    folder.mkdir()
    file = folder / "checkpoint.pt"
    slowest = most = 0
    for n in range(count):
        state = torch.load(work / "model" / "checkpoint.pt")
        name = list(CLAIMS)[n % len(CLAIMS)]
        entry = claim(state, name, rng)
        torch.save(state, file)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, usage = finish(start(load_classifier, str(folder), work / "log"), 10 * LONGEST)
        end, wrong = describe_end(code, work / "log")
        seconds = usage.ru_utime + usage.ru_stime
        slowest = max(slowest, seconds)
        most = max(most, (usage.ru_maxrss - before) / 1024)
        large = seconds > LONGEST_CLAIM or usage.ru_maxrss - before > 500 * 1024
        row.add(end, f"{name} in {entry}", wrong, f"{seconds:.1f} s" if large else None)
    row.figures = {"slowest_s": round(slowest, 2), "most_MiB": round(most)}
    yield row


# -------------------------------------------------------------------------------------- pictures


def torture_reader(work, count, rng):
    """Read mutilated pictures as the scripts do, in processes that may not take much memory."""
    row = Row("pictures")
    harm = work / "elsewhere" / "executed"
    whole = write_pictures(rng)
    files = [("whole", content) for content in whole]
    files += [("bomb", content) for content in (*make_bombs(), postscript(harm))]
    files += [("mutated", mutate(whole[i % len(whole)], rng)) for i in range(count)]
    endings = (".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".jp2", ".avif", ".ppm", "")
    classifier = Classifier("any", None, [], 3, 224, 256, "cpu")  # how a picture is cut
    read_photo("sample:coffee", classifier)  # imports what it needs
    slowest = most = 0.0
    for way, content in files:
        path = work / f"picture{rng.choice(endings)}"
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reading = start(lambda p: read_photo(p, classifier), str(path), work / "log", MOST_MEMORY)
        code, usage = finish(reading, 10 * LONGEST)
        end, wrong = describe_end(code, work / "log")
        seconds = usage.ru_utime + usage.ru_stime  # a busy machine makes no picture slower
        slowest = max(slowest, seconds)
        most = max(most, (usage.ru_maxrss - before) / 1024)
        late = f"{seconds:.0f} s" if seconds > LONGEST else None
        executed = "executed" if harm.exists() else None
        what = f"{content[:40]}, {len(content)} bytes"
        row.add(f"{way}: {'read' if end == 'done' else end}", what, wrong, late, executed)
        path.unlink()
    row.figures = {"slowest_s": round(slowest, 2), "most_MiB": round(most)}
    yield row


# -------------------------------------------------------------------------------------- settings


def try_settings(work, count, rng):
    """Run each script with many settings, in processes that may not take much memory."""
    for script in (*TRAINERS, *EXPLAINERS, torch_basics):
        begin = []
        if script in TRAINERS:
            begin = ["--dataset", "glyphs", "--data-dir", work / "data", "--width", "0.05"]
        if script in EXPLAINERS:
            begin = ["--model", work / "model", "--image", work / "photo.png"]
        row = Row(f"settings of {script.SCRIPT}.py")
        draw_settings(work, script, begin, count, rng.randrange(2**32), row)
        yield row


def parses(script, words):
    """Tell whether a script's parser takes a command line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            script.get_parser().parse_args(words)
    except SystemExit:
        return False
    return True


def draw_settings(work, script, begin, count, seed, row):
    """Run one script with many settings that its parser takes.

    :param list begin: what all its command lines begin with
    """
    run = work / "run"

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(plausible(script).filter(partial(parses, script)))
    def call(drawn):
        shutil.rmtree(run, ignore_errors=True)
        argv = [*begin, "--dry-run", *drawn, "--out", run]
        code, _ = finish(start(script.main, argv, work / "log", 2 * MOST_MEMORY), LONGEST_RUN)
        end, wrong = describe_end(code, work / "log")
        left = [f"left {file}" for file in (work / "elsewhere").iterdir()]
        row.add(end, " ".join(drawn), wrong, *left, *halves(run))

    call()


# ---------------------------------------------------------------------------------------- photos


def explain_photos(work, count, rng):
    """Explain many photos, one of them broken; kill the run, and resume it.

    What memory it takes for all of them is compared with what it takes for a few, but for the
    contact sheet, which has a limit of its own.
    """
    log = work / "log"
    for script, many in ((smoothgrad, max(20, count)), (explain_perturb, max(20, count // 5))):
        row = Row(f"{script.SCRIPT}.py on {many} photos, killed")
        memory = []
        for size in (10, many):
            photos = work / f"{script.SCRIPT}-{size}-photos"
            run = work / f"{script.SCRIPT}-{size}-run"
            write_photos(photos, size, rng)
            argv = ["--image", photos, "--model", work / "model", *EXPLAINERS[script]]
            killed = start(script.main, [*argv, "--out", run], log)
            finish(killed, 0.3 * size / 2)  # about half-way
            seen = {file: file.stat().st_mtime_ns for file in run.glob("records/[!.]*.json")}
            begun = (run / "records" / "arguments.txt").exists()
            more = ["--resume", run] if begun else [*argv, "--out", run.with_name(f"{run.name}2")]
            run = run if begun else run.with_name(f"{run.name}2")

            def explain(argv, script=script):
                script.contact_sheet = lambda *_, **__: None
                script.main(argv)

            code, usage = finish(start(explain, more, log))
            memory.append(usage.ru_maxrss // 1024)
            end, wrong = describe_end(code, log)
            again = [f"{f} twice" for f, at in seen.items() if f.stat().st_mtime_ns != at]
            metrics = json.loads((run / "metrics.json").read_text())
            found = (len(metrics["images"]), len(metrics["failed"]))
            other = None if found == (size - 1, 1) else f"{found} photos and failures"
            row.add(end, f"{size} photos, {len(seen)} before", wrong, other, *again)
        if memory[1] > 1.1 * memory[0] + 50:
            row.bad.append(f"{row.name}: {memory} MiB for 10 photos and for all")
        row.figures = {"MiB_for_10": memory[0], "MiB_for_all": memory[1]}
        yield row


# ------------------------------------------------------------------------- somebody else's runs


def make_runs(work, rng):
    """Make a finished run of each script, if that hasn't been done yet: folders by script."""
    runs = {script: whole_run(script, work) for script in TRAINERS}
    photos = work / "few"
    if not photos.exists():
        write_photos(photos, 3, rng)
        (photos / "001.png").unlink()  # the one that is no picture
    for script, options in EXPLAINERS.items():
        runs[script] = work / f"{script.SCRIPT}-few"
        argv = ["--image", photos, "--model", work / "model", *options, "--out", runs[script]]
        if not runs[script].exists():
            must(script, argv, work / "log")
    return runs


def spoil_many(work, count, rng, name, call):
    """Spoil runs of all scripts, hand each to a script, and look at all that lies around it.

    :param Callable call: from a script and a folder to what to start and its command line
    """
    row = Row(name)
    runs = make_runs(work, rng)
    folder = work / "parent" / "run"
    (work / "parent" / "folder").mkdir(parents=True, exist_ok=True)
    victim = work / "parent" / "victim"
    victim.write_text("mine")
    places = [victim, work / "parent" / "gone", work / "parent" / "folder"]
    bombs = make_bombs()
    for n in range(count):
        script = list(runs)[n % len(runs)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs[script], folder)
        (folder / ".lock").unlink(missing_ok=True)
        done = [spoil_run(folder, bombs, places, rng) for _ in range(rng.choice((1, 1, 3)))]
        before = list_files(work, (folder, work / "log"))
        function, argv = call(script, folder)
        code, _ = finish(start(function, argv, work / "log", MOST_MEMORY), LONGEST_RUN)
        end, wrong = describe_end(code, work / "log")
        after = list_files(work, (folder, work / "log"))
        changed = [f"{k} was touched" for k in before | after if before.get(k) != after.get(k)]
        if function is report.main and code == 0:
            changed.append(find_hole(folder / "report.html", report.TEMPLATE))
        row.add(end, f"{script.SCRIPT}, {'; '.join(done)}", wrong, *changed, *halves(folder))
    return row


def resume_runs(work, count, rng):
    """Go on with runs that somebody has spoilt; every second GAN draws samples."""

    def call(script, folder):
        if script is train_dcgan and rng.random() < 0.5:
            return script.main, ["--sample", folder, "--out", folder / "drawn"]
        return script.main, ["--resume", folder]

    yield spoil_many(work, count, rng, "other people's runs resumed", call)


def spoil_pages(work, count, rng):
    """Make pages of runs that somebody has spoilt."""

    def call(script, folder):
        return report.main, [folder]

    yield spoil_many(work, count, rng, "pages of other people's runs", call)


# ----------------------------------------------------------------------------------------- names


def try_names(work, count, rng):
    """Train on classes, and explain photos, of odd names: nothing obeys them."""
    row = Row("odd names of classes and photos")
    for n in range(count):
        data = work / f"names{n}"
        names = rng.sample(NAMES, 2)
        for half in ("train", "test"):
            (data / half).mkdir(parents=True)
            for name in names:
                write_photos(data / half / name, 4, rng)
        argv = ["--dataset", "folder", "--data-dir", data, "--out", data / "run", "--size", "8",
                "--width", "0.03", "--batch-size", "4", "--epochs", "1"]  # fmt: skip
        photos = ["--image", data / "train" / names[0], "--model", data / "run"]
        explain = [*photos, *EXPLAINERS[smoothgrad], "--out", data / "explained"]
        for script, words in ((train_classifier, argv), (smoothgrad, explain)):
            code, _ = finish(start(script.main, words, work / "log"), LONGEST_RUN)
            end, wrong = describe_end(code, work / "log")
            said = (work / "log").read_text(errors="replace")
            obeyed = any(not c.isprintable() and c not in "\n" for c in said)
            row.add(end, f"{names!r}", wrong, "not plain" if obeyed else None)
        for table in data.rglob("*.csv"):
            with open(table, newline="") as file:
                cells = [cell for line in csv.reader(file) for cell in line]
            formulas = [c for c in cells if c.startswith(("=", "+", "@")) or c[:1] + "1" == "-1"]
            formulas = [c for c in formulas if not c.lstrip("-")[:1].isdecimal()]
            row.bad += [f"{row.name}: {table.name}: {cell}" for cell in formulas]
    yield row


# ------------------------------------------------------------------------------------ the script


PARTS = {
    "kills": kill_trainings,
    "ranks": kill_ranks,
    "checkpoints": damage_checkpoints,
    "claims": claim_much,
    "disks": fill_disks,
    "pictures": torture_reader,
    "settings": try_settings,
    "photos": explain_photos,
    "runs": resume_runs,
    "pages": spoil_pages,
    "names": try_names,
}


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--divide", type=int, default=1, metavar="N",
                        help="do an N-th of everything (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART",
                        help="some parts: " + ", ".join(PARTS) + " (default: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0,
                        help="of all that is drawn (default: %(default)s)")  # fmt: skip
    return parser


def main():
    """Run all parts, print the table and the result line.

    :return: the exit code
    :rtype: int
    """
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    began = time.time()
    work = Path(tempfile.mkdtemp(prefix="torture-"))
    rows = []
    try:
        (work / "elsewhere").mkdir()
        (work / "model").mkdir()
        save_classifier(work / "model", ["red", "green", "blue"], [3, 16, 16])
        write_photos(work / "one", 2, random.Random(args.seed))
        shutil.move(work / "one" / "000.png", work / "photo.png")
        for part in args.only:
            count = max(2, COUNTS[part] // args.divide)
            for row in PARTS[part](work, count, random.Random(f"{part} {args.seed}")):
                print(f"{row.name}: {row.count}, bad {len(row.bad)}   {row.found()}", flush=True)
                rows.append(row)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n| what | how many | what came of it | bad |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.count:,} | {row.found()} | {len(row.bad)} |")
    result = {}
    for row in rows:
        for line in row.bad:
            print(f"BAD {line}")
        result[row.name] = {"count": row.count, "bad": len(row.bad), **row.figures}
    result["seconds"] = round(time.time() - began)
    print("RESULT " + json.dumps(result))
    return 1 if any(row.bad for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
