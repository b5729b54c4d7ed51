"""Text that every machine with Python has: the standard library's source, in bytes or tokens.

Shapes: B batch, T positions.
"""

import dataclasses
import pathlib
import sysconfig
from collections.abc import Callable, Sequence

import numpy as np

# Installed packages differ from machine to machine; tests are full of tables and broken text.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
HOLD_OUT_EVERY = 20  # files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on, and those of whole files held out to evaluate on; each integers (size,).

    A token of those held out is `bytes_per_token` of their text, on average.
    """

    training: np.ndarray
    evaluation: np.ndarray
    bytes_per_token: float


def as_bytes(texts: Sequence[bytes]) -> np.ndarray:
    """Makes a token of every byte: uint8 (size,)."""
    return np.frombuffer(b"".join(texts), dtype=np.uint8)


def load_corpus(encode: Callable[[Sequence[bytes]], np.ndarray] = as_bytes) -> Corpus:
    """Reads the library in the order of its paths, and holds out every twentieth file.

    `encode` maps the files of one of both parts to its tokens.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    if len(files) < HOLD_OUT_EVERY:
        raise ValueError(
            f"{root} holds {len(files)} source files, and {HOLD_OUT_EVERY} are needed; "
            "run a Python whose standard library is installed as source"
        )
    texts = [file.read_bytes() for file in files]
    held_out = texts[::HOLD_OUT_EVERY]
    evaluation = encode(held_out)
    return Corpus(
        training=encode([text for i, text in enumerate(texts) if i % HOLD_OUT_EVERY]),
        evaluation=evaluation,
        bytes_per_token=sum(map(len, held_out)) / len(evaluation),
    )


def sample_batch(
    text: np.ndarray, rng: np.random.Generator, batch_size: int, sequence_length: int
) -> dict[str, np.ndarray]:
    """Cuts windows at random places: "tokens", int32 (B, T + 1)."""
    starts_B = rng.integers(0, len(text) - sequence_length, size=batch_size)
    return {"tokens": _windows(text, starts_B, sequence_length)}


def spread_batches(
    text: np.ndarray, num_batches: int, batch_size: int, sequence_length: int
) -> list[dict[str, np.ndarray]]:
    """Cuts windows at even distances, the same ones every time: "tokens", int32 (B, T + 1)."""
    num_windows = num_batches * batch_size
    starts = np.linspace(0, len(text) - sequence_length - 1, num_windows, dtype=np.int64)
    return [
        {"tokens": _windows(text, starts_B, sequence_length)}
        for starts_B in np.split(starts, num_batches)
    ]


def _windows(text: np.ndarray, starts_B: np.ndarray, sequence_length: int) -> np.ndarray:
    return text[starts_B[:, None] + np.arange(sequence_length + 1)].astype(np.int32)
