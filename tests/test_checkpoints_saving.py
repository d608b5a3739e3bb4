"""Saving models: whole or not at all, shards, checksums, quantized models."""

import json
import warnings

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_unet3d.checkpoints import (
    checksum,
    read_header,
    read_json,
    storage,
    weight_files,
    write_safetensors,
)
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.models.pretrained import PretrainedModel

from .checkpoints_toy import COUNT, STEM, Pointwise, Toy, ToyConfig, make_toy, parameters, same


@pytest.fixture
def toy():
    return make_toy()


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_failed_write_leaves_the_folder_as_it_was(toy, tmp_path, monkeypatch):
    toy.save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    calls = []

    def fails_late(path, tensors, metadata):
        calls.append(path)
        write_safetensors(path, tensors, metadata)
        if len(calls) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(storage, "write_safetensors", fails_late)
    with pytest.raises(OSError, match="disk full"):
        Toy().save_pretrained(tmp_path, max_shard_size=700)
    assert len(calls) == 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("size", ["5GB", 700])
@pytest.mark.parametrize("old_size", ["5GB", 700])
def test_save_cut_off_at_any_rename_never_loads_half(toy, tmp_path, monkeypatch, size, old_size):
    new = Toy()
    mx.eval(new.parameters())
    renames = len(new.save_pretrained(tmp_path / "count", max_shard_size=size)) + 1 + (size == 700)
    real = storage.os.replace
    for stop in range(renames):
        folder = tmp_path / str(stop)
        toy.save_pretrained(folder, max_shard_size=old_size)
        done = []

        def cut(source, target, done=done, stop=stop):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(target)
            real(source, target)

        monkeypatch.setattr(storage.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(folder, max_shard_size=size)
        monkeypatch.setattr(storage.os, "replace", real)
        assert not list(folder.glob("*.part"))
        with pytest.raises((FileNotFoundError, CheckpointError)):
            Toy.from_pretrained(folder)
        new.save_pretrained(folder, max_shard_size=size)
        assert same(Toy.from_pretrained(folder), new)


def test_earlier_weights_of_the_variant_are_removed_and_others_kept(toy, tmp_path):
    toy.save_pretrained(tmp_path, max_shard_size=700)
    toy.save_pretrained(tmp_path, max_shard_size=700, variant="fp16")
    (tmp_path / f"{STEM}-notes.txt").touch()
    kept = {name for name in snapshot(tmp_path) if "fp16" in name or "notes" in name}
    toy.save_pretrained(tmp_path)
    assert set(snapshot(tmp_path)) == kept | {"config.json", f"{STEM}.safetensors"}
    toy.save_pretrained(tmp_path, max_shard_size=2000)
    assert f"{STEM}.safetensors" not in snapshot(tmp_path)
    assert len(weight_files(tmp_path, STEM)) == 2


def test_overwrite(toy, tmp_path):
    toy.save_pretrained(tmp_path, overwrite=False)
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"already has config.json, .*overwrite=True"):
        Toy().save_pretrained(tmp_path, overwrite=False)
    assert snapshot(tmp_path) == before


def test_save_over_the_folder_it_was_loaded_from(toy, tmp_path):
    toy.save_pretrained(tmp_path, layout="diffusers")
    loaded = Toy.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path, layout="mlx")
    assert same(Toy.from_pretrained(tmp_path), toy)


def test_shard_sizes(toy, tmp_path):
    files = toy.save_pretrained(tmp_path, max_shard_size=700)
    sizes = [sum(t.nbytes for t in read_header(file).tensors.values()) for file in files]
    assert sum(sizes) == 4 * COUNT
    for file, size in zip(files, sizes, strict=True):
        assert size <= 700 or len(read_header(file).tensors) == 1
    saved = read_json(tmp_path / f"{STEM}.safetensors.index.json")
    assert saved["metadata"] == {"total_size": 4 * COUNT}
    assert set(saved["weight_map"]) == set(parameters(toy))
    sizes = {"1KB": 1000, "1.5 MB": 1_500_000, "2GiB": 2**31, "17": 17, 5: 5}
    assert {size: storage.parse_size(size) for size in sizes} == sizes
    for wrong in (0, -1, "big", "5 TB", "", "-5GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            toy.save_pretrained(tmp_path, max_shard_size=wrong)


def test_unknown_layout(toy, tmp_path):
    with pytest.raises(ValueError, match="layout='torch' must be"):
        toy.save_pretrained(tmp_path / "x", layout="torch")
    assert not (tmp_path / "x").exists()


def test_checksum(toy, tmp_path):
    first = toy.save_pretrained(tmp_path / "a")
    again = toy.save_pretrained(tmp_path / "b")
    assert checksum(first) == checksum(again)
    assert len(checksum(first)) == 16
    content = bytearray(first[0].read_bytes())
    content[-1] ^= 1
    first[0].write_bytes(content)
    assert checksum(first) != checksum(again)


# Quantized models


class Broad(PretrainedModel):
    config_class = ToyConfig

    def __init__(self, channels=(64, 32), eps=1e-5, sample_size=None):
        super().__init__()
        self.config = ToyConfig(channels, eps, sample_size)
        self.proj = nn.Linear(*channels)
        self.skip = Pointwise(*channels)
        self.kept = nn.Linear(channels[1], 5)
        self.conv = nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_quantized_models_come_back(tmp_path, mode):
    model = Broad()
    count = model.num_parameters()
    size = {"affine": {"group_size": 64, "bits": 8}, "mxfp4": {"group_size": 32, "bits": 4}}[mode]
    nn.quantize(model, **size, mode=mode, class_predicate=lambda path, _: path in ("proj", "skip"))
    mx.eval(model.parameters())
    assert model.num_parameters() == count
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["quantization"] == {**size, "mode": mode}
    loaded = Broad.from_pretrained(tmp_path, dtype=mx.float16)
    assert "scales" in loaded.proj
    assert type(loaded.kept) is nn.Linear
    assert loaded.proj.weight.dtype == mx.uint32
    assert loaded.conv.weight.dtype == mx.float16
    x = mx.random.normal((3, 64))
    assert mx.allclose(loaded.skip(x.astype(mx.float16)), model.skip(x), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="save with layout='mlx'"):
        model.save_pretrained(tmp_path, layout="diffusers")
    config = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": {"nbits": 3}}))
    with pytest.raises(CheckpointError, match="must hold group_size"):
        Broad.from_pretrained(tmp_path)


def test_quantization_is_no_unknown_key(tmp_path):
    model = Broad()
    nn.quantize(model, class_predicate=lambda path, _: path == "proj")
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Broad.from_pretrained(tmp_path)
