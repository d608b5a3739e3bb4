"""Files of strangers given to the command: one sentence, status 2, nothing written, little time and memory.

Each case writes a file and gives it to a command. Refused checkpoints have tests in test_malformed.py.
"""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
from mlx_unet3d import media
from mlx_unet3d.cli import main
from mlx_unet3d.media import mp4 as mp4_module
from PIL import Image
from scenes import needs_ffmpeg

REPLAY = ["generate", "--from", "{}", "-o", "out.gif"]
RESUME = ["generate", "--resume", "{}", "-o", "out.gif"]
DECODE = ["decode", "{}", "-o", "out.gif"]
VIDEO = ["generate", "x", "--video", "{}", "-o", "out.gif"]
LORA = ["generate", "x", "--lora", "{}", "-o", "out.gif"]
INFO = ["info", "{}"]
CONVERT = ["convert", "--hf-path", "{}", "--mlx-path", "out"]
DIRTY = "\x1b[2J\x07\n\u202e"

# --- files ----------------------------------------------------------------------------------------


def gif(comment=None, size=(2, 2), frames=1, duration=0, tail=b";"):
    """A GIF of one colour; `size` is only claimed beyond 2x2, and the frames are."""
    width, height = size
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    if comment is not None:
        data = comment if isinstance(comment, bytes) else comment.encode()
        blocks = [data[i : i + 255] for i in range(0, len(data), 255)]
        head += b"!\xfe" + b"".join(bytes([len(b)]) + b for b in blocks) + b"\0"
    control = b"!\xf9\x04\0" + struct.pack("<H", duration) + b"\0\0"
    image = control + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return head + image * frames + tail


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size=(2, 2), *more, data=None):
    """A grey PNG of a claimed size, with more chunks."""
    body = zlib.compress(b"\0" * (1 + size[0]) * size[1] if data is None else data)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png_text(text):
    return png((2, 2), chunk(b"iTXt", b"Comment\0\0\0\0\0" + text.encode("utf-8", "surrogatepass")))


def webp(size=(16, 16), body=b""):
    """A WebP of a claimed canvas, with other chunks."""
    canvas = b"\x02\0\0\0" + (size[0] - 1).to_bytes(3, "little") + (size[1] - 1).to_bytes(3, "little")
    parts = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + body
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


def box(kind, *parts):
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def mp4(comment=None, *tracks):
    """The container alone, with a comment."""
    parts = [*tracks]
    if comment is not None:
        data = comment if isinstance(comment, bytes) else comment.encode("utf-8", "surrogatepass")
        tag = box(b"\xa9cmt", box(b"data", bytes(8), data))
        parts.append(box(b"udta", box(b"meta", bytes(4), box(b"hdlr", bytes(25)), box(b"ilst", tag))))
    return box(b"ftyp", b"isom") + box(b"moov", *parts)


def track(*runs, timescale=600, entries=None):
    table = b"".join(struct.pack(">II", *run) for run in runs)
    count = struct.pack(">I", len(runs) if entries is None else entries)
    return box(
        b"trak",
        box(
            b"mdia",
            box(b"mdhd", bytes(12), struct.pack(">I", timescale), bytes(8)),
            box(b"hdlr", bytes(8), b"vide", bytes(12)),
            box(b"minf", box(b"stbl", box(b"stts", bytes(4), count, table))),
        ),
    )


def tensors(entries, metadata=None, data=b""):
    """A safetensors file; `entries` maps names to (dtype, shape, bytes), or is the JSON itself."""
    if isinstance(entries, dict):
        header, at = {} if metadata is None else {"__metadata__": metadata}, 0
        for name, (dtype, shape, nbytes) in entries.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        entries, data = json.dumps(header), data or bytes(at)
    text = entries if isinstance(entries, bytes) else entries.encode()
    return len(text).to_bytes(8, "little") + text + data


LATENTS = {"latents": ("F32", (1, 4, 2, 4, 4), 512)}
SETTINGS = dict(prompt="x", model="demo", num_frames=2, height=32, width=32, steps=4, dtype="float32")


def latents(settings=None, entries=LATENTS, **changes):
    """A file of latents; `settings` may be the text itself."""
    text = json.dumps(SETTINGS | changes) if settings is None else settings
    return tensors(entries, {"settings": text})


