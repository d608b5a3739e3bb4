"""Checkpoints on the hub, with a local server in its place: what is downloaded, and what is said."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hub_server
import mlx.core as mx
import original_files as original
import pytest
import test_convert_refusals
import tiny
from mlx_unet3d import MotionAdapter, TextToVideoPipeline, UNet3DConditionModel
from hub_server import TOKEN, Hub, Repo, read_folder
from huggingface_hub import close_session, constants, file_download
from mlx_unet3d.checkpoints import find_folder, weight_files
from mlx_unet3d.cli import main
from mlx_unet3d.models.loading import find_checkpoint

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline with a licence, and beside its weights what a download must leave out."""
    folder = tiny.write_pipeline(tmp_path_factory.mktemp("model") / "source")
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    for name in ("unet", "vae"):
        shutil.copy(folder / name / WEIGHTS, folder / name / f"{STEM}.fp16.safetensors")
        (folder / name / f"{STEM}.bin").write_bytes(b"never asked for")
    shutil.copy(folder / "text_encoder/model.safetensors", folder / "text_encoder/model.fp16.safetensors")
    (folder / "unet/unet.onnx").write_bytes(b"never asked for")
    (folder / "samples").mkdir()
    (folder / "samples/a.gif").write_bytes(b"never asked for")
    return folder


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """The server, with "owner/video" on it, and an empty cache; nobody is logged in."""
    server = Hub()
    server.add("owner/video", model)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    url = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub library waits between its attempts
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield server
    close_session()  # its open connections
    server.close()


def convert(*arguments, source="owner/video"):
    return main(["convert", "--hf-path", source, "--mlx-path", "out", *arguments])


def refused(capsys, *words, source="owner/video", arguments=()):
    """A conversion that fails with one message, which has these words, and leaves nothing."""
    assert convert(*arguments, source=source) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    message = error[error.index("mlx-unet3d: error: ") :]
    for word in words:
        assert word in message, message
    assert os.listdir() == []


def needed(weights, text_weights):
    tokenizer = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    names = ["README.md", "model_index.json", "scheduler/scheduler_config.json"]
    names += [f"tokenizer/{name}" for name in tokenizer]
    names += [f"{part}/config.json" for part in ("unet", "vae", "text_encoder")]
    names += [f"unet/{weights}", f"vae/{weights}", f"text_encoder/{text_weights}"]
    return sorted(f"owner/video/{name}" for name in names)


def test_only_what_is_needed_is_downloaded_and_once(hub, model):
    assert convert("--verify") == 0
    assert hub.files() == needed(WEIGHTS, "model.safetensors")
    assert f"`owner/video` at `{hub.repos['owner/video'].refs['main']}`" in Path("out/README.md").read_text()
    assert "license: cc-by-nc-4.0" in Path("out/README.md").read_text()
    assert convert("--force") == 0
    TextToVideoPipeline.from_pretrained("owner/video")
    assert hub.files() == []
    ours = (Path("out/unet") / WEIGHTS).read_bytes()
    assert ours == (model / "unet" / WEIGHTS).read_bytes()


def test_a_variant_alone(hub):
    assert convert("--variant", "fp16") == 0
    assert hub.files() == needed(f"{STEM}.fp16.safetensors", "model.fp16.safetensors")


def test_a_variant_of_some_networks(hub, capsys):
    """The plain files are downloaded for the network that has no others, and only for that."""
    commit = hub.repos["owner/video"].commits[hub.repos["owner/video"].refs["main"]]
    del commit[f"vae/{STEM}.fp16.safetensors"]
    assert convert("--variant", "fp16") == 0
    assert f"vae: no files of the variant 'fp16'; taking {WEIGHTS}" in "".join(capsys.readouterr())
    files = needed(f"{STEM}.fp16.safetensors", "model.fp16.safetensors")
    files = {name.replace(f"vae/{STEM}.fp16", f"vae/{STEM}") for name in files}
    assert set(hub.files()) == files
    with pytest.warns(UserWarning, match="no files of the variant 'fp16' for vae; taking the plain ones"):
        TextToVideoPipeline.from_pretrained("owner/video", variant="fp16")
    assert hub.files() == []


