"""One photo after the other: found, read, explained, recorded; no broken one stops the others."""

import json
import os
import re
import sys
import zlib
from pathlib import Path

import torch
from tqdm import tqdm

from common.device import gather, is_first, ranks, share_from_first
from common.errors import UserError, plain
from common.images import crop_square, open_as_it_is, open_photo, picture_endings
from common.run import is_name, is_number, read_text, replacing, written

SAMPLES = {  # files of scikit-image
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "rocket": "rocket.jpg",
}


def find_photos(paths):
    """List the pictures that are meant by files, folders and ``sample:NAME``.

    :param list[str] paths: files are taken as they are; of a folder all files that are named as
        pictures, sorted, without hidden ones and without its subfolders
    :return: files and samples, each as it would be given, in order, without repetition
    :rtype: list[str]
    :raises UserError: if one isn't there, or a folder has no pictures
    """
    endings = picture_endings()
    found = {}
    for path in map(str, paths):
        if path.startswith("sample:"):
            if path[7:] not in SAMPLES:
                raise UserError(f"no {path}: there are sample:" + ", sample:".join(SAMPLES))
            found[path] = None
        elif os.path.isdir(path):
            files = [f for f in sorted(Path(path).iterdir()) if not f.name.startswith(".")]
            files = [str(f) for f in files if f.suffix.lower() in endings and not f.is_dir()]
            if not files:
                raise UserError(f"{path} has no pictures: give a folder of .jpg or .png files")
            found.update(dict.fromkeys(files))
        elif os.path.exists(path):
            found[path] = None
        else:
            raise UserError(f"no picture at {path}: give a file, a folder or sample:coffee")
    return list(found)


def read_photo(path, classifier):
    """Read a picture as a classifier wants it.

    :param str path: a file, or ``sample:NAME`` (CC0, from scikit-image)
    :param common.classifiers.Classifier classifier: whose transform, size and channels count
    :return: (1, channels, size, size), float32, in [0, 1], on the CPU
    :rtype: torch.Tensor
    :raises UserError: if it can't be read, or there is nothing to see
    """
    if path.startswith("sample:") and path[7:] in SAMPLES:  # a file may be so named, too
        import skimage  # not its io, which looks for plugins first

        picture = open_as_it_is(Path(skimage.data_dir, SAMPLES[path[7:]]))
    else:
        picture = open_photo(path)
    if "dark" in picture.info:
        say(f"warning: {path} is {picture.info['dark']}: scale it up", sys.stderr)
    picture = picture.convert("RGB" if classifier.channels == 3 else "L")
    if classifier.transform:
        pixels = classifier.transform(picture)
    else:
        pixels = crop_square(picture, classifier.size, classifier.size / classifier.resize)
    if pixels.min() == pixels.max():
        raise UserError(f"{path} is of one colour, there is nothing to explain: leave it out")
    return pixels.unsqueeze(0)


@torch.no_grad()
def predict(classifier, x, photos):
    """Classify photos, and refuse one for which the network gives no numbers.

    :param common.classifiers.Classifier classifier: whose network
    :param torch.Tensor x: the photos, (N, C, H, W)
    :param list[str] photos: what they are called
    :return: probabilities, (N, classes)
    :rtype: torch.Tensor
    :raises UserError: if one's are NaN; it names the photo and the network
    """
    probabilities = classifier.network(x).softmax(1)
    for photo, row in zip(photos, probabilities, strict=True):
        if not row.isfinite().all():
            name = classifier.name
            raise UserError(f"{photo}: {name} gives NaN for it: leave it out, or mend the network")
    return probabilities


def say(text, file=None):
    """Print a line above the progress bars, in one piece: other processes print, too."""
    tqdm.write(plain(text) + "\n", file, end="")


# ------------------------------------------------------------------ what a run has explained so far


def save_arguments(folder, script, args):
    """Write down at the start what was asked for, so that --resume can go on with it.

    :param pathlib.Path folder: the run folder; its records/ is made
    :param str script: name of the script, without .py
    :param argparse.Namespace args: all arguments
    """
    (folder / "records").mkdir(exist_ok=True)  # whichever process is first
    if is_first():
        with replacing(folder / "records" / "arguments.txt") as part:
            part.write_text(json.dumps({"script": script, "args": vars(args)}), encoding="utf-8")


def load_arguments(path, script):
    """Read what :func:`save_arguments` wrote.

    :param str path: the run folder
    :param str script: the script that must have written it
    :return: the arguments
    :rtype: dict
    :raises UserError: if there are none, or another script's
    """
    try:
        state = json.loads(read_text(Path(path) / "records" / "arguments.txt"))
        found = state["script"]
        args = dict(state["args"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no run of {script}.py to go on with: start a new one"
        ) from error
    if found != script:
        raise UserError(f"{path} was written by {found}.py: give a run of {script}.py")
    return args


def read_records(folder, check=None):
    """Read the records of the photos that have been explained.

    :param pathlib.Path folder: the run folder; anybody may have written what is in it
    :param Callable check: raises an exception for a record that its script can't use
    :return: records by the stem of their files, and the files that hold none
    :rtype: tuple[dict[str, dict], list[pathlib.Path]]
    """
    records = {}
    damaged = []
    for file in sorted((folder / "records").glob("[!.]*.json")):
        try:
            record = json.loads(read_text(file))
            check_record(record)
            if check:
                check(record)
            records[file.stem] = record
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
                RecursionError):  # fmt: skip
            damaged.append(file)
    return records, damaged


