"""The benchmark of prompt adherence, and the contact sheet."""

import subprocess
import sys
from pathlib import Path

import tiny
from mlx_unet3d import media
from mlx_unet3d.checkpoints import find_folder

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "evaluate.py"


def test_table(tmp_path):
    tiny.write_pipeline(tmp_path / "model")
    command = [sys.executable, str(SCRIPT), "--model", "model", "--prompts", "2", "--reference", "clips.npz"]
    done = subprocess.run(
        [*command, "--steps", "2", "3", "--guidance", "0", "--saving", "none", "cache-2-1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    header, _, first, cached, second, _ = done.stdout.strip().splitlines()
    assert header.startswith(
        "| scheduler | steps | guidance | dtype | quantized | UNet MB | saving | size | colour |"
    )
    assert first.startswith("| dpm++ | 2 | 0 | float32 | none |")
    assert first.endswith(" reference |")
    assert " cache-2-1 " in cached
    assert cached.endswith(" dB |")
    assert second.endswith(" dB |")
    assert "| 0 % |" in first  # of random weights
    again = subprocess.run(
        [*command, "--steps", "2", "--guidance", "0", "--batch", "1", "--save", "clips"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    compared = again.stdout.strip().splitlines()[-1].split("|")[-2].strip()
    assert compared == "equal" or float(compared.removesuffix(" dB")) > 50
    assert len(list((tmp_path / "clips").glob("*.webp"))) == 2


def test_quantization_table():
    """The demo's weights are in half precision as they are; 8 bits change them by little, 4 by more."""
    command = [sys.executable, str(ROOT / "benchmarks" / "quantization.py"), str(find_folder("demo"))]
    options = ["--quantize", "none", "8", "4-32", "--shape", "2", "4", "4"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.strip().splitlines()[2:]]
    assert [row[0] for row in rows] == ["none", "8", "4-32"]
    assert rows[0][4] == "equal"
    bits = [float(row[2]) for row in rows]
    assert bits[0] == 16
    assert 16 > bits[1] > bits[2] > 4
    assert float(rows[1][4]) > float(rows[2][4]) + 6 > 16


def test_contact_sheet(tmp_path):
    tiny.write_pipeline(tmp_path / "model")
    script = ROOT / "examples" / "gallery" / "make.py"
    options = ["--model", "model", "--output", "sheet.gif", "--steps", "1"]
    subprocess.run([sys.executable, str(script), *options], cwd=tmp_path, capture_output=True, check=True)
    frames, fps = media.read_video(tmp_path / "sheet.gif")
    assert frames.shape[0] == 8
    assert fps > 5
    assert media.read_metadata(tmp_path / "sheet.gif")["model"] == "model"
