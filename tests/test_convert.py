"""The converter without torch: what it writes, verifies, refuses, and leaves behind when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_unet3d_convert as converter
import numpy as np
import pytest
import tiny
from mlx_unet3d import AutoencoderKL, CLIPTextModel, TextToVideoPipeline, UNet3DConditionModel
from mlx_unet3d.checkpoints import describe, headers, read_header, weight_files
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.pipelines.motion_training import training_of
from mlx_unet3d_convert import conversion

SHORT = dict(num_frames=2, num_inference_steps=2)
NETWORKS = {"unet": UNet3DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def convert(source, *arguments, target="out"):
    return main(["convert", "--hf-path", str(source), "--mlx-path", target, *map(str, arguments)])


def tensors(folder):
    """All tensors of a component, as MLX loads them."""
    loaded = {}
    for path in weight_files(folder, "model" if "text" in str(folder) else "diffusion_pytorch_model"):
        loaded |= mx.load(str(path))
    return loaded


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_whole_pipeline(model, capsys):
    assert convert(model, "--verify") == 0
    captured = capsys.readouterr()
    assert captured.out == "out\n"
    assert "unet: UNet3DConditionModel from diffusion_pytorch_model.safetensors" in captured.err
    assert "unet: 466 tensors read back, all equal to the source" in captured.err
    assert all(same(model / name, Path("out") / name) for name in NETWORKS)
    ours, theirs = (TextToVideoPipeline.from_pretrained(folder) for folder in ("out", model))
    assert np.array_equal(ours("a cat", **SHORT).frames, theirs("a cat", **SHORT).frames)
    scheduler = Path("scheduler", "scheduler_config.json")
    assert json.loads((Path("out") / scheduler).read_text()) == json.loads((model / scheduler).read_text())


def test_the_scheduler_is_that_of_the_index(model, capsys):
    """The class in model_index.json goes before that of the config, and the result says the same in both."""
    source = with_index(model, scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert any("(scheduler_config.json says DDIMScheduler; model_index" in line for line in describe(source))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert convert(source) == 0
    assert "model_index.json asks for EulerDiscreteScheduler" in capsys.readouterr().err
    assert type(TextToVideoPipeline.from_pretrained("out").scheduler).__name__ == "EulerDiscreteScheduler"
    scheduler = Path("scheduler", "scheduler_config.json")
    saved, config = (json.loads((folder / scheduler).read_text()) for folder in (Path("out"), source))
    assert saved == config | {"_class_name": "EulerDiscreteScheduler"}


@pytest.mark.parametrize("to", ["mlx", "diffusers"])
def test_layouts_there_and_back(model, to):
    """mlx -> diffusers -> mlx is bit for bit where it began, and each step is what saving writes."""
    assert convert(model, "--to", to, target="first") == 0
    for name, cls in NETWORKS.items():
        cls.from_pretrained(model / name).save_pretrained(f"saved/{name}", layout=to)
        assert same(Path("first") / name, Path("saved") / name)
    assert convert("first", "--to", "mlx", target="second") == 0
    assert all(same(model / name, Path("second") / name) for name in NETWORKS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(model, dtype):
    assert convert(model, "--dtype", dtype, "--verify") == 0
    for name, cls in NETWORKS.items():
        converted = cls.from_pretrained(f"out/{name}")
        assert converted.dtype == getattr(mx, dtype)
        cls.from_pretrained(model / name, dtype=converted.dtype).save_pretrained(f"cast/{name}")
        assert same(Path("out") / name, Path("cast") / name)


def test_one_network(model):
    assert convert(model / "vae") == 0
    assert same(model / "vae", Path("out"))
    assert "AutoencoderKL.from_pretrained" in Path("out/README.md").read_text()


def test_pickles_beside_safetensors_of_something_else(model):
    """A LoRA beside the weights, or the weights of a variant, are not the weights that are asked for."""
    torch = pytest.importorskip("torch")
    source = Path(shutil.copytree(model, "mixed"))
    UNet3DConditionModel.from_pretrained(model / "unet").save_pretrained(source / "unet", layout="diffusers")
    weights = mx.load(str(source / "unet" / WEIGHTS))
    torch.save(
        {key: torch.tensor(np.array(array)) for key, array in weights.items()},
        source / "unet/diffusion_pytorch_model.bin",
    )
    (source / "unet" / WEIGHTS).rename(source / "unet/diffusion_pytorch_model.fp16.safetensors")
    (source / "unet/pytorch_lora_weights.safetensors").write_bytes(b"something else")
    for i, variant in enumerate(([], ["--variant", "fp16"])):
        assert convert(source, *variant, target=f"out{i}") == 0
        assert same(model / "unet", Path(f"out{i}/unet"))
    with pytest.raises(FileNotFoundError, match="it has the variant 'fp16': ask for that"):
        TextToVideoPipeline.from_pretrained(source)
    (source / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only as torch pickles.*mlx-unet3d convert"):
        TextToVideoPipeline.from_pretrained(source)


def test_shards_and_variants(model):
    unet = UNet3DConditionModel.from_pretrained(model / "unet")
    unet.save_pretrained("sharded", variant="fp16", max_shard_size="100KB")
    assert len(weight_files("sharded", "diffusion_pytorch_model", "fp16")) > 3
    assert convert("sharded", "--variant", "fp16", "--max-shard-size", "200KB") == 0
    assert 1 < len(weight_files("out", "diffusion_pytorch_model")) < 4
    assert same(model / "unet", Path("out"))


def test_old_names(model):
    """VAE attention by its names from before 2023, as 1x1 convolutions; a text encoder without its prefix."""
    vae = AutoencoderKL.from_pretrained(model / "vae")
    vae.save_pretrained("old", layout="diffusers")
    file = Path("old/diffusion_pytorch_model.safetensors")
    renamed = {}
    for key, array in mx.load(str(file)).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            if f"attentions.0.{new}." in key:
                key = key.replace(new, old)
                array = array[:, :, None, None] if array.ndim == 2 else array
        renamed[key] = array
    mx.save_safetensors(str(file), renamed, {"format": "pt"})
    assert convert("old", "--verify") == 0
    assert same(model / "vae", Path("out"))
    assert convert("old", "--to", "diffusers", "--verify", target="new") == 0
    assert "decoder.mid_block.attentions.0.to_q.weight" in tensors(Path("new"))


def test_dry_run_prints_every_tensor(model, capsys):
    assert convert(model, "--dry-run", "--dtype", "float16") == 0
    lines = capsys.readouterr().out.splitlines()
    keys = {key for name in NETWORKS for key in tensors(model / name)}
    assert {line.split()[0] for line in lines if " -> " in line} == keys
    assert any(line.endswith("F32 (8, 3, 3, 4) -> float16 (8, 3, 3, 4)") for line in lines)
    nbytes = sum(2 * array.size for name in NETWORKS for array in tensors(model / name).values())
    assert lines[-2] == f"{nbytes / 1e9:.2f} GB to write"
    assert lines[-1] == "in memory at once about 0.19 GB of weights, 0.19 GB with --verify"
    assert not os.listdir()


def test_dry_run_says_how_axes_are_turned(model, capsys):
    assert convert(model / "unet", "--dry-run", "--to", "diffusers") == 0
    out = capsys.readouterr().out
    assert "conv_in.weight" in out
    assert "F32 (8, 3, 3, 4) -> float32 (8, 4, 3, 3) OhwI to OIhw\n" in out
    assert "OhwI to OIhw1\n" in out  # temporal convolutions


def test_dry_run_checks_sizes(model, capsys):
    assert convert(model, "--dry-run", "--max-shard-size", "much") == 2
    assert "max_shard_size='much'" in capsys.readouterr().err


def test_dry_run_lists_all_that_does_not_fit(model, capsys):
    """Where the message of the error shows the first few of each side."""
    folder = shutil.copytree(model / "unet", Path("renamed"))
    file = folder / "diffusion_pytorch_model.safetensors"
    renamed = {key.replace("down_blocks", "dwn_blocks"): array for key, array in mx.load(str(file)).items()}
    mx.save_safetensors(str(file), renamed, {"format": "mlx"})
    assert convert(folder, "--dry-run") == 2
    captured = capsys.readouterr()
    strange = sorted(key for key in renamed if "dwn_blocks" in key)
    assert len(strange) > 50
    assert all(f"  {key}  (nearest: {key.replace('dwn', 'down')})" in captured.out for key in strange[:50])
    assert sum(line.startswith("  dwn_blocks") for line in captured.out.splitlines()) == len(strange)
    assert "and 1" in captured.err
    assert captured.err.count("\n") < 25
    assert os.listdir() == ["renamed"]


def test_card(model):
    source = shutil.copytree(model, Path("source"))
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags: [video]\n---\n# A model\n")
    assert convert("source", "--dtype", "float16") == 0
    card = Path("out/README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert "the folder `source`" in card
    assert os.getcwd() not in card
    parameters = UNet3DConditionModel.from_pretrained(model / "unet").num_parameters()
    assert f"| unet | {parameters:,} | float16 | " in card


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license:\n- cc-by-nc-4.0\n- mit\ntags:\n- video", "license:\n- cc-by-nc-4.0\n- mit"),
        ("license: [mit, other]", "license: [mit, other]"),
        (
            "license: other\nlicense_name: own\nlicense_link: https://a.b/c",
            "license: other\nlicense_name: own\nlicense_link: https://a.b/c",
        ),
        ("license: other\nlicense_link: LICENSE", "license: other"),
        ("license:\ntags: [video]", None),
    ],
)
def test_card_keeps_the_licence(model, front, kept):
    source = shutil.copytree(model / "vae", Path("source"))
    (source / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert convert("source") == 0
    lines = ["library_name: mlx", "pipeline_tag: text-to-video", *([] if kept is None else [kept])]
    assert Path("out/README.md").read_text().startswith("\n".join(["---", *lines, "---\n"]))


def test_card_of_the_demo():
    """It is on no hub."""
    assert convert("demo") == 0
    assert "base_model" not in Path("out/README.md").read_text()


def test_memory_is_that_of_a_tensor(model, monkeypatch):
    """No tensor but the one before is still held when the next is made."""
    held = []
    make = converter.TensorPlan.make

    def counting(self):
        mx.synchronize()
        mx.clear_cache()
        held.append(mx.get_active_memory())
        return make(self)

    monkeypatch.setattr(headers, "AHEAD", 0)
    monkeypatch.setattr(converter.TensorPlan, "make", counting)
    before = mx.get_active_memory()
    converter.convert(model / "unet", "out")
    header = read_header(model / "unet/diffusion_pytorch_model.safetensors")
    largest = max(info.nbytes for info in header.tensors.values())
    assert max(held) - before <= 2 * largest


def test_components_that_are_left_out_are_named(model, capsys):
    source = shutil.copytree(model, Path("source"))
    index = json.loads((source / "model_index.json").read_text())
    index |= {"safety_checker": [None, None], "image_encoder": ["transformers", "CLIPVisionModel"]}
    (source / "model_index.json").write_text(json.dumps(index))
    assert convert(source) == 0
    said = capsys.readouterr().err
    assert "image_encoder: left out, as this converter does not know CLIPVisionModel" in said
    assert "safety_checker" not in said
    assert "image_encoder" not in json.loads(Path("out/model_index.json").read_text())


# Refusals leave nothing behind.


def test_existing_output(model, capsys):
    Path("out").mkdir()
    Path("out/precious.txt").write_text("mine")
    assert convert(model) == 2
    assert "--force" in capsys.readouterr().err
    assert convert(model, "--force") == 2
    assert "not even by --force" in capsys.readouterr().err
    assert os.listdir("out") == ["precious.txt"]
    Path("out/precious.txt").unlink()
    for name in ("vae", "unet"):  # an empty folder, a checkpoint
        assert convert(model / name, "--force") == 0
        assert "config.json" in os.listdir("out")
        assert os.listdir() == ["out"]


def test_output_that_the_source_links_to(model, capsys):
    shutil.copytree(model, "out")
    source = shutil.copytree(model, Path("source"))
    shutil.rmtree(source / "unet")
    (source / "unet").symlink_to(Path("out/unet").resolve())
    assert convert(source, "--force", "--dtype", "float16") == 2
    assert "links to; give another place" in capsys.readouterr().err
    assert same("out/unet", model / "unet")


def damaged(model, change):
    folder = shutil.copytree(model, Path("damaged"))
    change(folder)
    return folder


def with_config(model, name, **config):
    return damaged(model / name, lambda folder: (folder / "config.json").write_text(json.dumps(config)))


def with_weights(model, content):
    return damaged(model / "vae", lambda folder: (folder / WEIGHTS).write_bytes(content))


def with_scheduler(model, **config):
    file = Path("scheduler", "scheduler_config.json")
    return damaged(model, lambda folder: (folder / file).write_text(json.dumps(config)))


def with_index(model, **entries):
    def change(folder):
        file = folder / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    return damaged(model, change)


def as_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).with_suffix(".bin").write_bytes(b"\x80\x02cos\nsystem\n(X\x02\0\0\0lstR.")


def as_other_pickle(folder):
    (folder / WEIGHTS).rename(folder / "vae.pth")


WEIGHTS = "diffusion_pytorch_model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"

BAD = {
    "missing": (lambda m: "nowhere/at/all", (), "neither an existing folder"),
    "no checkpoint": (lambda m: damaged(m, lambda f: (f / "model_index.json").unlink()), (), "config.json"),
    "unknown class": (lambda m: with_config(m, "unet", _class_name="FluxTransformer"), (), "FluxTransformer"),
    "other class": (
        lambda m: with_config(m, "unet", _class_name="AutoencoderKL"),
        (),
        "does not fit AutoencoderKL",
    ),
    "cut short": (lambda m: damaged(m / "vae", lambda f: os.truncate(f / WEIGHTS, 9000)), (), "cut short"),
    "no weights": (lambda m: damaged(m / "vae", lambda f: (f / WEIGHTS).unlink()), (), WEIGHTS),
    "lfs pointer": (lambda m: with_weights(m, LFS), (), "git-lfs"),
    "web page": (lambda m: with_weights(m, b"<html>404</html>"), (), "web page"),
    "empty": (lambda m: with_weights(m, b""), (), "empty"),
    "malicious pickle": (lambda m: damaged(m / "vae", as_pickle), (), "os.system"),
    "no tokenizer": (lambda m: damaged(m, lambda f: shutil.rmtree(f / "tokenizer")), (), "tokenizer"),
    "bad scheduler": (lambda m: with_scheduler(m, beta_schedule="X"), (), "no beta_schedule='X'"),
    "no such scheduler": (lambda m: with_index(m, scheduler=["diffusers", "X"]), (), "no scheduler 'X'"),
    "variant": (lambda m: m, ("--variant", "fp8"), "fp8"),
    "no such id": (lambda m: "nobody/no-such-model", ("--local-files-only",), "nobody/no-such-model"),
    "shard size": (lambda m: m, ("--max-shard-size", "big"), "max_shard_size='big'"),
    "no parent": (lambda m: m, ("--mlx-path", "a/b"), "make that folder first"),
    "inside": (lambda m: m, ("--mlx-path", "IN_SOURCE"), "give another place"),
    "revision": (lambda m: m, ("--revision", "main"), "is for hub ids"),
    "other pickle": (lambda m: damaged(m / "vae", as_other_pickle), (), "it has vae.pth: choose a variant"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(model, capsys, name):
    make, arguments, message = BAD[name]
    source = make(model)
    arguments = [str(model / "inside") if a == "IN_SOURCE" else a for a in arguments]
    assert convert(source, *arguments) == 2
    assert message in capsys.readouterr().err
    assert set(os.listdir()) <= {"damaged"}
    assert not (model / "inside").exists()


def test_full_disk(model, monkeypatch, capsys):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert convert(model) == 2
    assert "make room" in capsys.readouterr().err
    assert not os.listdir()


def test_verify_finds_what_the_disk_did(model, monkeypatch):
    """A bit that changes after writing: nothing is left, and it is said where."""
    write = conversion.write

    def failing(component, folder, *arguments):
        write(component, folder, *arguments)
        path = folder / "diffusion_pytorch_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-7] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(conversion, "write", failing)
    with pytest.raises(CheckpointError, match="came out different"):
        converter.convert(model / "unet", "out", verify=True)
    assert not os.listdir()


@pytest.mark.parametrize("number", [1e6, -1e6])
@pytest.mark.parametrize("verify", [(), ("--verify",)])
def test_overflows_are_found(model, capsys, verify, number):
    vae = AutoencoderKL.from_pretrained(model / "vae")
    vae.decoder.conv_in.bias[1] = number
    vae.save_pretrained("source")
    assert convert("source", *verify, "--dtype", "float16") == 2
    assert (
        "the largest of float16, became infinite in decoder.conv_in.bias; choose" in capsys.readouterr().err
    )
    assert os.listdir() == ["source"]
    assert convert("source", *verify, "--dtype", "bfloat16") == 0


def test_verify_finds_another_config(model, monkeypatch, capsys):
    """All tensors are right, and the network is not: the forward tells."""
    write = conversion.write

    def failing(component, folder, *arguments):
        write(component, folder, *arguments)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"norm_eps": 0.1}))

    assert convert(model / "unet", "--verify") == 0
    assert "UNet3DConditionModel: a forward is equal to the source's" in capsys.readouterr().err
    monkeypatch.setattr(conversion, "write", failing)
    with pytest.raises(CheckpointError, match="a forward of the converted UNet3DConditionModel differs"):
        converter.convert(model / "unet", "other", verify=True)
    assert os.listdir() == ["out"]


KILLED = """
import os, signal, sys
import mlx_unet3d
import mlx_unet3d_convert as converter
from mlx_unet3d.cli import main

