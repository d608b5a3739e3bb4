"""mlx-unet3d plan, and --memory of generate."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx_unet3d import MotionAdapter, media, memory
from mlx_unet3d.chips import working_set
from mlx_unet3d.cli import generate, main
from seeded import CONFIGS
from tiny import write_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("plan") / "pipeline")


@pytest.fixture
def configs(folder, tmp_path):
    """The folder without its weights."""
    copy = tmp_path / "configs"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


@pytest.fixture
def limits():
    before = mx.set_memory_limit(10**12), mx.set_cache_limit(10**9)
    yield
    mx.set_memory_limit(before[0])
    mx.set_cache_limit(before[1])


def test_plan_reads_configs_alone(configs, capsys):
    assert main(["plan", "--model", str(configs), "--frames", "2", "--height", "32", "--width", "64"]) == 0
    out = capsys.readouterr().out
    assert "2 frames of 64x32, with guidance, float32" in out or mx.default_device() == mx.gpu
    for stage in ("prompt", "denoise", "decode"):
        assert f"\n{stage} " in out
    assert "this machine" in out
    assert "defaults" in out


def test_plan_for_a_chip_and_a_memory(configs, capsys):
    command = ["plan", "--model", str(configs), "--frames", "1", "--chip", "m2-max"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "M2 Max with 32 GB" in out
    assert "s a step at its peak rates" in out
    assert "32x32, with guidance, float16" in out
    assert main([*command, "--memory", "96GB", "--guidance", "1", "--video-to-video"]) == 0
    out = capsys.readouterr().out
    assert "M2 Max with 96 GB" in out
    assert "without guidance" in out
    assert "\nencode " in out


def test_plan_takes_the_frames_that_a_checkpoint_recommends(configs, capsys):
    index = json.loads((configs / "model_index.json").read_text())
    index["_recommended"] = {"num_frames": 3}
    (configs / "model_index.json").write_text(json.dumps(index))
    assert main(["plan", "--model", str(configs), "--memory", "8"]) == 0
    assert "3 frames of 32x32" in capsys.readouterr().out


def test_plan_counts_cached_features(configs, capsys):
    command = ["plan", "--model", str(configs), "--frames", "2", "--height", "256", "--width", "256"]

    def peak(*options):
        assert main([*command, *options]) == 0
        (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("denoise"))
        return float(line.split()[3])

    assert peak("--cache-depth", "2") >= peak()
    assert main([*command, "--cache-depth", "9"]) == 2
    assert "depth of a feature cache is 9" in capsys.readouterr().err


def test_plan_of_a_frame_that_is_too_large_for_one_array(configs, capsys):
    command = ["plan", "--model", str(configs), "--frames", "1", "--height", "16384", "--width", "16384"]
    assert main(command) == 2
    assert "--vae-tiling" in capsys.readouterr().err


def test_plan_with_tiles(configs, capsys):
    config = json.loads((configs / "vae" / "config.json").read_text())
    (configs / "vae" / "config.json").write_text(json.dumps(config | {"sample_size": 64}))
    command = ["plan", "--model", str(configs), "--frames", "1", "--height", "512", "--width", "512"]

    def peak(*options):
        assert main([*command, *options]) == 0
        (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("decode"))
        return float(line.split()[3])

    assert peak("--vae-tiling") < 0.5 * peak()


def test_plan_says_what_fits_instead(configs, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 700_000)
    command = ["plan", "--model", str(configs), "--frames", "8", "--height", "256", "--width", "256"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "the nearest that fits" in out or "nor does any smaller video" in out


VISION = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
VISION |= dict(projection_dim=12, image_size=16, patch_size=8)
FLAT = dict(_class_name="UNet2DConditionModel", cross_attention_dim=12, attention_head_dim=2)
FLAT |= dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=8)
FLAT |= dict(
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
ADAPTER = dict(_class_name="MotionAdapter", block_out_channels=(16, 32), motion_layers_per_block=1)
ADAPTER |= dict(motion_num_attention_heads=2, motion_norm_num_groups=8, motion_max_seq_length=16)


def family_folder(configs, kind):
    """The configs of a pipeline with another UNet."""
    parts = {"unet": CONFIGS.get(kind, {}) | {"_class_name": kind}}
    if kind == "MotionAdapter":
        parts = {"unet": FLAT, "motion_adapter": ADAPTER}
    if kind.startswith("UNetSpatio"):
        name = "AutoencoderKLTemporalDecoder"
        parts["vae"] = CONFIGS[name] | {"_class_name": name}
    if kind in ("UNetSpatioTemporalConditionModel", "I2VGenXLUNet"):
        parts["image_encoder"] = VISION | {"_class_name": "CLIPVisionModelWithProjection"}
    index = json.loads((configs / "model_index.json").read_text())
    for name, config in parts.items():
        (configs / name).mkdir(exist_ok=True)
        (configs / name / "config.json").write_text(json.dumps(config))
        index[name] = ["diffusers", config["_class_name"]]
    (configs / "model_index.json").write_text(json.dumps(index))
    return configs


def test_plan_of_a_motion_adapter_elsewhere(configs, tmp_path, capsys):
    """Stable Diffusion and motion modules: a folder, a file of theirs, and models into which none go."""
    whole = memory.read_networks(family_folder(configs, "MotionAdapter"))
    index = json.loads((configs / "model_index.json").read_text())
    index.pop("motion_adapter")
    (configs / "model_index.json").write_text(json.dumps(index))
    elsewhere = (configs / "motion_adapter").rename(tmp_path / "elsewhere")
    config = {k: v for k, v in ADAPTER.items() if k != "_class_name"}
    MotionAdapter(**config).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "mm.safetensors")
    for adapter in (elsewhere, tmp_path / "mm.safetensors"):
        found = memory.read_networks(configs, motion_adapter=adapter)
        assert found.unet.kind is whole.unet.kind
        assert found.unet.nbytes(mx.float16) == whole.unet.nbytes(mx.float16)
        words = ["plan", "--model", str(configs), "--motion-adapter", str(adapter), "--num-frames", "2"]
        assert main(words) == 0
        assert "2 frames of 64x64" in capsys.readouterr().out
    assert main(["plan", "--model", str(configs)]) == 2
    assert "--motion-adapter" in capsys.readouterr().err
    assert main(["plan", "--motion-adapter", str(elsewhere)]) == 2
    assert "UNet3DConditionModel, into which no motion adapter goes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "video", "stages"),
    [
        ("UNetMotionModel", "16 frames of 64x64", ["prompt", "denoise", "decode"]),
        ("MotionAdapter", "16 frames of 64x64", ["prompt", "denoise", "decode"]),
        (
            "UNetSpatioTemporalConditionModel",
            "25 frames of 1024x576",
            ["image", "encode", "denoise", "decode"],
        ),
        ("I2VGenXLUNet", "16 frames of 1280x704", ["prompt", "image", "encode", "denoise", "decode"]),
    ],
)
def test_plan_of_the_family(configs, kind, video, stages):
    networks = memory.read_networks(family_folder(configs, kind))
    height, width = networks.default_size
    assert str(memory.Video(networks.default_frames, height, width)) == video
    small = dict(num_frames=2, height=32, width=32, backend="cpu", dtype=mx.float32)
    found = memory.plan(networks, **small)
    assert [stage.name for stage in found.stages] == stages
    single = memory.plan(networks, **small, guidance=False)
    assert single.stages[-2].peak < found.stages[-2].peak
    if kind.startswith("UNetSpatio"):
        by_frame = memory.plan(networks, **small, decode_chunk_size=1)
        assert by_frame.stages[-1].peak < found.stages[-1].peak
        with pytest.raises(ValueError, match="decode_chunk_size=0"):
            memory.plan(networks, **small, decode_chunk_size=0)


def test_plan_refuses(configs, capsys):
    for options, message in (
        (["--chip", "M0"], "not in the table"),
        (["--memory", "much"], "such as 16GB"),
    ):
        with pytest.raises(SystemExit):
            main(["plan", "--model", str(configs), *options])
        assert message in capsys.readouterr().err
    assert main(["plan", "--model", str(configs), "--height", "33"]) == 2
    assert "multiple of 8" in capsys.readouterr().err


def generated(folder, output, *options):
    arguments = ["generate", "a cat", "--num-frames=2", "--steps=2", "--overwrite"]
    assert main([*arguments, "--model", str(folder), "-o", str(output), *options]) == 0
    return media.read_video(output)[0], media.read_metadata(output)


def test_generate_chooses_settings_that_leave_the_video_as_it_is(
    folder, tmp_path, capsys, monkeypatch, limits
):
    output = tmp_path / "video.png"
    expected, metadata = generated(folder, output, "--memory", "off")
    assert "memory: " not in capsys.readouterr().err
    chosen = memory.Settings(sequential_guidance=True, frames=1, pixels=4)
    plan = memory.Plan(memory.Video(2, 32, 32), chosen, (memory.Stage("denoise", 1, 10, 1, ""),), budget=100)
    applied = []
    monkeypatch.setattr(memory, "plan", lambda *_, **options: applied.append(options) or plan)
    frames, same = generated(folder, output)
    assert "memory: guidance in two passes" in capsys.readouterr().err
    assert applied[0]["num_frames"] == 2
    assert applied[0]["guidance"]
    assert abs(frames.astype(int) - expected.astype(int)).max() <= 1
    assert same == metadata


def test_generate_takes_a_size_and_sets_limits(folder, tmp_path, capsys, limits):
    generated(folder, tmp_path / "video.png", "--memory", "8GB")
    assert mx.set_memory_limit(10**12) == working_set(8)
    assert "peak memory" in capsys.readouterr().err


def test_generate_says_where_it_may_not_fit(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1000)
    generated(folder, tmp_path / "video.png")
    assert "memory: this may not fit" in capsys.readouterr().err


def test_the_option_is_checked(capsys):
    assert generate.memory_option("auto") == "auto"
    assert generate.memory_option("16GB") == 16
    with pytest.raises(SystemExit):
        main(["generate", "a cat", "--memory", "none"])
    assert "such as 16GB" in capsys.readouterr().err
