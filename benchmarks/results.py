"""Make the pictures and numbers of results/ and benchmarks/README.md again, and check the text.

    python benchmarks/results.py              # what has no run yet: hours; resumes where it stopped
    python benchmarks/results.py --only runs/mnist benchmarks/dcgan_quality.py
    python benchmarks/results.py --check      # a second: does the text still say what was measured?

The two pages are the recipe. Below a block of commands stands a comment, which readers don't see:

    <!-- runs/mnist
    epochs.gif -> dcgan_mnist.gif
    epochs.-1.d_real = 0.69
    -->

Its first line names the command, by its --out folder or, for a benchmark, by its script. A line
with an arrow copies a picture of the run folder to results/; a line with "=" says how the section
writes a value of metrics.json, or of the RESULT line. Values go to results/metrics.json as they
were measured; the check compares the text with them, to the digits that it gives.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.run import replacing

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("results/README.md", "benchmarks/README.md")
RECORD = ROOT / "results" / "metrics.json"
COMMENT = re.compile(r"<!-- (\S+)\n(.*?)-->", re.DOTALL)


# ------------------------------------------------------------------------- what the pages promise


def read_commands(text):
    """List the commands in a page's blocks of shell, each a list of words."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def read_page(text):
    """Find what a page promises.

    :param str text: the page, as Markdown
    :return: for each comment "name", "command" (a list of words), "files" ({source: target}),
        "values" ({path: text}) and "section", what its readers see
    :rtype: list[dict]
    :raises ValueError: if no command of the page has the comment's name
    """
    commands = read_commands(text)
    promises = []
    for section in re.split(r"^(?=#)", text, flags=re.MULTILINE):
        for name, body in COMMENT.findall(section):
            command = next((words for words in commands if name in words), None)
            if command is None:
                raise ValueError(f"no command makes {name}")
            promise = {
                "name": name,
                "command": command,
                "files": dict(re.findall(r"^(\S+) -> (.+)$", body, re.MULTILINE)),
                "values": dict(re.findall(r"^(\S+) = (.+)$", body, re.MULTILINE)),
                "section": COMMENT.sub("", section),
            }
            promises.append(promise)
    return promises


# -------------------------------------------------------------------------- what the pages say


def look_up(record, path):
    """Follow a path like "epochs.-1.d_real" into lists and dicts."""
    for key in path.split("."):
        record = record[int(key)] if isinstance(record, list) else record[key]
    return record


def write_like(value, text):
    """Write a number as a text does: as many digits after the point, as percent or as 1.3e-13."""
    number = re.fullmatch(r"[\d,]+\.?(\d*)(e-?\d+)?( ?%)?", text)
    if not number:
        return str(value)
    digits = len(number[1])
    if number[2]:
        return f"{value:.{digits}e}"
    if number[3]:
        return f"{100 * value:,.{digits}f}{number[3]}"
    return f"{value:,.{digits}f}"


def differences(promises, record):
    """Compare the pages with the record.

    :param list[dict] promises: of :func:`read_page`
    :param dict record: what results/metrics.json holds
    :return: one line for each text that doesn't say what was measured
    :rtype: list[str]
    """
    found = []
    for promise in promises:
        name = promise["name"]
        values = record.get(name, {})
        for path, text in promise["values"].items():
            as_a_word = rf"(?<![\d.,]){re.escape(text)}(?![\d]|[.,]\d)"
            if path not in values:
                found.append(f"{name}: {path} was never recorded: run make results")
            elif write_like(values[path], text) != text:
                found.append(f"{name}: {path} is {values[path]}, the text says {text}")
            elif not re.search(as_a_word, promise["section"]):
                found.append(f"{name}: {path} is {text}, which its section doesn't say")
    return found


# ----------------------------------------------------------------------------- making it again


def make(promise):
    """Run a command if its results aren't there, copy its pictures, and return what it measured.

    :param dict promise: of :func:`read_page`
    :return: what metrics.json or the RESULT line holds
    :rtype: dict
    """
    name = promise["name"]
    command = [sys.executable, *promise["command"][1:]]
    if name.endswith(".py"):
        folder = ROOT
        measured = ROOT / "runs" / "benchmarks" / f"{Path(name).stem}.json"
    else:
        folder = ROOT / name
        measured = folder / "metrics.json"
        if (folder / "checkpoint.pt").is_file() or (folder / "records").is_dir():
            command = [*command[:2], "--resume", name]  # it was stopped
    if not measured.is_file():
        print("runs    ", shlex.join(command), flush=True)
        output = subprocess.PIPE if folder == ROOT else None
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=output, text=True)
        if output:  # a benchmark writes no file
            print(done.stdout)
            measured.parent.mkdir(parents=True, exist_ok=True)
            with replacing(measured) as part:
                part.write_text(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    for source, target in promise["files"].items():
        shutil.copyfile(folder / source, ROOT / "results" / target)
    return json.loads(measured.read_text())


# ------------------------------------------------------------------------------------ the script


def get_parser():
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only, run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the comments, not all")
    return parser


def main(argv=None):
    """Make what is missing, record it, and say where the text is out of date.

    :return: 0, or 1 if the text doesn't say what was measured
    :rtype: int
    """
    args = get_parser().parse_args(argv)
    promises = []
    for page in PAGES:
        promises += read_page((ROOT / page).read_text(encoding="utf-8"))
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    for promise in promises:
        name = promise["name"]
        if args.check or (args.only and name not in args.only):
            continue
        found = make(promise)
        record[name] = {path: look_up(found, path) for path in promise["values"]}
        with replacing(RECORD) as part:
            part.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    wrong = differences(promises, record)
    for line in wrong:
        print(line)
    if not wrong:
        print(f"{len(promises)} runs: the text says what was measured")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
