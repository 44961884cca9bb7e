"""Watch a run while it goes on: its table and its pictures in TensorBoard."""

import contextlib
import json
import re
import shutil

import numpy as np
from PIL import Image

from common.device import is_first
from common.errors import UserError

_shown = {}  # by run folder: its SummaryWriter; how many rows, and which records that was given


def watch(folder):
    """Show a run in TensorBoard from now on; ``tensorboard --logdir FOLDER`` draws it.

    What the run writes by :func:`common.run.write_csv` and :func:`common.images.save_png` is shown
    as well, and the records of :func:`common.gallery.explain_photos`. A resumed run is shown from
    its beginning: its events are written anew.

    :param pathlib.Path folder: the run folder
    :raises UserError: if the package is missing
    """
    if not is_first():
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs another package: pip install tensorboard") from error
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    _shown[folder] = [SummaryWriter(folder / "tensorboard", flush_secs=5), 0, set()]
    for file in sorted(folder.rglob("*.png")):
        show_picture(file, np.asarray(Image.open(file)))
    show_records(folder)


def show_rows(folder, rows):
    """Show the numbers of a table's new rows, against its first column.

    :param pathlib.Path folder: the run folder; one that nobody watches costs nothing
    :param list[dict] rows: all rows
    """
    if folder not in _shown:
        return
    writer, count, _ = _shown[folder]
    for row in rows[count:]:
        step, *names = row
        for name in names:
            writer.add_scalar(name, row[name], row[step])
    writer.flush()
    _shown[folder][1] = len(rows)


def show_picture(path, picture):
    """Show a picture whose name ends in the number of its epoch, as samples/epoch_012.png does.

    :param pathlib.Path path: its file
    :param numpy.ndarray picture: uint8, (H, W, 3)
    """
    number = re.fullmatch(r"(.*)_(\d+)", path.stem)
    for folder in _shown.keys() & set(path.parents):
        if number:
            name = (path.parent / number[1]).relative_to(folder).as_posix()
            _shown[folder][0].add_image(name, picture, int(number[2]), dataformats="HWC")


def show_records(folder):
    """Show the photos that were explained since the last call: the trace and the mask of each.

    :param pathlib.Path folder: the run folder; one that nobody watches costs nothing
    """
    if folder not in _shown:
        return
    writer, _, known = _shown[folder]
    for file in sorted((folder / "records").glob("[!.]*.json")):
        if file.stem in known:
            continue
        with contextlib.suppress(ValueError, OSError):  # damaged: it will be explained again
            trace = json.loads(file.read_text(encoding="utf-8")).get("trace", [])
            mask = folder / f"{file.stem}_mask.png"
            if mask.is_file():
                picture = np.asarray(Image.open(mask).convert("RGB"))
                writer.add_image(f"{file.stem}/mask", picture, dataformats="HWC")
            for row in trace:
                step, *names = row
                for name in names:
                    writer.add_scalar(f"{file.stem}/{name}", row[name], row[step])
            known.add(file.stem)
    writer.flush()
