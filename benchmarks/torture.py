"""What kills, full disks, damaged files, mutilated pictures and odd settings do to the scripts.

    python benchmarks/torture.py               # a quarter of an hour of CPU time
    python benchmarks/torture.py --divide 25   # a look: two minutes

The long version of tests/test_faults.py: every part draws its moments and places from --seed.
Everything runs in processes of its own, so that what a kill, a crash or a lack of memory takes
along is no more than it would be for a user.

Nothing should be in the table's column "bad"; the exit code is 1 if something is. Linux only.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import hypothesis
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import explain_perturb
import report
import smoothgrad
import torch_basics
import train_classifier
import train_dcgan
from common.classifiers import Classifier
from common.errors import UserError
from common.photos import read_photo
from common.run import load_checkpoint
from tests.helpers import assert_same, learnt, save_classifier
from tests.processes import fork
from tests.test_faults import EXPLAINERS, TRAINERS, plausible

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--dataset", "glyphs", "--glyphs", "200", "--batch-size", "16", "--epochs", "4"]
COUNTS = {  # by part, how often
    "kills": 50,  # of each training
    "ranks": 6,
    "checkpoints": 500,
    "disks": 12,
    "pictures": 2000,  # mutated ones
    "settings": 40,  # of each script
    "photos": 500,  # for smoothgrad.py; explain_perturb.py gets a fifth of them
    "pages": 600,
}
HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">&lt;\u2028\udcff{{data}}'
ODD = [None, True, -1, 0, 1e308, 10**400, float("nan"), "", "../../x", "a\0b", HOSTILE, "a" * 10**5,
       [], {}, [[]], {"a": {"b": [{}]}}, [None, "b", 3]]  # fmt: skip
LONGEST = 10.0  # seconds of CPU that a picture may take
LONGEST_RUN = 60.0  # and a run of --dry-run, a page, or processes whose group has lost one
MOST_MEMORY = 2 * 2**30  # bytes that a picture may take beyond what the process has already


class Row(NamedTuple):
    """A row of the table."""

    name: str
    count: int
    found: str
    bad: list  # what went wrong, a line each
    figures: dict


def make_row(name, count, ends, bad, note="", **figures):
    """Make a row that lists how often what came of it, a Counter."""
    found = ", ".join(f"{n} {what}" for what, n in sorted(ends.items()))
    return Row(name, count, found + note, [f"{name}: {line}" for line in bad], figures)


# ------------------------------------------------------------------------------------- processes


def start(function, argument, log, memory=None):
    """Start a function, mostly a script's main, in a child process.

    :param object argument: what it is given; of a command line, words and paths
    :param pathlib.Path log: gets what it prints
    :param int memory: bytes that it may take beyond what it has
    :return: the child's process id
    :rtype: int
    """

    def call():
        os.dup2(sys.stderr.fileno(), 2)  # libraries in C write of their own accord
        os.chdir(log.parent / "elsewhere")  # what is written there by mistake is found
        if memory:
            status = Path("/proc/self/status").read_text()
            most = 1024 * int(re.search(r"VmData:\s+(\d+)", status)[1]) + memory
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        try:
            function([str(a) for a in argument] if isinstance(argument, list) else argument)
        except SystemExit as stop:  # argparse's own way
            os._exit(stop.code)

    return fork(call, log)


def finish(child, seconds=600.0):
    """Wait for a child, and kill it when its time is over.

    :return: its exit code, or minus the signal that it died of; and what it took
    :rtype: tuple[int, resource.struct_rusage]
    """
    end = time.monotonic() + seconds
    done, status, usage = os.wait4(child, os.WNOHANG)
    while not done and time.monotonic() < end:
        time.sleep(0.002)
        done, status, usage = os.wait4(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage


def must(script, argv, log):
    """Run a script that has to succeed."""
    code, _ = finish(start(script.main, argv, log))
    if code != 0:
        raise RuntimeError(f"{script.__name__}: {log.read_text()}")


def describe_end(code, log):
    """Say how a script ended, "done" or "one line", and what was bad about it, or None."""
    said = log.read_text(errors="replace")
    end = {0: "done", 2: "one line"}.get(code, f"code {code}")
    errors = said.count("error: ")
    if end.startswith("code") or "Traceback" in said or errors != (1 if code == 2 else 0):
        return end, f"{end}: {said[-300:]}"
    return end, None


def same(a, b):
    """Compare two trees of plain values and tensors bit for bit."""
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


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
        struck, bad = kill_training(work, script, count, rng)
        yield make_row(f"{script.SCRIPT}.py killed and resumed", count, struck, bad)


def kill_training(work, script, kills, rng):
    """Kill one of the trainings; every third time also while it goes on.

    :return: how many times what was struck, and what went wrong
    :rtype: tuple[collections.Counter, list[str]]
    """
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
    struck = Counter()
    bad = []
    n = 0
    while n < kills:
        shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        code, _ = finish(go_on(), rng.uniform(0, seconds))
        if code == 0:  # it was quicker than the kill, which then doesn't count
            seconds = min(seconds, max(0.1, time.monotonic() - began))
            continue
        struck[find_moment(run)] += 1
        if n % 3 == 0:
            code, _ = finish(go_on(), rng.uniform(0, seconds))
            struck["a second time"] += code != 0
        if code not in (0, -signal.SIGKILL):
            bad.append(f"kill {n}: exit code {code}: {log.read_text()[-300:]}")
        bad += [f"kill {n}: {line}" for line in find_unreadable(run, script)]
        code, _ = finish(go_on())
        if code != 0:
            bad.append(f"kill {n}: not resumed: {log.read_text()[-300:]}")
        elif not same(learnt(run, script.SCRIPT), expected):
            bad.append(f"kill {n}: other weights")
        elif list(run.rglob("*.part*")):
            bad.append(f"kill {n}: half a file is left")
        n += 1
    return struck, bad


def find_unreadable(folder, script):
    """List what is wrong with the checkpoints in a folder: they are whole, or not there."""
    lines = []
    for file in folder.rglob("[!.]*.pt"):
        try:
            load_checkpoint(file, script.SCRIPT)
        except UserError as error:
            lines.append(str(error))
    return lines


def find_moment(run):
    """Tell from what is in a run folder what its process was doing when it was killed."""
    kinds = {".pt": "in a checkpoint", ".gif": "in the GIF", ".png": "in a picture"}
    for part in run.rglob(".*.part*"):
        return kinds.get(part.suffix, "in a table")
    saved = (run / "checkpoint.pt").exists()
    return "between two files" if saved else "before the first checkpoint"


def kill_ranks(work, count, rng):
    """Kill one of torchrun's processes; go on with one process less."""
    folder = work / "ranks"
    log = work / "log"
    options = [*train_options(train_classifier, work), "--epochs", "60", "--out", folder]
    table = folder / "metrics.csv"

    def launch(processes, argv):
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, "-m", *torchrun, ROOT / "train_classifier.py", *argv]
        with open(log, "w") as file:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, stdout=file, stderr=file, env=one_thread)

    slowest = 0.0
    bad = []
    for n in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        processes = 2 + n % 2
        parent = launch(processes, options)
        while not table.exists() and parent.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
        began = time.monotonic()
        code, _ = finish(parent.pid)
        seconds = time.monotonic() - began
        slowest = max(slowest, seconds)
        said = log.read_text()
        if code == 0 or 'train_classifier.py", line' in said or "SIGKILL" not in said:
            bad.append(f"kill {n}: exit code {code}: {said[-300:]}")
        if seconds > LONGEST_RUN:
            bad.append(f"kill {n}: the others ended after {seconds:.0f} s")
        code, _ = finish(launch(processes - 1, ["--resume", folder]).pid)
        if code != 0 or len(table.read_text().splitlines()) != 61:
            bad.append(f"kill {n}: not resumed: {log.read_text()[-300:]}")
    note = f"the others ended within {slowest:.0f} s, one less went on"
    yield make_row("one of torchrun's processes killed", count, {}, bad, note)


