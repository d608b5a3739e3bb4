"""A small byte-level vocabulary in the form of CLIP's, for tests."""

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = ("panda", "surfing", "surf", "the", "cat's", "don", "wave", "waves", "in", "on", "rock")


def build(words=WORDS) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges with which each of `words` is one token; "!" is 0, as in CLIP's."""
    alphabet = ["!", *(letter for letter in sorted(ByteLevel.alphabet()) if letter != "!")]
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges = []
    for word in words:
        *letters, last = word
        done = letters[0]
        for part in (*letters[1:], last + "</w>"):
            if done + part not in tokens:
                merges.append((done, part))
                tokens.append(done + part)
            done += part
    tokens += [BOS, EOS]
    return {token: i for i, token in enumerate(tokens)}, merges


def token(content: str, **flags) -> dict:
    return dict({"content": content, "lstrip": False, "normalized": True, "rstrip": False}, **flags) | {
        "single_word": False
    }


def write_folder(folder: Path, vocab: dict, merges: list, pad_token="!", length=77, **files) -> Path:
    """A folder like ModelScope's: the config says that padding is the end token, the map says `pad_token`.

    Further files by name without suffix, replacing these; None leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    typed = {"__type": "AddedToken"}
    contents = {
        "vocab": vocab,
        "tokenizer_config": {
            "add_prefix_space": False,
            "bos_token": typed | token(BOS),
            "do_lower_case": True,
            "eos_token": typed | token(EOS),
            "errors": "replace",
            "model_max_length": length,
            "pad_token": EOS,
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": typed | token(EOS),
        },
        "special_tokens_map": {
            "bos_token": token(BOS),
            "eos_token": token(EOS),
            "pad_token": pad_token,
            "unk_token": token(EOS),
        },
        **files,
    }
    for name, value in contents.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
