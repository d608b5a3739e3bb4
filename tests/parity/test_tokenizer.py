"""CLIPTokenizer against transformers' own, on a small vocabulary and on CLIP's where it is at hand.

CLIP's vocabulary is not in this repository. Set CLIP_BPE_FILE to `bpe_simple_vocab_16e6.txt.gz`, or to the
wheel of open-clip-torch, which holds it (`pip download --no-deps open-clip-torch`).
"""

import gzip
import importlib.util
import os
import random
import warnings
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from clip_vocab import BOS, EOS, build, token, write_folder  # noqa: E402
from mlx_unet3d.tokenizer import CLIPTokenizer  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

VOCAB_NAME = "bpe_simple_vocab_16e6.txt.gz"


def bpe_lines() -> list[str] | None:
    """Lines of CLIP's merges file, None where there is none."""
    spec = importlib.util.find_spec("open_clip")
    installed = None if spec is None else Path(spec.submodule_search_locations[0]) / VOCAB_NAME
    path = Path(os.environ["CLIP_BPE_FILE"]) if "CLIP_BPE_FILE" in os.environ else installed
    if path is None or not path.is_file():
        return None
    data = path.read_bytes()
    if path.suffix == ".whl":
        data = zipfile.ZipFile(path).read(f"open_clip/{VOCAB_NAME}")
    return gzip.decompress(data).decode("utf-8").split("\n")


def clip_vocab(lines: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's own order: bytes, printable ones first, bytes at the end of a word, merges, specials."""
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    alphabet = ByteLevel.alphabet()
    printable = sorted(letter for letter in alphabet if ord(letter) < 256)
    letters = printable + sorted(letter for letter in alphabet if ord(letter) >= 256)
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges), BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


@pytest.fixture(scope="module", params=["small", "clip"])
def vocab(request):
    if request.param == "small":
        return build()
    lines = bpe_lines()
    if lines is None:
        pytest.skip("no CLIP vocabulary: set CLIP_BPE_FILE to it, or install open-clip-torch")
    found = clip_vocab(lines)
    assert len(found[0]) == 49408
    return found


FIXED = [
    "",
    " ",
    "\t\n\r ",
    "a panda surfing",
    "A  Panda\tSURFING\non the   waves",
    "rock!",
    "rock!!! roll ! !",
    "!important",
    "it's the cat's, don't we'll they've I'm you're he'd",
    "IT'S DON'T 'Tis ''s '' '",
    "it\u2019s a typographic apostrophe",
    "2 dogs, 1234567890 and 3.14 or 1,000",
    "½ ² ③ Ⅷ ٣ 四",
    "café cafe\u0301 naïve Ångström A\u030angstro\u0308m",
    "ﬁ ligature ﬀ, ǅ titlecase, ß STRASSE, İstanbul ISTANBUL \u0131",
    "ΑΣ ὈΔΥΣΣΕΎΣ",
    "熊猫冲浪 パンダ 판다 서핑",
    "がぎぐ か\u3099",
    "हिन्दी ไทย עברית العربية",
    "🏄 🐼🌊 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "a🐼b",
    "zero\u200bwidth \u200d joiner \ufeff bom \u00ad soft",
    "nbsp\u00a0em\u2003ideographic\u3000line\u2028para\u2029nel\u0085vt\x0bff\x0c",
    "control \x00 \x01 \x07 \x1b[31m \x7f",
    "under_score-dash/slash\\back @home #tag $5 50% a&b (x) [y] {z} <tag> ~ ` ^ | + = * ; : ?",
    "…—\u2013“quoted”«»„",
    "<|startoftext|>",
    "<|endoftext|> after",
    "before<|endoftext|>after <|STARTOFTEXT|>",
    "<|startoftext",
    "<|pad|> <cat-toy> <Cat-Toy> a<cat-toy>b",
    "</w> a</w>b",
    "x" * 400,
    "a " * 200,
    "! " * 100,
    "🐼" * 50,
    "the panda is surfing on the waves, " * 12,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "masterpiece, best quality, (ultra-detailed:1.2), 8k uhd, dslr, f/1.4, --ar 16:9",
    "\U0001d54f\U0001d550 math \U0010ffff private \ue000 unassigned \u0378",
]


def random_prompts(count: int) -> list[str]:
    rng = random.Random(0)
    pieces = [piece for text in FIXED[:30] for piece in text.split(" ")] + [" ", "  ", "!", "'s", "\n"]
    ranges = [(32, 126), (160, 591), (880, 1279), (0x4E00, 0x4EFF), (0x1F300, 0x1F6FF), (1, 31)]
    prompts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 40)):
            if rng.random() < 0.6:
                parts.append(rng.choice(pieces) + rng.choice(["", " ", "  "]))
            else:
                low, high = rng.choice(ranges)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 5))))
        prompts.append("".join(parts))
    return prompts


