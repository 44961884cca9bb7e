"""The script that runs all that wants a GPU: what it reads, and that results are kept at once."""

import json
import time

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Check, Figure
from tests.helpers import refusal


@pytest.mark.parametrize(
    ("figure", "reached", "row"),
    [
        (Figure("a", 5.123, at_least=5), True, "| a | 5.123 | ≥ 5: reached |"),
        (Figure("a", 4.9, at_least=5), False, "| a | 4.9 | ≥ 5: missed |"),
        (Figure("a", 0.15, at_most=0.15), True, "| a | 0.15 | ≤ 0.15: reached |"),
        (Figure("a", 12345.6, at_least=15000), False, "| a | 12,346 | ≥ 15,000: missed |"),
        (Figure("a", float("nan"), at_most=1), False, "| a | nan | ≤ 1: missed |"),
        (Figure("a", 0.99994), None, "| a | 0.99994 |  |"),
    ],
)
def test_a_figure_beside_its_goal(figure, reached, row):
    """Reached or missed, at the goal itself reached; without a goal neither."""
    assert figure.reached() is reached
    assert figure.row() == row


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    """One line, and nothing on the disk."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in refusal(gpu.main, ["--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


def test_figures_of_each_benchmark():
    """From the keys that they print: ratios of times, of memory, and what follows from them."""
    speed = {"images_per_second_ours": 50_000, "ratio_ours": 5.5, "ratio_bfloat16": 5.9}
    assert [f.reached() for f in gpu.read_dcgan_speed(speed)] == [True, False, None, True, True]
    captum = {"mb_ours_100": 3000, "mb_captum_100": 8000, "mb_captum_10_at_once_100": 9, "r_min": 1,
              "mb_ours_100_increase": 1, "mb_pair_100": 1, "mb_pair_100_increase": 7,
              "ratio_vs_captum_default": 2, "ratio_vs_captum_ig": 3,
              "copies_per_second": 16_000}  # fmt: skip
    figures = gpu.read_captum(captum)
    assert [f.value for f in figures] == [2, 0.375, 16_000, 3, 1]
    assert [f.reached() for f in figures] == [False, True, True, None, True]
    ports = {"ratio_ours_defaults": 10, "ratio_TorchRay": 0.1}
    assert gpu.read_ports(ports)[1].value == 100
    images = [{"seconds": 9, "methods": {"random": {"sensitivity": 1}}},
              {"seconds": 1, "methods": {"random": {}}}]  # fmt: skip
    assert gpu.read_comparison({"images": images})[2].value == 80 * 1 + 24 * 9


def test_results_are_written_as_they_come(tmp_path, monkeypatch, capsys):
    """What was measured before a check that fails, or that takes too long, is there already."""
    folder = tmp_path / "run"

    def read(found):
        return [Figure("value", found["value"], at_least=1)]

    def make_checks(folder, rehearse):
        look = f"print(open({str(folder / 'table.md')!r}).read())"
        return [
            Check("one", ["-c", "print('RESULT {\"value\": 7}')"], read, 60),
            Check("two", ["-c", f"{look}; raise SystemExit('no data')"], read, 60),
            Check("three", ["-c", "import time; time.sleep(60)"], read, 1),
        ]

    monkeypatch.setattr(gpu, "make_checks", make_checks)
    began = time.monotonic()
    result = gpu.main(["--rehearse", "--out", str(folder), "--only", "one", "two", "three"])
    assert time.monotonic() - began < 50
    assert result == {"value": 7}
    assert "| value | 7 | ≥ 1: reached |" in (folder / "two.txt").read_text()
    rows = (folder / "table.md").read_text().splitlines()[4:]
    assert rows == [
        "| value | 7 | ≥ 1: reached |", "| two | failed: no data | |",
        "| three | failed: not done after 1 s | |",
    ]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert any("1 of 1 goals reached" in line for line in lines)
    assert json.loads(lines[-1].removeprefix("RESULT ")) == result
    assert len(list((folder / "photos").glob("*.png"))) == 6


def test_every_check_is_a_command_that_its_script_takes(tmp_path):
    """At full size and in small: flags that exist, photos that are there."""
    for rehearse in (False, True):
        folder = tmp_path / str(rehearse)
        folder.mkdir()
        gpu.make_photos(folder / "photos", 8)
        for check in gpu.make_checks(folder, rehearse):
            script = __import__(check.words[0].removesuffix(".py").replace("/", "."), fromlist="_")
            args = script.get_parser().parse_args(check.words[1:])
            assert args.cuda is not rehearse
            assert 0 < check.seconds < gpu.LIMIT
