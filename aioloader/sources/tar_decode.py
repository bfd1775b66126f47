"""Decodes the members of a sample by their extensions."""

import io
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from aioloader.errors import BrokenDataError

__all__ = ["DecodeSample", "Decoding"]

Decoding = bool | Literal["pil", "torchrgb8"] | Mapping[str, Callable[[bytes], Any]]

IMAGES: Final = frozenset({"jpg", "jpeg", "png", "ppm", "pgm", "pbm", "pnm", "webp", "bmp", "tif", "tiff"})


class DecodeSample:
    """From a sample of bytes to one of values: `Pipeline(TarShards(urls)).map(DecodeSample("torchrgb8"))`.

    A member is decoded by what comes after the last dot of its extension: `seg.png` as `png`. Members with unknown
    extensions stay bytes, and so do pickles (`.pyd`, `.pickle`, `.pth`), because reading one runs code in it.

    Args:
        decoding: True: `json` to its value; `txt`, `text` to `str`; `cls`, `cls2`, `index`, `inx`, `id`, `count` to
            `int`; `npy` to an array; images stay bytes. `"pil"`: these, and images to RGB images of Pillow.
            `"torchrgb8"`: these, and images to tensors, uint8 [3, H, W] in 0..255. A mapping from extensions to
            functions of bytes: nothing else is decoded.

    Raises:
        ImportError: `"pil"` or `"torchrgb8"` without Pillow.
        ValueError: `decoding` is invalid.
    """

    def __init__(self, decoding: Decoding = True) -> None:
        self._by_extension: dict[str, Callable[[bytes], Any]] = {}
        if isinstance(decoding, Mapping):
            for extension, decode in decoding.items():
                if not callable(decode):
                    raise ValueError(f"decode must map extensions to functions, got {decode!r} for {extension!r}")
            self._by_extension = {key.lower().lstrip("."): decode for key, decode in decoding.items()}
        elif decoding in (True, "pil", "torchrgb8"):
            self._by_extension = dict(_BASIC)
            if decoding is not True:
                _require_pillow(decoding)
                image = _pil if decoding == "pil" else _torchrgb8
                self._by_extension |= dict.fromkeys(IMAGES, image)
        elif decoding is not False:
            raise ValueError(
                f"decode must be False, True, 'pil', 'torchrgb8' or a mapping from extension to function, "
                f"got {decoding!r}"
            )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """A new dict with the same keys.

        Raises:
            BrokenDataError: A member cannot be decoded; `__cause__` is the decoder's error.
        """
        by_extension = self._by_extension
        if not by_extension:
            return sample
        decoded = {}
        for name, value in sample.items():
            decode = by_extension.get(name) or by_extension.get(name.rpartition(".")[2])
            if decode is not None and isinstance(value, bytes):
                try:
                    value = decode(value)
                except Exception as error:
                    raise BrokenDataError(
                        f"{sample.get('__key__')}.{name} in {sample.get('__url__')} cannot be decoded: "
                        f"{type(error).__name__}: {error}"
                    ) from error
            decoded[name] = value
        return decoded


def _require_pillow(decoding: object) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"decode={decoding!r} needs Pillow: pip install 'aioloader[images]'") from error


def _text(content: bytes) -> str:
    return content.decode("utf-8")


def _npy(content: bytes) -> Any:
    import numpy

    return numpy.load(io.BytesIO(content), allow_pickle=False)


def _pil(content: bytes) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def _torchrgb8(content: bytes) -> Any:
    import torch

    image = _pil(content)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


_BASIC: Final[dict[str, Callable[[bytes], Any]]] = {
    "json": json.loads,
    "jsn": json.loads,
    "npy": _npy,
    **dict.fromkeys(("txt", "text", "transcript"), _text),
    **dict.fromkeys(("cls", "cls2", "class", "count", "index", "inx", "id"), int),
}
