"""Text that every machine with Python has: the bytes of the standard library's source.

Shapes: B batch, T positions.
"""

import dataclasses
import pathlib
import sysconfig

import numpy as np

# Installed packages differ from machine to machine; tests are full of tables and broken text.
EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
HOLD_OUT_EVERY = 20  # files


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Bytes to train on, and those of whole files held out to evaluate on; each uint8 (size,)."""

    training: np.ndarray
    evaluation: np.ndarray


def load_corpus() -> Corpus:
    """Reads the library in the order of its paths, and holds out every twentieth file."""
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
    held_out = files[::HOLD_OUT_EVERY]
    training = [file for file in files if file not in set(held_out)]
    return Corpus(training=_read(training), evaluation=_read(held_out))


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


def _read(files: list[pathlib.Path]) -> np.ndarray:
    return np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
