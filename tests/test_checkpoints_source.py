"""Finding checkpoints: folders, the hub's cache, variants, shards and their indexes."""

import dataclasses
import inspect
import json
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from mlx_unet3d import CLIPTokenizer, UNet3DConditionModel
from huggingface_hub import errors
from mlx_unet3d.checkpoints import (
    DEMO,
    Hub,
    find_folder,
    read_component_config,
    read_json,
    weight_files,
    write_safetensors,
)
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.image_processor import CLIPImageProcessor
from mlx_unet3d.memory import read_networks

STEM = "diffusion_pytorch_model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def shard(folder, name, *keys):
    write_safetensors(folder / name, {key: mx.zeros((1,)) for key in keys}, {"format": "pt"})


def index(folder, name, **weight_map):
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def names(files):
    return [file.name for file in files]


@pytest.fixture
def cache(tmp_path):
    """The hub's cache after a download of some of owner/video."""
    root = tmp_path / "models--owner--video"
    snapshot = root / "snapshots" / COMMIT
    unet = snapshot / "unet"
    unet.mkdir(parents=True)
    blobs = root / "blobs"
    blobs.mkdir()
    shard(blobs, "beef", "w")
    (blobs / "cafe").write_text('{"_class_name": "X"}')
    (unet / f"{STEM}.fp16.safetensors").symlink_to(blobs / "beef")
    (unet / "config.json").symlink_to(blobs / "cafe")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return tmp_path


def test_local_folder_as_it_is(tmp_path):
    (tmp_path / "unet").mkdir()
    assert find_folder(tmp_path) == tmp_path
    assert find_folder(str(tmp_path), subfolder="unet") == tmp_path / "unet"


def test_local_folder_errors(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=r"no folder 'vae'; its folders are unet"):
        find_folder(tmp_path, subfolder="vae")
    with pytest.raises(ValueError, match="revision='main' is for hub ids"):
        find_folder(tmp_path, revision="main")
    with pytest.raises(ValueError, match="is a file"):
        find_folder(tmp_path / "file")
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none/here"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            find_folder(missing)
    for outside in ("../unet", "/etc", "a/../../b", "..\\unet"):
        with pytest.raises(ValueError, match="must lie inside"):
            find_folder(tmp_path, subfolder=outside)


