"""mlx-unet3d bench: a row of a table, with numbers that fit together."""

import mlx.core as mx
import pytest
import tiny
from mlx_unet3d import AutoencoderKL, memory
from mlx_unet3d.cli import main


def test_bench(tmp_path, capsys):
    folder = tiny.write_pipeline(tmp_path / "pipe")
    assert (
        main(["bench", "--model", str(folder), "--num-frames", "2", "--steps", "2", "--dtype", "float32"])
        == 0
    )
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 3
    header, rule, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set(rule) == {"---"}
    found = dict(zip(header, row, strict=True))
    assert found["video"] == "32x32x2, guided"
    assert found["dtype"] == "float32"
    assert found["model"] == str(folder)
    assert mx.__version__ in found["MLX"]
    networks = memory.read_networks(folder)
    work = memory.step_work(networks, memory.Video(2, 32, 32, guidance=True), mx.float32)
    seconds = float(found["s a step"])
    assert float(found["TFLOP/s"]) * seconds * 1e12 == pytest.approx(work.operations, rel=0.02)
    assert float(found["GB/s"]) * seconds * 1e9 == pytest.approx(work.moved, rel=0.02)
    assert 0 < float(found["peak GB"]) < 1
    whole = 50 * seconds + float(found["s to decode"])
    assert float(found["frames a second, 50 steps"]) == pytest.approx(2 / whole, rel=0.02)


@pytest.mark.parametrize("tiling", [False, True])
def test_tiling(tmp_path, monkeypatch, tiling):
    folder = tiny.write_pipeline(tmp_path / "pipe")
    found, decode = [], AutoencoderKL.decode

    def noting(self, *args, **options):
        found.append(self.use_tiling)
        return decode(self, *args, **options)

    monkeypatch.setattr(AutoencoderKL, "decode", noting)
    command = ["bench", "--model", str(folder), "--num-frames", "1", "--steps", "1"]
    assert main([*command, *["--vae-tiling"] * tiling]) == 0
    assert set(found) == {tiling}


def test_work_grows_with_the_video():
    networks = memory.read_networks("demo")
    one, two = (
        memory.step_work(networks, memory.Video(8, 64, 64, batch, guidance), mx.float16)
        for batch, guidance in ((1, False), (1, True))
    )
    assert 1.9 < two.operations / one.operations < 2.1
    assert 1 < two.moved / one.moved < 2.1  # weights are read once