folder, last = os.getcwd(), int(sys.argv[1])
count = 0

def step():
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)

def watch(event, arguments):  # all that changes files in the folder
    if event == "open":
        path, mode, flags = arguments
        changes = isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR)
    else:
        path, changes = (arguments or [""])[0], event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
    if changes and os.path.abspath(path).startswith(folder):
        step()

make = converter.TensorPlan.make
converter.TensorPlan.make = lambda plan: (step(), make(plan))[1]
sys.addaudithook(watch)
status = main(["convert", "--hf-path", "source", "--mlx-path", "out"])
print(count)
sys.exit(status)
"""


def test_killed_at_any_moment(tmp_path):
    """Among tensors and at changes of files: no output loads, no source is touched, the next run succeeds."""
    tiny.randomize(AutoencoderKL(**tiny.VAE)).save_pretrained("source")
    before = {p.name: p.read_bytes() for p in Path("source").iterdir()}

    def run(last):
        return subprocess.run([sys.executable, "-c", KILLED, str(last)], capture_output=True, text=True)

    done = run(0)
    assert done.returncode == 0, done.stderr
    steps, tensors_in_all = int(done.stdout.split()[-1]), len(tensors("source"))
    shutil.rmtree("out")
    assert steps > tensors_in_all + 3
    for last in (1, 3, tensors_in_all // 2, *(steps - n for n in (10, 7, 4, 2, 1, 0))):
        assert run(last).returncode == -signal.SIGKILL
        if Path("out").exists():  # it was done: then all of it is there
            assert same(Path("source"), Path("out"))
            shutil.rmtree("out")
    assert {p.name: p.read_bytes() for p in Path("source").iterdir()} == before
    assert convert("source", "--verify") == 0
    assert same(Path("source"), Path("out"))
    assert set(os.listdir()) == {"source", "out"}  # what the killed ones left is cleaned up


def test_module_in_a_checkout(model):
    """`python -m convert` in the repository is the same command."""
    root = Path(__file__).parents[1]
    paths = ["--hf-path", str(model / "vae"), "--mlx-path", os.path.abspath("out")]
    subprocess.run([sys.executable, "-m", "convert", *paths], cwd=root, check=True, capture_output=True)
    assert same(model / "vae", Path("out"))


TRAININGS = {
    "mm_sd_v15_v2.ckpt": ("DDIMScheduler", {}),
    "guoyww/animatediff-motion-adapter-v1-5-3": ("DDIMScheduler", {}),
    "AnimateLCM_sd15_t2v.ckpt": ("LCMScheduler", dict(num_inference_steps=6, guidance_scale=2.0)),
    "animatediff_lightning_8step_diffusers.safetensors": (
        "EulerDiscreteScheduler",
        dict(num_inference_steps=8, guidance_scale=1.0),
    ),
    "ByteDance/AnimateDiff-Lightning": (
        "EulerDiscreteScheduler",
        dict(num_inference_steps=4, guidance_scale=1.0),
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_the_training_of_motion_modules_by_name(name):
    scheduler, recommended = TRAININGS[name]
    training = training_of(name)
    config = training.scheduler_config(dict(beta_start=0.00085, beta_end=0.012, prediction_type="epsilon"))
    assert (training.scheduler, training.recommended) == (scheduler, recommended)
    assert (config["_class_name"], config["beta_schedule"]) == (scheduler, "linear")
    assert (config["beta_start"], config["beta_end"]) == (0.00085, 0.012)


def test_the_training_of_motion_modules_by_tensors():
    """AnimateLCM's own file has no tables of positions; diffusers' files need none."""
    assert training_of("x.ckpt", authors=True, mid=True, tables=False).scheduler == "LCMScheduler"
    for other in (dict(tables=True), dict(mid=False, tables=False), dict(authors=False, tables=False)):
        assert training_of("x.ckpt", **dict(authors=True, mid=True) | other).scheduler == "DDIMScheduler"