def sparse(start, size):
    """A file that begins so, and goes on with zeros that take no room."""

    def write(path):
        path.write_bytes(start)
        os.truncate(path, size)

    return write


def pipe(path):
    os.mkfifo(path)


def link(to):
    return lambda path: path.symlink_to(to)


def folder(files):
    """A folder of these files."""

    def write(path):
        path.mkdir()
        for name, content in files.items():
            target = path / name
            target.parent.mkdir(exist_ok=True)
            content(target) if callable(content) else target.write_bytes(content)

    return write


def archive(program, root="archive", data=True, **more):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(f"{root}/data.pkl", program)
        for name, content in {"version": b"3", **({"data/0": bytes(24)} if data else {})}.items():
            made.writestr(f"{root}/{name}", content)
        for name, content in more.items():
            made.writestr(name, content)
    return file.getvalue()


# --- what settings may not be ---------------------------------------------------------------------

DEEP = "[" * 100_000
TEXT = [1, 0.5, True, [], {}, ["x"], "\ud800"]
NAMES = [*TEXT, "", "x\0y"]
CHOICES = [*TEXT, "", "none of them", "x" * 10_000]
COUNTS = ["3", True, [], {}, 0, -1, 2.5, 10**30, 10**12]
NUMBERS = ["3", True, [], {}, [1]]
BAD = {
    "prompt": [*TEXT, "x" * 110_000],
    "negative_prompt": TEXT,
    "num_frames": [*COUNTS, 5000],
    "height": [*COUNTS, 40_000],
    "width": [*COUNTS, 40_000],
    "steps": COUNTS,
    "guidance": NUMBERS,
    "seed": [*NUMBERS, 2**64, -(2**63) - 1, 0.5],
    "rng": CHOICES,
    "scheduler": CHOICES,
    "eta": NUMBERS,
    "clip_skip": COUNTS,
    "dtype": CHOICES,
    "vae_dtype": CHOICES,
    "vae_tiling": [1, "true", [], {}],
    "fps": [*NUMBERS, 0, -1],
    "model": NAMES,
    "revision": NAMES,
    "variant": NAMES,
    "lora": [
        "x",
        "[1]",
        '[["x"]]',
        '[["x", "1"]]',
        "[[1, 1]]",
        '[["x", NaN]]',
        '[[["x"], 1]]',
        '{"a": 1}',
        DEEP[:5000],
        1,
        [],
    ],
    "convolution": CHOICES,
    "cache_interval": COUNTS,
    "cache_depth": COUNTS,
    "guidance_from": [*NUMBERS, -1, 2],
    "guidance_to": [*NUMBERS, -1, 2, 0],
    "video": NAMES,
    "strength": NUMBERS,
    "context_frames": [*COUNTS[:4], -1, 2.5, 10**12],
    "context_stride": [*COUNTS, 13],
    "context_schedule": CHOICES,
    "context_closed_loop": [1, "true", [], {}],
    "free_noise": [1, "true", [], {}],
    "free_noise_stride": COUNTS,
    "free_init": [*COUNTS[:4], -1, 2.5, 101],
    "prompt_at": [
        "x",
        "[]",
        "{}",
        '[["x", "y"]]',
        '[[0, "y"]]',
        '[[1, "y"], [1, "z"]]',
        '[[1, ["y"]]]',
        '[[1.5, "y"]]',
        '[[5, "y"]]',  # of a video of 2 frames
        DEEP[:5000],
        1,
        [],
    ],
}
NO_SETTINGS = {
    "nothing": "",
    "a number": "1",
    "a list": "[]",
    "null": "null",
    "deep": DEEP,
    "deep objects": '{"a":' * 100_000,
    "digits": '{"seed": ' + "9" * 5000 + "}",
    "infinite": '{"prompt": "x", "eta": 1e999}',
    "not a number": '{"prompt": "x", "eta": NaN}',
    "infinity": '{"prompt": "x", "eta": -Infinity}',
    "cut": '{"prompt": "x',
    "an object inside": '{"prompt": {"a": 1}}',
    "no prompt": '{"seed": 1}',
    "control characters": json.dumps({"prompt": "x", "rng": DIRTY}),
    "a key of control characters": json.dumps({DIRTY: "x"}),
    "a model elsewhere": json.dumps({"prompt": "x", "model": "/etc"}),
    "a model up there": json.dumps({"prompt": "x", "model": "a/../.."}),
    "a model at home": json.dumps({"prompt": "x", "model": "~/x"}),
    "a model of no place": json.dumps({"prompt": "x", "model": f"./{DIRTY}"}),
    "a lora elsewhere": json.dumps({"prompt": "x", "model": "demo", "lora": '[["/etc/passwd", 1]]'}),
    "a video elsewhere": json.dumps({"prompt": "x", "model": "demo", "video": "/etc/passwd"}),
    "too large a video": json.dumps({"prompt": "x", "num_frames": 4000, "height": 8000, "width": 8000}),
    "too large a side": json.dumps({"prompt": "x", "width": 1_000_000, "vae_tiling": True}),
    "shares of a run": json.dumps({"prompt": "x", "guidance_from": 0.7, "guidance_to": 0.2}),
    "strangers": json.dumps({str(i): i for i in range(5000)}),
}


