"""The pickle reader against torch: the same tensors, in both containers."""

import pytest

torch = pytest.importorskip("torch")

import argparse  # noqa: E402
import datetime  # noqa: E402
import pathlib  # noqa: E402
from collections import Counter, OrderedDict, defaultdict, deque  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_unet3d.checkpoints.headers import read_tensor  # noqa: E402
from mlx_unet3d.checkpoints.pickles import is_pickle, read_pickle  # noqa: E402
from mlx_unet3d.errors import CheckpointError  # noqa: E402
from test_pickles import OUTSIDE, dictionary, members, tensor, write_zip  # noqa: E402

pytestmark = pytest.mark.parity

NAMES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def state():
    torch.manual_seed(0)
    base = torch.randn(6, 10)
    tensors = {name: (torch.randn(3, 4) * 5).to(dtype) for name, dtype in NAMES.items()}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "row": base[2],  # shares the storage
        "column": base[:, 3],
        "turned": base.T,
        "expanded": torch.ones(1, 4).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2, 3, 3)),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    return tensors


def as_torch(array):
    """MLX's array, bit for bit."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def check(path, expected):
    assert is_pickle(path)
    found = read_pickle(path).tensors
    assert list(found) == list(expected)
    for name, wanted in expected.items():
        assert found[name].shape == tuple(wanted.shape)
        assert found[name].nbytes == wanted.numel() * wanted.element_size()
        read = as_torch(read_tensor(path, found[name]))
        if wanted.dtype == torch.float64:
            wanted = wanted.float()
        assert read.dtype == wanted.dtype
        assert torch.equal(read, wanted.detach()), name


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_all_dtypes_and_strides(tmp_path, zipped, protocol):
    path = tmp_path / "model.bin"
    torch.save(state(), path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    check(path, state())


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_of_a_module(tmp_path, zipped):
    """An OrderedDict with metadata, as modules give it, alone and beside other things."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    path = tmp_path / "model.pth"
    torch.save(module.state_dict(), path, _use_new_zipfile_serialization=zipped)
    check(path, module.state_dict())
    wrapped = {"epoch": 3, "rate": 1e-3, "state_dict": module.state_dict(), "names": ["a"], "size": (1, 2)}
    torch.save(wrapped, path, _use_new_zipfile_serialization=zipped)
    check(path, module.state_dict())
    torch.save(OrderedDict(module.half().state_dict()), path, _use_new_zipfile_serialization=zipped)
    check(path, module.state_dict())


def beside():
    """What training leaves beside the weights."""
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters(), lr=np.float64(1e-3))
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    counted = torch.nn.Parameter(torch.ones(2))
    counted.note = "an attribute"
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "dtype": torch.float16,
        "dtypes": [torch.bfloat16, np.float32, np.dtype("int64")],
        "when": [now, now.date(), now.time(), now - now],
        "seen": [set(), {1, "a"}, frozenset(), frozenset({2})],
        "lr": [np.float32(1), np.float64(1e-4), np.int64(3), np.bool_(True)],
        "params": torch.nn.ParameterDict({"a": torch.ones(2)}),
        "optimizer": optimizer.state_dict(),
        "schedule": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(rate=1, folder=pathlib.Path("x"), device=torch.device("cpu")),
        "paths": [pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("c")],
        "shape": torch.Size([2, 3]),
        "default": [defaultdict(list, a=[1]), defaultdict(dict)],
        "counts": [Counter("abca"), deque([1, 2], 5)],
        "plain": [1j, b"", b"bytes", bytearray(b"x"), range(3), slice(1, 2), torch.strided, dict, int],
        "random": torch.get_rng_state(),
        "noted": counted,
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("name", beside())
def test_what_lies_beside_the_weights(tmp_path, name, zipped, protocol):
    """Passed over, in front of the weights and behind."""
    tensors = {"w": torch.randn(2, 3)}
    found = {name: beside()[name], "state_dict": tensors, "again": beside()[name]}
    torch.save(found, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    check(tmp_path / "x.ckpt", tensors)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_parameters(tmp_path, zipped, protocol):
    """Those of a ParameterDict, and with attributes."""
    noted = torch.nn.Parameter(torch.randn(3))
    noted.note = {"rate": 1}
    tensors = {"a": torch.nn.Parameter(torch.randn(2, 2)), "b": noted}
    for value in (torch.nn.ParameterDict(tensors), {"state_dict": torch.nn.ParameterDict(tensors)}, tensors):
        torch.save(value, tmp_path / "x", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        check(tmp_path / "x", tensors)
    torch.save(defaultdict(dict, tensors), tmp_path / "x", pickle_protocol=protocol)
    check(tmp_path / "x", tensors)


def test_a_state_dict_for_each_network(tmp_path):
    unet, vae = torch.nn.Linear(2, 3).state_dict(), {"w": torch.ones(2)}
    torch.save({"unet": unet, "vae": vae, "optimizer": {"state": {}}, "step": 3}, tmp_path / "x.pt")
    check(tmp_path / "x.pt", {**{f"unet.{key}": value for key, value in unet.items()}, "vae.w": vae["w"]})


@pytest.mark.parametrize("version", ["v0.0", "v0.1"])
@pytest.mark.parametrize("network", ["alex", "squeeze", "vgg"])
def test_files_of_others(version, network):
    """The legacy files of the lpips package, which torch 0.4 wrote."""
    package = find_spec("lpips")
    if package is None:
        pytest.skip("lpips is not installed (pip install --no-deps lpips)")
    path = Path(package.origin).parent / "weights" / version / f"{network}.pth"
    expected = torch.load(path, map_location="cpu", weights_only=True)
    assert len(expected) == (7 if network == "squeeze" else 5)
    check(path, expected)


@pytest.mark.parametrize("name", OUTSIDE)
def test_torch_refuses_members_outside_the_first_folder_too(tmp_path, name):
    path = members(tmp_path / "x.bin", *OUTSIDE[name])
    with pytest.raises(RuntimeError, match=r"subdirectory|hasRecord|failed locating"):
        torch.load(path)


VERSIONS = (b"", b"0", b"1", b"3", b"10", b"11", b"-1", b"+3", b" 3", b"3 of torch", b"0x3", b"x", b"9" * 30)


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
@pytest.mark.parametrize(
    "entries",
    [
        *({"version": text} for text in (None, *VERSIONS)),
        *({"version": None, ".data/version": text} for text in VERSIONS),
        *({"byteorder": text} for text in (None, b"little", b"Little", b"little\n", b"")),
        *({".storage_alignment": text} for text in (b"64", b"x")),
        {"constants.pkl": b""},
    ],
)
def test_archives_that_torch_reads(tmp_path, entries):
    """The same archives are read and refused."""
    path = write_zip(tmp_path / "x.bin", dictionary(w=tensor()), **entries)
    try:
        expected = torch.load(path, weights_only=True)
    except (RuntimeError, ValueError, LookupError):
        with pytest.raises(CheckpointError):
            read_pickle(path)
    else:
        check(path, expected)
