"""What kills, full disks, damaged files, mutilated pictures and odd settings do to the scripts.

    python benchmarks/torture.py

The long version of tests/test_faults.py: every part draws its moments and places from --seed.
Everything runs in forked processes, so that what a kill, a crash or a lack of memory takes along is
no more than it would be for a user.

Nothing should be in the table's column "bad"; the exit code is 1 if something is. Linux only.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare_explanations
import explain_perturb
import smoothgrad
import torch_basics
import train_classifier
import train_dcgan
from common.checkpoint import load_checkpoint, save_checkpoint
from common.errors import HelpFormatter, UserError, exit_code
from common.layers import to_plain
from common.photos import read_photo

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--dataset", "glyphs", "--batch-size", "16", "--epochs", "4"]
TRAININGS = {
    train_dcgan: [*TINY, "--width", "0.03", "--z-dim", "4", "--glyphs", "200"],
    train_classifier: [*TINY, "--width", "0.05", "--size", "12", "--glyphs", "400"],
}
SETTINGS = {  # what a drawn command line begins with: MODEL and PHOTO are made for it
    train_dcgan: ["--dry-run", "--dataset", "glyphs", "--width", "0.03"],
    train_classifier: ["--dry-run", "--dataset", "glyphs", "--width", "0.05"],
    smoothgrad: ["--dry-run", "--model", "MODEL", "--image", "PHOTO"],
    explain_perturb: ["--dry-run", "--model", "MODEL", "--image", "PHOTO"],
    compare_explanations: ["--dry-run", "--model", "MODEL", "--image", "PHOTO"],
    torch_basics: ["--dry-run"],
}
NUMBERS = ["0", "1", "2", "3", "17", "64", "1000", "0.001", "0.5", "0.99", "1e-12", "1e30", "-1",
           "1000000", "2147483647", "9" * 20, "nan"]  # fmt: skip
WORDS = ["0", "2", "red", "Green", "blue", "3", "", "violet"]
LONGEST = 10.0  # seconds of CPU that a picture may take
LONGEST_RUN = 60.0  # and a run of --dry-run, or processes whose group has lost one
MOST_MEMORY = 2 * 2**30  # bytes that a picture may take beyond what the process has already


# ------------------------------------------------------------------------------------- processes


def fork(function, log):
    """Run a function in a child process as a script is run, and note what it prints.

    :return: the child's process id
    :rtype: int
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        sys.stdout = sys.stderr = open(log, "w")  # noqa: SIM115 (closed with the process)
        os.dup2(sys.stderr.fileno(), 2)  # libtiff writes of its own accord
        code = exit_code(function)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child, seconds=300.0):
    """Wait for a child, and kill it when its time is over.

    :return: its exit code, or minus the signal that it died of
    :rtype: int
    """
    end = time.monotonic() + seconds
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.002)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        done = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(done[1])


def memory(child):
    """Read how much memory a process has, in MiB; 0 when it has ended."""
    try:
        status = Path(f"/proc/{child}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def limit_memory(most):
    """Let this process take no more than so many bytes beyond what it has."""
    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + most,) * 2)


def is_one_line(log):
    """Tell whether what a script said is one error and no traceback."""
    text = log.read_text()
    return "Traceback" not in text and text.count("error: ") == 1


# ----------------------------------------------------------------------------------------- kills