@pytest.mark.parametrize("text", ["", "name", "a/b/c", "owner/", "own er/name", "-a/b", "a/b\n"])
def test_neither_folder_nor_id(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text == "":
        assert find_folder(text).resolve() == tmp_path  # the current folder, as Path says
        return
    with pytest.raises(ValueError, match="neither an existing folder nor a hub id"):
        find_folder(text)


def test_hub_cache_without_network(cache):
    options = {"cache_dir": cache, "local_files_only": True}
    folder = find_folder("owner/video", subfolder="unet", stem=STEM, variant="fp16", **options)
    assert names(weight_files(folder, STEM, "fp16")) == [f"{STEM}.fp16.safetensors"]
    assert find_folder("owner/video", revision=COMMIT, **options) == folder.parent
    config = read_component_config("owner/video", "config.json", subfolder="unet", **options)
    assert config == {"_class_name": "X"}
    with pytest.raises(FileNotFoundError, match="run once online"):
        find_folder("owner/other", **options)
    with pytest.raises(FileNotFoundError, match="run once online"):
        find_folder("owner/video", revision="v2", **options)
    with pytest.raises(FileNotFoundError, match=r"no files for subfolder 'vae'.*tree/main"):
        find_folder("owner/video", subfolder="vae", **options)
    with pytest.raises(
        FileNotFoundError, match=r"it has the variant 'fp16': ask for that|ask for one of these"
    ):
        weight_files(folder, STEM)
    with pytest.raises(FileNotFoundError, match=r"huggingface.co/owner/video/tree/main"):
        weight_files(folder, "model")


def test_hub_offline_by_environment(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_folder("owner/video", subfolder="unet", cache_dir=cache).name == "unet"
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        find_folder("owner/other", cache_dir=cache)


def test_only_the_needed_files_are_asked_for(cache, monkeypatch):
    asked = {}

    def download(hub_id, **arguments):
        asked.update(arguments, hub_id=hub_id)
        return str(cache / "models--owner--video" / "snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_folder("owner/video", subfolder="unet", stem=STEM, variant="fp16", token="t", revision="r")
    assert (asked["hub_id"], asked["token"], asked["revision"]) == ("owner/video", "t", "r")
    wanted = set(
        huggingface_hub.utils.filter_repo_objects(
            [
                "unet/config.json",
                f"unet/{STEM}.fp16.safetensors",
                f"unet/{STEM}.fp16-00001-of-00002.safetensors",
                f"unet/{STEM}.safetensors.index.fp16.json",
                f"unet/{STEM}.safetensors.fp16.index.json",
                f"unet/{STEM}.safetensors",
                f"unet/{STEM}-00001-of-00002.safetensors",
                f"unet/{STEM}.safetensors.index.json",
                f"unet/{STEM}.fp16.bin",
                "vae/config.json",
                "config.json",
                "README.md",
            ],
            allow_patterns=asked["allow_patterns"],
        )
    )
    assert wanted == {
        "unet/config.json",
        f"unet/{STEM}.fp16.safetensors",
        f"unet/{STEM}.fp16-00001-of-00002.safetensors",
        f"unet/{STEM}.safetensors.index.fp16.json",
        f"unet/{STEM}.safetensors.fp16.index.json",
    }
    read_component_config("owner/video", "config.json", subfolder="unet")
    assert asked["allow_patterns"] == ["unet/config.json"]


def http_error(kind, status):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("the hub's own words", response=response)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (http_error(errors.GatedRepoError, 403), PermissionError, "accept its licence at https"),
        (http_error(errors.RepositoryNotFoundError, 404), FileNotFoundError, "check the spelling"),
        (http_error(errors.RevisionNotFoundError, 404), FileNotFoundError, "no revision 'v9'"),
        (http_error(errors.HfHubHTTPError, 401), PermissionError, "hf auth login"),
        (http_error(errors.HfHubHTTPError, 403), PermissionError, "HTTP 403"),
        (http_error(errors.HfHubHTTPError, 500), ConnectionError, "HTTP 500.*own words"),
        (errors.LocalEntryNotFoundError("no line"), FileNotFoundError, "out of reach.*no line"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_hub_errors_say_what_to_do(monkeypatch, error, kind, message):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=message) as caught:
        find_folder("owner/video", revision="v9")
    assert "owner/video" in str(caught.value)


def test_order_of_weight_files(tmp_path):
    shard(tmp_path, f"{STEM}-00001-of-00002.safetensors", "a")
    shard(tmp_path, f"{STEM}-00002-of-00002.safetensors", "b")
    index(
        tmp_path,
        f"{STEM}.safetensors.index.json",
        b=f"{STEM}-00002-of-00002.safetensors",
        a=f"{STEM}-00001-of-00002.safetensors",
    )
    assert names(weight_files(tmp_path, STEM)) == [
        f"{STEM}-00001-of-00002.safetensors",
        f"{STEM}-00002-of-00002.safetensors",
    ]
    shard(tmp_path, f"{STEM}.fp16.safetensors", "a")
    assert len(weight_files(tmp_path, STEM)) == 2
    assert names(weight_files(tmp_path, STEM, "fp16")) == [f"{STEM}.fp16.safetensors"]
    shard(tmp_path, f"{STEM}.safetensors", "a", "b")
    assert names(weight_files(tmp_path, STEM)) == [f"{STEM}.safetensors"]


@pytest.mark.parametrize(
    "index_file", [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.safetensors.fp16.index.json"]
)
def test_sharded_variant(tmp_path, index_file):
    shards = [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for key, name in zip("ab", shards, strict=True):
        shard(tmp_path, name, key)
    index(tmp_path, index_file, a=shards[0], b=shards[1])
    assert names(weight_files(tmp_path, STEM, "fp16")) == shards
    with pytest.raises(FileNotFoundError, match=f"has no {STEM}.safetensors"):
        weight_files(tmp_path, STEM)


def test_variant_that_is_not_there(tmp_path):
    shard(tmp_path, f"{STEM}.fp16.safetensors", "a")
    with pytest.raises(FileNotFoundError, match=r"it has the variant 'fp16': ask for that"):
        weight_files(tmp_path, STEM)
    with pytest.raises(FileNotFoundError, match=r"variant='bf16'\); it has the variant 'fp16'"):
        weight_files(tmp_path, STEM, "bf16")
    shard(tmp_path, f"{STEM}.safetensors", "a")
    with pytest.raises(
        FileNotFoundError, match=r"it has files without a variant, the variant 'fp16': ask for one of these"
    ):
        weight_files(tmp_path, STEM, "bf16")
    with pytest.raises(ValueError, match="must be letters"):
        weight_files(tmp_path, STEM, "../x")


def test_no_safetensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder is empty"):
        weight_files(tmp_path, STEM)
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"it has config\.json"):
        weight_files(tmp_path, STEM)
    (tmp_path / f"{STEM}.bin").touch()
    with pytest.raises(CheckpointError, match=r"only as torch pickles \(diffusion_.*\.bin\)"):
        weight_files(tmp_path, STEM)


ONE, TWO = f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "no weight_map"),
        ({"a": ONE, "b": TWO, "c": f"{STEM}-3.safetensors"}, "1 are not there"),
        ({"a": "../secret.safetensors"}, "plain name"),
        ({"a": "/etc/passwd"}, "plain name"),
        ({"a": "sub/x.safetensors"}, "plain name"),
        ({"a": "sub\\x.safetensors"}, "plain name"),
        ({"a": "C:x.safetensors"}, "plain name"),
        ({"a": "config.json"}, "plain name"),
        ({"a": 7}, "plain name"),
        ({"a": TWO, "b": ONE}, "'a' is in .*00002.*; it is in .*00001"),
        ({"a": ONE, "b": TWO, "c": TWO}, "'c' is in .*; it is in none of the shards"),
    ],
)
def test_wrong_index(tmp_path, weight_map, message):
    shard(tmp_path, ONE, "a")
    shard(tmp_path, TWO, "b")
    index(tmp_path, f"{STEM}.safetensors.index.json", **weight_map)
    with pytest.raises(CheckpointError, match=message):
        weight_files(tmp_path, STEM)


def test_key_in_two_shards(tmp_path):
    shard(tmp_path, ONE, "a", "b")
    shard(tmp_path, TWO, "b")
    index(tmp_path, f"{STEM}.safetensors.index.json", a=ONE, b=TWO)
    with pytest.raises(CheckpointError, match="'b' is in two shards"):
        weight_files(tmp_path, STEM)


def test_damaged_shard_is_named(tmp_path):
    shard(tmp_path, ONE, "a")
    (tmp_path / TWO).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    index(tmp_path, f"{STEM}.safetensors.index.json", a=ONE, b=TWO)
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*git-lfs pointer"):
        weight_files(tmp_path, STEM)


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="no JSON file"):
        read_json(path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has model_index\.json.*subfolder"):
        read_json(path)
    for text, message in (
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("<html>", "a web page"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "not a list"),
        ("null", "not a NoneType"),
    ):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="not UTF-8"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}


PUBLIC = (
    find_folder,
    read_component_config,
    UNet3DConditionModel.from_pretrained,
    UNet3DConditionModel.load_config,
    CLIPTokenizer.from_pretrained,
    CLIPImageProcessor.from_pretrained,
    read_networks,
)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__qualname__)
def test_arguments_of_the_hub(function):
    """They are those of diffusers, stand in the signature, and nothing else is taken."""
    parameters = inspect.signature(function).parameters
    for setting in dataclasses.fields(Hub):
        assert parameters[setting.name].default == setting.default
        assert parameters[setting.name].annotation == setting.type
    with pytest.raises(TypeError, match="unexpected keyword argument 'revison'"):
        function(DEMO, *["x"] * (function is read_component_config), revison="main")
    with pytest.raises(TypeError, match=r"takes hub= or revision=, not both"):
        function(DEMO, *["x"] * (function is read_component_config), revision="main", hub=Hub())
    for given in ({"revision": "main"}, {"hub": Hub(revision="main")}):
        with pytest.raises(ValueError, match="revision='main' is for hub ids"):
            function(DEMO, *["x"] * (function is read_component_config), **given)


def test_a_token_is_never_shown():
    assert "secret" not in repr(Hub(token="secret"))
