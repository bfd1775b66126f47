"""How fast JPEGs become batches of 224 x 224: `python -m bench.decode`.

Pictures of 500 x 375 (made by Pillow: gradients and noise, 40 to 60 kB), decoded and resized in two workers, by Pillow
and by simplejpeg. Both release the GIL, so that threads do what processes do; the limit is two cores.
"""

import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from torch import Tensor

from aioloader import DataLoader, Pipeline
from bench._harness import PER_SECOND, Contender, Epoch, Report, Target, Tick, by_for, parser_for, pick
from bench._rivals import spdl_loader

BATCH: Final = 32
DISTINCT: Final = 16
SIZE: Final = (500, 375)

LOADER: Final = "aioloader, DataLoader, 2 workers"
PIPELINE: Final = "aioloader, Pipeline, 2 threads"

Decode = Callable[[bytes], Tensor]


def pictures() -> list[bytes]:
    """JPEGs, the same in every process."""
    random = np.random.default_rng(0)
    across = np.linspace(0, 255, SIZE[0])[None, :, None]
    down = np.linspace(0, 255, SIZE[1])[:, None, None]
    found = []
    for _ in range(DISTINCT):
        noise = random.normal(0, 12, (SIZE[1], SIZE[0], 3))
        pixels = (across * random.random(3) + down * random.random(3)) / 2 + noise
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
        found.append(file.getvalue())
    return found


def with_pillow(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        small = image.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(small).copy())


def with_simplejpeg(content: bytes) -> Tensor:
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(content, fastdct=True, fastupsample=True)
    small = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(small).copy())


class Decoded(torch.utils.data.Dataset[Tensor]):
    """So many samples, of fewer pictures."""

    def __init__(self, samples: int, decode: Decode) -> None:
        self._samples = samples
        self._decode = decode
        self._pictures = pictures()

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        return self._decode(self._pictures[index % DISTINCT])


def bare(samples: int, decode: Decode) -> Epoch:
    dataset = Decoded(samples, decode)
    torch.set_num_threads(1)

    def epoch(tick: Tick) -> None:
        for start in range(0, samples, BATCH):
            torch.stack([dataset[index] for index in range(start, start + BATCH)])
            tick(BATCH)

    return epoch


def by_loader(samples: int, decode: Decode) -> Epoch:
    return by_for(DataLoader(Decoded(samples, decode), BATCH, num_workers=2))


def by_pipeline(samples: int, decode: Decode) -> Epoch:
    contents = pictures()
    source = [contents[index % DISTINCT] for index in range(samples)]
    return by_for(Pipeline(source).map(decode, concurrency=2).batch(BATCH))


def by_torch(samples: int, decode: Decode) -> Epoch:
    dataset = Decoded(samples, decode)
    return by_for(torch.utils.data.DataLoader(dataset, BATCH, num_workers=2, persistent_workers=True))


def by_spdl(samples: int, decode: Decode) -> Epoch:
    dataset = Decoded(samples, decode)

    def load(indices: list[int]) -> Tensor:
        return torch.stack([dataset[index] for index in indices])

    def describe(builder: Any) -> Any:
        return builder.add_source(range(samples)).aggregate(BATCH).pipe(load, concurrency=2, output_order="input")

    return by_for(spdl_loader(describe, threads=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=12, quick=3, smallest=2) * BATCH
    report = Report("decode", options)
    for name, decode, needs in (("Pillow", with_pillow, ()), ("simplejpeg", with_simplejpeg, ("simplejpeg",))):
        torch_name, spdl_name = "torch, 2 workers", "SPDL, per batch, 2 threads"
        report.compare(
            f"JPEG to 224 x 224 by {name}, batches of {BATCH}",
            [
                Contender("one thread", partial(bare, samples, decode), samples, limit=True, needs=needs),
                Contender(LOADER, partial(by_loader, samples, decode), samples, needs=needs),
                Contender(PIPELINE, partial(by_pipeline, samples, decode), samples, needs=needs),
                Contender(spdl_name, partial(by_spdl, samples, decode), samples, needs=("spdl", *needs)),
                Contender(torch_name, partial(by_torch, samples, decode), samples, needs=needs),
            ],
            [Target(LOADER, "speed", rival, 1.1) for rival in (torch_name, spdl_name)],
            unit=PER_SECOND,
            rounds=pick(options, full=5, quick=1, smallest=1),
            apart=True,
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