def setting_cases():
    for name, values in BAD.items():
        for i, value in enumerate(values):
            text = json.dumps(SETTINGS | {name: value})
            yield f"replay: {name} {i}", "x.gif", gif(text), REPLAY
            command = RESUME if i % 2 else DECODE
            yield f"{command[0]}: {name} {i}", "x.latents.safetensors", latents(text), command
    for name, text in NO_SETTINGS.items():
        yield f"gif: {name}", "x.gif", gif(text), REPLAY
        yield f"png: {name}", "x.png", png_text(text), REPLAY
        yield f"mp4: {name}", "x.mp4", mp4(text), REPLAY
        if name != "no prompt":
            yield f"latents: {name}", "x.latents.safetensors", latents(text), RESUME


def shaped(shape, dtype="F32", item=4):
    return {"latents": (dtype, shape, int(np.prod(shape)) * item)}


def with_steps(*shape, dtype="F32"):
    return LATENTS | {"predictions": (dtype, shape, 4 * int(np.prod(shape)))}


NOT_FINITE = struct.pack("<f", float("nan")) + bytes(508)
L = "x.latents.safetensors"
LATENT_FILES = {
    "empty": b"",
    "zeros": bytes(1000),
    "a page": b"<!DOCTYPE html><html>",
    "gigabytes": sparse(b"", 20 * 2**30),
    "a header of gigabytes": sparse((2**34).to_bytes(8, "little") + b"{", 20 * 2**30),
    "a pipe": pipe,
    "a device": link("/dev/zero"),
    "a folder": folder({}),
    "a link to itself": link(L),
    "no latents": latents(entries={"x": ("F32", (1,), 4)}),
    "more than latents": latents(entries=LATENTS | {"x": ("F32", (1,), 4)}),
    "no settings": tensors(LATENTS, {}),
    "settings no text": tensors('{"__metadata__":{"settings":1}}'),
    "four axes": latents(entries=shaped((4, 2, 4, 4))),
    "no frames": latents(entries=shaped((1, 4, 0, 4, 4))),
    "two videos": latents(entries=shaped((2, 4, 2, 4, 4))),
    "integers": latents(entries=shaped((1, 4, 2, 4, 4), "I32")),
    "bytes": latents(entries=shaped((1, 4, 2, 4, 4), "U8", 1)),
    "booleans": latents(entries=shaped((1, 4, 2, 4, 4), "BOOL", 1)),
    "doubles": latents(entries=shaped((1, 4, 2, 4, 4), "F64", 8)),
    "eight bits": latents(entries=shaped((1, 4, 2, 4, 4), "F8_E4M3", 1)),
    "complex": latents(entries=shaped((1, 4, 2, 4, 4), "C64", 8)),
    "another number of frames": latents(num_frames=3),
    "another size": latents(width=64),
    "no size": latents(width=None),
    "no frames said": latents(num_frames=None),
    "no model": latents(model=None),
    "predictions of another size": latents(entries=with_steps(2, 1, 4, 2, 4, 5)),
    "no predictions": latents(entries=with_steps(0, 1, 4, 2, 4, 4)),
    "predictions of integers": latents(entries=with_steps(2, 1, 4, 2, 4, 4, dtype="I32")),
    "predictions of a scalar": latents(entries=with_steps()),
    "predictions without end": latents(entries=with_steps(1001, 1, 4, 2, 4, 4)),
    "not finite": tensors(LATENTS, {"settings": json.dumps(SETTINGS)}, NOT_FINITE),
    "half a character": tensors(b'{"__metadata__":{"settings":"\\ud800"}}'),
    "bad escape": tensors(b'{"__metadata__":{"settings":"\\u+123"}}'),
    "a fraction": tensors(b'{"latents":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', data=bytes(4)),
    "a name of control characters": latents(entries={DIRTY: ("F32", (1,), 4)}),
    "a dtype of control characters": latents(entries={"latents": (DIRTY, (1,), 4)}),
}


