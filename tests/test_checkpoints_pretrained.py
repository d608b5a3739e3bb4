"""Loading models: round trips, dtypes, legacy names, strictness, memory."""

import gc
import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_unet3d.checkpoints import (
    checksum,
    load_tensors,
    read_header,
    weight_files,
    write_safetensors,
)
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.pretrained import PretrainedModel

from .checkpoints_toy import COUNT, STEM, Toy, ToyConfig, diffusers_tensors, make_toy, parameters, same, write


@pytest.fixture
def toy():
    return make_toy()


# Counting


def test_counts(toy):
    assert toy.num_parameters() == COUNT
    assert toy.num_parameters(exclude_embeddings=True) == COUNT - 42
    toy.conv1[2].freeze()
    assert toy.num_parameters(only_trainable=True) == COUNT - 366
    assert toy.dtype == mx.float32
    toy.set_dtype(mx.bfloat16)
    assert toy.dtype == mx.bfloat16
    with pytest.raises(ValueError, match="no floating parameters"):
        _ = PretrainedModel().dtype


# Round trips


@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
@pytest.mark.parametrize("size", ["5GB", 700])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_save_and_load(toy, tmp_path, layout, size, variant):
    files = toy.save_pretrained(tmp_path, layout=layout, max_shard_size=size, variant=variant)
    assert (len(files) > 1) == (size == 700)
    assert files == weight_files(tmp_path, STEM, variant)
    assert {read_header(file).metadata["format"] for file in files} == {"mlx" if layout == "mlx" else "pt"}
    loaded = Toy.from_pretrained(tmp_path, variant=variant)
    assert same(loaded, toy)
    assert not loaded.training
    assert not loaded.dropout.training
    assert loaded.config == toy.config
    assert loaded.weights_checksum == checksum(files)
    assert toy.weights_checksum is None
    assert not list(tmp_path.glob("*.part"))


def test_saved_config(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text) == {
        "_class_name": "Toy",
        "_diffusers_version": "0.42.1",
        "channels": [4, 6],
        "eps": 1e-5,
        "sample_size": None,
    }
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert Toy.load_config(tmp_path) == json.loads(text)


def test_saving_twice_gives_equal_bytes(toy, tmp_path):
    for folder in ("a", "b"):
        toy.save_pretrained(tmp_path / folder, layout="diffusers")
    name = f"{STEM}.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_loaded_convolutions_are_row_contiguous(toy, tmp_path):
    toy.save_pretrained(tmp_path, layout="diffusers")
    for dtype in (None, mx.float16):
        for name, array in parameters(Toy.from_pretrained(tmp_path, dtype=dtype)).items():
            view, stride = memoryview(array), array.itemsize
            for size, found in zip(reversed(view.shape), reversed(view.strides), strict=True):
                assert size == 1 or found == stride, name
                stride *= size


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dtype(toy, tmp_path, dtype):
    toy.save_pretrained(tmp_path)
    loaded = Toy.from_pretrained(tmp_path, dtype=dtype)
    assert {array.dtype for array in parameters(loaded).values()} == {dtype}
    loaded.save_pretrained(tmp_path / "cast")
    assert Toy.from_pretrained(tmp_path / "cast").dtype == dtype
    with pytest.raises(ValueError, match=r"must be mx.float32"):
        Toy.from_pretrained(tmp_path, dtype=mx.int8)


def test_mixed_dtypes_load_as_the_most_common(toy, tmp_path):
    tensors = diffusers_tensors(toy)
    tensors = {name: array.astype(mx.float16) for name, array in tensors.items()}
    tensors["to_q.bias"] = tensors["to_q.bias"].astype(mx.float32)
    write(tmp_path, tensors)
    with pytest.warns(UserWarning, match=r"16 bytes of F32.*loading all as mlx.core.float16") as warned:
        loaded = Toy.from_pretrained(tmp_path)
    assert warned[0].filename == __file__
    assert {array.dtype for array in parameters(loaded).values()} == {mx.float16}
    assert Toy.from_pretrained(tmp_path, dtype=mx.float32).dtype == mx.float32


def test_legacy_names_and_shapes(toy, tmp_path):
    tensors = diffusers_tensors(toy)
    tensors["query.weight"] = tensors.pop("to_q.weight")[:, :, None, None]
    tensors["query.bias"] = tensors.pop("to_q.bias")
    tensors["embeddings.position_ids"] = mx.arange(77)
    write(tmp_path, tensors, metadata={})
    assert same(Toy.from_pretrained(tmp_path), toy)
    tensors["to_q.bias"] = tensors["query.bias"]
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'query.bias' and 'to_q.bias' are both"):
        Toy.from_pretrained(tmp_path)


def test_layout_is_told_by_the_metadata_alone(toy, tmp_path):
    """A 3x3 kernel over 3 channels has the same shape both ways."""

    class Cube(Toy):
        class_names = ("Cube",)

        def __init__(self, **config):
            super().__init__(**config)
            self.conv1[2] = nn.Conv2d(3, 3, 3)

    cube = Cube()
    mx.eval(cube.parameters())
    config = {"_class_name": "Cube"}
    weight = cube.conv1[2].weight
    for metadata, expected in (
        ({"format": "mlx"}, weight),
        ({"format": "pt"}, weight.transpose(0, 2, 3, 1)),
        ({}, weight.transpose(0, 2, 3, 1)),
    ):
        tensors = parameters(cube) if metadata.get("format") == "mlx" else diffusers_tensors(cube)
        tensors["conv1.2.weight"] = weight
        write(tmp_path, tensors, config, metadata)
        assert mx.array_equal(Cube.from_pretrained(tmp_path).conv1[2].weight, expected)