def test_adapters_in_folders_of_a_repository(hub, model, tmp_path):
    pipe = TextToVideoPipeline.from_pretrained(model)
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    name = "pytorch_lora_weights.safetensors"
    names, files = (name, f"ink/{name}", "ink/deep/my.safetensors"), {}
    for i, path in enumerate(
        (*names, "ink/other.safetensors")
    ):  # each its own content: the cache knows those
        lora = {f"{key}.lora_A.weight": i * mx.ones((2, 16)), f"{key}.lora_B.weight": mx.ones((16, 2))}
        mx.save_safetensors(str(tmp_path / "lora.safetensors"), lora)
        files[path] = (tmp_path / "lora.safetensors").read_bytes()
    hub.repos["owner/styles"] = Repo()
    hub.repos["owner/styles"].commit(files)
    hub.files()
    for i, (source, asked) in enumerate(zip(("", "/ink", "/ink/deep/my.safetensors"), names, strict=True)):
        assert pipe.load_lora_weights(f"owner/styles{source}", f"style{i}") == {"unet": 1}
        assert hub.files() == [f"owner/styles/{asked}"]
    with pytest.raises(FileNotFoundError, match=r"has none of none\.safetensors; it has"):
        pipe.load_lora_weights("owner/styles/ink/none.safetensors", "none")
    with pytest.raises(ValueError, match="must lie inside"):
        pipe.load_lora_weights("owner/styles/../other/a.safetensors", "outside")


def test_from_pretrained(hub):
    pipe = TextToVideoPipeline.from_pretrained("owner/video")
    assert hub.files() == [name for name in needed(WEIGHTS, "model.safetensors") if "README" not in name]
    alone = UNet3DConditionModel.from_pretrained("owner/video", subfolder="unet")
    assert alone.weights_checksum == pipe.unet.weights_checksum
    assert hub.files() == []


def test_shards(hub, model, tmp_path):
    folder = tmp_path / "sharded"
    UNet3DConditionModel.from_pretrained(model / "unet").save_pretrained(folder, max_shard_size="200KB")
    shutil.copy(model / "unet" / WEIGHTS, folder / f"{STEM}.fp16.safetensors")
    hub.add("owner/sharded", folder)
    assert len(weight_files(find_folder("owner/sharded", stem=STEM), STEM)) > 1
    assert hub.files() == sorted(f"owner/sharded/{p.name}" for p in folder.iterdir() if "fp16" not in p.name)


def test_pickles_are_downloaded_only_where_there_is_nothing_else(hub, model, capsys):
    del hub.repos["owner/video"].commits[hub.repos["owner/video"].refs["main"]]["vae/" + WEIGHTS]
    refused(capsys, f"vae/{STEM}.bin is not", "download it again")
    assert [name for name in hub.files() if name.endswith(".bin")] == [f"owner/video/vae/{STEM}.bin"]


def test_revision(hub, capsys):
    repo = hub.repos["owner/video"]
    first = repo.refs["main"]
    changed = repo.commits[first] | {"README.md": b"---\nlicense: mit\n---\n"}
    second = repo.commit(changed)
    repo.refs["v1"] = first
    for revision, commit, licence in (("v1", first, "cc-by-nc-4.0"), ("main", second, "mit")):
        assert convert("--force", "--revision", revision) == 0
        card = Path("out/README.md").read_text()
        assert f"`owner/video` at `{commit}`" in card
        assert f"license: {licence}" in card
    assert convert("--force", "--revision", first) == 0
    assert f"at `{first}`" in Path("out/README.md").read_text()
    shutil.rmtree("out")
    refused(capsys, "owner/video has no revision 'v9'", "/tree/main", arguments=("--revision", "v9"))


