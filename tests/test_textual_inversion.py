"""Learned tokens: in files of diffusers and of the web UI, of one vector and of several."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_unet3d import TextToVideoPipeline, media
from mlx_unet3d.cli import main
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.pipelines.text import written_out

WIDTH = tiny.TEXT["hidden_size"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_pipeline(tmp_path_factory.mktemp("model") / "source")


@pytest.fixture
def pipe(folder):
    return TextToVideoPipeline.from_pretrained(folder)


def vectors(count):
    return mx.random.normal((count, WIDTH), key=mx.random.key(3))


def states(pipe, prompt):
    return pipe.encode_prompt(prompt, guidance_scale=1)[0]


def test_one_vector(pipe, tmp_path):
    before = states(pipe, "a cat")
    mx.save_safetensors(str(tmp_path / "learned_embeds.safetensors"), {"<toy>": vectors(1)[0]})
    assert pipe.load_textual_inversion(tmp_path) == ["<toy>"]
    ids = pipe.tokenizer("a <toy>")[0].tolist()
    assert ids[2:4] == [len(pipe.tokenizer) - 1, pipe.tokenizer.eos_token_id]
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    assert mx.array_equal(table[ids[2]], vectors(1)[0])
    assert mx.array_equal(states(pipe, "a cat"), before)
    assert not mx.array_equal(states(pipe, "a <toy>"), states(pipe, "a <"))


def test_the_vector_of_a_known_word_means_that_word(pipe):
    word = pipe.tokenizer("z")[0][1]
    table = pipe.text_encoder.text_model.embeddings.token_embedding.weight
    pipe.load_textual_inversion({"<zed>": table[int(word)]})
    assert mx.array_equal(states(pipe, "a <zed> b"), states(pipe, "a z b"))


def test_several_vectors(pipe, tmp_path):
    mx.save_safetensors(str(tmp_path / "style.safetensors"), {"emb_params": vectors(3)})
    with pytest.raises(ValueError, match="pass token="):
        pipe.load_textual_inversion(tmp_path / "style.safetensors")
    names = pipe.load_textual_inversion(tmp_path / "style.safetensors", "<style>")
    assert names == ["<style>", "<style>_1", "<style>_2"]
    first = len(pipe.tokenizer) - 3
    assert pipe.tokenizer(written_out(pipe.tokenizer, "a <style>!"))[0][2:5].tolist() == [
        first,
        first + 1,
        first + 2,
    ]
    frames = pipe("a <style>", num_frames=1, num_inference_steps=1).frames
    assert np.isfinite(frames).all()


def test_saved_and_loaded_again(pipe, tmp_path):
    pipe.load_textual_inversion({"<style>": vectors(2)})
    pipe.save_pretrained(tmp_path)
    again = TextToVideoPipeline.from_pretrained(tmp_path)
    assert mx.array_equal(states(again, "the <style> b"), states(pipe, "the <style> b"))


def test_a_larger_table_than_the_tokenizer(pipe):
    """ModelScope's text encoders may have ids that no token has."""
    config = pipe.text_encoder.config
    pipe.text_encoder.set_token_embeddings([config.vocab_size + 9], mx.zeros((1, WIDTH)))
    size = pipe.text_encoder.config.vocab_size
    pipe.load_textual_inversion({"<toy>": vectors(1)})
    assert pipe.text_encoder.config.vocab_size == size
    assert states(pipe, "a <toy>").shape[0] == 1


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({}, CheckpointError, "has 0 tensors"),
        ({"a": mx.zeros((1, WIDTH)), "b": mx.zeros((1, WIDTH))}, CheckpointError, "has 2 tensors"),
        ({"<toy>": mx.zeros((1, WIDTH + 1))}, CheckpointError, "another model"),
        ({"<toy>": mx.zeros((1, WIDTH), mx.int32)}, CheckpointError, "no embedding"),
        ({"<toy>": mx.zeros((1, 1, WIDTH))}, CheckpointError, "no embedding"),
        ({"z</w>": mx.zeros((1, WIDTH))}, ValueError, "is a token already"),
        ({"a toy": mx.zeros((1, WIDTH))}, ValueError, "without white space"),
    ],
)
def test_refused(pipe, tensors, kind, message):
    count = len(pipe.tokenizer)
    with pytest.raises(kind, match=message):
        pipe.load_textual_inversion(tensors)
    assert len(pipe.tokenizer) == count == pipe.text_encoder.config.vocab_size


def test_twice(pipe):
    pipe.load_textual_inversion({"<toy>": vectors(1)})
    with pytest.raises(ValueError, match="is a token already"):
        pipe.load_textual_inversion({"<toy>": vectors(1)})


def test_file_of_the_web_ui(pipe, tmp_path):
    """What torch.save makes of {"string_to_param": {"*": vectors}, "name": ...}, and of a command."""
    torch = pytest.importorskip("torch")
    learned = torch.tensor(np.array(vectors(2)))
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": learned}, "name": "style", "step": 5}
    torch.save(content, tmp_path / "style.pt")
    assert pipe.load_textual_inversion(tmp_path / "style.pt") == ["style", "style_1"]
    assert pipe.load_textual_inversion(tmp_path / "style.pt", "<b>") == ["<b>", "<b>_1"]
    assert mx.array_equal(states(pipe, "a style cat"), states(pipe, "a <b> cat"))
    torch.save({key: content[key] for key in ("string_to_param",)}, tmp_path / "nameless.pt")
    with pytest.raises(ValueError, match="does not say what its token is called"):
        pipe.load_textual_inversion(tmp_path / "nameless.pt")


def test_command(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mx.save_safetensors("toy.safetensors", {"<toy>": vectors(2)})
    short = ["generate", "--model", str(folder), "--num-frames", "2", "--steps", "1"]
    assert main([*short, "a <toy>", "-o", "plain.png"]) == 0
    assert main([*short, "a <toy>", "-o", "own.png", "--embedding", "toy.safetensors"]) == 0
    assert "embedding toy.safetensors: '<toy>', 2 vectors" in capsys.readouterr().err
    assert main([*short, "a <b>", "-o", "other.png", "--embedding", "toy.safetensors", "<b>"]) == 0
    frames = [media.read_video(f"{name}.png")[0] for name in ("plain", "own", "other")]
    assert not np.array_equal(frames[0], frames[1])
    assert np.array_equal(frames[1], frames[2])
    assert media.read_metadata("own.png")["weights"] != media.read_metadata("plain.png")["weights"]
    assert main(["generate", "--from", "own.png", "--model", str(folder), "-o", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("own.png").read_bytes()
    for wrong, message in (
        (("toy.safetensors", "a", "b"), "repeat --embedding"),
        (("nowhere.safetensors",), "does not exist"),
    ):
        code = main([*short, "a", "-o", "no.png", "--embedding", *wrong])
        assert code == 2, capsys.readouterr().err
        assert message in capsys.readouterr().err
    assert not Path("no.png").exists()