def huge_latents(shape):
    """Latents of gigabytes, which take no room."""

    def write(path):
        frames, height, width = shape[2:]
        text = json.dumps(SETTINGS | dict(num_frames=frames, height=8 * height, width=8 * width))
        nbytes = 4 * int(np.prod(shape))
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}
        header = json.dumps({"__metadata__": {"settings": text}, "latents": entry}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + nbytes)

    return write


for sizes in (
    [1, 4, 2, 20_000, 20_000],
    [1, 4, 4096, 200, 200],
    [1, 1, 1, 3000, 3000],
    [1, 4, 300, 700, 700],
):
    LATENT_FILES[f"huge: {sizes}"] = huge_latents(sizes)

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
DUPLICATE = gif(size=(9999, 9999), frames=300)
VIDEOS = {
    "gif: huge": ("x.gif", DUPLICATE),
    "gif: of no size": ("x.gif", gif(size=(0, 0))),
    "gif: cut": ("x.gif", gif()[:30]),
    "gif: no image": ("x.gif", b"GIF89a\2\0\2\0\0\0\0;"),
    "gif: zeros without end": ("x.gif", sparse(gif(tail=b""), 20_000_000)),
    "gif: gigabytes": ("x.gif", sparse(gif(tail=b""), 2**34)),
    "gif: frames without end": ("x.gif", gif(frames=11_000)),
    "gif: EPS": ("x.gif", EPS),
    "gif: a page": ("x.gif", b"<html>"),
    "gif: pcx": ("x.gif", b"\x0a\x05\x01\x08" + bytes(200)),
    "gif: empty": ("x.gif", b""),
    "gif: a pipe": ("x.gif", pipe),
    "gif: a device": ("x.gif", link("/dev/zero")),
    "gif: a link to itself": ("x.gif", link("x.gif")),
    "png: huge": ("x.png", png((50_000, 50_000), data=b"")),
    "png: wide": ("x.png", png((2**31 - 1, 1), data=b"")),
    "png: of no size": ("x.png", png((0, 5), data=b"")),
    "png: too few data": ("x.png", png((100, 100), data=b"\0")),
    "png: no end of texts": (
        "x.png",
        png((2, 2), *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22)))] * 40),
    ),
    "png: a profile": (
        "x.png",
        png((2, 2), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**27))), data=b""),
    ),
    "png: frames of an animation": (
        "x.png",
        png((2, 2), chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), data=b""),
    ),
    "png: broken sum": ("x.png", png()[:-20] + b"\0" * 20),
    "png: a pipe": ("x.png", pipe),
    "png: gigabytes": ("x.png", sparse(png(), 2**34)),
    "png: EPS": ("x.png", EPS),
    "webp: huge": ("x.webp", webp((16_383, 16_383))),
    "webp: larger": ("x.webp", webp((2**24, 2**24))),
    "webp: nothing in it": ("x.webp", webp()),
    "webp: gigabytes": ("x.webp", sparse(webp(), 2**34)),
    "webp: a pipe": ("x.webp", pipe),
    "mp4: empty": ("x.mp4", b""),
    "mp4: a playlist": ("x.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"),
    "mp4: a list of files": ("x.mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"),
    "mp4: no track": ("x.mp4", mp4()),
    "mp4: a movie of gigabytes": ("x.mp4", sparse(struct.pack(">I4sQ", 1, b"moov", 2**34), 2**34)),
    "mp4: atoms without end": ("x.mp4", struct.pack(">I4s", 8, b"free") * 200_000),
    "mp4: an atom of length 1": ("x.mp4", struct.pack(">I4sQ", 1, b"free", 3) + bytes(50)),
    "mp4: a length beyond": ("x.mp4", struct.pack(">I4sQ", 1, b"free", 2**64 - 1) + bytes(50)),
    "mp4: no time": ("x.mp4", mp4(None, track((5, 0)))),
    "mp4: no frames": ("x.mp4", mp4(None, track((0, 5)))),
    "mp4: no scale": ("x.mp4", mp4(None, track((5, 5), timescale=0))),
    "mp4: more times than said": ("x.mp4", mp4(None, track((5, 5), entries=2**32 - 1))),
    "mp4: long times": ("x.mp4", mp4(None, track(*[(2**32 - 1, 2**32 - 1)] * 1000))),
    "mp4: no samples": ("x.mp4", mp4(None, track((5, 20)))),
    "mp4: a pipe": ("x.mp4", pipe),
    "mp4: a device": ("x.mp4", link("/dev/zero")),
    "mov: a page": ("x.mov", b"<html>"),
    "no suffix": ("x", gif()),
    "another suffix": ("x.eps", EPS),
    "a folder of nothing": ("x", folder({})),
    "a folder with a pipe": ("x", folder({"1.png": pipe})),
    "a folder with a device": ("x", folder({"1.png": link("/dev/zero")})),
    "a folder with a huge frame": ("x", folder({"1.png": png((50_000, 50_000), data=b"")})),
    "a folder of two sizes": ("x", folder({"1.png": png(), "2.png": png((3, 3))})),
    "a folder of a bad rate": ("x", folder({"1.png": png((2, 2), chunk(b"tEXt", b"fps\0nan"))})),
    "a folder of no rate": ("x", folder({"1.png": png((2, 2), chunk(b"tEXt", b"fps\0often"))})),
    "a folder of an endless rate": (
        "x",
        folder({"1.png": png((2, 2), chunk(b"tEXt", b"fps\0" + b"9" * 999))}),
    ),
}


