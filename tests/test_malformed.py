"""Malformed checkpoints given to the converter: refused in bounded time and memory, by file and cure.

What the single readers refuse is tested beside them; here it goes the whole way, and there are fuzzed files.
"""

import io
import itertools
import json
import os
import pickle
import pickletools
import re
import resource
import shutil
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline
from mlx_unet3d.checkpoints import read_header, read_pickle, read_tensor, write_safetensors
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{STEM}.safetensors.index.json"
PARTS = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
CURES = "download|repair|correct|convert|choose|check|save|pull|remove|pass|take|give|use|does not exist"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def bounded():
    """No test of this file takes long, or more memory than its files explain."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this takes too long"))
    signal.alarm(600)  # of the clock, for what waits; a busy machine may be slow
    scale = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    start = time.process_time()
    yield
    signal.alarm(0)
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before < 600e6


def read_folder(folder):
    """Kind, size and, where it is a small file, content of all that is below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        small = path.is_file() and info.st_size < 10**7
        found[str(path)] = (info.st_mode, info.st_size, path.read_bytes() if small else None)
    return found


# What is done to a folder. Each returns a function of it.


def write(name, content):
    """A file with this content in the place of the one that is there."""
    data = content if isinstance(content, bytes) else content.encode()

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return change


def edit(name, **values):
    """Other values in a JSON file."""

    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def weights(change, name=WEIGHTS):
    """A weight file with another header and other data."""

    def apply(folder):
        content = (folder / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, data = change(json.loads(content[8 : 8 + length]), content[8 + length :])
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)

    return apply


def entry(**values):
    """Another entry for the first tensor of the file."""

    def change(header, data):
        name = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
        return header | {name: header[name] | values}, data

    return weights(change)


def more(entries, data=b""):
    """More tensors, at the end."""
    return weights(lambda header, old: (header | entries(len(old)), old + data))


def cut(place):
    """The weights cut at a place, which is given the length of the header and that of the file."""

    def change(folder):
        path = folder / WEIGHTS
        header = int.from_bytes(path.read_bytes()[:8], "little")
        os.truncate(path, place(header, path.stat().st_size))

    return change


def sharded(weight_map=None, text=None, then=lambda folder: None):
    """Two shards and an index, which maps as `weight_map` of the right one, or has this text."""

    def change(folder):
        arrays = mx.load(str(folder / WEIGHTS))
        names = sorted(arrays)
        halves = names[::2], names[1::2]
        right = {}
        for part, half in zip(PARTS, halves, strict=True):
            write_safetensors(folder / part, {name: arrays[name] for name in half}, {"format": "mlx"})
            right |= dict.fromkeys(half, part)
        (folder / WEIGHTS).unlink()
        content = json.dumps({"weight_map": weight_map(right)}) if text is None else text
        data = content if isinstance(content, bytes) else content.encode()
        (folder / INDEX).write_bytes(data)
        then(folder)

    return change


def first_at(name):
    """The first tensor mapped to another file name."""
    return sharded(lambda right: right | {min(right): name})


def program(body):
    return b"\x80\x02" + body + b"."


def zipped(body, compression=zipfile.ZIP_STORED, **entries):
    """The weights as a zip archive with this pickle, and more entries."""

    def change(folder):
        (folder / WEIGHTS).unlink()
        with zipfile.ZipFile(folder / f"{STEM}.bin", "w", compression) as archive:
            archive.writestr("archive/data.pkl", program(body() if callable(body) else body))
            for name, content in ({"data/0": bytes(24), "version": b"3"} | entries).items():
                archive.writestr(f"archive/{name}", content)

    return change


def legacy(*pickles, end=b""):
    """The weights in the older container, with these pickles after its head."""

    def change(folder):
        (folder / WEIGHTS).unlink()
        facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, facts)]
        (folder / f"{STEM}.bin").write_bytes(b"".join([*head, *pickles]) + end)

    return change


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return (
        b"\x8a" + bytes([len(data)]) + data
        if len(data) < 256
        else b"\x8b" + struct.pack("<i", len(data)) + data
    )


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(6) + b"tQ"


def tensor(shape=(2, 3), strides=(3, 1), first=0, storage=STORAGE, name="w"):
    """A state dict of one tensor."""
    view = storage + number(first) + numbers(shape) + numbers(strides)
    arguments = b"(" + view + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"}" + text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs"


def laughs(depth=60):
    """A tuple that holds itself twice, `depth` levels deep: a few bytes, and 2**depth tuples to look at."""
    levels = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(depth))
    return b"(" + b"N" + b"tq\0" + levels


def sparse(name, size):
    """A file of zeros that takes no room."""

    def change(folder):
        (folder / name).unlink()
        with open(folder / name, "wb") as file:
            file.truncate(size)

    return change


def link(name, to):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(to)

    return change


