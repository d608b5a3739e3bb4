"""Quantized networks: how near they are to the original, what they weigh, and how they are saved."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_unet3d_convert as converter
import pytest
import tiny
from mlx_unet3d import (
    AutoencoderKL,
    CLIPTextModel,
    I2VGenXLUNet,
    TextToVideoPipeline,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from mlx.utils import tree_flatten
from mlx_unet3d.checkpoints import headers, read_json, weight_files
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.layers.quantized import Quantization, QuantizedLayer
from mlx_unet3d_convert.kinds import kind_of

CONFIG = tiny.UNET | {"block_out_channels": (32, 64), "cross_attention_dim": 32}
SETTINGS = [
    # settings, and the least signal-to-noise ratio of the output in dB
    (dict(bits=8, group_size=32), 30),
    (dict(bits=8, group_size=64), 30),
    (dict(bits=6, group_size=32), 20),
    (dict(bits=5, group_size=32), 14),
    (dict(bits=4, group_size=32), 8),
    (dict(bits=3, group_size=32), 3),
    (dict(bits=2, group_size=32), -3),
    (dict(mode="mxfp8"), 14),
    (dict(mode="mxfp4"), 5),
    (dict(mode="nvfp4"), 6),
]
NAMES = ["-".join(str(value) for value in settings.values()) for settings, _ in SETTINGS]


def make(**settings):
    mx.random.seed(0)
    unet = tiny.randomize(UNet3DConditionModel(**CONFIG)).eval()
    return unet.quantize(**settings) if settings else unet


def inputs(dtype=mx.float32):
    mx.random.seed(1)
    sample, text = mx.random.normal((2, 4, 3, 8, 8)), mx.random.normal((2, 5, 32))
    return sample.astype(dtype), 500, text.astype(dtype)


def ratio(result, truth):
    """Signal to noise in dB."""
    error = mx.square(result.astype(mx.float32) - truth).mean()
    return 10 * mx.log10(mx.square(truth).mean() / error).item()


def weight(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.parametrize(("settings", "least"), SETTINGS, ids=NAMES)
def test_output_and_reload(settings, least, tmp_path):
    original, model = make(), make(**settings)
    result = model(*inputs()).sample
    assert ratio(result, original(*inputs()).sample) > least
    assert model.num_parameters() == original.num_parameters()
    model.save_pretrained(tmp_path)
    again = UNet3DConditionModel.from_pretrained(tmp_path)
    assert mx.array_equal(again(*inputs()).sample, result)
    assert weight(again) == weight(model) < weight(original) / 2


WIDE = {"block_out_channels": (32, 64), "cross_attention_dim": 32}
NETWORKS = {
    "motion": lambda: UNetMotionModel(**tiny.MOTION | WIDE),
    "SVD": lambda: UNetSpatioTemporalConditionModel(**tiny.SVD | WIDE),
    "I2VGen-XL": lambda: I2VGenXLUNet(**{k: v for k, v in CONFIG.items() if k != "sample_size"}),
}


@pytest.mark.parametrize(
    ("settings", "least"), [SETTINGS[0], SETTINGS[4], SETTINGS[8]], ids=[NAMES[0], NAMES[4], NAMES[8]]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_other_networks(name, settings, least, tmp_path, monkeypatch):
    """As `test_output_and_reload`; with the option of the converter, the same bytes."""
    mx.random.seed(0)
    original = tiny.randomize(NETWORKS[name]()).eval()
    inputs = kind_of(type(original)).inputs(original.config)
    truth = inputs.run(original, mx.array)
    model = type(original)(**original.config)
    model.load_weights(tree_flatten(original.parameters()))
    result = inputs.run(model.eval().quantize(**settings), mx.array)
    assert ratio(result, truth) > least
    model.save_pretrained(tmp_path / "memory")
    again = type(original).from_pretrained(tmp_path / "memory")
    assert mx.array_equal(inputs.run(again, mx.array), result)
    assert weight(again) == weight(model) < weight(original) / 1.9
    original.save_pretrained(tmp_path / "source", layout="diffusers")
    made = converter.convert(tmp_path / "source", tmp_path / "out", quantization=Quantization(**settings))
    stem = made.components[0].cls.weights_stem
    written, saved = (mx.load(str(*weight_files(tmp_path / f, stem))) for f in ("out", "memory"))
    assert written.keys() == saved.keys()
    assert all(mx.array_equal(written[key], saved[key]) for key in saved)


def test_layers_compute_with_the_rounded_weights():
    """Each kind of layer is the original one with its weight rounded."""
    original, model = make(), make(bits=4, group_size=32, recipe="uniform")
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantizedLayer)}
    kinds = {type(layer).__name__ for layer in found.values()}
    assert kinds == {"QuantizedLinear", "QuantizedConv2d", "QuantizedTemporalConv"}
    layers = dict(original.named_modules())
    for path, layer in found.items():
        dense = layer.dense_weight(mx.float32)
        step = mx.abs(layers[path].weight).max() * 2 / 15
        assert mx.abs(dense - layers[path].weight).max() <= step
        layers[path].weight = dense
    assert mx.allclose(original(*inputs()).sample, model(*inputs()).sample, atol=1e-5)


def test_recipes():
    def bits(**settings):
        model = make(group_size=32, bits=4, **settings)
        return {path: m.bits for path, m in model.named_modules() if isinstance(m, QuantizedLayer)}

    mixed, uniform, linear = bits(), bits(recipe="uniform"), bits(recipe="linear")
    assert mixed.keys() == uniform.keys() > linear.keys()
    assert set(uniform.values()) == set(linear.values()) == {4}
    assert mixed["time_embedding.linear_1"] == mixed["conv_out"] == 8
    assert mixed["mid_block.resnets.0.conv1"] == mixed["mid_block.temp_convs.0.conv1.2"] == 4
    assert "mid_block.resnets.0.conv1" not in linear
    assert "conv_in" not in uniform  # 9 * 4 columns do not divide into groups of 32


def test_weights_are_restored_one_layer_at_a_time():
    """The peak over the weights is about that of the original, not the original and its restored copy."""
    limit = mx.set_memory_limit(1)
    try:
        peaks = []
        for model in (make(), make(bits=4, group_size=32)):
            mx.eval(model.parameters())
            arguments = inputs()
            mx.eval(arguments[0], arguments[2])
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(model(*arguments).sample)
            peaks.append(mx.get_peak_memory() - held)
            del model
    finally:
        mx.set_memory_limit(limit)
    largest = 4 * 64 * 128 * 9
    assert peaks[1] <= peaks[0] + 2 * largest


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays(dtype, tmp_path):
    make(bits=8, group_size=32).save_pretrained(tmp_path)
    model = UNet3DConditionModel.from_pretrained(tmp_path, dtype=dtype)
    result = model(*inputs(dtype)).sample
    assert model.dtype == result.dtype == dtype
    assert ratio(result, make()(*inputs()).sample) > 25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(bits=7), "bits=7 does not go with mode='affine'"),
        (dict(bits=True), "bits=True"),
        (dict(bits=8, mode="mxfp4"), "bits=8 does not go with mode='mxfp4'; use 4"),
        (dict(group_size=16), "use 32, 64, 128"),
        (dict(mode="int4"), "mode='int4' is not known"),
        (dict(recipe="best"), "recipe='best' is not known"),
    ],
)
def test_settings_that_do_not_exist(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_once_is_enough():
    with pytest.raises(ValueError, match="quantized already"):
        make(bits=8).quantize(bits=4)
    with pytest.raises(ValueError, match="before quantizing"):
        make(bits=8, group_size=32).fuse_qkv_projections()


@pytest.mark.parametrize(
    "entry",
    [[], "4 bits", {"nbits": 3}, {"bits": 5, "mode": "mxfp4"}, {"bits": 8, "conv_out": {"bits": "8"}}],
)
def test_malformed_settings_in_the_config(entry, tmp_path):
    make(bits=8, group_size=32).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json") | {"quantization": entry}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization="):
        UNet3DConditionModel.from_pretrained(tmp_path)


def test_settings_of_other_weights(tmp_path):
    make(bits=8, group_size=32).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json") | {"quantization": {"bits": 4, "group_size": 32}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not fit"):
        UNet3DConditionModel.from_pretrained(tmp_path)


def test_networks_quantized_by_mlx(tmp_path):
    """`mlx.nn.quantize` does linear layers; what it made is saved and comes back."""
    model = make()
    nn.quantize(
        model, 32, 8, class_predicate=lambda path, m: isinstance(m, nn.Linear) and m.weight.shape[1] % 32 == 0
    )
    model.save_pretrained(tmp_path)
    again = UNet3DConditionModel.from_pretrained(tmp_path)
    assert mx.allclose(again(*inputs()).sample, model(*inputs()).sample, atol=1e-4)
    text = CLIPTextModel(vocab_size=20, **tiny.TEXT | {"hidden_size": 32, "intermediate_size": 64})
    nn.quantize(text, 32, 8)
    with pytest.raises(ValueError, match="quantized embedding"):
        text.save_pretrained(tmp_path / "text")


# Through the converter.


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    make().save_pretrained(folder, layout="diffusers")
    return folder


def run(source, *arguments):
    return main(["convert", "--hf-path", str(source), "--mlx-path", "out", *arguments])


@pytest.mark.parametrize(("settings", "least"), SETTINGS, ids=NAMES)
def test_convert(settings, least, source, tmp_path, monkeypatch):
    """The same bytes as quantizing in memory."""
    monkeypatch.chdir(tmp_path)
    names = {"bits": "--q-bits", "group_size": "--q-group-size", "mode": "--q-mode"}
    arguments = [text for key, value in settings.items() for text in (names[key], str(value))]
    assert run(source, "--verify", *arguments) == 0
    UNet3DConditionModel.from_pretrained(source).quantize(**settings).save_pretrained("memory")
    written, saved = (mx.load(str(weight_files(f, "diffusion_pytorch_model")[0])) for f in ("out", "memory"))
    assert written.keys() == saved.keys()
    assert all(mx.array_equal(written[key], saved[key]) for key in saved)
    assert read_json("out/config.json") == read_json("memory/config.json")


def test_default(source, tmp_path, monkeypatch, capsys):
    """The recipe that changes next to nothing."""
    monkeypatch.chdir(tmp_path)
    assert run(source, "-q", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "-> affine 8 bits" in out
    assert "4 bits" not in out
    assert Quantization() == Quantization(8, 64, "affine")
    assert Quantization(mode="mxfp4") == Quantization(4, 32, "mxfp4")


def test_whole_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_pipeline(Path("source"))
    assert (
        run("source", "-q", "--q-bits", "8", "--q-group-size", "32", "--q-recipe", "uniform", "--verify") == 0
    )
    said = capsys.readouterr().err
    assert "in 8 bits" in said
    assert "dB above their rounding" in said
    assert "quantization" not in read_json("out/vae/config.json")
    pipe = TextToVideoPipeline.from_pretrained("out")
    frames = pipe("a cat", num_frames=2, num_inference_steps=2, output_type="np").frames
    assert frames.shape[1] == 2
    card = Path("out/README.md").read_text()
    assert "8 bits" in card
    capsys.readouterr()
    assert main(["info", "out"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("unet"))
    source = UNet3DConditionModel.from_pretrained("source/unet")
    assert f" {source.num_parameters():,} parameters in " in line
    layers = sum(isinstance(module, QuantizedLayer) for module in pipe.unet.modules())
    assert f", {layers} layers in 8 bits, " in line
    assert run("out", "--force", "--mlx-path", "again") == 2
    assert "quantized already" in capsys.readouterr().err


def test_one_network_is_quantized_as_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CLIPTextModel(vocab_size=50, **tiny.TEXT | {"hidden_size": 32}).save_pretrained("text")
    assert run("text", "--q-bits", "4", "--q-group-size", "32", "--verify") == 0
    assert "in 4 bits" in capsys.readouterr().err
    assert read_json("out/config.json")["quantization"] == Quantization(4, 32).to_dict()
    AutoencoderKL(**tiny.VAE).save_pretrained("vae")
    assert run("vae", "-q", "--force") == 2
    assert "a VAE is not quantized" in capsys.readouterr().err


def test_dry_run(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(source, "--q-bits", "4", "--q-group-size", "32", "--dry-run") == 0
    lines = capsys.readouterr().out
    assert "-> affine 4 bits (64, 3, 3, 64)" in lines
    assert "-> affine 8 bits" in lines
    assert "-> float32" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--q-bits", "7"), "bits=7"),
        (("--q-mode", "mxfp4", "--q-group-size", "64"), "group_size=64"),
        (("-q", "--to", "diffusers"), "does not read MLX's quantized weights"),
        (("-q", "--q-group-size", "128", "--q-recipe", "linear"), ""),
    ],
)
def test_refusals(arguments, message, source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(source, *arguments) == (2 if message else 0)
    assert message in capsys.readouterr().err
    assert Path("out").exists() == (not message)


def test_memory_is_that_of_a_tensor(source, tmp_path, monkeypatch):
    held = []
    make_tensor = converter.TensorPlan.make

    def counting(self):
        mx.synchronize()
        mx.clear_cache()
        held.append(mx.get_active_memory())
        return make_tensor(self)

    monkeypatch.setattr(headers, "AHEAD", 0)
    monkeypatch.setattr(converter.TensorPlan, "make", counting)
    before = mx.get_active_memory()
    converter.convert(source, tmp_path / "out", quantization=Quantization(8, 32))
    assert max(held) - before <= 3 * 4 * 64 * 128 * 9


def test_verify_finds_damage(source, tmp_path, monkeypatch):
    write = converter.conversion.write

    def failing(component, folder, *arguments):
        write(component, folder, *arguments)
        path = folder / "diffusion_pytorch_model.safetensors"
        arrays = mx.load(str(path))
        name = "mid_block.resnets.0.conv1.scales"
        arrays[name] = arrays[name] * 1.5
        mx.save_safetensors(str(path), arrays, {"format": "mlx"})

    monkeypatch.setattr(converter.conversion, "write", failing)
    with pytest.raises(CheckpointError, match=r"mid_block\.resnets\.0\.conv1\.weight quantized to 8 bits"):
        converter.convert(source, tmp_path / "out", quantization=Quantization(8, 32), verify=True)
    assert not (tmp_path / "out").exists()
