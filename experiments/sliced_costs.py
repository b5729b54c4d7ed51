"""The files of the costs of a model whose head is whole or in slices."""

from pathlib import Path


def with_slices(path: Path, count: int) -> Path:
    """Returns the file of the costs with a head in so many slices, beside that of a whole head."""
    return path if count == 1 else path.with_stem(f"{path.stem}-{count}-slices")