def folder_in_place(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def pipe_in_place(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


UNET_SIGNS = (
    *("time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.0.1.proj_in.weight"),
    "middle_block.0.temopral_conv.conv1.0.weight",
)


def original(*keys):
    """A file without a config in the folder's place, with tensors of these names."""

    def change(folder):
        for path in folder.iterdir():
            path.unlink()
        write_safetensors(folder / "x.safetensors", {key: mx.zeros((2, 3)) for key in keys}, {})

    return change


F32 = {"dtype": "F32", "shape": [2, 3]}
BIG = 10**12

# Name -> which folder of the pipeline, what is done to it, what the message must have in it.
CASES = {
    # Weights.
    "cut after the length": ("vae", cut(lambda header, size: 8), (WEIGHTS, "cut short")),
    "cut in the length": ("vae", cut(lambda header, size: 5), (WEIGHTS, "cut short")),
    "cut in the header": ("vae", cut(lambda header, size: 8 + header // 2), (WEIGHTS, "cut short")),
    "cut after the header": ("vae", cut(lambda header, size: 8 + header), (WEIGHTS, "cut short")),
    "cut by a byte": ("vae", cut(lambda header, size: size - 1), (WEIGHTS, "cut short")),
    "a byte more": ("vae", weights(lambda h, d: (h, d + b"\0")), (WEIGHTS, "1 bytes follow")),
    "integers for weights": ("vae", entry(dtype="I32"), ("dtype I32, must be floating",)),
    "a dtype that MLX lacks": ("vae", more(lambda at: {"f8": {"dtype": "F8_E4M3", "shape": [1],
        "data_offsets": [at, at + 1]}}, b"\0"), ("unexpected", "f8")),
    "another framework": ("vae", weights(lambda h, d: (h | {"__metadata__": {"format": "flax"}}, d)),
        (WEIGHTS, "'flax'")),
    "a million axes": ("vae", entry(shape=[2**31 - 1] * 10**6), (WEIGHTS, "1000000 axes")),
    "dtype of a megabyte": ("vae", entry(dtype="F" * 10**6), (WEIGHTS, "unknown dtype")),
    "name of a megabyte": ("vae", more(lambda at: {"x" * 10**6: F32 | {"data_offsets": [at, at]}}),
        (WEIGHTS,)),
    "many strangers": ("vae", weights(lambda h, d: ({f"{i:06}" * 12: F32 | {"data_offsets":
        [24 * i, 24 * i + 24]} for i in range(30_000)}, bytes(24 * 30_000))),
        ("30000 unexpected", "180 missing")),
    "strangers with long names": ("vae", weights(lambda h, d: ({f"{i}" * 4000: F32 | {"data_offsets": [24 * i,
        24 * i + 24]} for i in range(300)}, bytes(24 * 300))), ("300 unexpected",)),
    "gigabytes of zeros": ("vae", sparse(WEIGHTS, 20 * 2**30), (WEIGHTS, "not a safetensors")),
    "a folder for weights": ("vae", folder_in_place(WEIGHTS), (WEIGHTS,)),
    "a pipe for weights": ("vae", pipe_in_place(WEIGHTS), (WEIGHTS,)),
    "a link to nothing": ("vae", link(WEIGHTS, "nowhere"), (WEIGHTS,)),
    "a link to a device": ("vae", link(WEIGHTS, "/dev/zero"), (WEIGHTS,)),
    "a link out of the folder": ("vae", link(WEIGHTS, "/etc/passwd"), (WEIGHTS, "not a safetensors")),
    "a link to itself": ("vae", link(WEIGHTS, WEIGHTS), (WEIGHTS,)),

    # Original files, told by the names in them.
    "original: halved at once": ("vae", original(*UNET_SIGNS, "input_blocks.0.op.weight",
        "input_blocks.1.0.in_layers.0.weight"), ("x.safetensors", "no tensor for")),
    "original: a number of digits": ("vae", original(*UNET_SIGNS, f"input_blocks.{'9' * 5000}.0.weight"),
        ("x.safetensors", "no tensor for")),
    "original: strangers": ("vae", original(*("".join(word) * 12 for word in itertools.islice(
        itertools.product("abcdefgh", repeat=5), 30_000))), ("x.safetensors", "none of the networks")),
    "original: a long name": ("vae", original("x" * 10**6), ("x.safetensors", "none of the networks")),
    "original: a device for its config": ("vae", lambda f: (original(*UNET_SIGNS)(f),
        (f / "config.json").symlink_to("/dev/zero")), ("config.json",)),

    # Index of shards.
    "index: a page": ("vae", sharded(text=PAGE), (INDEX, "web page")),
    "index: lfs": ("vae", sharded(text=LFS), (INDEX, "git lfs pull")),
    "index: mark of bytes": ("vae", sharded(text=b"\xef\xbb\xbf{}"), (INDEX, "BOM")),
    "index: utf-16": ("vae", sharded(text='{"weight_map": {}}'.encode("utf-16")), (INDEX, "not UTF-8")),
    "index: empty": ("vae", sharded(text=""), (INDEX, "not valid JSON")),
    "index: a list": ("vae", sharded(text="[]"), (INDEX, "a list")),
    "index: map is a list": ("vae", sharded(list), (INDEX, "no weight_map")),
    "index: out of the folder": ("vae", first_at("../x.safetensors"),
        (INDEX, "'../x.safetensors'", "plain name")),
    "index: absolute": ("vae", first_at("/tmp/x.safetensors"), (INDEX, "plain name")),
    "index: backslashes": ("vae", first_at("..\\x.safetensors"), (INDEX, "plain name")),
    "index: empty name": ("vae", first_at(""), (INDEX, "plain name")),
    "index: hidden": ("vae", first_at(".safetensors"), (INDEX, "plain name")),
    "index: nul": ("vae", first_at("x\0.safetensors"), (INDEX, "plain name")),
    "index: null": ("vae", first_at(None), (INDEX, "plain name")),
    "index: a pickle": ("vae", first_at(f"{STEM}.bin"), (INDEX, "plain name")),
    "index: long name": ("vae", first_at("x" * 5000 + ".safetensors"), (INDEX, "plain name")),
    "index: a folder": ("vae", sharded(lambda r: r | {min(r): "x.safetensors"},
        then=lambda f: (f / "x.safetensors").mkdir()), (INDEX, "x.safetensors", "finish the download")),
    "index: link to a folder": ("vae", sharded(dict, then=lambda f: link(PARTS[1], "/tmp")(f)),
        (INDEX, PARTS[1])),
    "index: link out": ("vae", sharded(dict, then=lambda f: link(PARTS[1], "/etc/passwd")(f)), (PARTS[1],)),
    "index: a tensor too many": ("vae", sharded(lambda r: r | {"none": PARTS[0]}), (INDEX, "'none'")),
    "index: all in one shard": ("vae", sharded(lambda r: dict.fromkeys(r, PARTS[0])), (INDEX, "none of the")),
    "index: deep": ("vae", sharded(text='{"weight_map":' + '{"a":' * 10**5), (INDEX, "not valid JSON")),
    "index: gigabytes": ("vae", sharded(dict, then=lambda f: sparse(INDEX, 10 * 2**30)(f)),
        (INDEX, "too large")),

    # Configs.
    "config: a page": ("vae", write("config.json", PAGE), ("config.json", "web page")),
    "config: lfs": ("vae", write("config.json", LFS), ("config.json", "git lfs pull")),
    "config: a mark of bytes": ("vae", write("config.json", b"\xef\xbb\xbf{}"), ("config.json", "BOM")),
    "config: cut": ("vae", write("config.json", '{"_class_name": "AutoencoderKL", "act_'),
        ("config.json", "JSON")),
    "config: zeros": ("vae", write("config.json", bytes(100)), ("config.json", "not valid JSON")),
    "config: class is a list": ("vae", edit("config.json", _class_name=["AutoencoderKL"]),
        ("config.json", "class")),
    "config: class is an object": ("vae", edit("config.json", _class_name={"a": 1}),
        ("config.json", "class")),
    "config: architectures": ("text_encoder", edit("config.json", _class_name=None, architectures=7),
        ("config.json", "class")),
    "config: a pipe": ("vae", pipe_in_place("config.json"), ("config.json",)),
    "config: a device": ("vae", link("config.json", "/dev/zero"), ("config.json",)),
    "config: gigabytes": ("vae", sparse("config.json", 10 * 2**30), ("config.json", "too large")),
    "no channels": ("vae", edit("config.json", in_channels=0), ("config.json", "in_channels=0")),
    "negative channels": ("vae", edit("config.json", block_out_channels=[4, -4, 4, 8]),
        ("config.json", "block_out_channels")),
    "channels that are text": ("vae", edit("config.json", latent_channels="4"),
        ("config.json", "latent_channels='4'")),
    "channels that are no number": ("vae", edit("config.json", block_out_channels=[4, float("nan"), 4, 8]),
        ("config.json", "block_out_channels")),
    "channels that are one number": ("vae", edit("config.json", block_out_channels=4),
        ("config.json", "block_out_channels")),
    "a billion layers": ("vae", edit("config.json", layers_per_block=10**9),
        ("config.json", "layers_per_block")),
    "10**12 channels": ("vae", edit("config.json", in_channels=BIG), ("config.json", f"in_channels={BIG}")),
    "10**12 wide": ("vae", edit("config.json", block_out_channels=[BIG] * 4),
        ("config.json", "block_out_channels")),
    "2**31 - 2 wide": ("vae", edit("config.json", block_out_channels=[2**31 - 2] * 4), ("config.json",)),
    "10**6 wide": ("vae", edit("config.json", block_out_channels=[10**6] * 4), ("config.json", "do not fit")),
    "10**12 groups": ("vae", edit("config.json", norm_num_groups=BIG), ("config.json", "norm_num_groups")),
    "groups that do not divide": ("vae", edit("config.json", norm_num_groups=3),
        ("config.json", "norm_num_groups")),
    "block types are text": ("vae", edit("config.json", down_block_types="DownEncoderBlock2D"),
        ("config.json", "down_block_types")),
    "block types are numbers": ("unet", edit("config.json", down_block_types=[1, 2]), ("config.json", "1")),
    "block types are lists": ("unet", edit("config.json", down_block_types=[["a"], ["b"]]), ("config.json",)),
    "activation": ("vae", edit("config.json", act_fn="sin"), ("config.json", "sin")),
    "activation is a list": ("vae", edit("config.json", act_fn=["silu"]), ("config.json", "act_fn")),
    "scale is no number": ("vae", edit("config.json", scaling_factor=float("nan")),
        ("config.json", "scaling_factor")),
    "scale is text": ("vae", edit("config.json", scaling_factor="big"), ("config.json", "scaling_factor")),
    "unet: heads": ("unet", edit("config.json", attention_head_dim=BIG),
        ("config.json", "attention_head_dim")),
    "unet: heads of each block": ("unet", edit("config.json", attention_head_dim=[4, 4]),
        ("config.json", "attention_head_dim")),
    "unet: text channels": ("unet", edit("config.json", cross_attention_dim=BIG),
        ("config.json", "cross_attention_dim")),
    "unet: negative text channels": ("unet", edit("config.json", cross_attention_dim=-12),
        ("config.json", "cross_attention_dim")),
    "unet: text channels are text": ("unet", edit("config.json", cross_attention_dim="12"),
        ("config.json", "cross_attention_dim")),
    "unet: infinite epsilon": ("unet", edit("config.json", norm_eps=float("inf")),
        ("config.json", "norm_eps")),
    "unet: epsilon is text": ("unet", edit("config.json", norm_eps="1e-5"), ("config.json", "norm_eps")),
    "unet: scale is no number": ("unet", edit("config.json", mid_block_scale_factor=float("nan")),
        ("config.json", "mid_block_scale_factor")),
    "unet: scale is zero": ("unet", edit("config.json", mid_block_scale_factor=0),
        ("config.json", "mid_block_scale_factor")),
    "unet: condition": ("unet", edit("config.json", time_cond_proj_dim="a"),
        ("config.json", "time_cond_proj_dim")),
    "unet: another network": ("unet", edit("config.json", class_embed_type="timestep"),
        ("config.json", "class_embed_type")),
    "unet: heads by number": ("unet", edit("config.json", num_attention_heads=2),
        ("config.json", "num_attention")),
    "unet: many levels": ("unet", edit("config.json", down_block_types=["DownBlock3D"] * 10**5,
        up_block_types=["UpBlock3D"] * 10**5, block_out_channels=[8] * 10**5), ("config.json", "levels")),
    "text: a billion layers": ("text_encoder", edit("config.json", num_hidden_layers=10**9),
        ("config.json", "num_hidden_layers")),
    "text: vocabulary": ("text_encoder", edit("config.json", vocab_size=BIG), ("config.json", "vocab_size")),
    "text: epsilon": ("text_encoder", edit("config.json", layer_norm_eps=None),
        ("config.json", "layer_norm_eps")),
    "text: activation": ("text_encoder", edit("config.json", hidden_act={}), ("config.json", "hidden_act")),
    "config: quantized": ("unet", edit("config.json", quantization={"bits": 4}), ("quantized already",)),

    # The index of the pipeline.
    "pipeline: a page": ("", write("model_index.json", PAGE), ("model_index.json", "web page")),
    "pipeline: lfs": ("", write("model_index.json", LFS), ("model_index.json", "git lfs pull")),
    "pipeline: a list": ("", write("model_index.json", "[]"), ("model_index.json", "a list")),
    "pipeline: empty": ("", write("model_index.json", "{}"), ("model_index.json", "no UNet")),
    "pipeline: class of a list": ("", edit("model_index.json", unet=["diffusers", ["UNet3DConditionModel"]]),
        ("model_index.json", "unet")),
    "pipeline: path": ("", edit("model_index.json", **{"../unet": ["diffusers", "UNet3DConditionModel"]}),
        ("model_index.json", "'../unet'")),
    "pipeline: absolute path": ("", edit("model_index.json", **{"/tmp": ["diffusers", "AutoencoderKL"]}),
        ("model_index.json", "'/tmp'")),
    "pipeline: backslash": ("", edit("model_index.json", **{"..\\vae": ["diffusers", "AutoencoderKL"]}),
        ("model_index.json", "vae")),
    "pipeline: no name": ("", edit("model_index.json", **{"": ["diffusers", "AutoencoderKL"]}),
        ("model_index.json", "''")),
    "pipeline: this folder": ("", edit("model_index.json", **{".": ["diffusers", "AutoencoderKL"]}),
        ("model_index.json", "'.'")),
    "pipeline: a file's name": ("", edit("model_index.json", **{"README.md": ["diffusers", "AutoencoderKL"]}),
        ("model_index.json", "'README.md'")),
    "pipeline: nul": ("", edit("model_index.json", **{"va\0e": ["diffusers", "AutoencoderKL"]}),
        ("model_index.json",)),
    "pipeline: other class": ("", edit("model_index.json", vae=["diffusers", "UNet3DConditionModel"]),
        ("config.json", "AutoencoderKL")),
    "pipeline: no part": ("", lambda f: shutil.rmtree(f / "vae"), ("no folder 'vae'",)),

    # Tokenizer.
    "vocab: a page": ("", write("tokenizer/vocab.json", PAGE), ("vocab.json", "web page")),
    "vocab: lfs": ("", write("tokenizer/vocab.json", LFS), ("vocab.json", "git lfs pull")),
    "vocab: cut": ("", write("tokenizer/vocab.json", '{"a": 1, "b'), ("vocab.json", "not valid JSON")),
    "vocab: ids are fractions": ("", write("tokenizer/vocab.json", '{"a": 0.5}'), ("vocab.json", "0.5")),
    "vocab: huge ids": ("", write("tokenizer/vocab.json", json.dumps({"a": BIG})), ("vocab.json", str(BIG))),
    "vocab: half a character": ("", edit("tokenizer/vocab.json", **{"\ud800": 500}), ("vocab.json", "d800")),
    "vocab: other": ("", write("tokenizer/vocab.json", '{"a": 0}'),
        ("tokenizer", "is not in the vocabulary")),
    "merges: lfs": ("", write("tokenizer/merges.txt", LFS), ("merges.txt", "git lfs pull")),
    "merges: a page": ("", write("tokenizer/merges.txt", PAGE), ("merges.txt", "web page")),
    "merges: bytes": ("", write("tokenizer/merges.txt", bytes(range(256))), ("merges.txt", "UTF-8")),
    "merges: strangers": ("", write("tokenizer/merges.txt", "#version: 0.2\nq u\n"), ("merges.txt", "'qu'")),
    "merges: gigabytes": ("", sparse("tokenizer/merges.txt", 10 * 2**30), ("merges.txt", "too large")),
    "tokenizer: endless below": ("", edit("tokenizer/tokenizer_config.json", model_max_length=float("-inf")),
        ("tokenizer_config.json", "model_max_length")),
    "tokenizer: one token": ("", edit("tokenizer/tokenizer_config.json", model_max_length=1),
        ("tokenizer_config.json", "model_max_length")),
    "tokenizer: empty padding": ("", edit("tokenizer/tokenizer_config.json", pad_token=""),
        ("tokenizer_config.json", "not a token")),
    "tokenizer: half a character": ("", edit("tokenizer/tokenizer_config.json", pad_token="\ud800"),
        ("tokenizer_config.json", "d800")),
    "tokenizer: class": ("", edit("tokenizer/tokenizer_config.json", tokenizer_class=["CLIPTokenizer"]),
        ("tokenizer_config.json", "pass the folder")),
    "tokenizer: id of digits": ("", edit("tokenizer/tokenizer_config.json",
        added_tokens_decoder={"9" * 5000: {"content": "x"}}), ("tokenizer_config.json", "added token")),
    "tokenizer: id beyond": ("", edit("tokenizer/tokenizer_config.json",
        added_tokens_decoder={"99999999": {"content": "x"}}), ("tokenizer", "should have id")),
    "tokenizer: gone": ("", lambda f: shutil.rmtree(f / "tokenizer"), ("no folder 'tokenizer'",)),

    # Scheduler.
    "scheduler: a page": ("", write("scheduler/scheduler_config.json", PAGE),
        ("scheduler_config.json", "web page")),
    "scheduler: no class": ("", edit("model_index.json", scheduler=["diffusers"]),
        ("model_index.json", "a class name")),
    "scheduler: class is a list": ("", edit("model_index.json", scheduler=["diffusers", ["DDIMScheduler"]]),
        ("model_index.json", "no scheduler ['DDIMScheduler']")),
    "scheduler: unknown": ("", edit("model_index.json", scheduler=["diffusers", "LMSDiscreteScheduler"]),
        ("model_index.json", "LMSDiscreteScheduler", "nearest is DEISMultistepScheduler")),
    "scheduler: 10**12 steps": ("", edit("scheduler/scheduler_config.json", num_train_timesteps=BIG),
        ("scheduler_config.json", "num_train_timesteps")),
    "scheduler: a billion steps": ("", edit("scheduler/scheduler_config.json", num_train_timesteps=10**9),
        ("scheduler_config.json", "num_train_timesteps")),
    "scheduler: steps are text": ("", edit("scheduler/scheduler_config.json", num_train_timesteps="1000"),
        ("scheduler_config.json", "num_train_timesteps")),
    "scheduler: beta is text": ("", edit("scheduler/scheduler_config.json", beta_start="small"),
        ("scheduler_config.json",)),
    "scheduler: beta is no number": ("", edit("scheduler/scheduler_config.json", beta_end=float("nan")),
        ("scheduler_config.json", "beta_end")),
    "scheduler: schedule": ("", edit("scheduler/scheduler_config.json", beta_schedule=["linear"]),
        ("scheduler_config.json",)),
    "scheduler: betas": ("", edit("scheduler/scheduler_config.json", trained_betas={"a": 1}),
        ("scheduler_config.json",)),

    # Pickles.
    "pickle: a page": ("vae", lambda f: (f / WEIGHTS).rename(f / f"{STEM}.bin").write_bytes(PAGE),
        (".bin", "web page")),
    "pickle: lfs": ("vae", lambda f: (f / WEIGHTS).rename(f / f"{STEM}.bin").write_bytes(LFS),
        (".bin", "git lfs")),
    "pickle: a storage of tuples": ("vae", zipped(b"}" + text("w") + laughs() + b"Qs"), (".bin", "download")),
    "pickle: a key of tuples": ("vae", zipped(b"(" + text("storage") + b"ctorch\nFloatStorage\n" + laughs()
        + text("cpu") + number(6) + b"tQ"), (".bin", "download")),
    "pickle: a name of tuples": ("vae", zipped(laughs() + text("x") + b"\x93"), (".bin", "asks for")),
    "pickle: a shape of tuples": ("vae", zipped(b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + number(0)
        + laughs() + laughs() + b"tR"), (".bin", "download")),
    "pickle: a dictionary of tuples": ("vae", zipped(b"ccollections\nOrderedDict\n(](" + laughs()
        + b"N\x86etR"),
        (".bin", "download")),
    "pickle: keys of tuples": ("vae", legacy(program(tensor()), program(b"](" + laughs() + b"e")),
        (".bin", "download")),
    "pickle: ten million lists": ("vae", zipped(lambda: b"]" * 10**7), (".bin", "download")),
    "pickle: marks": ("vae", zipped(lambda: b"N" * 10**6 + b"(t" * 10**5), (".bin", "download")),
    "pickle: copies": ("vae", zipped(lambda: b"](" + b"N" * 10**6 + b"eq\0" + b"(h\0tq\1"
        + b"ctorch\nSize\nh\1R" * 10**4), (".bin", "download")),
    "pickle: text beyond the file": ("vae", legacy(b"\x80\x02\x8d" + struct.pack("<Q", 10**14)),
        (".bin", "download")),
    "pickle: bytes of gigabytes": ("vae", lambda f: (legacy(b"\x80\x04\x8e"
        + struct.pack("<Q", 8 * 2**30))(f), os.truncate(f / f"{STEM}.bin", 9 * 2**30)), (".bin", "download")),
    "pickle: a line of gigabytes": ("vae", lambda f: (legacy(b"\x80\x02cx")(f),
        os.truncate(f / f"{STEM}.bin", 9 * 2**30)), (".bin", "download")),
    "pickle: a million axes": ("vae", zipped(lambda: tensor([2**60] * 10**5, [1] * 10**5)), (".bin", "axes")),
    "pickle: a long stride": ("vae", zipped(tensor([1, 6], [2**62, 1])), ("unexpected",)),
    "pickle: an empty tensor far away": ("vae", zipped(tensor([0], [1], first=2**62)), ("unexpected",)),
    "pickle: endless repetition": ("vae", zipped(tensor([2**30, 2**20], [0, 0])), (".bin", "'w'")),
    "pickle: a key of digits": ("vae", zipped(b"}" + number(10**6000) + b"Ns"),
        (".bin", "no tensors by name")),
    "pickle: deflated": ("vae", zipped(tensor(), zipfile.ZIP_DEFLATED), (".bin", "compressed")),
    "pickle: a bomb for its order": ("vae", zipped(tensor(), zipfile.ZIP_LZMA, byteorder=bytes(10**7)),
        (".bin", "compressed")),
    "pickle: not its tensors": ("vae", zipped(tensor()), ("unexpected", "missing")),
    "pickle: another's index": ("vae", lambda f: (f / WEIGHTS).rename(
        f / f"{STEM}.bin.index.json").write_text('{"weight_map": {"a": "../x.bin"}}'),
        (".bin.index.json", "plain name")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_malformed_input(model, capsys, name):
    part, change, words = CASES[name]
    folder = Path(shutil.copytree(model / part, "damaged"))
    change(folder)
    before = read_folder(folder)
    assert main(["convert", "--hf-path", "damaged", "--mlx-path", "out"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    message = captured.err[captured.err.index("mlx-unet3d: error: ") :]
    for word in words:
        assert word in message, message[:2000]
    assert re.search(CURES, message, re.IGNORECASE), message[:2000]
    assert len(message) < 5000
    assert os.listdir() == ["damaged"]
    assert read_folder(folder) == before


# Adapters, whose files are read by the same readers.

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = tiny.UNET["block_out_channels"][-1]


def adapter(metadata=None, **changes):
    """A file of a LoRA for one layer, with other arrays, None for none, and settings in JSON."""
    arrays = {"lora_A.weight": mx.ones((2, WIDE)), "lora_B.weight": mx.ones((WIDE, 2))}
    arrays |= {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {f"{LAYER}.{key}": array for key, array in arrays.items() if array is not None}
    return lambda path: write_safetensors(
        path, tensors, {} if metadata is None else {"lora_adapter_metadata": metadata}
    )


def learned(key, *shape):
    return lambda path: write_safetensors(path, {key: mx.zeros(shape)}, {})


def repeated(path):
    """A thousand names for a tensor of most of the file."""
    one = tensor((60_000,), (1,), storage=STORAGE.replace(number(6), number(60_000)))[:-1]
    names = b"".join(text(f"{LAYER}{i}.lora_A.weight") + b"h\0s" for i in range(1000))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(one + b"q\0s" + names))
        archive.writestr("archive/data/0", bytes(240_000))
        archive.writestr("archive/version", b"3")


def half_a_character(path):
    body = tensor((6,), (1,)).replace(text("w"), b"X\3\0\0\0\xed\xa0\x80")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program(body))
        archive.writestr("archive/data/0", bytes(24))
        archive.writestr("archive/version", b"3")


LORAS = {
    "alpha of two numbers": (adapter(alpha=mx.ones(2)), "must be a number"),
    "no number for alpha": (adapter(alpha=mx.array(float("nan"))), "alpha of"),
    "complex alpha": (adapter(alpha=mx.array(1 + 1j)), "float"),
    "scalars": (adapter(lora_A__weight=mx.array(1.0)), "do not fit"),
    "scalar for up": (adapter(lora_B__weight=mx.array(1.0)), "do not fit"),
    "rank 0": (adapter(lora_A__weight=mx.ones((0, WIDE)), lora_B__weight=mx.ones((WIDE, 0))), "do not fit"),
    "twelve axes": (adapter(lora_A__weight=mx.ones((1,) * 12)), "do not fit"),
    "half": (adapter(lora_A__weight=None), "one half"),
    "a long name": (adapter(**{"x" * 10**6: mx.ones(1)}), "fit no layer"),
    "settings: deep": (adapter("[" * 10**5), "lora_adapter_metadata"),
    "settings: no JSON": (adapter("{"), "lora_adapter_metadata"),
    "settings: a list": (adapter("[]"), "an object"),
    "settings: digits": (adapter('{"lora_alpha": ' + "9" * 5000 + "}"), "lora_adapter_metadata"),
    "settings: huge": (adapter('{"lora_alpha": ' + "9" * 500 + "}"), "too large"),
    "settings: text": (adapter('{"lora_alpha": "2"}'), "alpha of"),
    "settings: patterns": (adapter('{"alpha_pattern": [1]}'), "alpha_pattern"),
    "settings: pattern of text": (adapter('{"alpha_pattern": {"to_q": "2"}}'), "alpha of"),
    "a page": (lambda path: path.write_bytes(PAGE), "web page"),
    "names for the same": (repeated, "each tensor once"),
    "malicious": (lambda path: path.write_bytes(pickle.dumps(print, 2)), "malicious"),
}
EMBEDDINGS = {
    "no vector": (learned("<a>", 0, tiny.TEXT["hidden_size"]), "no embedding"),
    "no channels": (learned("<a>", 1, 0), "no embedding"),
    "scalar": (learned("<a>"), "no embedding"),
    "other width": (learned("<a>", 1, 3), "another model"),
    "a long name": (learned("x" * 10**6, 1, tiny.TEXT["hidden_size"]), "no name"),
    "half a character": (half_a_character, "no name"),
}


@pytest.mark.parametrize("name", [*LORAS, *(f"embedding: {name}" for name in EMBEDDINGS)])
def test_malformed_adapter(model, name):
    pipe = TextToVideoPipeline.from_pretrained(model)
    change, word = LORAS.get(name) or EMBEDDINGS[name.removeprefix("embedding: ")]
    path = Path("adapter.safetensors")
    change(path)
    with pytest.raises(CheckpointError) as caught:
        (pipe.load_lora_weights if name in LORAS else pipe.load_textual_inversion)(path)
    message = str(caught.value)
    assert word in message
    assert str(path) in message
    assert len(message) < 3000
    assert not pipe.unet.list_adapters()
    assert not pipe.tokenizer.added_tokens or name in LORAS


# Fuzzed files: what is read is what was written, or there is a CheckpointError; never another exception.

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.bias": np.arange(3, dtype=np.float16),
    "steps": np.array(7, dtype=np.int64),
    "mask": np.array([True, False, True]),
    "empty": np.zeros(0, np.float32),
}
DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "bool": "BOOL"}


def contents(path, read):
    """All tensors of a file, as NumPy has them, each lying inside it; None where the file is refused."""
    try:
        header = read(path)
        size = path.stat().st_size
        for info in header.tensors.values():
            assert 0 <= info.begin <= info.begin + (info.nbytes if info.strides is None else 0) <= size
        return {name: np.array(read_tensor(path, info)) for name, info in header.tensors.items()}
    except CheckpointError as error:
        message = str(error)
    assert str(path) in message
    assert len(message) < 3000
    return None


def equal(found, names=True):
    """Whether the tensors are those of ARRAYS; where a name may be changed, in any case their values."""
    if names:
        return found.keys() == ARRAYS.keys() and all(same(found[name], ARRAYS[name]) for name in ARRAYS)
    left = list(ARRAYS.values())
    for array in found.values():
        at = next((i for i, other in enumerate(left) if same(array, other)), None)
        if at is None:
            return False
        del left[at]
    return not left


def same(a, b):
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def flips(content, places, bits=range(8)):
    """The content with one bit changed, for each of these bits of the places."""
    for place in places:
        for bit in bits:
            yield content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :]


def mixed(content, places, rng, count):
    """The content with a few bytes of the places changed, taken out or put in."""
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 5)):
            at = int(rng.choice(places)) % len(changed)
            kind = rng.integers(4)
            if kind == 0:
                changed[at] = rng.integers(256)
            elif kind == 1:
                del changed[at : at + int(rng.integers(1, 9))]
            elif kind == 2:
                changed[at:at] = rng.bytes(int(rng.integers(1, 9)))
            else:
                changed[at] = rng.choice(np.frombuffer(b'0123456789-.eE"[]{}:,(tRQ)\x80', np.uint8))
        yield bytes(changed)


@pytest.fixture(scope="module")
def safetensors(tmp_path_factory):
    """The content of a file with ARRAYS, and where its data begin."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_safetensors(path, {name: mx.array(array) for name, array in ARRAYS.items()}, {"format": "pt"})
    content = path.read_bytes()
    assert equal(contents(path, read_header))
    return content, 8 + int.from_bytes(content[:8], "little")


def trial(tmp_path, content, read=read_header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return contents(path, read)


def test_safetensors_cut_anywhere(tmp_path, safetensors):
    content, _ = safetensors
    for length in range(len(content)):
        assert trial(tmp_path, content[:length]) is None
    assert trial(tmp_path, content + b"\0") is None


def test_safetensors_with_a_bit_changed(tmp_path, safetensors):
    """Three bits of each byte of length and header. The data have no check; a changed name is a name."""
    content, data = safetensors
    refused = 0
    rng = np.random.default_rng(4)
    for changed in (c for at in range(data) for c in flips(content, [at], rng.permutation(8)[:3])):
        found = trial(tmp_path, changed)
        refused += found is None
        assert found is None or equal(found, names=False)
    assert refused > 3 * data // 2


def test_safetensors_with_bytes_mixed(tmp_path, safetensors):
    content, data = safetensors
    rng = np.random.default_rng(0)
    found = [trial(tmp_path, changed) for changed in mixed(content, range(data), rng, 800)]
    assert 600 < found.count(None) < 800


STRANGE = [
    *(None, True, -1, 0, 1, 0.5, 1e300, float("nan"), float("inf"), 2**31, 2**32, 2**63 - 1, 2**64, 10**30),
    *("", "F32", "\ud800", "x" * 300, [], [0], [-1], [1, 2, 3], [2**63, 2**63], [[1]], {}, {"dtype": "F32"}),
]


def test_safetensors_with_strange_values(tmp_path, safetensors):
    """Every field of every tensor, and every number in it, in turn as STRANGE, or that of another tensor."""
    content, data = safetensors
    header = json.loads(content[8:data])
    tried = 0

    def attempt(changed):
        nonlocal tried
        tried += 1
        text = json.dumps(changed).encode()
        found = trial(tmp_path, len(text).to_bytes(8, "little") + text + content[data:])
        assert found is None or sum(array.nbytes for array in found.values()) == len(content) - data

    for name, fields in header.items():
        for value in STRANGE:
            attempt(header | {name: value})
            for field, old in fields.items():
                attempt(header | {name: fields | {field: value}})
                for i in range(len(old) if isinstance(old, list) else 0):
                    attempt(header | {name: fields | {field: [*old[:i], value, *old[i + 1 :]]}})
    for first in ARRAYS:
        for second in ARRAYS:
            attempt(header | {first: header[second]})
            attempt(header | {first: header[first] | {"data_offsets": header[second]["data_offsets"]}})
    assert tried > 1000


# Pickles of ARRAYS, of a transposed view, and of a parameter.

CLASSES = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "bool": "BoolStorage"}


def state_dict(is_legacy):
    """The program of a state dict with ARRAYS, as a list of its operations."""
    parts = [b"}", b"("]
    for key, (name, array) in enumerate(ARRAYS.items()):
        strides = [n // array.itemsize for n in array.strides]
        parts += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", b"(", b"(", text("storage")]
        parts += [f"ctorch\n{CLASSES[str(array.dtype)]}\n".encode(), text(str(key)), text("cpu")]
        parts += [number(array.size), *([b"N"] if is_legacy else []), b"t", b"Q", number(0)]
        for values in (array.shape, strides):
            parts += [b"(", *map(number, values), b"t"]
        parts += [b"\x89", b"ccollections\nOrderedDict\n", b")", b"R", b"t", b"R"]
    return [*parts, b"u"]


def as_zip(body):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program(body))
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3")
        for key, array in enumerate(ARRAYS.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
    return file.getvalue()


def as_legacy(body):
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, facts)]
    keys = pickle.dumps([str(key) for key in range(len(ARRAYS))], 2)
    data = [struct.pack("<q", array.size) + array.tobytes() for array in ARRAYS.values()]
    return b"".join([*head, program(body), keys, *data])


EVENTS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "os.remove"),
    *("pickle.find_class", "os.mkdir", "os.rename", "ctypes.dlopen"),
)
watched: list[str] | None = None


@pytest.fixture
def nothing_runs():
    """No program, name of a pickle, connection or change of files while pickles are read."""
    global watched
    watched = []
    if not hasattr(sys, "_watched_by_these_tests"):  # a hook stays until the process ends
        sys._watched_by_these_tests = True
        sys.addaudithook(
            lambda event, _: watched.append(event) if watched is not None and event in EVENTS else 0
        )
    yield
    seen, watched = watched, None
    assert not seen


@pytest.fixture(params=["zip", "legacy"])
def container(request, tmp_path):
    """How to make a file of a program, and the whole file of ARRAYS."""
    make = as_zip if request.param == "zip" else as_legacy
    whole = make(b"".join(state_dict(request.param == "legacy")))
    assert equal(trial(tmp_path, whole, read_pickle))
    return make, whole


@pytest.mark.usefixtures("nothing_runs")
def test_pickles_cut_anywhere(tmp_path, container):
    _, whole = container
    for length in range(len(whole)):
        assert trial(tmp_path, whole[:length], read_pickle) is None


@pytest.mark.usefixtures("nothing_runs")
def test_pickles_with_a_bit_changed(tmp_path, container):
    """A bit of each byte. In a zip archive, whose pickle has a checksum, what is read is unchanged."""
    make, whole = container
    exempt = set()
    if make is as_zip:
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            for entry in archive.infolist():
                if (
                    "/data/" in entry.filename
                ):  # the data themselves, and the two bytes that say where they begin
                    data = entry.header_offset + 30 + len(entry.filename)
                    exempt |= {*range(data, data + entry.file_size)}
                    exempt |= {entry.header_offset + 28, entry.header_offset + 29}
    rng = np.random.default_rng(3)
    refused = tried = 0
    for place in range(len(whole)):
        for changed in flips(whole, [place], rng.permutation(8)[:1]):
            found = trial(tmp_path, changed, read_pickle)
            tried += 1
            refused += found is None
            if make is as_zip and place not in exempt:
                assert found is None or equal(found)
    assert refused > tried // 3


@pytest.mark.usefixtures("nothing_runs")
def test_pickles_with_bytes_mixed(tmp_path, container):
    _, whole = container
    rng = np.random.default_rng(1)
    found = [trial(tmp_path, changed, read_pickle) for changed in mixed(whole, range(len(whole)), rng, 500)]
    assert 290 < found.count(None) < 500


@pytest.mark.usefixtures("nothing_runs")
def test_pickles_with_operations_mixed(tmp_path, container):
    """Operations left out, repeated, exchanged and put in, in a file that is valid otherwise."""
    make, _ = container
    rng = np.random.default_rng(2)
    right = state_dict(make is as_legacy)
    codes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    arguments = [b"", b"", b"\0", b"\1", b"\5", b"\0\0\0\0", b"x\n", b"os\nsystem\n", b"\xff" * 8]
    refused = 0
    for _ in range(500):
        parts = list(right)
        for _ in range(rng.integers(1, 4)):
            at, other = rng.integers(len(parts), size=2)
            kind = rng.integers(5)
            if kind == 0:
                del parts[at]
            elif kind == 1:
                parts[at:at] = parts[min(at, other) : max(at, other)][:20]
            elif kind == 2:
                parts[at], parts[other] = parts[other], parts[at]
            elif kind == 3:
                parts.insert(at, codes[rng.integers(len(codes))] + arguments[rng.integers(len(arguments))])
            else:
                parts[at] = number((-1, 0, 1, 2, 7, 2**31, 2**62, 2**70)[rng.integers(8)])
        refused += trial(tmp_path, make(b"".join(parts)), read_pickle) is None
    assert 235 < refused < 500
