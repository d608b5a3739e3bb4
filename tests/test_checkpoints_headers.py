"""Reading and writing safetensors files: every malformed file is refused before MLX sees it."""

import json
import struct

import mlx.core as mx
import pytest
from mlx_unet3d.checkpoints import (
    Deferred,
    TensorInfo,
    headers,
    load_tensors,
    read_header,
    read_tensor,
    write_safetensors,
)
from mlx_unet3d.errors import CheckpointError


def pack(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


A = tensor([2], 0, 8)

NOT_SAFETENSORS = {
    "empty": (b"", "is empty"),
    "four bytes": (b"\x02\0\0\0", "cut short"),
    "length only": (struct.pack("<Q", 2), "cut short"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "web page, indented": (b"\n  <html>\n<head></head></html>", "web page"),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "git lfs pull",
    ),
    "zip pickle": (b"PK\x03\x04" + b"\0" * 60, "torch pickle"),
    "legacy pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M", "torch pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 40, "GGUF"),
    "numpy": (b"\x93NUMPY\x01\0v\0{'descr'", "NumPy"),
    "text": (b"hello, I am a text file", "not a safetensors file"),
    "zeros": (bytes(64), "not a safetensors file"),
    "header is a list": (pack([1, 2]), "not a safetensors file"),
    "leading space": (pack(b" {}"), "not a safetensors file"),
}

MALFORMED = {
    "header length beyond the file": (pack({"a": A}, b"\0" * 8, length=4000), "cut short"),
    "header length huge": (pack({"a": A}, b"\0" * 8, length=2**63), "above the limit"),
    "header length zero": (pack(b"{}", length=0), "not valid JSON"),
    "header cut inside": (pack({"a": A}, b"\0" * 8, length=30), "not valid JSON"),
    "bad json": (pack(b'{"a": '), "not valid JSON"),
    "trailing zeros in the header": (pack(b"{}\0\0"), "not valid JSON"),
    "not utf-8": (pack(b'{"\xff": 1}'), "not valid JSON"),
    "lone surrogate": (
        pack(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "not valid JSON",
    ),
    "nested deep": (pack(b'{"a":' * 50_000), "not valid JSON"),
    "nan": (pack(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "NaN"),
    "number of 5000 digits": (
        pack(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
        "not valid JSON|sizes go",
    ),
    "duplicate tensor": (
        pack(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            b"\0" * 16,
        ),
        "'a' comes twice",
    ),
    "duplicate field": (
        pack(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        "comes twice",
    ),
    "metadata not a map": (pack({"__metadata__": ["mlx"], "a": A}, b"\0" * 8), "metadata"),
    "metadata not text": (pack({"__metadata__": {"v": 1}, "a": A}, b"\0" * 8), "metadata"),
    "entry not a map": (pack({"a": 5}), "lacks one of"),
    "shape missing": (pack({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8), "lacks"),
    "unknown dtype": (pack({"a": tensor([2], 0, 8, "F31")}, b"\0" * 8), "unknown dtype 'F31'"),
    "dtype not text": (pack({"a": tensor([2], 0, 8, 32)}, b"\0" * 8), "unknown dtype 32"),
    "negative sizes": (pack({"a": tensor([-2, -1], 0, 8)}, b"\0" * 8), "sizes go"),
    "fractional size": (pack({"a": tensor([2.0], 0, 8)}, b"\0" * 8), "sizes go"),
    "true as a size": (pack({"a": tensor([True, 2], 0, 8)}, b"\0" * 8), "sizes go"),
    "shape a number": (pack({"a": tensor(2, 0, 8)}, b"\0" * 8), "sizes go"),
    "size wraps in int32": (pack({"a": tensor([2**32 + 2], 0, 8)}, b"\0" * 8), "sizes go"),
    "large and empty": (pack({"a": tensor([2**31, 0], 0, 0)}), "sizes go"),
    "astronomic": (pack({"a": tensor([2**31 - 1] * 4, 0, 0)}), "takes"),
    # mx.load takes this one, as 0 bytes, and the first sum over it ends the process
    "2**64 bytes": (pack({"a": tensor([2**30, 2**30, 4], 0, 0)}), "takes"),
    "size mismatch": (pack({"a": tensor([3], 0, 8)}, b"\0" * 8), "takes 12 bytes"),
    "offsets negative": (pack({"a": tensor([2], -8, 0)}, b"\0" * 8), "data_offsets"),
    "offsets reversed": (pack({"a": tensor([2], 8, 0)}, b"\0" * 8), "data_offsets"),
    "three offsets": (
        pack({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}, b"\0" * 8),
        "data_offsets",
    ),
    "offsets near 2**64": (
        pack({"a": tensor([2], 2**64 - 16, 2**64 - 8)}, b"\0" * 8),
        "leaves a gap",
    ),
    "overlap": (pack({"a": A, "b": tensor([2], 4, 12)}, b"\0" * 12), "overlaps"),
    "same span": (pack({"a": A, "b": A}, b"\0" * 8), "overlaps"),
    "gap": (pack({"a": A, "b": tensor([2], 12, 20)}, b"\0" * 20), "leaves a gap"),
    "gap at the start": (pack({"a": tensor([2], 8, 16)}, b"\0" * 16), "leaves a gap"),
    "trailing bytes": (pack({"a": A}, b"\0" * 9), "1 bytes follow"),
    "data cut short": (pack({"a": A}, b"\0" * 7), "promises 8 bytes of tensors, it has 7"),
}


@pytest.mark.parametrize("name", [*NOT_SAFETENSORS, *MALFORMED])
def test_malformed_file_is_refused(tmp_path, name):
    content, message = (NOT_SAFETENSORS | MALFORMED)[name]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    for read in (read_header, load_tensors):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_the_safetensors_library_refuses_the_same(tmp_path):
    """Each case is wrong by the format, not by our opinion; one is only too large for MLX."""
    safetensors = pytest.importorskip("safetensors")
    for name, (content, _) in (NOT_SAFETENSORS | MALFORMED).items():
        if name in ("large and empty", "leading space"):
            continue
        path = tmp_path / f"{abs(hash(name))}.safetensors"
        path.write_bytes(content)
        with (
            pytest.raises((safetensors.SafetensorError, OSError)),
            safetensors.safe_open(path, "np"),
        ):
            pytest.fail(name)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_header(tmp_path)


def test_valid_headers(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({}))
    assert read_header(path).tensors == {}
    header = {
        "__metadata__": {"format": "pt"},
        "empty": tensor([0, 3], 8, 8),
        "scalar": tensor([], 8, 12),
        "a": A,
    }
    path.write_bytes(pack(header, b"\0" * 12))
    read = read_header(path)
    assert read.metadata == {"format": "pt"}
    start = path.stat().st_size - 12
    assert read.tensors == {
        "a": TensorInfo("F32", (2,), 8, start),
        "empty": TensorInfo("F32", (0, 3), 0, start + 8),
        "scalar": TensorInfo("F32", (), 4, start + 8),
    }
    assert load_tensors(path)["scalar"].shape == ()


def test_read_tensor_is_what_mlx_loads(tmp_path):
    path = tmp_path / "x.safetensors"
    dtypes = (mx.float32, mx.float16, mx.bfloat16, mx.int64, mx.uint8, mx.bool_)
    tensors = {str(d): (mx.random.normal((3, 5)) * 9).astype(d) for d in dtypes}
    tensors |= {"scalar": mx.array(2.5), "empty": mx.zeros((0, 3))}
    write_safetensors(path, tensors, {})
    loaded = mx.load(str(path))
    for name, info in read_header(path).tensors.items():
        array = read_tensor(path, info)
        assert array.dtype == loaded[name].dtype
        assert array.shape == loaded[name].shape
        assert mx.array_equal(array, loaded[name])
    last = max(read_header(path).tensors.values(), key=lambda info: info.begin + info.nbytes)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short while it was read"):
        read_tensor(path, last)


def test_deferred_tensors_are_written_one_at_a_time(tmp_path):
    """Made in turn, none kept, and the same bytes as those of plain arrays."""
    arrays = {name: mx.random.normal((4, 8)) for name in "abc"}
    made = []

    def deferred(name):
        def make():
            made.append(name)
            return arrays[name]

        return Deferred((4, 8), mx.float32, make)

    write_safetensors(tmp_path / "deferred", {name: deferred(name) for name in arrays}, {"format": "mlx"})
    assert made == ["a", "b", "c"]
    write_safetensors(tmp_path / "plain", arrays, {"format": "mlx"})
    assert (tmp_path / "deferred").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "F8_E5M2"])
def test_dtypes_that_mlx_lacks_are_named(tmp_path, dtype):
    """F8_E4M3 would load, as integers."""
    path = tmp_path / "x.safetensors"
    size = 8 if dtype == "F64" else 1
    path.write_bytes(pack({"w": tensor([2], 0, 2 * size, dtype)}, b"\0" * 2 * size))
    assert read_header(path).tensors["w"].dtype == dtype
    with pytest.raises(CheckpointError, match=f"'w' has dtype {dtype}.*save the file as F32"):
        load_tensors(path)


def test_load_does_not_need_the_extension(tmp_path):
    path = tmp_path / "blob"
    write_safetensors(path, {"a": mx.arange(3)}, {"format": "mlx"})
    assert load_tensors(path)["a"].tolist() == [0, 1, 2]


DTYPES = [
    *(mx.float32, mx.float16, mx.bfloat16, mx.complex64, mx.bool_),
    *(mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64),
]


def test_write_then_read_is_the_identity(tmp_path):
    tensors = {f"t{i}": (mx.arange(6).reshape(2, 3) % 5).astype(d) for i, d in enumerate(DTYPES)}
    tensors |= {"scalar": mx.array(2.5), "none": mx.zeros((0, 4)), "é": mx.ones((1,))}
    tensors["turned"] = tensors["t1"].T
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"format": "mlx"})
    for read in (load_tensors(path), mx.load(str(path))):
        assert read.keys() == tensors.keys()
        for name, array in tensors.items():
            assert read[name].dtype == array.dtype
            assert read[name].shape == array.shape
            assert mx.array_equal(read[name], array), name
    data_start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    assert data_start % 8 == 0


def test_bytes_written_do_not_depend_on_order(tmp_path):
    tensors = {"c": mx.ones((1,)), "b": mx.ones((3,), mx.float16), "a": mx.zeros((2, 2))}
    write_safetensors(tmp_path / "1", tensors, {"x": "1", "format": "pt"})
    write_safetensors(tmp_path / "2", dict(sorted(tensors.items())), {"format": "pt", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_writing_turned_arrays_costs_two_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "AHEAD", 0)
    arrays = {f"w{i}": mx.random.uniform(shape=(512, 512)) for i in range(8)}
    mx.eval(arrays)
    turned = {name: array.T for name, array in arrays.items()}
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    write_safetensors(tmp_path / "x", turned, {"format": "pt"})
    assert mx.get_peak_memory() - before <= 2 * 512 * 512 * 4
