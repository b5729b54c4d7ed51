"""Text as tokens, by a tokenizer.json as Hugging Face has it beside a model."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np


def read_tokenizer(file: str | pathlib.Path) -> Callable[[Sequence[bytes]], np.ndarray]:
    """Returns what maps texts in UTF-8 to all their tokens, int32 (size,), without special ones.

    Raises:
      ValueError: the file is no tokenizer.json, or the package that reads it is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError(
            "a tokenizer.json is read by the package tokenizers, which is not installed; run "
            "pip install 'jaxptis[tokenizer]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of no narrower type
        raise ValueError(f"{file} is no tokenizer.json: {error}") from error

    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(texts: Sequence[bytes]) -> np.ndarray:
        decoded = (text.decode(errors="replace") for text in texts)
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in decoded]
        return np.concatenate([np.asarray(each, np.int32) for each in ids])

    return encode
