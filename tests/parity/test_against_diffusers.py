"""The benchmark against diffusers, on a tiny network."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from reference import unet_pair

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location(
        "against_diffusers", ROOT / "benchmarks" / "against_diffusers.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table(benchmark, tmp_path, capsys):
    unet_pair(tmp_path)
    rows = benchmark.main(["--model", str(tmp_path), "--sizes", "1x2x8x8", "2x1x6x8", "--repeats", "3"])
    assert [row.size for row in rows] == [(1, 2, 8, 8), (2, 1, 6, 8)]
    for row in rows:
        assert row.error < 1e-5
        assert row.peak > 1 * 2 * 8 * 8 * 32 * 4  # a state of the first level, at least
        assert len(row.ours) == len(row.theirs) == 3
        assert min(row.ours + row.theirs) > 0
    lines = capsys.readouterr().out.splitlines()
    assert "float32" in lines[0]
    assert "torch" in lines[0]
    assert lines[2].startswith("| B x F x H x W |")
    assert lines[4].startswith("| 1x2x8x8 |")
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_quantiles(benchmark):
    row = benchmark.Row((1, 1, 1, 1), 0.0, 0, theirs=[2.0, 2.0, 2.0], ours=[1.0, 2.0, 4.0])
    assert row.ratios == [0.5, 1.0, 2.0]
    assert "| 1.00 | 0.75 to 1.50 |" in str(row)


def test_size(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--sizes", "1x2x3"])
    assert "'1x2x3' is not BxFxHxW" in capsys.readouterr().err
