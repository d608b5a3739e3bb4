"""What diffusers' users type: it works, or one line says what to write."""

import io
import subprocess
import sys
import types

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import (
    AnimateDiffPipeline,
    DiffusionPipeline,
    MotionAdapter,
    TextToVideoPipeline,
    UNetMotionModel,
    VideoOutput,
    VideoToVideoPipeline,
    export_to_gif,
    export_to_video,
    media,
)
from mlx_unet3d.diffusers_names import ADVICE, ATTRIBUTES
from mlx_unet3d.dtypes import as_dtype
from mlx_unet3d.media import export
from mlx_unet3d.pipelines import progress
from PIL import Image

SHORT = dict(num_frames=2, num_inference_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def pipe(folder):
    return TextToVideoPipeline.from_pretrained(folder)


def clip(frames=3, height=24, width=32):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


# Dtypes.


class TorchDtype:
    """Prints as a dtype of torch, which need not be there."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_dtypes_of_any_library(folder, name):
    wanted = getattr(mx, name)
    for form in (wanted, name, TorchDtype(name)):
        assert as_dtype(form) == wanted
    assert as_dtype(np.float16) == as_dtype(np.dtype("float16")) == mx.float16
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=TorchDtype(name))
    assert (pipe.dtype, pipe.vae.dtype) == (wanted, mx.float32)
    with pytest.raises(ValueError, match=r"dtype=torch.int8 must be mx.float32, mx.float16 or mx.bfloat16"):
        TextToVideoPipeline.from_pretrained(folder, torch_dtype=TorchDtype("int8"))
    with pytest.raises(TypeError, match="takes dtype or torch_dtype, its other name, not both"):
        TextToVideoPipeline.from_pretrained(folder, torch_dtype=mx.float16, dtype=mx.float16)


def test_the_dtype_of_a_device(folder, tmp_path, monkeypatch):
    half = TextToVideoPipeline.from_pretrained(folder, dtype="float16", vae_dtype="bfloat16")
    assert half.vae.dtype == mx.bfloat16
    half.save_pretrained(tmp_path)
    assert TextToVideoPipeline.from_pretrained(tmp_path).dtype == mx.float32
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert TextToVideoPipeline.from_pretrained(folder).dtype == mx.float16


def test_a_motion_adapter_in_one_dtype_with_its_pipeline(tmp_path):
    base = tiny.write_stable_diffusion(tmp_path / "base", tmp_path / "adapter")
    adapter = MotionAdapter.from_pretrained(tmp_path / "adapter", torch_dtype="float16")
    assert adapter.dtype == mx.float16
    pipe = AnimateDiffPipeline.from_pretrained(base, motion_adapter=adapter, torch_dtype="float16")
    assert isinstance(pipe.unet, UNetMotionModel)
    assert pipe.dtype == mx.float16
    with pytest.raises(TypeError, match=r"__init__ takes no motion_adapter: give from_pretrained\("):
        AnimateDiffPipeline(**pipe.components, motion_adapter=adapter)
    with pytest.raises(AttributeError, match=r"no encode_image: write encode_ip_adapter_image\(image\)"):
        pipe.encode_image("photo.jpg")


# Progress.


class Stderr(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_for_those_that_watch(pipe, monkeypatch, is_terminal):
    def shown(**options):
        monkeypatch.setattr(sys, "stderr", Stderr(is_terminal))
        pipe("a cat", **SHORT, **options)
        return sys.stderr.getvalue()

    assert ("denoise" in shown()) == ("decode" in shown()) == is_terminal
    assert "denoise" in shown(progress=True)
    assert shown(progress=False) == ""
    pipe.set_progress_bar_config(disable=True, desc="mine")
    assert shown() == ""
    assert "mine" in shown(progress=True)
    pipe.set_progress_bar_config(disable=False)
    assert "denoise" in shown()
    with pytest.raises(TypeError, match="takes no colr: give arguments of tqdm"):
        pipe.set_progress_bar_config(colr="red")


def test_a_notebook_is_watched(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stderr(False))
    assert not progress.is_shown(None)
    for config, is_kernel in (({"IPKernelApp": {}}, True), ({}, False)):
        shell = types.SimpleNamespace(config=config)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda s=shell: s))
        assert progress.is_shown(None) == is_kernel


# Videos in notebooks and files.


def embedded(html):
    return [part.partition(";")[0] for part in html.split("data:")[1:]]


def test_a_notebook_shows_the_videos(pipe, monkeypatch):
    output = pipe("a cat", **SHORT)
    html = output._repr_html_()
    assert embedded(html) == ["image/webp"]
    assert 'alt="2 frames of 32x32 pixels"' in html
    assert (output.keys(), output.fps) == (["frames"], 8)
    assert pipe("a cat", output_type="pil", **SHORT)._repr_html_() == html
    assert pipe("a cat", output_type="latent", **SHORT)._repr_html_() is None
    six = VideoOutput(np.stack([clip()] * 6), 8.0)._repr_html_()
    assert len(embedded(six)) == 4
    assert "and 2 more" in six


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_what_a_notebook_keeps_is_bounded(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(export.features, "check", lambda name: kind == "webp")
    monkeypatch.setattr(export, "MAX_SIDE", 96)
    noise = clip(8, 40, 120)
    data, found = export._small(noise, 8)
    assert found == kind
    (tmp_path / f"a.{kind}").write_bytes(data)
    frames, fps = media.read_video(tmp_path / f"a.{kind}")
    assert (frames.shape, round(fps)) == ((8, 32, 96, 3), 8)
    monkeypatch.setattr(export, "MAX_BYTES", 4000)
    data, _ = export._small(noise, 8)
    assert len(data) <= 4000
    (tmp_path / f"a.{kind}").write_bytes(data)
    assert media.read_video(tmp_path / f"a.{kind}")[0].shape[0] < 8


def test_export_in_all_forms(tmp_path):
    frames = clip()
    expected = media.read_video(export_to_video(frames, tmp_path / "a.png", fps=8))[0]
    assert np.array_equal(expected, frames)
    floats = frames.astype(np.float32) / 255
    forms = [list(frames), list(floats), floats, mx.array(floats), [Image.fromarray(x) for x in frames]]
    for form in forms:
        path = export_to_video(form, output_video_path=str(tmp_path / "b.png"))
        assert np.array_equal(media.read_video(path)[0], frames)
    path = export_to_gif(image=forms[-1], fps=5)
    assert path.endswith(".gif")
    assert media.read_video(path)[1] == 5
    for wrong, message in (
        (frames[None], r"a batch of videos; give one, frames\[0\]"),
        ([forms[-1]], r"a list of 1 videos; give one, frames\[0\]"),
        (floats * 255, r"the range is \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            export_to_gif(wrong, tmp_path / "c.gif")
    with pytest.raises(TypeError, match=r"give one of its videos, output.frames\[0\]"):
        export_to_gif(VideoOutput(floats[None]), tmp_path / "c.gif")
    with pytest.raises(TypeError, match="export_to_video takes no bitrate: leave it out"):
        export_to_video(frames, tmp_path / "c.png", bitrate=1)
    assert not (tmp_path / "c.gif").exists()
    if media.encoders()[".mp4"] is not None:
        assert media.read_video(export_to_video(frames, fps=8))[0].shape == frames.shape


# Methods and arguments.


def test_switches_of_networks(pipe):
    base = pipe("a cat", **SHORT).frames
    pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.4, b2=1.6)
    assert np.abs(pipe("a cat", **SHORT).frames - base).max() > 1e-3
    pipe.disable_freeu()
    pipe.fuse_qkv_projections()
    assert pipe.unet.processors_before_fusion is not None
    assert np.abs(pipe("a cat", **SHORT).frames - base).max() < 1e-4
    pipe.unfuse_qkv_projections()
    pipe.set_attention_slice("max")
    assert np.abs(pipe("a cat", **SHORT).frames - base).max() < 1e-4


def test_adapters_by_the_names_of_diffusers(pipe):
    base = pipe("a cat", **SHORT).frames
    a, b = (np.random.default_rng(i).normal(size=(4, 8)).astype(np.float32) for i in (0, 1))
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    lora = {path.format("A"): mx.array(a), path.format("B"): mx.array(b.T)}
    pipe.load_lora_weights(pretrained_model_name_or_path_or_dict=lora, adapter_name="x")
    pipe.load_lora_weights(lora, adapter_name="y")
    assert pipe.get_list_adapters() == {"unet": ["x", "y"]}
    pipe.set_adapters(["x", "y"], adapter_weights=[0.5, 0.0])
    assert pipe.get_active_adapters() == ["x"]
    assert np.abs(pipe("a cat", **SHORT).frames - base).max() > 1e-4
    pipe.set_adapters([])
    assert pipe.get_active_adapters() == []
    assert np.abs(pipe("a cat", **SHORT).frames - base).max() < 1e-5
    pipe.delete_adapters("x")
    assert pipe.get_list_adapters() == {"unet": ["y"]}
    with pytest.raises(ValueError, match="there is no adapter 'x'; there are: y"):
        pipe.delete_adapters(["y", "x"])
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {}


def test_devices(pipe, monkeypatch):
    class Device:
        def __str__(self):
            return "cuda:0"

    for name, own, other in ((mx.gpu, "mps", "cpu"), (mx.cpu, "cpu", "mps")):
        monkeypatch.setattr(mx, "default_device", lambda name=name: mx.Device(name))
        assert pipe.to(own) is pipe  # no warning
        with pytest.warns(UserWarning, match="to does nothing in mlx_unet3d: MLX computes on its default"):
            pipe.to(device=other)
    with pytest.warns(UserWarning, match="to does nothing"):
        pipe.to(Device())
    for dtype in (mx.float16, TorchDtype("float16")):
        with pytest.raises(TypeError, match=r"float16\): choose the dtype when loading"):
            pipe.to("cpu", dtype)


def test_every_argument_with_advice_gives_it(pipe, folder):
    given = {
        "__init__": lambda **more: TextToVideoPipeline(**pipe.components, **more),
        "__call__": lambda **more: VideoToVideoPipeline.from_pipe(pipe)("a cat", clip(), **more),
        "from_pretrained": lambda **more: DiffusionPipeline.from_pretrained(folder, **more),
        "export_to_video": lambda **more: export_to_video(clip(), "never.gif", **more),
    }
    for method, table in ADVICE.items():
        for name in table:
            with pytest.raises(TypeError, match=f"no {name}(:| here:) "):
                given.get(method, getattr(pipe, method, None))(**{name: None})
    with pytest.warns(UserWarning, match="safety_checker does nothing in mlx_unet3d: videos are not checked"):
        DiffusionPipeline.from_pretrained(folder, safety_checker=None)


def test_every_attribute_with_advice_gives_it(pipe):
    for name in ATTRIBUTES:
        for owner in (pipe, TextToVideoPipeline):
            with pytest.raises(AttributeError, match=f"^TextToVideoPipeline has no {name}: ") as caught:
                getattr(owner, name)
            assert "\n" not in str(caught.value)
    with pytest.raises(AttributeError, match=r"'TextToVideoPipeline' object has no attribute 'nothing'$"):
        _ = pipe.nothing


def test_a_generator_of_torch_is_told_its_seed(pipe):
    generator = types.SimpleNamespace(initial_seed=lambda: 7)
    with pytest.raises(TypeError, match="give seed=, seed=7: "):
        pipe("a cat", generator=generator, **SHORT)


def test_names_of_the_top_level():
    script = """
import mlx_unet3d
from mlx_unet3d import TextToVideoSDPipeline, VideoToVideoSDPipeline
from mlx_unet3d.utils import export_to_gif, export_to_video
assert TextToVideoSDPipeline is mlx_unet3d.TextToVideoPipeline
for line in (
    "from mlx_unet3d import load_image", "from mlx_unet3d.utils import load_image",
    "from mlx_unet3d import LMSDiscreteScheduler", "mlx_unet3d.UNet2DConditionModel",
    "mlx_unet3d.DiffusionPipeline()", "from mlx_unet3d import nothing",
):
    try:
        exec(line)
    except Exception as error:
        print(type(error).__name__, error)
assert not hasattr(mlx_unet3d, "StableDiffusionPipeline")
assert "torch" not in __import__("sys").modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    image, again, scheduler, unet, base, nothing = done.stdout.splitlines()
    assert image.startswith("ImportError mlx_unet3d has no load_image: give the path of a picture to a call")
    assert again.startswith("ImportError mlx_unet3d.utils has no load_image: give the path")
    assert scheduler.endswith("has no LMSDiscreteScheduler: write DEISMultistepScheduler, the nearest")
    assert unet.startswith("AttributeError mlx_unet3d has no UNet2DConditionModel: write UNetMotionModel")
    assert "write DiffusionPipeline.from_pretrained(model)" in base
    assert nothing == "ImportError mlx_unet3d has no nothing"
