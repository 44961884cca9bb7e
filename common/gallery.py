"""One explanation per photo: shared among processes, resumable, and no broken photo stops it."""

import contextlib
import json
import re
import sys
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from common.device import is_first, ranks
from common.errors import PeerError, UserError
from common.panels import contact_sheet
from common.report import photos_page
from common.run import finish, replacing
from common.watch import show_records


def name_photos(photos, stems=()):
    """Make one file name stem for each photo, whatever its own name holds.

    :param list[str] photos: files and ``sample:NAME``
    :param dict[str, str] stems: what some photos are called already, these or others
    :return: stem by photo; letters, digits, ``-`` and ``_`` only, all different, also where
        capital letters make no difference
    :rtype: dict[str, str]
    """
    stems = dict(stems)
    used, counts = {stem.lower() for stem in stems.values()}, {}
    for photo in photos:
        if photo in stems:
            continue
        stem = photo[7:] if photo.startswith("sample:") else Path(photo).stem
        stem = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII)[:60].strip("_") or "photo"
        unique, count = stem, counts.get(stem, 1)
        while unique.lower() in used:
            count += 1
            unique = f"{stem}_{count}"
        stems[photo], counts[stem] = unique, count
        used.add(unique.lower())
    return stems


def say(text, file=None):
    """Print a line above the progress bars, in one piece: other processes print, too."""
    tqdm.write(text + "\n", file, end="")


def save_arguments(folder, script, args):
    """Write down at the start what was asked for, so that --resume can go on with it.

    :param pathlib.Path folder: the run folder
    :param str script: name of the script, without .py
    :param argparse.Namespace args: all arguments
    """
    if ranks()[0] == 0:
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
        text = (Path(path) / "records" / "arguments.txt").read_text(encoding="utf-8")
        state = json.loads(text)
        found, args = state["script"], dict(state["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no run of {script} to go on with: start a new one") from error
    if found != script:
        raise UserError(f"{path} was written by {found}, not by {script}: give a run of {script}")
    return args


def read_records(folder):
    """Read the records of the photos that have been explained.

    :param pathlib.Path folder: the run folder
    :return: records by stem
    :rtype: dict[str, dict]
    """
    records = {}
    for file in sorted((folder / "records").glob("[!.]*.json")):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: done again
            record = json.loads(file.read_text(encoding="utf-8"))
            records[file.stem] = record | {"path": record["path"]}
    return records


def explain_photos(photos, folder, explain, group=1):
    """Explain the photos of this process that haven't been explained yet.

    A photo's record, ``records/STEM.json``, is written after all its other files: a resumed run
    goes on with the photos that have none. One that can't be read costs no other.

    :param list[str] photos: all of them; each process takes its share
    :param pathlib.Path folder: the run folder
    :param Callable explain: from a list of pairs (photo, stem) to one record each, plain values
    :param int group: how many photos ``explain`` is given at once
    :return: the records of all photos, in order, and what went wrong with the others
    :rtype: tuple[list[dict], dict[str, str]]
    """
    rank, world = ranks()
    # A photo keeps its stem, whichever others a resumed run is given.
    done = {record["path"]: stem for stem, record in read_records(folder).items()}
    stems, failed = name_photos(photos, done), {}
    todo = [photo for photo in photos[rank::world] if photo not in done]
    groups = [todo[i : i + group] for i in range(0, len(todo), group)]
    off = rank > 0 or len(photos) == 1 or None  # None: off where there is no terminal
    with tqdm(total=len(todo), unit="photo", disable=off) as bar:
        while groups:
            some = groups.pop(0)
            try:
                records = explain([(photo, stems[photo]) for photo in some])
            except UserError as error:
                if not folder.is_dir():  # deleted under way: the others can't be saved, either
                    raise
                if len(some) > 1:  # find the one
                    groups = [[photo] for photo in some] + groups
                    continue
                failed[some[0]] = str(error)
            else:
                for photo, record in zip(some, records, strict=True):
                    with replacing(folder / "records" / f"{stems[photo]}.json") as part:
                        part.write_text(json.dumps(record), encoding="utf-8")
                show_records(folder)
            bar.update(len(some))
    if world > 1:
        everybody = [None] * world
        try:
            dist.all_gather_object(everybody, failed)  # also waits for the last record
        except RuntimeError as error:
            raise PeerError from error
        failed = {photo: why for part in everybody for photo, why in part.items()}
    show_records(folder)
    records = read_records(folder)
    return [records[stems[photo]] for photo in photos if stems[photo] in records], failed


def finish_photos(folder, script, args, argv, device, started, images, failed, side, parser=None):
    """End a run: its contact sheet, its page, metrics.json, and what went wrong.

    :param list[dict] images: the records of all photos
    :param dict[str, str] failed: what was wrong with the others
    :param int side: of a photo's panel on the contact sheet, in pixels
    :param argparse.ArgumentParser parser: a new one of the script, for the page; without it there
        is no page. The other parameters are those of :func:`common.run.finish`
    :return: what metrics.json holds; nothing in all processes but the first
    :rtype: dict
    :raises UserError: as :func:`report_failures`
    """
    if not is_first():
        return {}
    count = len(images) + len(failed)
    if count > 1:
        panels = {folder / image["panel"]: image["path"] for image in images}
        contact_sheet(folder / "contact_sheet.png", panels, columns=2, side=side)
    if parser:
        photos_page(folder, script, args, parser, images)
    found = {"images": images, "failed": failed}
    found = finish(folder, script, args, argv, f"{len(images)} photos", device, started, **found)
    report_failures(failed, count)
    return found


def report_failures(failed, count):
    """Name the photos that could not be explained.

    :param dict[str, str] failed: what was wrong, by photo
    :param int count: how many photos there were
    :raises UserError: if there are any; exit code 2 if it is all of them, else 1
    """
    if len(failed) == count == 1:
        raise UserError(next(iter(failed.values())))
    for why in failed.values():
        print(f"warning: {why}", file=sys.stderr)
    if failed:
        code = 2 if len(failed) == count else 1
        line = f"{len(failed)} of {count} photos could not be explained: see the warnings above"
        raise UserError(line, code)