def test_all_files_are_of_one_commit(hub, model):
    """The branch moves on while it is read: the networks still belong together."""
    repo = hub.repos["owner/video"]
    first = repo.refs["main"]
    other = dict(repo.commits[first])
    other["vae/" + WEIGHTS] = b"of another version"

    def push(method, path):
        if method == "GET" and path.endswith("unet/config.json"):
            repo.commit(other)

    hub.answer = push
    assert convert() == 0
    assert (Path("out/vae") / WEIGHTS).read_bytes() == (model / "vae" / WEIGHTS).read_bytes()
    assert repo.refs["main"] != first


# Refusals say what to do.


def test_repository_that_is_not_there(hub, capsys):
    refused(capsys, "'owner/vidoe'", "check the spelling", "hf auth login", source="owner/vidoe")


def test_gated(hub, model, capsys, monkeypatch):
    hub.add("owner/gated", model, gated=True)
    words = ("owner/gated is gated", "accept its licence at https", "hf auth login", "a local folder")
    refused(capsys, *words, source="owner/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert convert(source="owner/gated") == 0


def test_private(hub, model, capsys, tmp_path):
    hub.add("owner/private", model, private=True)
    refused(capsys, "does not show it to you", "hf auth login", source="owner/private")
    (tmp_path / "token").write_text(TOKEN)
    assert convert(source="owner/private") == 0


@pytest.mark.parametrize("place", ["/api/", "/resolve/"])
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, ("refuses owner/video (HTTP 401)", "hf auth login")),
        (403, ("refuses owner/video (HTTP 403)", "accept its licence")),
        (429, ("HTTP 429", "try again later")),
        (500, ("HTTP 500", "try again later")),
        (503, ("HTTP 503", "or pass a local folder")),
    ],
)
def test_other_answers(hub, capsys, place, status, words):
    hub.answer = lambda method, path: status if place in path else None
    refused(capsys, *words)


def test_file_that_is_gone(hub, capsys):
    """Listed, and then not there."""
    hub.answer = lambda method, path: 404 if path.endswith("unet/config.json") else None
    refused(capsys, "HTTP 404", "unet/config.json")


def test_missing_weights(hub, capsys):
    commit = hub.repos["owner/video"].commits[hub.repos["owner/video"].refs["main"]]
    for name in [name for name in commit if name.startswith("unet/") and "config" not in name]:
        del commit[name]
    refused(capsys, f"unet has no {WEIGHTS}", "huggingface.co/owner/video/tree/main")


def test_missing_variant(hub, capsys):
    refused(capsys, f"has no {STEM}.bf16.safetensors", "/tree/main", arguments=("--variant", "bf16"))
    assert convert() == 0
    shutil.rmtree("out")
    refused(capsys, "it has files without a variant: ask for that", arguments=("--variant", "bf16"))


def test_no_checkpoint(hub, capsys):
    hub.repos["owner/data"] = Repo()
    hub.repos["owner/data"].commit({"train.csv": b"1,2"})
    refused(capsys, "config.json does not exist", source="owner/data")


def test_no_connection(hub, capsys):
    """With what is in the cache it works, and without it says that it is the connection."""
    assert convert() == 0
    close_session()
    hub.close()
    assert convert("--force") == 0
    shutil.rmtree("out")
    refused(capsys, "owner/other", "out of reach", "run once online", source="owner/other")
    refused(capsys, arguments=("--variant", "fp16"))  # only the plain weights are there


def test_asked_to_stay_offline(hub, capsys):
    refused(capsys, "local_files_only", "run once online", arguments=("--local-files-only",))
    assert hub.requests == []


def test_a_connection_that_breaks_is_taken_up_again(hub, model, capsys):
    hub.cuts = 3
    while convert() != 0:  # later versions of the hub library go on by themselves, with 1.0 one runs again
        assert "broke off" in capsys.readouterr().err
    assert hub.cuts == 0
    assert (Path("out/unet") / WEIGHTS).read_bytes() == (model / "unet" / WEIGHTS).read_bytes()


