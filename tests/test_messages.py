"""tests/README.md lists what is said when something goes wrong: all of it, and nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {"UserError", "NotThereError", "Interrupted"}


def literals(tree):
    """Collect the fixed parts of the strings in a syntax tree, without what goes between them."""
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and type(n.value) is str]


def trees():
    """Parse the scripts and common/."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("common/*.py")]
    return {file.name: ast.parse(file.read_text(encoding="utf-8")) for file in files}


def raised():
    """Find the longest fixed part of each error that is made in the code.

    :return: where, and the part
    :rtype: list[tuple[str, str]]
    """
    found = []
    for name, tree in trees().items():
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        for call in calls:
            if getattr(call.func, "id", None) in ERRORS:
                part = max(literals(call), key=len, default="")
                found += [(f"{name}: {part.strip()[:40]}", part)] if len(part) > 7 else []
    return sorted(set(found))


def rows():
    """Read the first column of the table."""
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return [cell for cell in cells[1:] if not cell.startswith("**")]


@pytest.mark.parametrize("part", [pytest.param(part, id=where) for where, part in raised()])
def test_every_error_is_in_the_table(part):
    """Whoever adds one reviews it there: what is wrong, and what to do next, in one line."""
    assert part.strip() in (ROOT / "tests" / "README.md").read_text(encoding="utf-8")


def test_every_row_is_in_the_code():
    """A line that nothing says any more is taken out of the table."""
    parts = {part.strip() for tree in trees().values() for part in literals(tree)}
    parts = [part for part in parts if len(part) > 7]
    assert len(rows()) > 50
    assert not [row for row in rows() if not any(part in row for part in parts)]
