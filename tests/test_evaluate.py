"""The benchmark of prompt adherence: a row a setting, the clips kept and compared with."""

import subprocess
import sys
from pathlib import Path

import tiny

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "evaluate.py"


def test_table(tmp_path):
    tiny.write_pipeline(tmp_path / "model")
    command = [sys.executable, str(SCRIPT), "--model", "model", "--prompts", "2", "--reference", "clips.npz"]
    done = subprocess.run(
        [*command, "--steps", "2", "3", "--guidance", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    header, _, first, second = done.stdout.strip().splitlines()
    assert header.startswith("| scheduler | steps | guidance | dtype | size | colour | shape | motion |")
    assert first.startswith("| dpm++ | 2 | 0 | float32 |")
    assert first.endswith(" reference |")
    assert second.endswith(" dB |")
    assert "| 0 % |" in first  # of random weights
    again = subprocess.run(
        [*command, "--steps", "2", "--guidance", "0", "--batch", "1", "--save", "clips"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip().splitlines()[-1].split("|")[-2].strip() == "equal"
    assert len(list((tmp_path / "clips").glob("*.webp"))) == 2