# ----------------------------------------------------------------------------- disks, checkpoints


def fill_disks(work, count, rng):
    """Train on disks that are too small, one after the other; needs the right to mount."""
    ends = Counter()
    bad = []
    disk = work / "disk"
    disk.mkdir()
    for _ in range(count):
        size = rng.randrange(20, 2000)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            ends["not allowed to mount"] += 1
            continue
        try:
            argv = [*train_options(train_dcgan, work), "--out", disk / "run"]
            code, _ = finish(start(train_dcgan.main, argv, work / "log"))
            end, wrong = describe_end(code, work / "log")
            ends[end] += 1
            halves = [f"{file} is left" for file in disk.rglob("*.part*")]
            lines = [wrong, *halves, *find_unreadable(disk, train_dcgan)]
            bad += [f"{size} kB: {line}" for line in lines if line]
        finally:
            subprocess.run(["umount", disk], check=True)
    yield make_row("disks that are too small", count, ends, bad)


def damage_checkpoints(work, count, rng):
    """Flip a bit at many places of a checkpoint, and cut it at as many."""
    folder = whole_run(train_dcgan, work)
    good = (folder / "checkpoint.pt").read_bytes()
    expected = learnt(folder, "train_dcgan")
    file = work / "checkpoint.pt"
    ends = Counter()
    bad = []
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
        ends[f"{what}: {end}"] += 1
        if end not in ("unharmed", "refused"):
            bad.append(f"{what} at {place}: {end}")
    yield make_row("damaged checkpoints", count, ends, bad)


