"""The README's commands and programs run as they stand, the examples too.

The checkpoint of the README is a tiny untrained one here, in a hub cache as a download leaves it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, media
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "damo-vilab/text-to-video-ms-1.7b"
LORA = (("A", (1, 4, 3, 3)), ("B", (8, 1, 1, 1)))  # of the tiny network's first layer
BY_CI = ("Make a video", "With uv", "With pip", "Tests")  # sections whose commands `.ci/run` runs


def sections() -> dict[str, str]:
    parts = re.split(r"^##+ (.+)\n", README, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


IMAGE_MODELS = {
    "stabilityai/stable-video-diffusion-img2vid-xt": tiny.write_stable_video,
    "ali-vilab/i2vgen-xl": tiny.write_i2vgen_xl,
}
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
MOTION_ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-3"


def cached(hub: Path, hub_id: str) -> Path:
    """The folder of a hub id in a cache, as a download makes it."""
    model = hub / f"models--{hub_id.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the examples, and the environment in which the hub is a cache and nothing else."""
    folder = tmp_path_factory.mktemp("readme")
    hub = folder / "hub"
    snapshot = cached(hub, HUB_ID)
    tiny.write_pipeline(snapshot)
    for hub_id, write in IMAGE_MODELS.items():
        write(cached(hub, hub_id))
    tiny.write_stable_diffusion(cached(hub, STABLE_DIFFUSION), cached(hub, MOTION_ADAPTER))
    Image.new("RGB", (60, 40), "teal").save(folder / "photo.jpg")
    pipe = TextToVideoPipeline.from_pretrained(snapshot)
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).save_pretrained(snapshot / name, variant="fp16")
    lora = {f"conv_in.lora_{half}.weight": mx.zeros(shape) for half, shape in LORA}
    mx.save_safetensors(str(folder / "style.safetensors"), lora)
    shutil.copytree(ROOT / "examples", folder / "examples")
    scripts = Path(sys.executable).parent
    environment = os.environ | {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "MLX_UNET3D_CONFIG": str(folder / "config.toml"),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONWARNINGS": "error",
    }
    return folder, environment


def run(place, command: str | list[str]) -> str:
    folder, environment = place
    done = subprocess.run(
        command, cwd=folder, env=environment, shell=isinstance(command, str), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands(place):
    commands = [
        line
        for name, text in sections().items()
        if name not in BY_CI
        for block in blocks(text, "sh")
        for line in block.splitlines()
    ]
    assert any(line.startswith("mlx-unet3d generate") for line in commands)
    for command in commands:
        if ".mp4" in command and media.encoders()[".mp4"] is None:
            continue
        printed = run(place, command)
        for name in re.findall(r"-o (\S+)", command):
            if command.startswith("mlx-unet3d compare"):  # which prints a table
                assert (place[0] / name).exists()
                continue
            # Several videos have their seeds in their names.
            assert all((place[0] / line).exists() for line in printed.split()), printed
            assert Path(name).stem in printed
    assert media.read_metadata(place[0] / "panda.gif")["prompt"] == "a panda surfing a wave"


def test_the_rest_of_the_commands_is_run_by_ci():
    script = (ROOT / ".ci" / "run").read_text()
    for name in BY_CI:
        assert blocks(sections()[name], "sh")
        assert re.search(rf'readme "?{name}\b', script)


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_programs(place, number):
    run(place, [sys.executable, "-c", blocks(README, "python")[number]])


EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


SMALL = {
    "animatediff.py": ["--frames", "2", "--steps", "2"],
    "memory.py": ["--frames", "2", "--size", "64"],
    "text_to_video.py": ["--frames", "2"],
    "video_to_video.py": ["--frames", "2"],
    "stable_video.py": ["photo.jpg", "--steps", "2"],
    "i2vgen_xl.py": ["photo.jpg", "a boat", "--steps", "2"],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(place, name):
    assert run(place, [sys.executable, f"examples/{name}", *SMALL[name]])
    assert name in (place[0] / "examples" / name).read_text()  # its command stands in its docstring


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_names_of_the_package(place):
    """What the text names as `mlx_unet3d.` and more is there after `import mlx_unet3d` alone."""
    names = sorted(set(re.findall(r"`(mlx_unet3d(?:\.\w+)+)", README)))
    assert "mlx_unet3d.memory.plan" in names
    run(place, [sys.executable, "-c", "; ".join(["import mlx_unet3d", *names])])