def same(a, b):
    """Compare two trees of plain values and tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def learnt(script, folder):
    """Read the networks, the optimizers and the epoch of a run."""
    state = load_checkpoint(folder, script.SCRIPT)
    parts = {"generator", "discriminator", "ema", "g_optimizer", "d_optimizer", "network",
             "optimizer", "epoch"}  # fmt: skip
    return {key: value for key, value in state.items() if key in parts}


def kill_trainings(work, script, kills, rng):
    """Kill a training at random moments, resume it, and compare the weights.

    Every third one is killed a second time while it goes on.

    :return: how many times what was struck, and what went wrong
    :rtype: tuple[collections.Counter, list[str]]
    """
    options = [*TRAININGS[script], "--data-dir", str(work / "data")]
    whole = work / f"{script.SCRIPT}-whole"
    for _ in range(2):  # the second time the glyphs are cached: the moments are drawn from that
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        code = wait(fork(lambda: script.main([*options, "--out", str(whole)]), work / "log"))
        assert code == 0, (work / "log").read_text()
    seconds, expected = time.monotonic() - began, learnt(script, whole)
    struck, bad, run, log = Counter(), [], work / "run", work / "log"

    def go_on():  # or begin, where there is nothing to go on with
        saved = (run / "checkpoint.pt").exists()
        argv = ["--resume", str(run)] if saved else [*options, "--out", str(run)]
        return fork(lambda: script.main(argv), log)

    n = 0
    while n < kills:
        shutil.rmtree(run, ignore_errors=True)
        began = time.monotonic()
        code = wait(go_on(), rng.uniform(0, seconds))
        if code == 0:  # it was quicker than the kill, which then doesn't count
            seconds = min(seconds, max(0.1, time.monotonic() - began))
            continue
        struck[moment(run)] += 1
        if n % 3 == 0 and code == -signal.SIGKILL:
            code = wait(go_on(), rng.uniform(0, seconds))
            struck["a second time"] += code != 0
        name, n = f"{script.SCRIPT}, kill {n}", n + 1
        if code not in (0, -signal.SIGKILL):
            bad.append(f"{name}: exit code {code}: {log.read_text()[-300:]}")
        for file in run.rglob("[!.]*.pt"):
            try:
                load_checkpoint(file, script.SCRIPT)
            except UserError as error:
                bad.append(f"{name}: {error}")
        if wait(go_on()) != 0:
            bad.append(f"{name}: {log.read_text()[-300:]}")
        elif not same(learnt(script, run), expected):
            bad.append(f"{name}: other weights")
        elif list(run.rglob("*.part*")):
            bad.append(f"{name}: half a file is left")
    return struck, bad


def kill_ranks(work, kills, rng):
    """Kill one of torchrun's processes; go on with one process less.

    :return: how long the others lived on, and what went wrong
    :rtype: tuple[list[float], list[str]]
    """
    run, log, script, took, bad = work / "ranks", work / "log", train_classifier, [], []
    options = [*TRAININGS[script], "--epochs", "60", "--data-dir", str(work / "data"),
               "--out", str(run)]  # fmt: skip
    file = ROOT / f"{script.SCRIPT}.py"

    def launch(count, argv):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command, one_thread = [sys.executable, *torchrun, file, *argv], {"OMP_NUM_THREADS": "1"}
        with open(log, "w") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | one_thread)

    def wait_for(parent):
        try:
            return parent.wait(300)
        except subprocess.TimeoutExpired:
            parent.kill()
            return parent.wait()

    for n in range(kills):
        shutil.rmtree(run, ignore_errors=True)
        count = 2 + n % 2
        parent = launch(count, options)
        while not (run / "metrics.csv").exists() and parent.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
        began = time.monotonic()
        wait_for(parent)
        took.append(time.monotonic() - began)
        said, name = log.read_text(), f"kill {n} of one of {count} processes"
        if parent.returncode == 0 or f'{script.SCRIPT}.py", line' in said or "SIGKILL" not in said:
            bad.append(f"{name}: exit code {parent.returncode}: {said[-300:]}")
        if took[-1] > LONGEST_RUN:
            bad.append(f"{name}: the others ended after {took[-1]:.0f} s")
        if wait_for(launch(count - 1, ["--resume", str(run)])) != 0:
            bad.append(f"{name}: not resumed: {log.read_text()[-300:]}")
        elif len((run / "metrics.csv").read_text().splitlines()) != 61:
            bad.append(f"{name}: not 60 epochs")
    return took, bad


def moment(run):
    """Tell from what is in a run folder what its process was doing when it was killed."""
    kinds = {".pt": "in a checkpoint", ".gif": "in the GIF", ".png": "in a picture"}
    parts = list(run.rglob(".*.part*"))
    if parts:
        return kinds.get(parts[0].suffix, "in a table")
    saved = (run / "checkpoint.pt").exists()
    return "between two files" if saved else "before the first checkpoint"


def fill_disks(work, sizes):
    """Train on disks that are too small, one after the other; needs the right to mount.

    :return: how often which way to end, and what went wrong
    :rtype: tuple[collections.Counter, list[str]]
    """
    ends, bad, disk = Counter(), [], work / "disk"
    disk.mkdir()
    for size in sizes:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return Counter({"not allowed to mount": 1}), []
        try:
            argv = [*TRAININGS[train_dcgan], "--data-dir", str(work / "data"),
                    "--out", str(disk / "run")]  # fmt: skip
            code = wait(fork(lambda argv=argv: train_dcgan.main(argv), work / "log"))
            ends["done" if code == 0 else "one line" if code == 2 else f"code {code}"] += 1
            if code not in (0, 2) or (code == 2 and not is_one_line(work / "log")):
                bad.append(f"disk of {size} kB: {(work / 'log').read_text()[-300:]}")
            for file in disk.rglob("*.pt"):
                load_checkpoint(file, "train_dcgan")
            if list(disk.rglob("*.part*")):
                bad.append(f"disk of {size} kB: half a file is left")
        except UserError as error:
            bad.append(f"disk of {size} kB: {error}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return ends, bad


def damage_checkpoints(work, step):
    """Flip a bit in every ``step``-th byte of a checkpoint, and cut it at as many places.

    :return: how often refused or unharmed, and what went wrong
    :rtype: tuple[collections.Counter, list[str]]
    """
    good = (work / "train_dcgan-whole" / "checkpoint.pt").read_bytes()
    expected, file = learnt(train_dcgan, work / "train_dcgan-whole"), work / "checkpoint.pt"
    ends, bad = Counter(), []
    places = range(0, len(good), step)
    flipped = (good[:i] + bytes([good[i] ^ 1 << i // step % 8]) + good[i + 1 :] for i in places)
    for what, variants in (("flipped", flipped), ("cut", (good[:i] for i in places))):
        for i, content in enumerate(variants):
            file.write_bytes(content)
            try:
                equal = same(learnt(train_dcgan, file), expected)
                ends[f"{what}: {'unharmed' if equal else 'OTHER WEIGHTS'}"] += 1
                if not equal:
                    bad.append(f"{what} at {i * step}: other weights")
            except UserError:
                ends[f"{what}: refused"] += 1
            except Exception as error:
                bad.append(f"{what} at {i * step}: {error!r}")
    return ends, bad


# -------------------------------------------------------------------------------------- pictures


def write_pictures(rng):
    """Write one small picture in every format and mode that Pillow writes.

    :return: contents by name
    :rtype: dict[str, bytes]
    """
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (48, 64, 3), np.uint8)
    colour = Image.fromarray(noise).resize((96, 72))
    found = {}
    extras = {"TIFF": [{"compression": c} for c in ("raw", "tiff_lzw", "tiff_deflate", "jpeg",
                                                    "group4", "packbits")],
              "JPEG": [{"progressive": True}, {"exif": Image.Exif()}, {"subsampling": 0}],
              "PNG": [{"optimize": True}, {"interlace": True}],
              "GIF": [{"save_all": True, "append_images": [colour.rotate(90)]}],
              "WEBP": [{"lossless": True}], "JPEG2000": [{"irreversible": True}]}  # fmt: skip
    quiet, errors = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 2)  # libtiff complains of what it doesn't write
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F"):
            for i, extra in enumerate([{}, *extras.get(kind, [])]):
                file = io.BytesIO()
                try:
                    picture = colour.convert("L").convert(mode) if mode in "I;16F" else None
                    (picture or colour.convert(mode)).save(file, kind, **extra)
                except Exception:  # not every format has every mode
                    continue
                found[f"{kind}-{mode.replace(';', '_')}-{i}"] = file.getvalue()
    os.dup2(errors, 2)
    return found


def chunk(kind, content):
    """Build a chunk of a PNG file."""
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def png(width, height, *chunks, depth=8, colour=2):
    """Build a PNG file that says what size it is, whatever its chunks hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deflate(mebibytes):
    """Compress so many MiB of zeros, a thousand to one."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(mebibytes)) + packer.flush()


def make_bombs():
    """Build small files that want to become large ones.

    :return: contents by name
    :rtype: dict[str, bytes]
    """
    zeros, large = deflate(64), deflate(1024)
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "TIFF")
    tiff = bytearray(file.getvalue())
    bombs = {
        "png, 30,000 x 30,000": png(30_000, 30_000, chunk(b"IDAT", large)),
        "png, 9,400 x 9,400": png(9_400, 9_400, chunk(b"IDAT", deflate(253))),
        "png, 2 billion wide": png(2**31 - 1, 1, chunk(b"IDAT", zeros)),
        "png, 9,000 x 9,000 of 16 bits": png(9_000, 9_000, chunk(b"IDAT", large), depth=16),
        "png, 9,000 x 9,000, no data": png(9_000, 9_000, chunk(b"IDAT", b"")),
        "png, 4 x 4, a GiB of data": png(4, 4, chunk(b"IDAT", large)),
        "png, text": png(64, 64, chunk(b"zTXt", b"a\0\0" + large), chunk(b"IDAT", zeros)),
        "png, profile": png(64, 64, chunk(b"iCCP", b"a\0\0" + large), chunk(b"IDAT", zeros)),
        "png, many chunks": png(64, 64, *[chunk(b"IDAT", b"")] * 100_000),
        "ppm, 9,000 x 9,000": b"P6 9000 9000 255\n" + bytes(1000),
        "ppm, 10^9 wide": b"P5 1000000000 1 255\n" + bytes(1000),
        "ppm, endless number": b"P6 " + b"9" * 1_000_000,
        "bmp, 30,000 x 30,000": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 30_000,
                                                    30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "gif, 65,535 x 65,535": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff"
                                b"\xff\xff\0\x02\x02D\x01\0;",
        "jpeg, 65,500 x 65,500": b"\xff\xd8\xff\xc0\0\x11\x08\xff\xdc\xff\xdc\x03\x01\x11\0\x02\x11"
                                 b"\x01\x03\x11\x01\xff\xd9",
        "zip": b"PK\3\4" + large[:1000],
        "empty": b"",
        "zeros": bytes(1_000_000),
    }  # fmt: skip
    for name, tag in (("width", 256), ("height", 257), ("bits", 258), ("strips", 273)):
        at = tiff.index(struct.pack("<H", tag))
        for value in (0, 1, 65_535, 2**31 - 1, 2**32 - 1):
            bad = bytearray(tiff)
            bad[at + 4 : at + 12] = struct.pack("<II", 1, value)
            bombs[f"tiff, {name} {value}"] = bytes(bad)
            bad[at + 4 : at + 12] = struct.pack("<II", value, 8)
            bombs[f"tiff, {name}, {value} values"] = bytes(bad)
    return bombs


def mutate(content, rng):
    """Spoil a file in one of the ways in which files are spoilt.

    :return: what was done, and the content
    :rtype: tuple[str, bytes]
    """
    data = bytearray(content)
    way = rng.choice(("bits", "header", "cut", "huge", "repeat", "splice"))
    if way == "bits":
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "header":
        for _ in range(3):
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    elif way == "cut":
        del data[rng.randrange(len(data)) :]
    elif way == "huge":  # lengths, widths and offsets are of four bytes in most formats
        at = rng.randrange(max(1, min(200, len(data) - 4)))
        data[at : at + 4] = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f",
                                        b"\0\0\xff\xff", b"\0\0\0\0"))  # fmt: skip
    elif way == "repeat":
        at = rng.randrange(len(data))
        data[at:at] = data[: rng.randrange(len(data)) + 1] * 3
    else:
        data = data[: len(data) // 2] + bytes(rng.randrange(256) for _ in range(len(data) // 2))
    return way, bytes(data)


def torture_reader(work, count, rng):
    """Read mutilated pictures as the scripts do, in a process that may not take much memory.

    :return: how often which way to end, what went wrong, and the largest figures
    :rtype: tuple[collections.Counter, list[str], dict]
    """
    whole, folder, names = write_pictures(rng), work / "pictures", []
    folder.mkdir()
    extensions = (".png", ".jpg", ".gif", ".tif", ".webp", ".bmp", ".jp2", ".avif", ".ppm", "")
    files = [("whole", content) for content in whole.values()]
    files += [("bomb", content) for content in make_bombs().values()]
    kinds = sorted(whole)
    files += [mutate(whole[kinds[i % len(kinds)]], rng) for i in range(count)]
    for i, (way, content) in enumerate(files):
        names.append((way, folder / f"{i}{rng.choice(extensions)}"))
        names[-1][1].write_bytes(content)
    ends, bad, start, slowest, most = Counter(), [], 0, 0.0, 0.0
    results = work / "results"
    while start < len(names):  # a process that dies is followed by one for the rest
        child = fork(lambda start=start: read_all(names[start:], results), work / "log")
        code = wait(child, LONGEST * 60)
        lines = results.read_text().splitlines()
        for (way, _), line in zip(names[start:], lines, strict=False):
            end, seconds, mebibytes, _ = line.split("\t")
            ends[f"{way if way in ('whole', 'bomb') else 'mutated'} {end}"] += 1
            slowest, most = max(slowest, float(seconds)), max(most, float(mebibytes))
            if end == "TRACEBACK" or float(seconds) > LONGEST or float(mebibytes) > 2048:
                bad.append(f"{way}: {line}")
        start += len(lines)
        if start < len(names):
            bad.append(f"{names[start]}: the process ended with {code}")
            start += 1
    return ends, bad, {"slowest_s": round(slowest, 2), "most_MiB": round(most)}


def read_all(names, results):
    """Read pictures, and write down after each one how it ended.

    The memory given is the peak since the start, beyond what the process had then.
    """
    limit_memory(MOST_MEMORY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(results, "w") as file:
        for _, path in names:
            began, text = time.process_time(), ""  # a busy machine makes no picture slower
            try:
                read_photo(str(path), 256, 224)
                end = "read"
            except UserError as error:
                end, text = "refused", str(error)
                if len(text.splitlines()) != 1:
                    end = "TRACEBACK"
                if "memory" in text:
                    end = "refused for memory"
            except Exception as error:
                end, text = "TRACEBACK", repr(error)
            used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            text = text.replace("\t", " ")[:300]
            print(end, f"{time.process_time() - began:.2f}", f"{used:.0f}", text,
                  sep="\t", file=file, flush=True)  # fmt: skip


# ------------------------------------------------------------------------------------------ load


def make_classifier(folder):
    """Write a checkpoint as train_classifier.py does, of a tiny network with random weights."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16 * 16, 3)
    )
    state = {"script": "train_classifier", "layers": to_plain(network), "shape": [3, 16, 16],
             "network": network.state_dict(), "classes": ["red", "green", "blue"],
             "mean": [0.5] * 3, "std": [0.1] * 3}  # fmt: skip
    save_checkpoint(folder / "checkpoint.pt", state)


