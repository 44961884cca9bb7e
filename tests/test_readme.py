"""The pages are executable: every command in them parses, and every path in them exists."""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "results/README.md", "benchmarks/README.md"]


def commands():
    """Collect the lines of all shell blocks, without comments.

    :return: page and command
    :rtype: list[tuple[str, str]]
    """
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page, line.split(" #")[0].strip()) for line in lines if line.strip()]
    return found


def load(script):
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_parse(page, command):
    """A command names a script or a make target that is there, with flags that it knows."""
    words = shlex.split(command)
    words = [word for word in words if not re.fullmatch(r"\w+=\S*", word)]  # VARIABLE=value
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        assert words[0] in ("git", "cd", "pip", ".venv/bin/pip", "python", "python3", "source")
        return
    parser = load(words[scripts[0]]).get_parser()
    arguments = words[scripts[0] + 1 :]
    try:
        parser.parse_args(arguments)
    except SystemExit as stop:
        pytest.fail(f"{command}: exit code {stop.code}")


def test_runs_that_commands_take_up_are_made_before():
    """Whatever --resume and --sample name is the --out of a command further up."""
    made = set()
    for _, command in commands():
        words = shlex.split(command)
        for flag, value in itertools.pairwise(words):
            if flag in ("--resume", "--sample"):
                assert value in made, command
        made |= {v for flag, v in itertools.pairwise(words) if flag == "--out"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Pictures and files that a page points to are in the repository."""
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)#\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [t for t in targets if not t.startswith("http")]
    assert local, "a page without a single link or picture"
    for target in local:
        assert ((ROOT / page).parent / target).exists(), target
