"""CLIPTokenizer: prompts to the token ids of a CLIP text encoder.

Byte-level BPE on lower-cased words; equals transformers' class of that name. Source: Radford et
al., arXiv:2103.00020, and Sennrich et al., arXiv:1508.07909.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from .atomic import write_text
from .checkpoints import Hub, find_folder, takes_hub
from .checkpoints.config import blame
from .errors import CheckpointError
from .scalars import as_count
from .tokenizer_files import CURE, END_OF_WORD, FILES, content_of, read_tokenizer

# Words, contractions, single digits and runs of anything else.
_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
    r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

_DEFAULTS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


class CLIPTokenizer:
    """Prompts to token ids and back; transformers' class of that name.

    Text is normalized (NFC, white space, lower case), split into words and those into tokens.
    Special tokens are found in the text itself: where the padding token is "!", as in ModelScope's
    checkpoint, an exclamation mark becomes the padding id.

    Args:
        vocab: id of each token.
        merges: pairs of tokens that are merged, most frequent first.
        special_tokens: "bos_token", "eos_token", "unk_token", "pad_token" and others by name;
            missing ones of these four are CLIP's own. Start, end and unknown must be in `vocab`.
        extra_special_tokens: special tokens without a name.
        added_tokens: further tokens that are found in text before it is split, with their ids; a
            token outside the vocabulary must have the next free id.
        model_max_length: tokens a text, the two at its ends included.

    Raises CheckpointError where these do not fit together.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        *,
        special_tokens: Mapping[str, str | AddedToken] | None = None,
        extra_special_tokens: Sequence[str | AddedToken] = (),
        added_tokens: Mapping[int, AddedToken] | None = None,
        model_max_length: int = 77,
    ) -> None:
        special = {**_DEFAULTS, **(special_tokens or {})}
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.model_max_length = _checked_length("model_max_length", model_max_length)
        self.special_tokens = {name: content_of(token) for name, token in special.items()}
        for name in ("bos_token", "eos_token", "unk_token"):
            if self.special_tokens[name] not in self.vocab:
                raise CheckpointError(
                    f"{name}={self.special_tokens[name]!r} is not in the vocabulary of "
                    f"{len(self.vocab)} tokens; is this a CLIP tokenizer? If so, {CURE}"
                )
        self._backend = _byte_level_bpe(self.vocab, self.merges, self.special_tokens["unk_token"])
        self._add_tokens(added_tokens or {}, [*special.values(), *extra_special_tokens])

    def _add_tokens(self, added: Mapping[int, AddedToken], special: Iterable[str | AddedToken]) -> None:
        known = set()
        # Tokens with ids first: the others take what is free after them.
        for token_id, token in sorted(added.items()):
            known.add(token.content)
            if token.content in self.special_tokens.values():
                token.special = True
            self._backend.add_tokens([token])
            got = self._backend.token_to_id(token.content)
            if got != token_id:
                raise CheckpointError(
                    f"added token {token.content!r} should have id {token_id}, but the vocabulary "
                    f"gives it {got}; the tokenizer's files are of different versions: {CURE}"
                )
        for token in special:
            if content_of(token) not in known:
                known.add(content_of(token))
                self._backend.add_tokens([_as_special(token)])
        for name, content in self.special_tokens.items():
            if self._backend.token_to_id(content) is None:
                raise CheckpointError(f"{name}={content!r} cannot be a token; {CURE}")

    @classmethod
    @takes_hub
    def from_pretrained(
        cls, path_or_id: str | Path, *, subfolder: str | None = None, hub: Hub
    ) -> "CLIPTokenizer":
        """Load a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`.

        `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` are read where
        they are there. Of the first two, which may name different padding tokens, the second wins,
        unless the first lists its `added_tokens_decoder`: transformers' rule.

        Args:
            path_or_id: folder, or hub id `owner/name`.
            subfolder: "tokenizer" for the folder of a pipeline.
            revision, local_files_only, token, cache_dir, hub: see `checkpoints.Hub`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: see `find_folder`.
            CheckpointError: the files are damaged, or not those of a CLIP tokenizer.
        """
        folder = find_folder(path_or_id, subfolder=subfolder, hub=hub, files=FILES)
        with blame(folder):
            return cls(**read_tokenizer(folder))

    def save_pretrained(self, folder: str | Path) -> list[Path]:
        """Write `vocab.json`, `merges.txt`, `tokenizer_config.json` and `special_tokens_map.json`,
        which transformers reads as well; returns their paths."""
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        decoder = {
            str(token_id): {
                key: getattr(token, key)
                for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
            }
            for token_id, token in sorted(self._backend.get_added_tokens_decoder().items())
        }
        config = {
            **self.special_tokens,
            "added_tokens_decoder": decoder,
            "model_max_length": self.model_max_length,
            "tokenizer_class": "CLIPTokenizer",
        }
        merges = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        contents = {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False),
            "merges.txt": "\n".join(merges) + "\n",
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
            "special_tokens_map.json": json.dumps(self.special_tokens, ensure_ascii=False, indent=2),
        }
        for name, content in contents.items():
            write_text(folder / name, content)
        # Files of an earlier tokenizer in this folder would be read first.
        for name in set(FILES) - set(contents):
            (folder / name).unlink(missing_ok=True)
        return [folder / name for name in contents]

    # Ids of the special tokens.

    @property
    def bos_token_id(self) -> int:
        """First of every text."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int:
        """Last of every text, before the padding."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int:
        """Fills a text up to the wanted length."""
        return self._id("pad_token")

    def _id(self, name: str) -> int:
        return self._backend.token_to_id(self.special_tokens[name])

    def __len__(self) -> int:
        """Number of tokens, the added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def added_tokens(self) -> dict[str, int]:
        """Tokens beside the vocabulary that are not special, and their ids."""
        decoder = self._backend.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(decoder.items()) if not token.special}

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Give texts such as "<cat-toy>" tokens of their own; returns the new ids, which follow the others.

        Raises ValueError for an empty text, one with white space, or one that is a token already; none is
        added then.
        """
        for token in tokens:
            if not token or token.split() != [token]:
                raise ValueError(f"token={token!r} must be a text without white space")
            if token in self.vocab or self._backend.token_to_id(token) is not None:
                raise ValueError(f"{token!r} is a token already; choose another name")
        if len(set(tokens)) != len(tokens):
            raise ValueError(f"tokens={list(tokens)} has one twice")
        self._backend.add_tokens([AddedToken(token, normalized=True) for token in tokens])
        return [self._backend.token_to_id(token) for token in tokens]

    # Texts to ids and back.

    def __call__(self, texts: str | Sequence[str], *, max_length: int | None = None) -> np.ndarray:
        """Token ids of texts, each with its start and end token, padded to one length.

        Args:
            texts: one text or several.
            max_length: tokens a text, at least 2; None for `model_max_length`. A longer text is
                cut, with a UserWarning that quotes what was cut off; the end token stays.

        Returns int32 (B, max_length). Raises TypeError for anything but texts, ValueError for none
        and for text that is not valid Unicode.
        """
        length = self.model_max_length
        if max_length is not None:
            length = _checked_length("max_length", max_length)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError('texts is empty; pass one text at least, if only ""')
        for text in texts:
            _check_text(text)
        room = length - 2
        ids = np.full((len(texts), length), self.pad_token_id, dtype=np.int32)
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for row, text, encoding in zip(ids, texts, encodings, strict=True):
            tokens = encoding.ids
            if len(tokens) > room:
                cut = text[encoding.offsets[room][0] :]
                warnings.warn(
                    f"the text has {len(tokens)} tokens, and {room} fit; cut off: {cut!r}",
                    stacklevel=2,
                )
                tokens = tokens[:room]
            row[: len(tokens) + 2] = [self.bos_token_id, *tokens, self.eos_token_id]
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray | mx.array, *, skip_special_tokens: bool = False) -> str:
        """Text of the ids (L,) of one text: lower case, a space after each word.

        `skip_special_tokens` leaves out start, end, padding and what else is special.
        """
        ids = np.array(ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise ValueError(f"ids is {ids.dtype} {ids.shape}; it must be integers (tokens,)")
        text = self._backend.decode(ids.tolist(), skip_special_tokens=skip_special_tokens)
        return text.replace(END_OF_WORD, " ").strip()


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], unk_token: str) -> Tokenizer:
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token=unk_token,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _as_special(token: str | AddedToken) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)  # not normalized: found before lower-casing
    token.special = True
    return token


def _checked_length(name: str, value: int) -> int:
    return as_count(name, value, 2, " (start and end token)")


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}: {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: {text[error.start]!r} at position {error.start} "
            "stands for no character; was it read in the wrong encoding?"
        ) from error