def find_done(folder, check=None):
    """Find the photos of which nothing is lost or damaged, and warn of the others.

    :param pathlib.Path folder: the run folder
    :param Callable check: as in :func:`read_records`
    :return: the stem of their files by photo
    :rtype: dict[str, str]
    """
    records, damaged = read_records(folder, check)
    done = {}
    for stem, record in records.items():
        file = find_damage(folder, record)
        if file is None:
            done[record["path"]] = stem
        else:
            damaged.append(file)
    for file in damaged:
        line = f"warning: {file} is lost or damaged: its photo is explained again"
        print(plain(line), file=sys.stderr)
    return done


def find_damage(folder, record):
    """Return the first of a photo's files that isn't what was written, or None.

    :param pathlib.Path folder: the run folder
    :param dict record: the photo's; its "files" are checksums by name
    """
    for name, checksum in record["files"].items():
        file = folder / name
        outside = ".." in Path(name).parts or folder not in file.parents
        if outside or not file.is_file() or zlib.crc32(file.read_bytes()) != checksum:
            return file
    return None


def check_record(record):
    """Raise an exception for a record that isn't one of a photo."""
    numbers = [record[name] for name in ("target", "probability", "seconds", "evaluations")]
    names = [record["class_name"], record.get("panel", "")]
    if not all(map(is_number, numbers)) or not all(map(is_name, names)):
        raise ValueError("no record")
    if not isinstance(record["path"], str) or not isinstance(record["files"], dict):
        raise ValueError("no record")
    if os.sep in record.get("panel", ""):
        raise ValueError("a panel elsewhere")


def name_photos(photos, stems=()):
    """Make one file name stem for each photo, whatever its own name holds.

    :param list[str] photos: files and ``sample:NAME``
    :param dict[str, str] stems: what some photos are called already, these or others
    :return: stem by photo; letters, digits, ``-`` and ``_`` only, all different, also where
        capital letters make no difference
    :rtype: dict[str, str]
    """
    stems = dict(stems)
    used = {stem.lower() for stem in stems.values()}
    for photo in photos:
        if photo in stems:
            continue
        stem = photo[7:] if photo.startswith("sample:") else Path(photo).stem
        stem = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII)[:60].strip("_") or "photo"
        unique = stem
        count = 1
        while unique.lower() in used:
            count += 1
            unique = f"{stem}_{count}"
        stems[photo] = unique
        used.add(unique.lower())
    return stems


def explain_photos(photos, folder, explain, group=1, check=None):
    """Explain the photos of this process that haven't been explained yet.

    A photo's record, ``records/STEM.json``, is written after all its other files, whose checksums
    it holds: a resumed run goes on with the photos of which one is lost or damaged. One that can't
    be read costs no other.

    :param list[str] photos: all of them; each process takes its share
    :param pathlib.Path folder: the run folder
    :param Callable explain: from a list of pairs (photo, stem) to one record each, plain values
    :param int group: how many photos ``explain`` is given at once
    :param Callable check: raises an exception for a record that the script can't use
    :return: the records of all photos, in order, and what went wrong with the others
    :rtype: tuple[list[dict], dict[str, str]]
    """
    rank, world = ranks()
    # A photo keeps its stem, whichever others a resumed run is given.
    done = share_from_first(find_done(folder, check) if rank == 0 else None)
    stems = name_photos(photos, done)
    failed = {}
    todo = [photo for photo in photos[rank::world] if photo not in done]
    groups = [todo[i : i + group] for i in range(0, len(todo), group)]
    hidden = rank > 0 or len(photos) == 1 or None  # None: hidden where there is no terminal
    with tqdm(total=len(todo), unit="photo", disable=hidden) as bar:
        while groups:
            some = groups.pop(0)
            before = len(written)
            try:
                records = explain([(photo, stems[photo]) for photo in some])
            except UserError as error:
                if len(some) > 1:  # find the one
                    groups = [[photo] for photo in some] + groups
                    continue
                failed[some[0]] = str(error)
            else:
                # Of several photos at once each answers for the files of all.
                made = sorted(set(written[before:]))
                files = {str(f.relative_to(folder)): zlib.crc32(f.read_bytes()) for f in made}
                for photo, record in zip(some, records, strict=True):
                    whole = record | {"files": files}
                    with replacing(folder / "records" / f"{stems[photo]}.json") as part:
                        part.write_text(json.dumps(whole), encoding="utf-8")
            bar.update(len(some))
    failed = gather(failed)  # also waits for the last record of all processes
    records, _ = read_records(folder, check)
    for record in records.values():
        del record["files"]
    return [records[stems[photo]] for photo in photos if stems[photo] in records], failed


def report_failures(failed, count):
    """Name the photos that could not be explained.

    :param dict[str, str] failed: what was wrong, by photo
    :param int count: how many photos there were
    :raises UserError: if there are any; exit code 2 if it is all of them, else 1
    """
    if len(failed) == count == 1:
        raise UserError(next(iter(failed.values())))
    for why in failed.values():
        print(f"warning: {plain(why)}", file=sys.stderr)
    if failed:
        code = 2 if len(failed) == count else 1
        line = f"{len(failed)} of {count} photos could not be explained: see the warnings above"
        raise UserError(line, code)
