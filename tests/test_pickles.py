"""Torch pickles read as data: what is taken, and what is refused by name and never run."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mlx_unet3d.checkpoints import describe
from mlx_unet3d.checkpoints.pickles import is_pickle, read_pickle
from mlx_unet3d.errors import CheckpointError


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def storage(key: str, cls: str, count: int, legacy: bool = False) -> bytes:
    parts = text("storage") + named("torch", cls) + text(key) + text("cpu") + number(count)
    return b"(" + parts + (b"N" if legacy else b"") + b"tQ"


def numbers(values) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key="0", cls="FloatStorage", count=6, first=0, shape=(2, 3), strides=(3, 1), legacy=False
) -> bytes:
    arguments = storage(key, cls, count, legacy) + number(first) + numbers(shape) + numbers(strides) + b"\x89"
    return (
        named("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + arguments
        + named("collections", "OrderedDict")
        + b")RtR"
    )


def dictionary(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


DATA = np.arange(6, dtype="<f4").tobytes()


def write_zip(
    path: Path, body: bytes, data=(("0", DATA),), compression=zipfile.ZIP_STORED, **entries: bytes | None
) -> Path:
    entries = {"version": b"3\n", **entries}
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program(body))
        for key, content in data:
            archive.writestr(f"archive/data/{key}", content)
        for name, content in entries.items():
            if content is not None:
                archive.writestr(f"archive/{name}", content)
    return path


def write_legacy(path: Path, body: bytes = b"", data=(("0", 6, DATA),), little=True) -> Path:
    body = body or dictionary(w=tensor(legacy=True))
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    facts = pickle.dumps({"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}, 2)
    keys = pickle.dumps([key for key, _, _ in data], 2)
    content = b"".join(struct.pack("<q", count) + raw for _, count, raw in data)
    path.write_bytes(magic + pickle.dumps(1001, 2) + facts + program(body) + keys + content)
    return path


def test_both_containers(tmp_path):
    for path in (
        write_zip(tmp_path / "a.bin", dictionary(w=tensor())),
        write_legacy(tmp_path / "b.bin", dictionary(w=tensor(legacy=True))),
    ):
        assert is_pickle(path)
        found = read_pickle(path).tensors["w"]
        assert (found.dtype, found.shape, found.strides, found.nbytes) == ("F32", (2, 3), (3, 1), 24)
        assert path.read_bytes()[found.begin :][:24] == DATA


def test_info_reads_pickles(tmp_path):
    """Where there are no other weights: what is in them, and that they want converting."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet3DConditionModel"}))
    write_zip(tmp_path / "diffusion_pytorch_model.bin", dictionary(w=tensor()))
    write_zip(tmp_path / "diffusion_pytorch_model.fp16.bin", dictionary(w=tensor()))
    (line,) = describe(tmp_path)
    assert "6 parameters in 1 tensors, F32" in line
    assert line.endswith("torch pickle (to be converted to safetensors first), diffusion_pytorch_model.bin")