def held_for_hours(path):
    """Two frames of 60 ms and one of eleven minutes, of 1.6 million pixels."""
    first, second, third = (Image.new("P", (2000, 800), i) for i in range(3))
    first.save(path, "GIF", save_all=True, append_images=[second, third], duration=[60, 60, 655_350])


VIDEOS["gif: held for hours"] = ("x.gif", held_for_hours)
VIDEOS["webp: held for hours"] = ("x.webp", lambda path: Image.new("RGB", (900, 900)).save(path, "WEBP",
    save_all=True, append_images=[Image.new("RGB", (900, 900), 9)], duration=[10, 8_000_000]))  # fmt: skip

CONFIG = {"_class_name": "UNet3DConditionModel", "sample_size": 8, "block_out_channels": [8, 16]}


def config(text=None, name="config.json", **changes):
    content = json.dumps(CONFIG | changes) if text is None else text
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    return "x", folder({name: data})


CONFIGS = {
    "empty": config(""),
    "zeros": config(bytes(50)),
    "a list": config("[]"),
    "a number": config("7"),
    "cut": config('{"a": '),
    "deep": config(DEEP),
    "deep objects": config('{"a":' * 100_000),
    "digits": config('{"sample_size": ' + "9" * 5000 + "}"),
    "not text": config(b"\xff\xfe\x00"),
    "a page": config("<!DOCTYPE html>"),
    "a pointer": config("version https://git-lfs.github.com/spec/v1\n"),
    "millions of values": config('{"a": [' + "[]," * 11_000_000 + "[]]}"),
    "gigabytes": ("x", folder({"config.json": sparse(b"{", 2**34)})),
    "a pipe": ("x", folder({"config.json": pipe})),
    "a device": ("x", folder({"config.json": link("/dev/zero")})),
    "index: deep": config(DEEP, "model_index.json"),
    "index: a list": config("[]", "model_index.json"),
    "index: a pipe": ("x", folder({"model_index.json": pipe})),
    "class of control characters": config(_class_name=DIRTY),
    "class is a list": config(_class_name=["UNet3DConditionModel"]),
    "class is a number": config(_class_name=7),
    "no class": config(_class_name=None),
    "another class": config(_class_name="os.system"),
    "text for a number": config(in_channels="4"),
    "a key of control characters": config(**{DIRTY: 1}),
    "channels of control characters": config(in_channels=DIRTY),
    "no channels": config(block_out_channels=[]),
    "channels of a list": config(block_out_channels=[[8], [16]]),
    "negative channels": config(block_out_channels=[-8, 16]),
    "huge channels": config(block_out_channels=[2**40, 2**40]),
    "infinite": config('{"_class_name": "UNet3DConditionModel", "norm_eps": 1e999}'),
    "layers without end": config(layers_per_block=10**9),
    "unknown blocks": config(down_block_types=[DIRTY, DIRTY]),
}


