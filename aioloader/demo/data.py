"""The demo's images: scikit-learn's 1,797 handwritten digits, one PNG file each."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LEVELS = 16
"""The darkest pixel value in scikit-learn's digits; 0 is white."""

Sample = tuple[str, int]
"""The name of a file and its label, 0 to 9."""

Example = tuple[NDArray[np.float32], int]
"""A training example: pixels as returned by `decode`, and the label."""


@dataclass(frozen=True)
class Split:
    """The training set and the test set."""

    train: list[Sample]
    test: list[Sample]


def encode(pixels: NDArray[np.floating[Any]]) -> bytes:
    """Return a grayscale PNG of a digit's [8, 8] pixels in 0..16, scaled to 0..255."""
    content = io.BytesIO()
    Image.fromarray((pixels * (255 / LEVELS)).round().astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def decode(content: bytes) -> NDArray[np.float32]:
    """Return the pixels of a PNG as float32 [1, 8, 8] in 0..1, channel first as in torch."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image, dtype=np.float32)[np.newaxis] / np.float32(255)


def write_digits(folder: Path) -> Split:
    """Write every digit and a list of them to `folder`; the split is fixed, with a fifth of each digit for tests."""
    from sklearn.datasets import load_digits  # here: the import takes a second, and training does not need it
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    samples = [(f"{position:04}.png", int(label)) for position, label in enumerate(digits.target)]
    for (name, _), pixels in zip(samples, digits.images, strict=True):
        (folder / name).write_bytes(encode(pixels))
    train, test = train_test_split(samples, test_size=0.2, stratify=digits.target, random_state=0)
    (folder / "split.json").write_text(json.dumps({"train": train, "test": test}))
    return Split(train, test)


def read_split(folder: Path) -> Split:
    """Return the split that `write_digits` has written to `folder`."""
    parts = json.loads((folder / "split.json").read_text())
    return Split(**{part: [(name, label) for name, label in samples] for part, samples in parts.items()})