PROMPTS = FIXED + random_prompts(220)


def ours(tokenizer: CLIPTokenizer, texts, **keywords) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the text has .* cut off")
        return tokenizer(texts, **keywords)


def theirs(tokenizer, texts, length=77) -> np.ndarray:
    encoded = tokenizer(texts, padding="max_length", max_length=length, truncation=True)
    return np.array(encoded.input_ids)


def compare(folder: Path, reference=None) -> tuple[CLIPTokenizer, "transformers.CLIPTokenizer"]:
    reference = reference or transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for prompt, a, b in zip(PROMPTS, ours(tokenizer, PROMPTS), theirs(reference, PROMPTS), strict=True):
        assert a.tolist() == b.tolist(), repr(prompt)
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(reference, f"{name}_token_id")
    assert len(tokenizer) == len(reference)
    return tokenizer, reference


def test_ids_of_varied_prompts(tmp_path, vocab):
    compare(write_folder(tmp_path, *vocab))


def test_documented_ids(tmp_path, vocab):
    if len(vocab[0]) != 49408:
        pytest.skip("ids of CLIP's own vocabulary")
    tokenizer = CLIPTokenizer.from_pretrained(write_folder(tmp_path, *vocab))
    assert tokenizer("Spiderman is surfing")[0, :7].tolist() == [49406, 18427, 533, 15762, 49407, 0, 0]
    assert tokenizer("rock!")[0, :5].tolist() == [49406, 2172, 0, 49407, 0]


def test_padding_by_end_token(tmp_path, vocab):
    tokenizer, _ = compare(write_folder(tmp_path, *vocab, pad_token=EOS))
    assert tokenizer("")[0, -1] == tokenizer.eos_token_id


def test_without_special_token_files(tmp_path, vocab):
    folder = write_folder(tmp_path, *vocab, tokenizer_config=None, special_tokens_map=None)
    compare(folder)


def test_special_token_as_object(tmp_path, vocab):
    """An object keeps its flags: a normalized "!" is looked for after normalization."""
    compare(write_folder(tmp_path, *vocab, pad_token=token("!", lstrip=True)))


def test_added_tokens(tmp_path, vocab):
    size = len(vocab[0])
    added = {"<cat-toy>": size, "<|pad|>": size + 1}
    folder = write_folder(tmp_path, *vocab, pad_token="<|pad|>", added_tokens=added)
    tokenizer, _ = compare(folder)
    assert tokenizer.pad_token_id == size + 1


def test_padding_token_outside_the_vocabulary(tmp_path, vocab):
    tokenizer, _ = compare(write_folder(tmp_path, *vocab, pad_token="<|pad|>"))
    assert tokenizer.pad_token_id == len(vocab[0])


def test_extra_special_tokens(tmp_path, vocab):
    special = {"pad_token": "!", "additional_special_tokens": ["<cat-toy>", "surf"]}
    compare(write_folder(tmp_path, *vocab, special_tokens_map=special))


def test_what_transformers_saves(tmp_path, vocab):
    """transformers 5 writes tokenizer.json, with the special tokens in tokenizer_config.json."""
    reference = transformers.CLIPTokenizer.from_pretrained(write_folder(tmp_path / "a", *vocab))
    reference.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert not (tmp_path / "b" / "vocab.json").is_file()
    compare(tmp_path / "b", reference)


def test_what_we_save(tmp_path, vocab):
    size = len(vocab[0])
    folder = write_folder(tmp_path / "a", *vocab, added_tokens={"<cat-toy>": size})
    tokenizer, reference = compare(folder)
    tokenizer.save_pretrained(tmp_path / "b")
    compare(tmp_path / "b", reference)
    compare(tmp_path / "b")


@pytest.mark.parametrize("length", [2, 3, 10, 40])
def test_other_lengths(tmp_path, vocab, length):
    folder = write_folder(tmp_path, *vocab)
    reference = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    np.testing.assert_array_equal(
        ours(tokenizer, PROMPTS, max_length=length), theirs(reference, PROMPTS, length)
    )


def test_decode(tmp_path, vocab):
    tokenizer, reference = compare(write_folder(tmp_path, *vocab))
    for ids in ours(tokenizer, PROMPTS):
        for skip in (False, True):
            expected = reference.decode(ids.tolist(), skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
