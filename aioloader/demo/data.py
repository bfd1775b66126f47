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
"""The darkest value of a digit's pixel as scikit-learn has it; 0 is white."""

Sample = tuple[str, int]
"""A file's name and its label, 0 to 9."""

Example = tuple[NDArray[np.float32], int]
"""What a network learns from: pixels as `decode` returns them, and the label."""


@dataclass(frozen=True)
class Split:
    """What is trained on and what is tested on, never both."""

    train: list[Sample]
    test: list[Sample]


def encode(pixels: NDArray[np.floating[Any]]) -> bytes:
    """Return a grayscale PNG of a digit's [8, 8] pixels in 0..16, which become 0..255."""
    content = io.BytesIO()
    Image.fromarray((pixels * (255 / LEVELS)).round().astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


def decode(content: bytes) -> NDArray[np.float32]:
    """Return the pixels of a PNG as float32 [1, 8, 8] in 0..1, channel first as torch wants it."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image, dtype=np.float32)[np.newaxis] / np.float32(255)


def write_digits(folder: Path) -> Split:
    """Write every digit and the list of them into `folder`; always split alike, a fifth of each digit for tests."""
    from sklearn.datasets import load_digits  # here: it takes a second, and who trains only reads
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    samples = [(f"{position:04}.png", int(label)) for position, label in enumerate(digits.target)]
    for (name, _), pixels in zip(samples, digits.images, strict=True):
        (folder / name).write_bytes(encode(pixels))
    train, test = train_test_split(samples, test_size=0.2, stratify=digits.target, random_state=0)
    (folder / "split.json").write_text(json.dumps({"train": train, "test": test}))
    return Split(train, test)


def read_split(folder: Path) -> Split:
    """Return what `write_digits` listed in `folder`."""
    parts = json.loads((folder / "split.json").read_text())
    return Split(**{part: [(name, label) for name, label in samples] for part, samples in parts.items()})
