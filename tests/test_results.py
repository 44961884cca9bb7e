"""The gallery's text says what was measured."""

import pytest

from benchmarks import results

PAGE = """# Gallery

## One

```sh
python train_dcgan.py --dataset mnist \\
    --out runs/one
python benchmarks/speed.py --rounds 3  # a benchmark
```

<!-- runs/one
samples/a.png -> one.png
epochs.-1.d_real = 0.69
accuracy = 99.7 %
-->

D(x) is 0.69 and 99.7 % are right.

## Two

<!-- benchmarks/speed.py
ratio = 2.1
-->

It is 2.1 times as fast.
"""
RECORD = {
    "runs/one": {"epochs.-1.d_real": 0.6859, "accuracy": 0.9972},
    "benchmarks/speed.py": {"ratio": 2.09},
}


def test_this_repository_says_what_was_measured():
    """Every number that a comment of the two pages names, to the digits that the text gives."""
    assert results.main(["--check"]) == 0


def test_reads_a_page():
    one, two = results.read_page(PAGE)
    assert one["command"][-2:] == ["--out", "runs/one"]
    assert one["files"] == {"samples/a.png": "one.png"}
    assert one["values"] == {"epochs.-1.d_real": "0.69", "accuracy": "99.7 %"}
    assert "<!--" not in one["section"]
    assert "It is" not in one["section"]
    assert two["command"] == ["python", "benchmarks/speed.py", "--rounds", "3"]
    assert results.differences([one, two], RECORD) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("d_real = 0.69", "d_real = 0.70", "is 0.6859, the text says 0.70"),
        ("D(x) is 0.69", "D(x) is 0.693", "which its section doesn't say"),
        ("It is 2.1", "It is 12.1", "which its section doesn't say"),
        ("accuracy =", "precision =", "was never recorded"),
    ],
)
def test_finds_what_is_out_of_date(old, new, line):
    found = results.differences(results.read_page(PAGE.replace(old, new)), RECORD)
    assert len(found) == 1
    assert line in found[0]


def test_a_run_that_nothing_makes_is_refused():
    with pytest.raises(ValueError, match="no command makes runs/three"):
        results.read_page(PAGE.replace("<!-- runs/one", "<!-- runs/three"))


@pytest.mark.parametrize(
    ("value", "text", "written"),
    [
        (0.6859, "0.69", "0.69"),
        (0.9972, "99.7 %", "99.7 %"),
        (1440.2, "1,440", "1,440"),
        (0.9972, "100%", "100%"),
        (1.2978e-13, "1.3e-13", "1.3e-13"),
        ("espresso", "espresso", "espresso"),
    ],
)
def test_writes_numbers_as_the_text_does(value, text, written):
    assert results.write_like(value, text) == written


def test_makes_what_is_missing_and_takes_what_is_there(tmp_path, monkeypatch):
    """A run that exists isn't run again, one that was stopped goes on; pictures are copied."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    run = tmp_path / "runs" / "one"
    for folder in (tmp_path / "results", tmp_path / "benchmarks", run / "samples", run / "records"):
        folder.mkdir(parents=True)
    (run / "samples" / "a.png").write_bytes(b"picture")
    speed = tmp_path / "benchmarks" / "speed.py"
    speed.write_text("print('a table')\nprint('RESULT {\"ratio\": 2.09}')\n")
    train = tmp_path / "train_dcgan.py"
    train.write_text(
        "import json, pathlib, sys\n"
        "pathlib.Path('runs/one/metrics.json').write_text(json.dumps({'words': sys.argv[1:]}))\n"
    )
    one, two = results.read_page(PAGE)
    for _ in range(2):
        assert results.make(one) == {"words": ["--resume", "runs/one"]}
        assert results.make(two) == {"ratio": 2.09}
        train.unlink(missing_ok=True)
        speed.unlink(missing_ok=True)
    assert (tmp_path / "results" / "one.png").read_bytes() == b"picture"


def test_follows_a_path():
    metrics = {"epochs": [{"d_real": 0.5}, {"d_real": 0.6859}]}
    assert results.look_up(metrics, "epochs.-1.d_real") == 0.6859
    with pytest.raises(LookupError):
        results.look_up(metrics, "epochs.7.d_real")