def test_info_reads_the_pickles_of_a_variant(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet3DConditionModel"}))
    write_zip(tmp_path / "diffusion_pytorch_model.bin", dictionary(w=tensor()))
    for i in (1, 2):
        shard = tmp_path / f"diffusion_pytorch_model.fp16-0000{i}-of-00002.bin"
        write_zip(shard, dictionary(**{f"w{i}": tensor()}))
    (line,) = describe(tmp_path, variant="fp16")
    assert "12 parameters in 2 tensors" in line
    (line,) = describe(tmp_path)
    assert "6 parameters in 1 tensors" in line


# Files that want something run. Each would leave a trace, and none does.

TRACE = "trace-of-running"


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


MALICIOUS = {
    "os.system": pickle.dumps(Runs(os.system, f"touch {TRACE}"), 2)[2:-1],
    "open": pickle.dumps(Runs(open, TRACE, "w"), 2)[2:-1],
    "protocol 4": pickle.dumps(Runs(os.mkdir, TRACE), 4)[11:-1],
    "eval": named("builtins", "eval") + b"(" + text(f"open('{TRACE}', 'w')") + b"tR",
    "python 2": named("__builtin__", "eval") + b"(" + text("1") + b"tR",
    "getattr": named("builtins", "getattr") + b"(" + named("os", "system") + text("x") + b"tR",
    "instance": b"(" + text(f"touch {TRACE}") + b"ios\nsystem\n",
    "object": b"(" + named("os", "system") + text(f"touch {TRACE}") + b"o",
    "new object": named("subprocess", "Popen") + b")\x81",
    "extension": b"\x82\x01",
    "torch.load": named("torch", "load") + b"(" + text("other.bin") + b"tR",
    "nested name": b"\x8c\x05torch\x8c\x0ahub.__dict_\x93",
    "lookalike": named("torch._utils", "_rebuild_tensor_v2.__globals__"),
    "call of a tensor": tensor() + b")R",
    "call of a storage class": named("torch", "FloatStorage") + b"(" + number(3) + b"tR",
    "state of a name": named("collections", "OrderedDict") + dictionary(__code__=b"N") + b"b",
    "named persistent": b"P0\n",
    "strange storage": storage("0", "FloatStorage", 1).replace(text("storage"), text("module")),
    "numpy": named("numpy.core.multiarray", "_reconstruct"),
    "numpy array": named("numpy._core.multiarray", "_reconstruct"),
    "a module": named("torch.nn.modules.container", "Sequential") + b")\x81",
    "new storage": named("torch", "FloatStorage") + b")\x81",
    "new tensor": named("torch._utils", "_rebuild_tensor_v2") + b")\x81",
    "call of a set": named("builtins", "set") + b")R)R",
    "call of a new set": b"\x8f)R",
    "part of a harmless name": named("datetime", "datetime.now"),
    "harmless name elsewhere": named("os", "set"),
    "persistent module": b"(" + text("module") + named("torch", "device") + text("x") + text("y") + b"tQ",
    "lightning": named("pytorch_lightning.callbacks", "ModelCheckpoint"),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_is_run(tmp_path, monkeypatch, name, legacy):
    monkeypatch.chdir(tmp_path)
    body = dictionary(w=tensor(legacy=legacy), x=MALICIOUS[name])
    write = write_legacy if legacy else write_zip
    with pytest.raises(CheckpointError, match=r"nothing of it was run|damaged"):
        read_pickle(write(tmp_path / "bad.bin", body))
    assert os.listdir() == ["bad.bin"]


def test_refusals_name_what_was_asked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"asks for posix\.system|asks for nt\.system"):
        read_pickle(write_zip(tmp_path / "a.bin", dictionary(x=MALICIOUS["os.system"])))
    with pytest.raises(CheckpointError, match=r"asks for pytorch_lightning\.callbacks\.ModelCheckpoint"):
        read_pickle(write_zip(tmp_path / "a.bin", dictionary(x=MALICIOUS["lightning"])))


def test_harmless_values_are_passed_over(tmp_path, monkeypatch):
    """They take what is given to them, and it is dropped."""
    monkeypatch.chdir(tmp_path)
    values = {
        "dtype": named("torch", "float16"),
        "set": named("__builtin__", "set") + b"(](" + number(1) + b"etR",
        "sets": b"\x8f(" + number(1) + b"\x90(" + number(2) + b"\x91\x86",
        "new": named("argparse", "Namespace") + b")\x81" + dictionary(x=number(1)) + b"b",
        "counter": named("collections", "Counter") + b")R(" + text("a") + number(1) + b"u",
        "deque": named("collections", "deque") + b")R(" + number(1) + b"e",
        "bytes": named("_codecs", "encode") + b"(" + text("x") + text("latin1") + b"tR",
    }
    for name, value in values.items():
        path = write_zip(tmp_path / name, dictionary(w=tensor(), x=value))
        assert list(read_pickle(path).tensors) == ["w"]


def parameters(state: bytes) -> bytes:
    return named("torch.nn.modules.container", "ParameterDict") + b")\x81" + state + b"b"


def test_parameters_of_a_dictionary(tmp_path):
    state = dictionary(training=b"\x88", _parameters=dictionary(a=tensor(), b=tensor()), _keys=b"}")
    assert list(read_pickle(write_zip(tmp_path / "x", parameters(state))).tensors) == ["a", "b"]


def test_a_state_dict_for_each_network(tmp_path):
    networks = dictionary(unet=dictionary(w=tensor()), vae=dictionary(w=tensor(), n=number(1)), other=b"}")
    assert list(read_pickle(write_zip(tmp_path / "x", networks)).tensors) == ["unet.w", "vae.w"]


DAMAGED = {
    "no data": (lambda p: write_zip(p, dictionary(w=tensor()), data=()), "missing"),
    "short data": (lambda p: write_zip(p, dictionary(w=tensor()), data=[("0", DATA[:20])]), "cut short"),
    "beyond": (lambda p: write_zip(p, dictionary(w=tensor(shape=(3, 3)))), "reaches beyond"),
    "strides beyond": (lambda p: write_zip(p, dictionary(w=tensor(strides=(4, 1)))), "reaches beyond"),
    "negative offset": (lambda p: write_zip(p, dictionary(w=tensor(first=-1))), "damaged"),
    "negative shape": (lambda p: write_zip(p, dictionary(w=tensor(shape=(-2, -3)))), "damaged"),
    "negative strides": (lambda p: write_zip(p, dictionary(w=tensor(strides=(-3, -1)))), "damaged"),
    "shape and strides": (lambda p: write_zip(p, dictionary(w=tensor(strides=(1,)))), "damaged"),
    "negative count": (lambda p: write_zip(p, dictionary(w=tensor(count=-6))), "damaged"),
    "huge count": (lambda p: write_zip(p, dictionary(w=tensor(count=2**31 - 1))), "cut short"),
    "no tensors": (lambda p: write_zip(p, dictionary(a=number(1))), "no tensors by name but a dict with a"),
    "a list": (lambda p: write_zip(p, b"]"), "no tensors by name but a list"),
    "parameters without any": (lambda p: write_zip(p, parameters(b"}")), "damaged"),
    "items for no set": (lambda p: write_zip(p, b"](" + number(1) + b"\x90"), "damaged"),
    "tuple keys": (lambda p: write_zip(p, b"}(" + b")" + tensor() + b"u"), "damaged"),
    "no mark": (lambda p: write_zip(p, b"}t"), "damaged"),
    "empty stack": (lambda p: write_zip(p, b"R"), "damaged"),
    "unknown memo": (lambda p: write_zip(p, b"h\x07"), "damaged"),
    "two values": (lambda p: write_zip(p, b"}}"), "damaged"),
    "bad opcode": (lambda p: write_zip(p, b"\xff"), "damaged"),
    "compressed": (
        lambda p: write_zip(p, dictionary(w=tensor()), compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "big-endian": (lambda p: write_zip(p, dictionary(w=tensor()), byteorder=b"big"), "big-endian"),
    "unknown byte order": (
        lambda p: write_zip(p, dictionary(w=tensor()), byteorder=b"Little"),
        "the unknown byte order 'Little'",
    ),
    "no version": (lambda p: write_zip(p, dictionary(w=tensor()), version=None), "no member 'version'"),
    **{
        f"version {text!r}": (
            lambda p, text=text: write_zip(p, dictionary(w=tensor()), version=text),
            "version .* of torch's format; it must be 1 to 10",
        )
        for text in (b"", b"0", b"11\n", b"-1", b"0x3", b"three", b"\xff", b"9" * 5000)
    },
    "the first version counts": (
        lambda p: write_zip(p, dictionary(w=tensor()), **{".data/version": b"99"}),
        "version '99'",
    ),
    "alignment": (
        lambda p: write_zip(p, dictionary(w=tensor()), **{".storage_alignment": b"x"}),
        "damaged",
    ),
    "TorchScript": (lambda p: write_zip(p, dictionary(w=tensor()), **{"constants.pkl": b""}), "TorchScript"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").writestr("letter.txt", "hello"), "data.pkl"),
    "legacy big-endian": (
        lambda p: write_legacy(p, little=False),
        "big-endian",
    ),
    "legacy without storage": (
        lambda p: write_legacy(p, data=()),
        "missing",
    ),
    "legacy cut short": (
        lambda p: write_legacy(p, data=[("0", 6, DATA[:9])]),
        "cut short",
    ),
    "legacy other count": (
        lambda p: write_legacy(p, data=[("0", 5, DATA)]),
        "damaged",
    ),
    "plain pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
    "text": (lambda p: p.write_bytes(b"<!DOCTYPE html>"), "damaged"),
    "deep": (lambda p: write_zip(p, b"]" * 100_000), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(tmp_path, name):
    make, message = DAMAGED[name]
    make(tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=message):
        read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_and_changed_bytes_never_crash(tmp_path, legacy):
    """Any prefix, and any single changed byte: read, or refused with a CheckpointError."""
    write = write_legacy if legacy else write_zip
    body = dictionary(w=tensor(legacy=legacy), v=tensor(legacy=legacy, first=1, shape=(5,), strides=(1,)))
    whole = write(tmp_path / "whole.bin", body).read_bytes()
    rng = np.random.default_rng(0)
    variants = [whole[:n] for n in range(0, len(whole), 7)]
    for place in rng.integers(len(whole), size=400):
        changed = bytearray(whole)
        changed[place] = rng.integers(256)
        variants.append(bytes(changed))
    refused = 0
    for content in variants:
        path = tmp_path / "x.bin"
        path.write_bytes(content)
        try:
            for found in read_pickle(path).tensors.values():
                assert 0 <= found.begin <= len(content)
        except CheckpointError:
            refused += 1
    assert refused > len(whole) // 7


def test_other_files_are_no_pickles(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    assert not is_pickle(path)
    with pytest.raises(FileNotFoundError):
        read_pickle(tmp_path / "missing.bin")


def rebuilt(path: Path, *more: tuple[str, bytes], before: bytes = b"", behind: bytes = b"") -> Path:
    """A good archive with more members and other bytes around it."""
    write_zip(path, dictionary(w=tensor()))
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in more:
            archive.writestr(name, content)
    path.write_bytes(before + path.read_bytes() + behind)
    return path


def members(path: Path, *contents: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents:
            archive.writestr(name, content)
    return path


PICKLE, VERSION, NUMBERS = ("data.pkl", program(dictionary(w=tensor()))), ("version", b"3"), ("data/0", DATA)
OUTSIDE = {
    "other folder first": [("b/x", b""), *((f"a/{name}", c) for name, c in (PICKLE, VERSION, NUMBERS))],
    "version elsewhere": [("a/data.pkl", PICKLE[1]), ("b/version", b"3"), ("a/data/0", DATA)],
    "numbers elsewhere": [("a/data.pkl", PICKLE[1]), ("a/version", b"3"), ("b/data/0", DATA)],
    "pickle elsewhere": [("a/version", b"3"), ("b/data.pkl", PICKLE[1]), ("a/data/0", DATA)],
    "folder inside": [(f"a/b/{name}", c) for name, c in (PICKLE, VERSION, NUMBERS)],
    "two capitals": [("A/data.pkl", PICKLE[1]), ("a/version", b"3"), ("a/data/0", DATA)],
    "no folder": [("x", b""), *((f"a/{name}", c) for name, c in (PICKLE, VERSION, NUMBERS))],
    "notes of macOS": [
        *((f"a/{name}", c) for name, c in (PICKLE, VERSION, NUMBERS)),
        ("__MACOSX/a/._x", b""),
    ],
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_all_members_lie_in_the_folder_of_the_first(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"lies outside|has no data"):
        read_pickle(members(tmp_path / "x.bin", *OUTSIDE[name]))


@pytest.mark.parametrize("text", [b"1", b"10", b" 3", b"+3", b"3 of torch", b"3\0"])
def test_versions_that_torch_reads(tmp_path, text):
    assert read_pickle(write_zip(tmp_path / "x.bin", dictionary(w=tensor()), version=text)).tensors


def test_members_are_found_in_any_case(tmp_path):
    """As torch has it."""
    path = members(tmp_path / "x.bin", ("a/DATA.PKL", PICKLE[1]), ("a/Version", b"3"), ("a/data/0", DATA))
    assert read_pickle(path).tensors["w"].shape == (2, 3)
    path = members(path, *((f"a/{n}", c) for n, c in (PICKLE, VERSION, NUMBERS, ("ByteOrder", b"big"))))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_pickle(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "changes",
    [
        dict(before=b"junk"),
        dict(before=b"PK\x03\x04" + bytes(60)),
        dict(more=[("archive/data/0", bytes(24))]),
        dict(more=[("archive/DATA/0", bytes(24))]),
        dict(more=[("other/data/0", bytes(24))]),
    ],
)
def test_archives_that_torch_refuses_or_reads_as_other_numbers(tmp_path, changes):
    more = changes.pop("more", ())
    path = rebuilt(tmp_path / "x.bin", *more, **changes)
    with pytest.raises(CheckpointError, match="not a torch file, or a damaged one"):
        read_pickle(path)


def test_bytes_behind_an_archive_do_no_harm(tmp_path):
    """As torch has it."""
    path = rebuilt(tmp_path / "x.bin", behind=b"junk")
    assert read_pickle(path).tensors["w"].shape == (2, 3)


@pytest.mark.parametrize("field", [20, 24])
def test_records_whose_size_lies(tmp_path, field):
    """In the central directory: the compressed size at byte 20, that of the content at 24."""
    path = rebuilt(tmp_path / "x.bin")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"archive/data/0"))
    struct.pack_into("<I", content, at + field, 12)
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_pickle(path)


def test_empty_tensors_of_sizes_that_no_array_has(tmp_path):
    shape = b"(" + number(0) + b"\x8a\x08" + struct.pack("<q", 2**40) + b"t"
    body = dictionary(w=tensor().replace(numbers((2, 3)), shape))
    with pytest.raises(CheckpointError, match=r"sizes go to 2\*\*31 - 1"):
        read_pickle(write_zip(tmp_path / "x.bin", body))


def test_names_of_the_file_are_escaped(tmp_path):
    body = dictionary(**{"\x1b[2J\n": number(1)})
    with pytest.raises(CheckpointError) as caught:
        read_pickle(write_zip(tmp_path / "x.bin", body))
    assert "\\x1b[2J\\n" in str(caught.value)
    assert str(caught.value).isprintable()