# Errors


def test_mismatches_are_listed(toy, tmp_path):
    tensors = diffusers_tensors(toy)
    tensors["to_k.weight"] = tensors.pop("to_q.weight")
    tensors["shortcut.bias"] = mx.zeros((9,))
    tensors["embed.weight"] = mx.zeros((7, 6), mx.int32)
    write(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        Toy.from_pretrained(tmp_path)
    text = str(caught.value)
    assert f"{tmp_path} does not fit Toy" in text
    assert "1 missing, 1 unexpected, 2 that do not fit" in text
    assert "to_q.weight  (nearest: to_k.weight)" in text
    assert "to_k.weight  (nearest: to_q.weight)" in text
    assert "shortcut.bias is (9,), must be (6,)" in text
    assert "embed.weight has dtype I32, must be floating" in text


def test_long_lists_are_cut(toy, tmp_path):
    write(tmp_path, {f"x{i}.weight": mx.zeros((1,)) for i in range(20)})
    with pytest.raises(CheckpointError, match=r"... and 12 more") as caught:
        Toy.from_pretrained(tmp_path)
    assert len(str(caught.value).splitlines()) == 1 + 2 * 10 + 1


def test_layout_mistold_by_the_metadata(toy, tmp_path):
    write(tmp_path, parameters(toy), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"would fit in the mlx layout, while .* diffusers"):
        Toy.from_pretrained(tmp_path)
    write(tmp_path, diffusers_tensors(toy), metadata={"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"would fit in the diffusers layout, while .* mlx"):
        Toy.from_pretrained(tmp_path)


def test_layouts_that_are_not_read(toy, tmp_path):
    write(tmp_path, diffusers_tensors(toy), metadata={"format": "flax"})
    with pytest.raises(CheckpointError, match="layout of 'flax'"):
        Toy.from_pretrained(tmp_path)


def test_shards_of_two_layouts(toy, tmp_path):
    first, second = toy.save_pretrained(tmp_path, layout="diffusers", max_shard_size=2000)
    tensors = load_tensors(second)
    mx.eval(tensors)
    write_safetensors(second, tensors, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=f"{first.name} .diffusers.*{second.name} .mlx"):
        Toy.from_pretrained(tmp_path)


def test_wrong_class_and_missing_config(toy, tmp_path):
    write(tmp_path, diffusers_tensors(toy), {"_class_name": "AutoencoderKL"})
    with pytest.raises(CheckpointError, match="for the class AutoencoderKL, not Toy or OldToy"):
        Toy.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"channels": [4, 6]}')
    assert same(Toy.from_pretrained(tmp_path), toy)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        Toy.from_pretrained(tmp_path)


def test_float64_is_refused_before_mlx_sees_it(tmp_path):
    write(tmp_path, {"a": mx.zeros((2,))})
    path = tmp_path / f"{STEM}.safetensors"
    content = path.read_bytes().replace(b'"F32","shape":[2]', b'"F64","shape":[1]')
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="F64, which MLX does not have"):
        Toy.from_pretrained(tmp_path)


# Cost


class Wide(PretrainedModel):
    config_class = ToyConfig

    def __init__(self, channels=(256, 256), eps=1e-5, sample_size=None):
        super().__init__()
        self.config = ToyConfig(channels, eps, sample_size)
        self.convs = [nn.Conv2d(*channels, 3) for _ in range(12)]


@pytest.mark.parametrize("dtype", [None, mx.float16])
@pytest.mark.parametrize("layout", ["mlx", "diffusers"])
def test_peak_is_the_model_and_one_tensor(tmp_path, dtype, layout):
    model = Wide()
    mx.eval(model.parameters())
    model.save_pretrained(tmp_path, layout=layout)
    del model
    gc.collect()  # models of other tests, which would be counted and then go
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = Wide.from_pretrained(tmp_path, dtype=dtype)
    tensor = 256 * 256 * 9 * 4
    final = sum(array.nbytes for array in parameters(loaded).values())
    # evaluated by now, and nothing kept besides
    assert final <= mx.get_active_memory() - before <= final + 4096 * 24
    assert mx.get_peak_memory() - before <= final + 2 * tensor


def test_random_start_values_are_never_computed(toy, tmp_path):
    """20000 x 20000 random numbers would take seconds and 1.6 GB."""

    class Huge(Toy):
        class_names = ("Toy",)

        def __init__(self, **config):
            super().__init__(**config)
            self.to_q.weight = mx.random.normal((20_000, 20_000))[:4, :6]

    toy.save_pretrained(tmp_path)
    mx.reset_peak_memory()
    assert same(Huge.from_pretrained(tmp_path), toy)
    assert mx.get_peak_memory() < 100_000_000
