"""CLIPTokenizer on a small vocabulary, without transformers: goldens, cutting, files, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from clip_vocab import BOS, EOS, build, write_folder
from mlx_unet3d.errors import CheckpointError
from mlx_unet3d.tokenizer import CLIPTokenizer

CASES = json.loads((Path(__file__).parent / "goldens" / "tokenizer.json").read_text("utf-8"))
VOCAB, MERGES = build()


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "tokenizer", VOCAB, MERGES, length=24)


@pytest.fixture
def tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:the text has")
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_golden(tokenizer, case):
    """Ids of transformers, dumped by tests/goldens/make_tokenizer.py."""
    ids = tokenizer(case["text"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [case["ids"]]
    assert tokenizer.decode(ids[0]) == case["decoded"]


def test_words(tokenizer):
    ids = tokenizer("the panda surf")[0]
    expected = [VOCAB[t] for t in (BOS, "the</w>", "panda</w>", "surf</w>", EOS)]
    assert ids[:5].tolist() == expected
    assert (ids[5:] == tokenizer.pad_token_id).all()


def test_padding_token_of_the_map_wins(tokenizer):
    assert tokenizer.pad_token_id == VOCAB["!"] == 0
    assert tokenizer("the!")[0, 2] == 0


def test_texts_are_independent(tokenizer):
    texts = ["the panda", "", "rock"]
    np.testing.assert_array_equal(tokenizer(texts), np.concatenate([tokenizer(t) for t in texts]))


def test_subfolder(folder):
    loaded = CLIPTokenizer.from_pretrained(folder.parent, subfolder="tokenizer")
    assert loaded.model_max_length == 24


def test_decode(tokenizer):
    ids = tokenizer("The  Panda, surfing")[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the panda , surfing"
    assert tokenizer.decode(ids[:2].tolist()) == f"{BOS}the"
    with pytest.raises(ValueError, match="ids is"):
        tokenizer.decode(ids[None])


# Cutting.


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("the panda SURFING  in  waves", "SURFING  in  waves"),
        ("the\u3000e\u0301e\u0301 panda", "e\u0301 panda"),
        ("the pandapandas", "apandas"),
        ("the 🐼 panda", "🐼 panda"),  # of four tokens, the first of which is kept
        ("the panda!", "!"),
    ],
)
def test_the_warning_quotes_what_was_cut(tokenizer, text, cut):
    with pytest.warns(UserWarning, match="cut off: ") as record:
        ids = tokenizer(text, max_length=4 if "\u0301" not in text else 5)
    assert len(record) == 1
    assert str(record[0].message).endswith(f"cut off: {cut!r}")
    assert record[0].filename == __file__
    assert ids[0, -1] == tokenizer.eos_token_id


def test_a_text_that_just_fits_is_not_cut(tokenizer):
    assert tokenizer("the panda", max_length=4).tolist()[0][-1] == tokenizer.eos_token_id
    assert tokenizer("", max_length=2).tolist() == [[VOCAB[BOS], VOCAB[EOS]]]


def test_one_warning_for_each_text_that_is_cut(tokenizer):
    with pytest.warns(UserWarning, match="cut off") as record:
        tokenizer(["the panda surf", "rock", "the waves in"], max_length=4)
    messages = [str(r.message) for r in record]
    assert messages == [
        "the text has 3 tokens, and 2 fit; cut off: 'surf'",
        "the text has 3 tokens, and 2 fit; cut off: 'in'",
    ]


# Files.


@pytest.mark.filterwarnings("ignore:the text has")
def test_save_and_load(tokenizer, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    paths = tokenizer.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == sorted(p.name for p in paths)
    again = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    texts = [case["text"] for case in CASES]
    np.testing.assert_array_equal(again(texts), tokenizer(texts))
    assert again.model_max_length == 24
    assert again.special_tokens == tokenizer.special_tokens


def test_length_that_is_not_given_or_endless_is_77(tmp_path):
    for length in (None, 1000000000000000019884624838656, float("inf")):
        folder = write_folder(tmp_path, VOCAB, MERGES, length=length)
        assert CLIPTokenizer.from_pretrained(folder)("").shape == (1, 77)


def test_added_token_with_another_id(tmp_path):
    folder = write_folder(tmp_path, VOCAB, MERGES, added_tokens={"<new>": len(VOCAB) + 5})
    with pytest.raises(CheckpointError, match=r"'<new>' should have id \d+"):
        CLIPTokenizer.from_pretrained(folder)


def test_added_token(tmp_path):
    folder = write_folder(tmp_path, VOCAB, MERGES, added_tokens={"<new>": len(VOCAB)})
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer("the <new>")[0, 2] == len(VOCAB)
    assert len(tokenizer) == len(VOCAB) + 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "vocab.json is not valid JSON"),
        ("vocab.json", "[]", "vocab.json must hold a JSON object"),
        ("vocab.json", "{}", "has no vocabulary"),
        ("vocab.json", '{"a": "1"}', "token 'a' has id '1'"),
        ("vocab.json", '{"a": -1}', "token 'a' has id -1"),
        ("vocab.json", '{"a": 1, "b": 1}', "same id"),
        ("merges.txt", "#version: 0.2\np a\nbroken\n", "merges.txt: merge 2 is 'broken'"),
        ("merges.txt", "p a n\n", "not two tokens"),
        ("merges.txt", "x y\n", "merge 1 needs the token 'xy'"),
        ("special_tokens_map.json", '{"pad_token": 3}', "3 is not a token"),
        ("special_tokens_map.json", '{"extra_special_tokens": "x"}', "must be a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "must be an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "added token 'x'"),
        ("tokenizer_config.json", '{"tokenizer_class": "T5Tokenizer"}', "is of a T5Tokenizer"),
        ("tokenizer.json", "{}", "does not hold a BPE model"),
        ("tokenizer.json", '{"model": {"type": "Unigram"}}', "does not hold a BPE model"),
        ("added_tokens.json", '{"<new>": "x"}', "added token 'x'"),
    ],
)
def test_damaged_files(folder, name, content, message):
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        CLIPTokenizer.from_pretrained(folder)
    assert str(folder / name) in str(caught.value)


def test_merges_that_are_not_text(folder):
    (folder / "merges.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"merges\.txt is not UTF-8"):
        CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_absent_files(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"has no {name}.*subfolder"):
        CLIPTokenizer.from_pretrained(folder)


def test_vocabulary_without_the_ends():
    vocab = {token: i for token, i in VOCAB.items() if token != BOS}
    with pytest.raises(CheckpointError, match=r"bos_token='<.startoftext.>' is not in the vocabulary"):
        CLIPTokenizer(vocab, MERGES)


# Arguments.


def test_wrong_arguments(tokenizer):
    with pytest.raises(TypeError, match="a text must be a str, not NoneType"):
        tokenizer(["the", None])
    with pytest.raises(TypeError, match="must be a str"):
        tokenizer(b"the")
    with pytest.raises(ValueError, match="texts is empty"):
        tokenizer([])
    with pytest.raises(ValueError, match=r"not valid Unicode: '\\udcff' at position 4"):
        tokenizer("the \udcff")
    for length in (1, 0, True, 7.0):
        with pytest.raises(ValueError, match=f"max_length={length}"):
            tokenizer("the", max_length=length)