def key(text):
    """A tensor of this name, as it stands in JSON."""
    return tensors('{"' + text + '":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', data=bytes(4))


PICKLE = b"\x80\x02}."
BAD_HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]'
PAIR = '"x.lora_A.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
ADAPTERS = {
    "empty": b"",
    "zeros": bytes(999),
    "a page": b"<html>",
    "a pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "cut": tensors(BAD_HEADER + b"}}", data=b"\0"),
    "deep": tensors("{" + '"a":{' * 50_000),
    "a list": tensors("[1]"),
    "huge shape": tensors('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "negative": tensors('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', data=bytes(4)),
    "a fraction": tensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4]}}', data=bytes(4)),
    "minus nothing": tensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', data=bytes(4)),
    "minus nothing in a shape": tensors('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "gap": tensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', data=bytes(8)),
    "overlap": tensors("{" + PAIR + "," + PAIR.replace("x.", "y.") + "}", data=bytes(16)),
    "twice": tensors("{" + PAIR + "," + PAIR + "}", data=bytes(16)),
    "half a character": key('\\ud800'),
    "the other half": key('\\udc00'),
    "halves apart": key('\\ud800\\\\udc00'),
    "bad escape": key('\\u+041'),
    "bad escape with a line": key('\\u0_41'),
    "not text": tensors(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', data=bytes(4)),
    "infinite": tensors('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1e999}}', data=bytes(4)),
    "millions of values": tensors('{"a":[' + "0," * 11_000_000 + "0]}"),
    "control characters": tensors({DIRTY: ("F32", (2, 2), 16)}),
    "dtype of control characters": tensors({"a": (DIRTY, (2, 2), 16)}),
    "metadata of control characters": tensors({"a.lora_A.weight": ("F32", (2, 2), 16)}, {"format": DIRTY}),
    "no adapter": tensors({"a": ("F32", (2, 2), 16)}),
    "half an adapter": tensors({"a.lora_A.weight": ("F32", (2, 2), 16)}),
    "settings": tensors({"a.lora_A.weight": ("F32", (2, 2), 16)}, {"lora_adapter_metadata": DEEP}),
    "gigabytes": sparse(b"", 2**34),
    "a pipe": pipe,
    "a device": link("/dev/zero"),
    "a folder": folder({}),
    "pickle: nothing": PICKLE,
    "pickle: a call": pickle.dumps(os.getcwd, 2),
    "pickle: control characters": b"\x80\x02cos\x1b[2J\nsystem\n.",
    "pickle: an archive of it": archive(pickle.dumps(os.getcwd, 2)),
    "pickle: keys of control characters": archive(b"\x80\x02}(X\x05\0\0\0\x1b[2J\nK\1u."),
    "pickle: prefixed": b"junk" + archive(PICKLE),
    "pickle: prefixed archive": b"PK\3\4" + bytes(60) + archive(PICKLE),
    "pickle: outside": archive(PICKLE, **{"other/x": b"1"}),
    "pickle: capitals": archive(PICKLE, **{"ARCHIVE/data.pkl": PICKLE}),
    "pickle: TorchScript": archive(PICKLE, **{"archive/constants.pkl": b""}),
    "pickle: byte order": archive(PICKLE, **{"archive/byteorder": b"\xff" * 1000}),
    "pickle: a version of the future": archive(PICKLE, **{"archive/.data/version": b"9" * 1000}),
    "pickle: two": archive(PICKLE, **{"other/data.pkl": PICKLE}),
    "pickle: no root": archive(PICKLE, root=""),
    "pickle: name of control characters": archive(PICKLE, root=f"{DIRTY}/a"),
    "pickle: no end": archive(b"\x80\x02}"),
    "pickle: a huge number": archive(b"\x80\x02\x8b\xff\xff\xff\x7f"),
    "pickle: a long text": archive(b"\x80\x02X\xff\xff\xff\xff"),
    "pickle: endless": archive(b"\x80\x02" + b"]" * 3_000_000 + b"."),
    "pickle: big-endian": archive(PICKLE, **{"archive/byteorder": b"big"}),
}  # fmt: skip


