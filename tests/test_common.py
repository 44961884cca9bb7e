"""What common/ is: shared by the scripts, and independent of them; one way to read a picture."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {file.stem: file for file in sorted((ROOT / "common").glob("[!_]*.py"))}
SCRIPTS = {file.stem: file for file in sorted(ROOT.glob("*.py"))}
EACH = pytest.mark.parametrize("module", MODULES)


def parse(file):
    """Parse a file of Python."""
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(nodes):
    """Return the full names of the modules that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@EACH
def test_a_module_needs_no_script_and_no_command_line(module):
    """Nothing of it is imported with a module; at work, one needs the network of a run."""
    names = imported(ast.walk(parse(MODULES[module])))
    assert "argparse" not in names
    assert not names & set(SCRIPTS) - ({"train_classifier"} if module == "classifiers" else set())
    assert not imported(parse(MODULES[module]).body) & set(SCRIPTS)


@EACH
def test_a_module_serves_two_scripts(module):
    """What one script alone needs stands in that script, but for three that are long to read."""
    users = [
        name for name, file in SCRIPTS.items()
        if f"common.{module}" in imported(ast.walk(parse(file)))
    ]  # fmt: skip
    # The glyphs are a dataset of common/data.py, Lite0 a network of common/classifiers.py.
    wanted = {"fid": ["train_dcgan"], "glyphs": [], "lite0": []}
    assert users == wanted[module] if module in wanted else len(users) >= 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_ctrl_c_before_it_imports_torch(script):
    """The first import that isn't Python's own is that of what answers."""
    names = [ast.unparse(node) for node in parse(SCRIPTS[script]).body if isinstance(
        node, (ast.Import, ast.ImportFrom))]  # fmt: skip
    slow = [name for name in names if name.split()[1].split(".")[0] not in sys.stdlib_module_names]
    assert slow[0] == "import common"


def test_pictures_are_opened_in_one_place_only():
    """Elsewhere one would be read without its profile, its orientation, a limit to its size."""
    openers = set()
    for name, file in (MODULES | SCRIPTS).items():
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "Image.open",
                "iio.imread",
            ):
                openers.add(name)
    assert openers == {"images"}