def explain_many(work, script, count, options, rng):
    """Explain many photos, one of them broken; kill the run half-way, and resume it.

    :return: what went wrong, and figures
    :rtype: tuple[list[str], dict]
    """
    photos, run, name = work / f"{count}-photos", work / f"{script.SCRIPT}-run", script.SCRIPT
    if not photos.exists():
        photos.mkdir()
        pixels = np.random.default_rng(rng.randrange(2**32))
        for i in range(count):
            some = pixels.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(some).save(photos / f"{i:03d}.png")
        (photos / f"{count // 2:03d}.png").write_bytes(b"no picture")
    argv = ["--image", str(photos), "--model", str(work), *options]
    bad, levels, seen = [], {}, {}
    for half in (True, False):
        command = [*argv, "--out", str(run)] if half else ["--resume", str(run)]
        child = fork(lambda command=command: script.main(command), work / "log")
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            done = len(list((run / "records").glob("[!.]*.json"))) if run.exists() else 0
            level = memory(child)
            if level and done:
                levels[done] = max(level, levels.get(done, 0.0)) if done < count - 1 else level
            if half and done >= count // 2:
                os.kill(child, signal.SIGKILL)
                seen = {f.name: f.stat().st_mtime_ns for f in (run / "records").glob("*.json")}
            time.sleep(0.02)
        code = os.waitstatus_to_exitcode(ended[1])
        if code != (-signal.SIGKILL if half else 1):
            bad.append(f"{name}: exit code {code}: {(work / 'log').read_text()[-300:]}")
            return bad, {"MiB_early": 0, "MiB_late": 0, "photos": count}
    found = json.loads((run / "metrics.json").read_text())
    if len(found["images"]) != count - 1 or len(found["failed"]) != 1:
        bad.append(f"{name}: {len(found['images'])} photos, {len(found['failed'])} failures")
    again = [n for n, at in seen.items() if (run / "records" / n).stat().st_mtime_ns != at]
    if again:
        bad.append(f"{name}: {len(again)} photos were explained twice")
    # Of the resumed process: after its first tenth, and before the contact sheet.
    second = [levels[n] for n in sorted(levels) if n > count * 0.6]
    tenth = max(1, len(second) // 10)
    early, late = (float(np.median(part)) for part in (second[:tenth], second[-tenth - 1 : -1]))
    if late > early * 1.1 + 20:
        bad.append(f"{name}: memory grew from {early:.0f} to {late:.0f} MiB")
    return bad, {"MiB_early": round(early), "MiB_late": round(late), "photos": count}


# -------------------------------------------------------------------------------------- settings


def draw_settings(script, rng):
    """Draw some options of a script, four in five with a value that its parser accepts.

    :return: words of a command line
    :rtype: list[str]
    """
    given_here = {"help", "out", "data_dir", "dataset", "image", "model", "resume", "sample", "fid",
                  "cuda", "compile", "tensorboard", "width", "dry_run"}  # fmt: skip
    actions = [a for a in script.get_parser()._actions if a.dest not in given_here]
    argv = []
    for action in rng.sample(actions, rng.randrange(min(5, len(actions)) + 1)):
        argv.append(rng.choice(action.option_strings))
        values = list(map(str, action.choices or ())) or (NUMBERS if action.type else WORDS)
        if action.type and rng.random() < 0.8:
            values = [value for value in values if accepts(action.type, value)]
        count = {0: 0, "+": rng.choice((1, 2, 3))}.get(action.nargs, 1)
        argv += [rng.choice(values) for _ in range(count)]
    return argv


def accepts(convert, text):
    """Tell whether a type of argparse's takes a text."""
    try:
        convert(text)
    except argparse.ArgumentTypeError:
        return False
    return True


def try_settings(work, script, count, rng):
    """Run a script with many settings, each in a process that may not take much memory.

    :return: how often which way to end, and what went wrong
    :rtype: tuple[collections.Counter, list[str]]
    """
    known = {"MODEL": str(work), "PHOTO": str(work / "photo.png")}
    ends, bad, away, log = Counter(), [], work / "away", work / "log"
    away.mkdir(exist_ok=True)
    for _ in range(count):
        shutil.rmtree(work / "run", ignore_errors=True)
        drawn = draw_settings(script, rng)
        argv = [known.get(word, word) for word in SETTINGS[script]] + drawn
        argv += ["--out", str(work / "run")]
        argv += ["--data-dir", str(work / "data")] if script in TRAININGS else []

        def run(argv=argv):
            os.chdir(away)
            limit_memory(2 * MOST_MEMORY)
            script.main(argv)

        code = wait(fork(run, log), LONGEST_RUN)
        text = log.read_text()
        ends[{0: "done", 2: "one line"}.get(code, f"code {code}")] += 1
        if code not in (0, 2) or "Traceback" in text or (code == 2 and not is_one_line(log)):
            bad.append(f"{script.SCRIPT}.py {' '.join(drawn)}: {code}: {text[-300:]}")
        if list(away.iterdir()) or list(work.rglob("*.part*")):
            bad.append(f"{script.SCRIPT}.py {' '.join(drawn)}: left a file elsewhere, or a half")
    return ends, bad


# ------------------------------------------------------------------------------------ the script


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each training script")
    parser.add_argument("--pictures", type=int, default=2000, help="mutated, beside whole ones")
    parser.add_argument("--photos", type=int, default=500, help="for smoothgrad.py to explain")
    parser.add_argument("--perturb", type=int, default=100, help="for explain_perturb.py")
    parser.add_argument("--step", type=int, default=1000, help="bytes from flip to flip")
    parser.add_argument("--ranks", type=int, default=6, help="of torchrun's processes to kill")
    parser.add_argument("--settings", type=int, default=40, help="command lines of each script")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    return parser


def main():
    """Run all parts, print the table and the result line.

    :return: the exit code
    :rtype: int
    """
    args = get_parser().parse_args()
    torch.set_num_threads(1)
    work, rng = Path(tempfile.mkdtemp(prefix="torture-")), random.Random(args.seed)
    rows, bad, result, began = [], [], {}, time.time()

    def note(name, count, found, wrong, **figures):
        rows.append((name, count, found, len(wrong)))
        bad.extend(wrong)
        result[name] = {"count": count, "bad": len(wrong), **figures}
        print(f"{name}: {count}, bad {len(wrong)}   {found}", flush=True)

    def words(counter):
        return ", ".join(f"{count} {what}" for what, count in sorted(counter.items()))

    try:
        for script in TRAININGS:
            found, wrong = kill_trainings(work, script, args.kills, rng)
            note(f"{script.SCRIPT}.py killed and resumed", args.kills, words(found), wrong)
        took, wrong = kill_ranks(work, args.ranks, rng)
        note("one of torchrun's processes killed", args.ranks, "the others ended within "
             f"{max(took, default=0):.0f} s, one less went on", wrong)  # fmt: skip
        found, wrong = damage_checkpoints(work, args.step)
        note("damaged checkpoints", sum(found.values()), words(found), wrong)
        sizes = [rng.randrange(20, 2000) for _ in range(12)]
        found, wrong = fill_disks(work, sizes)
        note("disks that are too small", sum(found.values()), words(found), wrong)
        found, wrong, figures = torture_reader(work, args.pictures, rng)
        most = f"{figures['slowest_s']} s of CPU, {figures['most_MiB']} MiB"
        note("pictures", sum(found.values()), f"{words(found)}; at most {most}", wrong, **figures)
        make_classifier(work)
        pixels = np.random.default_rng(args.seed).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(work / "photo.png")
        for script in SETTINGS:
            found, wrong = try_settings(work, script, args.settings, rng)
            note(f"settings of {script.SCRIPT}.py", args.settings, words(found), wrong)
        for script, count, options in (
            (smoothgrad, args.photos, ["--samples", "2", "--noise", "0.1"]),
            (explain_perturb, args.perturb, ["--iterations", "2", "--pictures", "2",
                                             "--mask-size", "4"]),
        ):  # fmt: skip
            wrong, figures = explain_many(work, script, count, options, rng)
            note(f"{script.SCRIPT}.py on photos, killed half-way", count,
                 f"{figures['MiB_early']} MiB at first, {figures['MiB_late']} at the end", wrong,
                 **figures)  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n| what | how many | what came of it | bad |\n|---|---|---|---|")
    for name, count, found, wrong in rows:
        print(f"| {name} | {count:,} | {found} | {wrong} |")
    print(*(f"BAD {line}" for line in bad), sep="\n")
    result["seconds"] = round(time.time() - began)
    print("RESULT " + json.dumps(result))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
