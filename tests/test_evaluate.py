"""The benchmark of prompt adherence, and the contact sheet."""

import runpy
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx_unet3d import media
from mlx_unet3d.checkpoints import find_folder

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "evaluate.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script in `tmp_path`, where `model` is a pipeline; returns the lines that it prints."""
    monkeypatch.chdir(tmp_path)
    tiny.write_pipeline(tmp_path / "model")
    limit = mx.set_memory_limit(10**12)
    mx.set_memory_limit(limit)

    def run(script, *options):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
        monkeypatch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out.strip().splitlines()

    yield run
    mx.set_memory_limit(limit)


def test_table(run, tmp_path):
    options = ["--model", "model", "--prompts", "2", "--reference", "clips.npz", "--guidance", "0"]
    lines = run(SCRIPT, *options, "--steps", "2", "3", "--saving", "none", "cache-2-1")
    header, _, first, cached, second, _ = lines
    assert header.startswith(
        "| scheduler | steps | guidance | dtype | quantized | UNet MB | saving | size | colour |"
    )
    assert first.startswith("| dpm++ | 2 | 0 | float32 | none |")
    assert first.endswith(" reference |")
    assert " cache-2-1 " in cached
    assert cached.endswith(" dB |")
    assert second.endswith(" dB |")
    assert "| 0 % |" in first  # of random weights
    again = run(SCRIPT, *options, "--steps", "2", "--batch", "1", "--save", "clips")
    compared = again[-1].split("|")[-2].strip()
    assert compared == "equal" or float(compared.removesuffix(" dB")) > 50
    assert len(list((tmp_path / "clips").glob("*.webp"))) == 2


def test_quantization_table(run):
    """The demo's weights are in half precision as they are; 8 bits change them by little, 4 by more."""
    options = ["--quantize", "none", "8", "4-32", "--shape", "2", "4", "4"]
    lines = run(ROOT / "benchmarks" / "quantization.py", find_folder("demo"), *options)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[0] for row in rows] == ["none", "8", "4-32"]
    assert rows[0][4] == "equal"
    bits = [float(row[2]) for row in rows]
    assert bits[0] == 16
    assert 16 > bits[1] > bits[2] > 4
    assert float(rows[1][4]) > float(rows[2][4]) + 6 > 16


def test_contact_sheet(run, tmp_path):
    script = ROOT / "examples" / "gallery" / "make.py"
    run(script, "--model", "model", "--output", "sheet.gif", "--steps", "1")
    frames, fps = media.read_video(tmp_path / "sheet.gif")
    assert frames.shape[0] == 8
    assert fps > 5
    assert media.read_metadata(tmp_path / "sheet.gif")["model"] == "model"