# -------------------------------------------------------------------------------------- pictures


def write_pictures(rng):
    """Write one small picture in every format and mode that Pillow writes, as bytes."""
    noise = np.frombuffer(rng.randbytes(48 * 64 * 3), np.uint8).reshape(48, 64, 3)
    colour = Image.fromarray(noise).resize((96, 72))
    compressions = ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "group4", "packbits")
    extras = {
        "TIFF": [{"compression": name} for name in compressions],
        "JPEG": [{"progressive": True}, {"exif": Image.Exif()}, {"subsampling": 0}],
        "GIF": [{"save_all": True, "append_images": [colour.rotate(90)]}],
        "WEBP": [{"lossless": True}],
        "JPEG2000": [{"irreversible": True}],
    }
    Image.init()  # all formats
    found = []
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff complains of what it doesn't write
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"):
            for extra in [{}, *extras.get(kind, [])]:
                file = io.BytesIO()
                try:
                    first = colour.convert("L") if mode in ("I;16", "I", "F") else colour
                    first.convert(mode).save(file, kind, **extra)
                except Exception:  # not every format has every mode
                    continue
                found.append(file.getvalue())
    os.dup2(stderr, 2)
    return found


def chunk(kind, content):
    """Build a chunk of a PNG file."""
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width, height, *chunks, depth=8):
    """Build a PNG file that says what size it is, whatever its chunks hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def make_bombs():
    """Build small files that want to become large ones, as bytes."""
    packer = zlib.compressobj(9)  # a GiB of zeros, a thousand to one
    large = b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()
    data = chunk(b"IDAT", large)
    bmp = struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6)
    gif = b"\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
    jpeg = b"\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x11\0\x02\x11\x01\x03\x11\x01\xff\xd9"
    bombs = [
        png(30_000, 30_000, data),
        png(9_400, 9_400, data),
        png(2**31 - 1, 1, data),
        png(9_000, 9_000, data, depth=16),
        png(9_000, 9_000, chunk(b"IDAT", b"")),
        png(4, 4, data),
        png(64, 64, chunk(b"zTXt", b"a\0\0" + large), data),
        png(64, 64, chunk(b"iCCP", b"a\0\0" + large), data),
        png(64, 64, *[chunk(b"IDAT", b"")] * 100_000),
        b"P6 9000 9000 255\n" + bytes(1000),
        b"P5 1000000000 1 255\n" + bytes(1000),
        b"P6 " + b"9" * 1_000_000,
        b"BM" + bmp,
        b"GIF89a" + gif,
        b"\xff\xd8\xff\xc0" + jpeg,
        b"PK\3\4" + large[:1000],
        b"",
        bytes(1_000_000),
    ]
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "TIFF")
    tiff = file.getvalue()
    for tag in (256, 257, 258, 273):  # width, height, bits, strips
        at = tiff.index(struct.pack("<H", tag)) + 4
        for value in (0, 1, 65_535, 2**31 - 1, 2**32 - 1):
            for entry in (struct.pack("<II", 1, value), struct.pack("<II", value, 8)):
                bombs.append(tiff[:at] + entry + tiff[at + 8 :])
    return bombs


def mutate(content, rng):
    """Spoil a file in one of the ways in which files are spoilt."""
    data = bytearray(content or b"\0")
    way = rng.choice(("bits", "header", "cut", "huge", "repeat", "splice"))
    at = rng.randrange(len(data))
    if way == "bits":
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "header":
        for _ in range(3):
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    elif way == "cut":
        del data[at:]
    elif way == "huge":  # lengths, widths and offsets are of four bytes in most formats
        at = min(at, rng.randrange(200))
        values = (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\xff\xff", b"\0" * 4)
        data[at : at + 4] = rng.choice(values)
    elif way == "repeat":
        data[at:at] = data[: rng.randrange(len(data)) + 1] * 3
    else:
        data[at:] = rng.randbytes(len(data) - at)
    return bytes(data)


def torture_reader(work, count, rng):
    """Read mutilated pictures as the scripts do, in processes that may not take much memory."""
    whole = write_pictures(rng)
    files = [("whole", content) for content in whole]
    files += [("bomb", content) for content in make_bombs()]
    files += [("mutated", mutate(whole[i % len(whole)], rng)) for i in range(count)]
    endings = (".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".jp2", ".avif", ".ppm", "")
    classifier = Classifier("any", None, [], 3, 224, 256, "cpu")  # how a picture is cut
    read_photo("sample:coffee", classifier)  # imports what it needs
    ends = Counter()
    bad = []
    slowest = 0.0
    most = 0.0
    for way, content in files:
        path = work / f"picture{rng.choice(endings)}"
        path.write_bytes(content)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        reading = start(lambda p: read_photo(p, classifier), str(path), work / "log", MOST_MEMORY)
        code, usage = finish(reading, 10 * LONGEST)
        end, wrong = describe_end(code, work / "log")
        ends[f"{way}: {'read' if end == 'done' else end}"] += 1
        seconds = usage.ru_utime + usage.ru_stime  # a busy machine makes no picture slower
        slowest = max(slowest, seconds)
        most = max(most, (usage.ru_maxrss - before) / 1024)
        if wrong or seconds > LONGEST:
            bad.append(f"{way}, {content[:40]}, {len(content)} bytes, {seconds:.0f} s: {wrong}")
        path.unlink()
    note = f"; at most {slowest:.1f} s of CPU, {most:.0f} MiB"
    figures = {"slowest_s": round(slowest, 2), "most_MiB": round(most)}
    yield make_row("pictures", len(files), ends, bad, note, **figures)


# -------------------------------------------------------------------------------------- settings


def try_settings(work, count, rng):
    """Run each script with many settings, in processes that may not take much memory."""
    for script in (*TRAINERS, *EXPLAINERS, torch_basics):
        begin = []
        if script in TRAINERS:
            begin = ["--dataset", "glyphs", "--data-dir", work / "data", "--width", "0.05"]
        if script in EXPLAINERS:
            begin = ["--model", work / "model", "--image", work / "photo.png"]
        ends, bad = draw_settings(work, script, begin, count, rng.randrange(2**32))
        yield make_row(f"settings of {script.SCRIPT}.py", count, ends, bad)


def parses(script, words):
    """Tell whether a script's parser takes a command line."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            script.get_parser().parse_args(words)
    except SystemExit:
        return False
    return True