def cases():
    yield from setting_cases()
    for name, content in LATENT_FILES.items():
        yield f"latents: {name}", L, content, DECODE
        if not name.startswith("no predictions"):
            yield f"resumed: {name}", L, content, RESUME
    for name, (file, content) in VIDEOS.items():
        yield f"video: {name}", file, content, VIDEO
        if not any(
            word in name for word in ("held", "times", "no samples", "no time", "no scale", "no frames")
        ):
            yield f"replayed: {name}", file, content, REPLAY
    for name, (file, content) in CONFIGS.items():
        yield f"config: {name}", file, content, INFO
    for name, content in ADAPTERS.items():
        yield f"adapter: {name}", "x.safetensors", content, LORA


CASES = {name: rest for name, *rest in cases()}


def write(path, content):
    content(path) if callable(content) else path.write_bytes(content)


def listing():
    return sorted((str(path), path.lstat().st_size) for path in Path().rglob("*"))


def test_hostile_files(tmp_path, monkeypatch, capsys):
    assert len(CASES) >= 300
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scale = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    wrong, slow = [], []
    for i, (name, (file, content, command)) in enumerate(CASES.items()):
        place = tmp_path / str(i)
        place.mkdir()
        monkeypatch.chdir(place)
        write(Path(file), content)
        there = listing()
        start = time.process_time()
        try:
            status = main([word.format(file) for word in command])
        except SystemExit as stop:
            status = stop.code
        except Exception as error:
            status = repr(error)
        seconds = time.process_time() - start
        said = capsys.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("mlx-unet3d: error: ")]
        fair = all(c.isprintable() or c in "\n\r" for c in said) and len(said) < 4000
        named = bool(errors) and Path(file).stem in errors[0]
        unlike = status != 2 or len(errors) != 1 or not fair or not named or "Traceback" in said
        if unlike or listing() != there:
            wrong.append((name, status, said[-300:]))
        if seconds > 10:  # 2 on a machine that does nothing else: a bound for what hangs
            slow.append((name, seconds))
        if Path(file).is_file() and not Path(file).is_symlink():
            Path(file).unlink()
    assert not wrong, json.dumps(wrong, indent=1)
    assert not slow
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale - before < 1e9


# On Linux the usage of a process begins with that of the one that started it; its own peak is in /proc.
SAMPLE = """
import re, resource, sys
from pathlib import Path
from mlx_unet3d.cli import main
status = main(sys.argv[1:])
scale = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if Path("/proc/self/status").exists():
    peak = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
print(max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * scale)
sys.exit(status)
"""


@needs_ffmpeg
def test_video_that_is_small_on_disk(tmp_path):
    """40 kB of mp4, half a gigabyte of pixels: refused as they come, and read where they are made small."""
    path = tmp_path / "x.mp4"
    source = ["-f", "lavfi", "-i", "color=black:s=3840x2160:r=30", "-frames:v", "24"]
    command = [mp4_module.find_encoder().executable, "-loglevel", "error", *source]
    command += ["-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "ultrafast"]
    subprocess.run([*command, path], check=True)
    assert path.stat().st_size < 100_000
    command = [sys.executable, "-c", SAMPLE, "generate", "x", "--video", "x.mp4", "-o", "out.gif"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "x.mp4 has more than 21 frames of 3840x2160 pixels" in done.stderr
    assert int(done.stdout) < 1e9
    assert os.listdir(tmp_path) == ["x.mp4"]
    frames, _ = media.read_video(path, num_frames=5, size=(16, None))
    assert frames.shape == (5, 16, 3840, 3)
