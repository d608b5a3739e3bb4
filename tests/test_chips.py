"""The table of chips: its arithmetic, its names and its refusals."""

import itertools

import pytest
from mlx_unet3d.chips import CHIPS, GIB, find_chip, working_set


def test_peak_rates():
    assert CHIPS["M1 Max"].fp16_tflops == pytest.approx(10.6, abs=0.05)
    assert CHIPS["M2 Max"].fp16_tflops == CHIPS["M2 Max"].matmul_tflops == pytest.approx(13.6, abs=0.05)
    assert CHIPS["M5 Max"].matmul_tflops == 4 * CHIPS["M5 Max"].fp16_tflops


def test_larger_chips_are_faster():
    for generation in "M1", "M2", "M3", "M4", "M5":
        family = [chip for name, chip in CHIPS.items() if name.split()[0] == generation]
        for small, large in itertools.pairwise(family):
            assert small.fp16_tflops < large.fp16_tflops
            assert small.gb_per_s < large.gb_per_s
            assert max(small.memory_gib) < max(large.memory_gib)


def test_working_set():
    assert working_set(8) == int(8 * GIB * 2 / 3)
    assert working_set(128) == 96 * GIB
    assert CHIPS["M2"].working_sets()[24] == 16 * GIB
    with pytest.raises(ValueError, match="memory_gib=0 must be at least 1"):
        working_set(0)


@pytest.mark.parametrize("name", ["M2 Max", "m2-max", "Apple M2 Max", "apple m2 max"])
def test_names(name):
    assert find_chip(name) is CHIPS["M2 Max"]


@pytest.mark.parametrize("name", ["M2 Maxi", "", "Apple", "A18", "M9"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="not in the table; use one of M1, M1 Pro"):
        find_chip(name)