def draw_settings(work, script, begin, count, seed):
    """Run one script with many settings that its parser takes.

    :param list begin: what all its command lines begin with
    :return: how often which way to end, and what went wrong
    :rtype: tuple[collections.Counter, list[str]]
    """
    run = work / "run"
    ends = Counter()
    bad = []

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
        ends[end] += 1
        left = [*(work / "elsewhere").iterdir(), *run.rglob("*.part*")]
        lines = [wrong, *(f"left {file}" for file in left)]
        bad.extend(f"{' '.join(drawn)}: {line}" for line in lines if line)

    call()
    return ends, bad


# ---------------------------------------------------------------------------------------- photos


def write_photos(folder, count, rng):
    """Write pictures of noise, and in their midst a file that is none."""
    folder.mkdir()
    for i in range(count):
        noise = np.frombuffer(rng.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3)
        Image.fromarray(noise).save(folder / f"{i:03d}.png")
    (folder / f"{count // 2:03d}.png").write_bytes(b"no picture")


def explain_photos(work, count, rng):
    """Explain many photos, one of them broken; kill the run half-way, and resume it."""
    for script, many in ((smoothgrad, max(20, count)), (explain_perturb, max(20, count // 5))):
        photos = work / f"{script.SCRIPT}-photos"
        write_photos(photos, many, rng)
        bad, levels = explain_many(work, script, photos, many)
        tenth = max(1, len(levels) // 10)
        early = float(np.median(levels[tenth : 2 * tenth] or [0]))
        late = float(np.median(levels[-tenth:] or [0]))
        if late > early * 1.1 + 20 or not early:
            bad.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
        note = f"{early:.0f} MiB at first, {late:.0f} at the end"
        figures = {"MiB_early": round(early), "MiB_late": round(late)}
        yield make_row(f"{script.SCRIPT}.py on photos, killed", many, {}, bad, note, **figures)


def explain_many(work, script, photos, count):
    """Explain photos as :func:`explain_photos` says.

    :return: what went wrong, and the memory that the resumed run took in the course of time, in MiB
    :rtype: tuple[list[str], list[float]]
    """
    run = work / f"{script.SCRIPT}-run"
    log = work / "log"
    argv = ["--image", photos, "--model", work / "model", *EXPLAINERS[script], "--out", run]

    def find_records():
        return list((run / "records").glob("[!.]*.json"))

    child = start(script.main, argv, log)
    while len(find_records()) < count // 2 and os.waitid(
        os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT
    ) is None:  # fmt: skip
        time.sleep(0.01)
    code, _ = finish(child, 0)
    if code != -signal.SIGKILL:
        return [f"exit code {code}: {log.read_text()[-300:]}"], []
    seen = {file: file.stat().st_mtime_ns for file in find_records()}

    child = start(script.main, ["--resume", run], log)
    levels = []  # from the first photo to the last but one: there is no contact sheet yet
    done, status = os.waitpid(child, os.WNOHANG)
    while not done:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{child}/status").read_text())
        if found and len(seen) < len(find_records()) < count - 1:
            levels.append(int(found[1]) / 1024)
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    bad = []
    if os.waitstatus_to_exitcode(status) != 1:  # partly done: one photo is broken
        bad.append(f"status {status}: {log.read_text()[-300:]}")
    metrics = json.loads((run / "metrics.json").read_text())
    if len(metrics["images"]) != count - 1 or len(metrics["failed"]) != 1:
        bad.append(f"{len(metrics['images'])} photos, {len(metrics['failed'])} failures")
    again = [file for file, at in seen.items() if file.stat().st_mtime_ns != at]
    if again:
        bad.append(f"{len(again)} photos were explained twice")
    return bad, levels


# ----------------------------------------------------------------------------------------- pages


def make_runs(work, rng):
    """Make a finished run of each script, and return their folders."""
    runs = [whole_run(script, work) for script in TRAINERS]
    photos = work / "few"
    write_photos(photos, 3, rng)
    (photos / "001.png").unlink()  # the one that is no picture
    for script, options in EXPLAINERS.items():
        run = work / f"{script.SCRIPT}-few"
        argv = ["--image", photos, "--model", work / "model", *options, "--out", run]
        must(script, argv, work / "log")
        runs.append(run)
    must(torch_basics, ["--dry-run", "--out", work / "basics"], work / "log")
    return [*runs, work / "basics"]


def spoil_record(value, rng):
    """Replace or remove something in a record, a tree of dicts and lists, in place."""
    while value:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if isinstance(value[key], (dict, list)) and rng.random() < 0.9:
            value = value[key]
        elif rng.random() < 0.2:
            del value[key]
            return
        else:
            value[key] = rng.choice(ODD)
            return


def spoil_run(folder, bombs, rng):
    """Spoil something in a run folder, and say what was done."""
    way = rng.choice(("record", "record", "content", "bomb", "gone", "folder", "link", "pipe"))
    files = sorted(file for file in folder.rglob("[!.]*") if file.is_file())
    record = folder / "metrics.json"
    if way == "record" and record in files:
        with contextlib.suppress(ValueError):  # spoilt already
            metrics = json.loads(record.read_text())
            spoil_record(metrics, rng)
            record.write_text(json.dumps(metrics))
        return "record"
    file = rng.choice(files)
    content = file.read_bytes()
    file.unlink()
    if way == "content":
        file.write_bytes(mutate(content, rng))
    elif way == "bomb":
        file.write_bytes(rng.choice(bombs))
    elif way == "folder":
        file.mkdir()
    elif way == "link":
        file.symlink_to(rng.choice(("/dev/zero", "/dev/null", file.name, "/etc/passwd", "gone")))
    elif way == "pipe":
        os.mkfifo(file)
    return f"{way} {file.relative_to(folder)}"


def find_hole(page):
    """Say what is wrong with a page, or None: it is the template around its data, JSON."""
    text = page.read_text(encoding="utf-8")
    template = report.TEMPLATE.read_text(encoding="utf-8")
    before, after = template.split("{{data}}")
    data = text.removeprefix(before).removesuffix(after)
    if len(before) + len(data) + len(after) != len(text) or set("<>&") & set(data):
        return "its data end their element"
    json.loads(data)
    return None


def spoil_pages(work, count, rng):
    """Make pages of run folders that somebody has spoilt."""
    runs = make_runs(work, rng)
    bombs = make_bombs()
    folder = work / "spoilt"
    page = folder / "report.html"
    log = work / "log"
    ends = Counter()
    bad = []
    for n in range(count):
        run = runs[n % len(runs)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run, folder)
        done = [spoil_run(folder, bombs, rng) for _ in range(rng.choice((1, 1, 3)))]
        before = set(folder.rglob("*"))
        code, _ = finish(start(report.main, [folder], log, MOST_MEMORY), LONGEST_RUN)
        end, wrong = describe_end(code, log)
        ends[end] += 1
        made = set(folder.rglob("*")) - before
        if made != ({page} if code == 0 else set()):
            wrong = wrong or f"{end}, and made {made}"
        wrong = wrong or (find_hole(page) if code == 0 else None)
        if wrong:
            bad.append(f"{run.name}, {'; '.join(done)}: {wrong}")
    yield make_row("pages of spoilt run folders", count, ends, bad)


# ------------------------------------------------------------------------------------ the script


PARTS = {
    "kills": kill_trainings,
    "ranks": kill_ranks,
    "checkpoints": damage_checkpoints,
    "disks": fill_disks,
    "pictures": torture_reader,
    "settings": try_settings,
    "photos": explain_photos,
    "pages": spoil_pages,
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
                print(f"{row.name}: {row.count}, bad {len(row.bad)}   {row.found}", flush=True)
                rows.append(row)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n| what | how many | what came of it | bad |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.name} | {row.count:,} | {row.found} | {len(row.bad)} |")
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