def test_a_connection_that_keeps_breaking(hub, model, capsys):
    """No half file is taken for a whole one, then or later."""
    # Files beside it are asked for at the same time, and may break off as well.
    hub.answer = lambda method, path: setattr(hub, "cuts", 99) if path.endswith("vae/" + WEIGHTS) else None
    refused(capsys, "the download of owner/video broke off", "run again")
    hub.answer, hub.cuts = lambda method, path: None, 0
    hub.files()
    assert convert("--verify") == 0
    assert f"owner/video/vae/{WEIGHTS}" in hub.files()
    assert (Path("out/vae") / WEIGHTS).read_bytes() == (model / "vae" / WEIGHTS).read_bytes()


def test_full_disk(hub, capsys, monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        refused(capsys, "no room for owner/video", str(tmp_path / "cache"), "make room", "HF_HOME")
    assert convert() == 0


def test_cache_that_cannot_be_written(hub, capsys, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    refused(capsys, "owner/video could not be downloaded", str(tmp_path / "cache"), "HF_HOME")


def test_as_a_process_with_progress(hub, tmp_path):
    """The command itself, pointed to the server by the environment; the downloads show a bar."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "mlx_unet3d", "convert", "--hf-path"]
    ran = subprocess.run([*command, "owner/video"], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "mlx_model\n")
    assert "Fetching" in ran.stderr
    assert "100%" in ran.stderr
    more = ["owner/none", "--mlx-path", "other"]
    ran = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "check the spelling" in ran.stderr


# Uploads.


@pytest.fixture
def login(tmp_path, hub):
    (tmp_path / "token").write_text(TOKEN)


def upload(source, *arguments, repo="me/converted"):
    return convert("--upload-repo", repo, *arguments, source=str(source))


def refused_upload(hub, capsys, *words, repo="me/converted"):
    """Refused before anything is read."""
    refused(capsys, *words, arguments=("--upload-repo", repo))
    assert hub.files() == []
    assert list(hub.repos) == ["owner/video"]


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("repo", ["me/converted", "team/converted"])
def test_upload(hub, model, capsys, repo):
    """To a private repository, of which the checkpoint comes back the same."""
    assert upload(model, "--verify", "--dtype", "float16", repo=repo) == 0
    captured = capsys.readouterr()
    assert captured.out == "out\n"
    assert captured.err.endswith(f"written to out\nuploaded to {hub.url}/{repo}\n")
    made = hub.repos[repo]
    assert made.private
    held = made.commits[made.refs["main"]]
    assert held == read_folder(Path("out")) | {".gitattributes": b""}
    unet = UNet3DConditionModel.from_pretrained(repo, subfolder="unet")
    assert unet.weights_checksum == UNet3DConditionModel.from_pretrained("out/unet").weights_checksum


@pytest.mark.usefixtures("login")
def test_upload_to_a_repository_that_is_there(hub, model, capsys):
    """Refused before the work; with --force its content is replaced, in one commit, and it stays public."""
    repo = hub.add("me/converted", model)
    before = repo.refs["main"]
    refused(capsys, "me/converted has files already", "--force", arguments=("--upload-repo", "me/converted"))
    assert hub.files() == []
    assert upload(model / "vae", "--force") == 0
    assert len(repo.commits) == 2
    assert repo.commits[repo.refs["main"]] == read_folder(Path("out"))
    assert before in repo.commits
    assert not repo.private


@pytest.mark.usefixtures("login")
def test_upload_to_an_empty_repository(hub, model):
    hub.repos["me/converted"] = repo = Repo(private=True)
    repo.commit({".gitattributes": b"*.safetensors filter=lfs"})
    assert upload(model / "vae") == 0
    assert repo.commits[repo.refs["main"]].keys() == {".gitattributes", *read_folder(Path("out"))}


def test_upload_without_login(hub, capsys):
    refused_upload(hub, capsys, "to upload to me/converted, log in with `hf auth login`", "no login yet")


def test_upload_with_a_token_that_is_not_accepted(hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    refused_upload(hub, capsys, "does not accept the login for me/converted", "a token that may write")


@pytest.mark.usefixtures("login")
def test_upload_that_is_not_allowed(hub, capsys):
    refused_upload(hub, capsys, "cannot write to other", "me/... or team/...", repo="other/converted")
    hub.user["auth"]["accessToken"]["role"] = "read"
    refused_upload(hub, capsys, "the login of me may only read", "settings/tokens")


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize("name", ["converted", "me/a/b", "https://huggingface.co/me/a", "../me/a", ""])
def test_upload_to_no_repository(hub, capsys, name):
    refused_upload(hub, capsys, "must be owner/name", repo=name)


@pytest.mark.usefixtures("login")
def test_upload_over_the_source(hub, capsys):
    refused_upload(hub, capsys, "is the source", repo="Owner/Video")


@pytest.mark.usefixtures("login")
def test_upload_with_the_hub_out_of_reach(hub, capsys):
    hub.answer = lambda method, path: 500 if "/api/" in path else None
    refused_upload(hub, capsys, "cannot be asked about me/converted", "try later")
    hub.answer = lambda method, path: None
    close_session()
    hub.close()
    refused_upload(hub, capsys, "cannot be asked about me/converted", "without --upload-repo")


@pytest.mark.usefixtures("login")
@pytest.mark.parametrize(
    ("place", "status"),
    [("/api/repos/create", 403), ("/commit/", 500), ("/preupload/", 413), ("/commit/", None)],
)
def test_upload_that_fails(hub, model, capsys, place, status):
    """What was converted stays, and how to upload it is said."""

    def answer(method, path):
        if place in path and status is None:
            raise ConnectionAbortedError
        return status if place in path else None

    hub.answer = answer
    assert upload(model / "vae", "--verify") == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "the checkpoint is in out, but could not be uploaded to me/converted" in message
    assert "hf upload me/converted out . --private" in message
    assert (Path("out") / WEIGHTS).read_bytes() == (model / "vae" / WEIGHTS).read_bytes()


@pytest.mark.usefixtures("login")
def test_a_dry_run_uploads_nothing(hub, model):
    assert upload(model / "vae", "--dry-run") == 0
    assert hub.requests == []


# What `info` says of repositories.


def info(capsys, *arguments):
    assert main(["info", *arguments]) == 0
    return capsys.readouterr().out


def only_error(capsys):
    """The one message, behind progress bars."""
    _, *messages = capsys.readouterr().err.split("mlx-unet3d: error: ")
    assert [message.count("\n") for message in messages] == [1]
    return messages[0]


@pytest.fixture
def adapters(hub, tmp_path):
    """A repository of files without a config, in a folder."""
    folder = tmp_path / "adapters"
    (folder / "sd15").mkdir(parents=True)
    modules = original.motion_module(
        original.as_diffusers(MotionAdapter(block_out_channels=(32, 64), motion_layers_per_block=1))
    )
    original.write_pickle(folder / "sd15/mm.ckpt", modules)
    original.write_pickle(folder / "sd15/old.ckpt", modules, legacy=True)
    down, up = "unet.attn2.to_k.lora_A.weight", "unet.attn2.to_k.lora_B.weight"
    lora = {down: mx.ones((4, 768)), up: mx.ones((320, 4)), "unet.big.lora_A.weight": mx.ones((4, 200_000))}
    mx.save_safetensors(str(folder / "pytorch_lora_weights.safetensors"), lora)
    hub.add("owner/adapters", folder)
    return folder


def test_info_of_a_pipeline_downloads_no_weights(hub, model, capsys):
    said = info(capsys, "owner/video")
    local = info(capsys, str(model))
    for part in ("unet", "vae", "text_encoder", "scheduler", "recommended", "total"):
        lines = [[line for line in s.splitlines() if line.startswith(part)] for s in (said, local)]
        assert lines[0] == lines[1]
    assert said.endswith("generate PROMPT --model owner/video\n")
    assert len(hub.parts) == 3  # of each file of weights
    assert list(Path("../cache").rglob("*.safetensors")) == []
    assert f"{STEM}.fp16.safetensors" in info(capsys, "owner/video", "--variant", "fp16")
    assert info(capsys, "owner/video/unet").startswith("UNet3DConditionModel, ")

    cached = info(capsys, "owner/video", "--local-files-only")
    assert "unet              UNet3DConditionModel, its weights are not in the cache\n" in cached
    hub.answer = lambda method, path: 500 if "/tree/" in path else None
    assert info(capsys, "owner/video").startswith("the hub is out of reach")


def test_info_of_files_reads_their_headers(hub, adapters, capsys):
    said = info(capsys, "owner/adapters/pytorch_lora_weights.safetensors")
    assert "on the hub        3.2 MB, of which only the header was read" in said
    assert "a LoRA, " in said
    assert "for Stable Diffusion 1.5" in said
    assert "--lora owner/adapters/pytorch_lora_weights.safetensors" in said
    assert sum(count for _, count in hub.parts) <= 2**18
    assert info(capsys, "owner/adapters").count("a LoRA, ") == 1
    hub.parts.clear()
    said = info(capsys, "owner/adapters/sd15/mm.ckpt")
    assert "a motion module of AnimateDiff" in said
    assert "--motion-adapter owner/adapters/sd15/mm.ckpt" in said
    assert sum(count for _, count in hub.parts) <= (adapters / "sd15/mm.ckpt").stat().st_size
    assert info(capsys, "owner/adapters/sd15").count("a motion module of AnimateDiff") == 2
    assert list(Path("../cache").rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/adapters/none.ckpt", "has no file none.ckpt; its weight files are pytorch_lora_weights.safe"),
        (
            "owner/adapters/other",
            "has neither model_index.json (a pipeline) nor config.json (a component) no",
        ),
        ("owner/nothing", "the hub has no https://huggingface.co/owner/nothing"),
        ("owner/nothing/x.ckpt", "the hub has no https://huggingface.co/owner/nothing"),
    ],
)
def test_info_of_what_the_hub_does_not_have(hub, adapters, name, message, capsys):
    assert main(["info", name]) == 2
    assert message in only_error(capsys)
    assert main(["info", name, "--local-files-only"]) == 2
    only_error(capsys)


def test_info_of_a_server_that_sends_no_parts(hub, adapters, capsys, monkeypatch):
    monkeypatch.setattr(hub_server, "PARTS", False)
    assert main(["info", "owner/adapters/sd15/mm.ckpt"]) == 2
    assert "does not send a part of owner/adapters/sd15/mm.ckpt; download it" in capsys.readouterr().err


def test_files_of_a_repository_are_converted(hub, adapters, capsys):
    """What `info` says of them is true."""
    assert convert(source="owner/adapters/sd15/mm.ckpt") == 0
    assert hub.files() == ["owner/adapters/sd15/mm.ckpt"]
    made = weight_files("out", STEM)[0].read_bytes()
    card = Path("out/README.md").read_text()
    assert f"`owner/adapters/sd15/mm.ckpt` at `{hub.repos['owner/adapters'].refs['main']}`" in card
    assert "base_model: owner/adapters\n" in card
    assert convert("--force", source=str(adapters / "sd15/mm.ckpt")) == 0
    assert weight_files("out", STEM)[0].read_bytes() == made
    assert convert("--force", "--revision", "main", source="owner/adapters/sd15/mm.ckpt") == 0
    shutil.rmtree("out")
    refused(capsys, "has no file sd15/none.ckpt", "/tree/main", source="owner/adapters/sd15/none.ckpt")
    base = shutil.move(test_convert_refusals.base(), "../base.ckpt")
    assert convert("--motion-adapter", "owner/adapters/sd15/mm.ckpt", source=base) == 0
    combined = weight_files("out", STEM)[0].read_bytes()
    assert convert("--motion-adapter", str(adapters / "sd15/mm.ckpt"), "--force", source=base) == 0
    assert weight_files("out", STEM)[0].read_bytes() == combined
    hub.add("owner/modules", Path(shutil.move("out", "../modules")))
    found = find_checkpoint(f"owner/modules/{WEIGHTS}", STEM, files=True)
    assert found.headers.keys() == {found.where}
    assert found.where.read_bytes() == combined
