"""The files of a CLIP tokenizer, checked: vocabulary, merges and special tokens."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from .checkpoints import read_json
from .checkpoints.config import read_text
from .errors import CheckpointError

END_OF_WORD = "</w>"

FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

_EXTRA = ("additional_special_tokens", "extra_special_tokens")


_CLASSES = (
    None,
    "CLIPTokenizer",
    "CLIPTokenizerFast",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
)


CURE = "download the tokenizer folder again"


# transformers writes 10^30 where no limit is set.
_NO_LIMIT = 10**6


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Read the arguments of `CLIPTokenizer` from the files of a folder; see its `from_pretrained`.

    Raises:
        FileNotFoundError: there is no vocabulary.
        CheckpointError: the files are damaged, or not those of a CLIP tokenizer.
    """
    path = folder / "tokenizer_config.json"
    config = _read_optional(path)
    if config.get("tokenizer_class") not in _CLASSES:
        raise CheckpointError(
            f"{path} is of a {config['tokenizer_class']}, not of a CLIPTokenizer; pass the folder "
            "of the CLIP tokenizer"
        )
    length = config.get("model_max_length")
    if not isinstance(length, (int, float)) or not length < _NO_LIMIT:
        length = 77
    if not length >= 2:
        raise CheckpointError(f"{path}: model_max_length={length!r} must be at least 2; {CURE}")
    vocab, merges, listed = _read_vocabulary(folder)
    special, extra, added = _read_special_tokens(folder, config)
    return {
        "vocab": vocab,
        "merges": merges,
        "special_tokens": special,
        "extra_special_tokens": extra,
        "added_tokens": {**added, **listed},
        "model_max_length": int(length),
    }


def content_of(token: str | AddedToken) -> str:
    """Return the text of a token."""
    return token if isinstance(token, str) else token.content


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_vocabulary(
    folder: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, AddedToken]]:
    """Vocabulary, merges and, from `tokenizer.json`, the added tokens."""
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        model = content.get("model")
        if (
            not isinstance(model, dict)
            or model.get("type", "BPE") != "BPE"
            or model.get("end_of_word_suffix") != END_OF_WORD
        ):
            raise CheckpointError(
                f"{path} does not hold a BPE model with the end of word {END_OF_WORD!r}, as "
                "CLIP's tokenizer has; pass the folder of the CLIP tokenizer"
            )
        vocab = _checked_vocab(path, model.get("vocab"))
        merges = _checked_merges(path, vocab, model.get("merges"))
        entries = content.get("added_tokens", [])
        if not isinstance(entries, list):
            raise CheckpointError(f"{path}: added_tokens must be a list; {CURE}")
        pairs = [(entry.get("id") if isinstance(entry, dict) else None, entry) for entry in entries]
        return vocab, merges, _added_tokens(path, pairs)
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no {' and no '.join(missing)}, and no tokenizer.json; pass the "
            'tokenizer\'s folder, or subfolder="tokenizer"'
        )
    vocab = _checked_vocab(folder / "vocab.json", read_json(folder / "vocab.json"))
    path = folder / "merges.txt"
    text = read_text(path)
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#version")]
    return vocab, _checked_merges(path, vocab, lines), {}


def _checked_vocab(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f"{path} has no vocabulary of tokens and ids; {CURE}")
    for token, token_id in vocab.items():
        _check_text(path, token)
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
            raise CheckpointError(
                f"{path}: token {token!r} has id {token_id!r}, which must be an integer of at least 0; {CURE}"
            )
    if len(set(vocab.values())) < len(vocab):
        raise CheckpointError(f"{path} gives the same id to several tokens; {CURE}")
    return vocab


def _checked_merges(path: Path, vocab: Mapping[str, int], merges: Any) -> list[tuple[str, str]]:
    if not isinstance(merges, list):
        raise CheckpointError(f"{path} has no list of merges; {CURE}")
    pairs = []
    for number, merge in enumerate(merges, start=1):
        pair = tuple(merge.split()) if isinstance(merge, str) else merge
        if (
            not isinstance(pair, (list, tuple))
            or len(pair) != 2
            or not all(isinstance(part, str) for part in pair)
        ):
            raise CheckpointError(f"{path}: merge {number} is {merge!r}, not two tokens; {CURE}")
        left, right = pair
        for token in (left, right, left + right):
            if token not in vocab:
                raise CheckpointError(
                    f"{path}: merge {number} needs the token {token!r}, which the vocabulary "
                    f"lacks; vocabulary and merges are of different versions: {CURE}"
                )
        pairs.append((left, right))
    return pairs


def _read_special_tokens(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, str | AddedToken], list[str | AddedToken], dict[int, AddedToken]]:
    """Special tokens by name, those without one, and added tokens by id, of the files beside the
    vocabulary."""
    path = folder / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise CheckpointError(f"{path}: added_tokens_decoder must be an object; {CURE}")
        return *_special_tokens(path, config), _added_tokens(path, decoder.items())
    map_path = folder / "special_tokens_map.json"
    mapped = {
        key: {**value, "special": True} if key in _NAMED and isinstance(value, dict) else value
        for key, value in _read_optional(map_path).items()
    }
    special, extra = _special_tokens(map_path if mapped else path, {**config, **mapped})
    contents = {content_of(token) for token in (*special.values(), *extra)}
    added_path = folder / "added_tokens.json"
    entries = [
        (token_id, {"content": content, "special": content in contents})
        for content, token_id in _read_optional(added_path).items()
    ]
    return special, extra, _added_tokens(added_path, entries)


def _special_tokens(
    path: Path, values: Mapping[str, Any]
) -> tuple[dict[str, str | AddedToken], list[str | AddedToken]]:
    """Named special tokens of a config, and those without a name."""
    named = {name: _token(path, values[name]) for name in _NAMED if values.get(name) is not None}
    extra = []
    for key in _EXTRA:
        tokens = values.get(key) or []
        if isinstance(tokens, dict):
            tokens = list(tokens.values())
        if not isinstance(tokens, list):
            raise CheckpointError(f"{path}: {key} must be a list; {CURE}")
        extra += [_token(path, token) for token in tokens]
    return named, extra


def _check_text(path: Path, token: str) -> str:
    """The token; CheckpointError for half a character, which JSON can hold and no text has."""
    try:
        token.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: the token {token!r} is not valid Unicode; {CURE}") from error
    return token


def _token(path: Path, value: Any) -> str | AddedToken:
    if isinstance(value, str) and value:
        return _check_text(path, value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise CheckpointError(f"{path}: {value!r} is not a token; {CURE}")
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(
        _check_text(path, value["content"]), **{flag: bool(value[flag]) for flag in flags if flag in value}
    )


def _added_tokens(path: Path, entries: Iterable[tuple[Any, Any]]) -> dict[int, AddedToken]:
    added = {}
    for token_id, value in entries:
        if not isinstance(value, dict) or not re.fullmatch(r"[0-9]{1,10}", str(token_id)):
            raise CheckpointError(f"{path}: added token {str(token_id)[:80]!r}: {value!r} is not one; {CURE}")
        added[int(token_id)] = _token(path, value)
    return added
