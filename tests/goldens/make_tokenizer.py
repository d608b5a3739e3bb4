"""Writes tests/goldens/tokenizer.json: prompts and what transformers' tokenizer makes of them.

Needs transformers. Run from anywhere: python tests/goldens/make_tokenizer.py
"""

import json
import sys
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "parity"))

from clip_vocab import build, write_folder  # noqa: E402

PROMPTS = [
    "",
    "a panda surfing on the waves",
    "The  CAT'S\tdon't\n",
    "rock! 42",
    "cafe\u0301 パンダ 🐼",
    "before<|endoftext|>after",
    "the waves " * 5,
]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        reference = CLIPTokenizer.from_pretrained(write_folder(Path(folder), *build(), length=24))
    ids = reference(PROMPTS, padding="max_length", max_length=24, truncation=True).input_ids
    cases = [
        {"text": text, "ids": row, "decoded": reference.decode(row)}
        for text, row in zip(PROMPTS, ids, strict=True)
    ]
    text = json.dumps(cases)
    (HERE / "tokenizer.json").write_text(text.replace("}, {", "},\n {") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
