"""Means over photos, and which of them is in bold."""

import csv

import pytest

from common.tables import summarise, to_markdown, write_tables

COLUMNS = {"deletion": "low", "insertion": "high", "sensitivity": "low", "evaluations": "low"}
IMAGES = [
    {"methods": {"chance": {"deletion": 0.0, "insertion": 0.1, "evaluations": 0},
                 "a": {"deletion": 0.2, "insertion": 0.6, "sensitivity": 0.5, "evaluations": 10},
                 "b": {"deletion": 0.25, "insertion": 0.9, "evaluations": 20}}},
    {"methods": {"chance": {"deletion": 0.0, "insertion": 0.1, "evaluations": 0},
                 "a": {"deletion": 0.4, "insertion": 0.6, "evaluations": 10}}},
]  # fmt: skip


def test_means_errors_and_numbers_of_photos():
    table = summarise(IMAGES, list(COLUMNS))
    # 0.2 and 0.4 deviate by 0.1 * sqrt(2) from their mean, which is thus known to 0.1
    assert table["a"]["deletion"] == pytest.approx((0.3, 0.1, 2))
    assert table["a"]["sensitivity"] == pytest.approx((0.5, 0, 1))  # of the photo that has it
    assert table["b"]["insertion"] == pytest.approx((0.9, 0, 1))
    assert "sensitivity" not in table["b"]


def test_the_best_is_bold_and_one_that_is_blind_is_not():
    table = summarise(IMAGES, ["deletion", "insertion", "evaluations"])
    assert to_markdown(table, COLUMNS, ("chance",)) == [
        "| method | deletion | insertion | evaluations |",
        "|---|---|---|---|",
        "| chance | 0.000 ± 0.000 | 0.100 ± 0.000 | 0 |",
        "| a | 0.300 ± 0.100 | 0.600 ± 0.000 | **10** |",
        "| b | **0.250** | **0.900** | 20 |",  # one photo has no error
    ]


def test_tables_are_written_without_checks_that_no_photo_has(tmp_path, capsys):
    table = summarise(IMAGES, ["deletion", "insertion", "evaluations"])
    write_tables(tmp_path, table, COLUMNS, ("chance", "centre"))
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["chance", "a", "b"]
    assert float(rows[1]["deletion error"]) == pytest.approx(0.1)
    assert rows[1]["deletion n"] == "2"
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "table.md").read_text().splitlines() == lines[:-1]
    assert lines[-1] == "high is good in insertion, low in the others; chance: blind, can't win"
