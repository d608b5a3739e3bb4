"""The README's commands and programs run as they stand, the examples too.

The checkpoint of the README is a tiny untrained one here, in a hub cache as a download leaves it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import MotionAdapter, TextToVideoPipeline, UNet3DConditionModel, media
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "from_diffusers.md").read_text(encoding="utf-8")
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
LCM_LORA = "latent-consistency/lcm-lora-sdv1-5"
MOTION_ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-3"


def cached(hub: Path, hub_id: str) -> Path:
    """The folder of a hub id in a cache, as a download makes it."""
    model = hub / f"models--{hub_id.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    snapshot = snapshot_of(hub, hub_id)
    snapshot.mkdir(parents=True)
    return snapshot


def snapshot_of(hub: Path, hub_id: str) -> Path:
    return hub / f"models--{hub_id.replace('/', '--')}" / "snapshots" / ("0" * 40)


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
    few = cached(hub, "jiachenli-ucsb/T2V-Turbo-MS"), cached(hub, "yhzhai/mcm"), cached(hub, LCM_LORA)
    turbo = tiny.unnamed_lora(UNet3DConditionModel(**tiny.UNET, time_cond_proj_dim=256), size=0.1)
    mx.save_safetensors(str(few[0] / "unet_lora.safetensors"), turbo)
    (few[0] / "unet_lora.safetensors").rename(few[0] / "unet_lora.pt")
    mcm = few[1] / "modelscopet2v-laion"
    mcm.mkdir()
    mx.save_safetensors(str(mcm / "adapter_model.safetensors"), lora)
    (mcm / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    mx.save_safetensors(str(few[2] / "pytorch_lora_weights.safetensors"), lora)
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


COMMANDS = {
    name: [line for block in blocks(text, "sh") for line in block.splitlines()]
    for name, text in sections().items()
    if name not in BY_CI and blocks(text, "sh")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(place, name):
    for command in COMMANDS[name]:
        if ".mp4" in command and media.encoders()[".mp4"] is None:
            continue
        printed = run(place, command)
        for output in re.findall(r"-o (\S+)", command):
            if command.startswith("mlx-unet3d compare"):  # which prints a table
                assert (place[0] / output).exists()
                continue
            # Several videos have their seeds in their names.
            assert all((place[0] / line).exists() for line in printed.split()), printed
            assert Path(output).stem in printed
    if name == "Real scenes":
        assert any(line.startswith("mlx-unet3d generate") for line in COMMANDS[name])
        assert media.read_metadata(place[0] / "panda.gif")["prompt"] == "a panda surfing a wave"
    few_steps = {"turbo.gif": 7.5, "mcm.gif": 1.0, "lcm.gif": 1.0, "turbo-snow.gif": 7.5}
    for output, guidance in few_steps.items():
        if f"-o {output}" in "\n".join(COMMANDS[name]):
            found = media.read_metadata(place[0] / output)
            found = [found[key] for key in ("scheduler", "steps", "guidance")]
            assert found == ["LCMScheduler", 4, guidance], output


def test_the_rest_of_the_commands_is_run_by_ci():
    script = (ROOT / ".ci" / "run").read_text()
    for name in BY_CI:
        assert blocks(sections()[name], "sh")
        assert re.search(rf'readme "?{name}\b', script)


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_programs(place, number):
    run(place, [sys.executable, "-c", blocks(README, "python")[number]])


EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


DEMO = {  # on the model of the package
    "memory.py": ["--frames", "2"],
    "text_to_video.py": [],
    "video_to_video.py": [],
    "windows.py": ["--loop", "--frames", "12", "--steps", "2"],
}
SMALL = {
    "animatediff.py": ["--frames", "2", "--steps", "2"],
    "stable_video.py": ["photo.jpg", "--steps", "2"],
    "i2vgen_xl.py": ["photo.jpg", "a boat", "--steps", "2"],
    "windows.py": ["--model", HUB_ID, "--length", "3", "--frames", "5", "--steps", "2"],
    "text_to_video.py": [
        "--model",
        HUB_ID,
        "--variant",
        "fp16",
        "--frames",
        "2",
        "--negative-prompt",
        "blurry",
    ],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(place, name):
    for table in (DEMO, SMALL):
        if name in table:
            assert run(place, [sys.executable, f"examples/{name}", *table[name]])
    text = (place[0] / "examples" / name).read_text()
    assert f"python examples/{name}" in text  # its command stands in its docstring
    assert (name in DEMO) != ("There is no small model of this family" in " ".join(text.split()))


@pytest.mark.parametrize("path", ["README.md", "docs/from_diffusers.md"])
def test_links_lead_somewhere(path):
    page = ROOT / path
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


OURS = [block for block in blocks(PAGE, "python") if "mlx_unet3d" in block]
THEIRS = [block for block in blocks(PAGE, "python") if "mlx_unet3d" not in block]


@pytest.fixture(scope="module")
def page_place(place):
    """The models of the page about diffusers besides."""
    hub = place[0] / "hub"
    tiny.write_pipeline(cached(hub, "cerspense/zeroscope_v2_XL"))
    snapshot = tiny.write_stable_diffusion_xl(cached(hub, "stabilityai/stable-diffusion-xl-base-1.0"))
    adapter = MotionAdapter.from_pretrained(snapshot_of(hub, MOTION_ADAPTER))
    adapter.save_pretrained(cached(hub, "guoyww/animatediff-motion-adapter-sdxl-beta"))
    for where in (snapshot, *(snapshot_of(hub, hub_id) for hub_id in IMAGE_MODELS)):
        for file in where.glob("*/*.safetensors"):
            shutil.copy(file, file.with_suffix(".fp16.safetensors"))
    models = cached(hub, "h94/IP-Adapter") / "models"
    tiny.write_ip_adapter(models, "ip-adapter_sd15.safetensors")
    key = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q.lora.{}.weight"
    lora = {key.format("down"): mx.ones((1, 8)), key.format("up"): mx.ones((8, 1))}
    zoom_out = cached(hub, "guoyww/animatediff-motion-lora-zoom-out")
    mx.save_safetensors(str(zoom_out / "diffusion_pytorch_model.safetensors"), lora)
    clip = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    media.write_video(place[0] / "clip.gif", clip)
    return place


def test_programs_of_the_page_about_diffusers(page_place):
    """All in one process, each in names of its own, in two steps and at the size of the tiny models."""
    assert len(OURS) == len(THEIRS) > 15
    programs = [block.replace("(576, 1024)", "(32, 48)") for block in OURS]
    if media.encoders()[".mp4"] is None:
        programs = [block.replace(".mp4", ".webp") for block in programs]
    (page_place[0] / "programs.json").write_text(json.dumps(programs))
    script = """
import json, pathlib
from mlx_unet3d.pipelines.calls import VideoPipeline
VideoPipeline.num_inference_steps = lambda self, value=None: 2
for number, program in enumerate(json.loads(pathlib.Path("programs.json").read_text())):
    exec(compile(program, f"program {number}", "exec"), {"__name__": "__main__"})
"""
    run(page_place, [sys.executable, "-c", script])


def test_the_programs_of_diffusers_are_programs():
    """They need torch, and are compiled alone."""
    for block in THEIRS:
        compile(block, "diffusers", "exec")


def test_names_of_the_package(place):
    """What the text names as `mlx_unet3d.` and more is there after `import mlx_unet3d` alone."""
    names = sorted(set(re.findall(r"`(mlx_unet3d(?:\.\w+)+)", README)))
    assert "mlx_unet3d.memory.plan" in names
    run(place, [sys.executable, "-c", "; ".join(["import mlx_unet3d", *names])])
