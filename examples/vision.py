"""Train on a folder of images: weighted classes, augmentation, validation, and an accelerator if there is one.

    python examples/vision.py pets --epochs 5

`pets/train/cat/7.jpg` is an image of the class `cat`; `pets/val` has the images that are held back. Rare classes are
drawn as often as common ones. An image is decoded once, and augmented anew whenever it is drawn, by numbers of its own:
the losses are the same for any number of `--workers`. The exit status is 1 unless each image that is held back was
seen once in each epoch. Needs `pip install 'aioloader[images,progress]'`.
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler

from aioloader import Pipeline, sample_rng
from aioloader.sources import Files


def augment(drawn: tuple[int, tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """Mirror every second image, and make each brighter or darker."""
    number, (image, label) = drawn
    rng = sample_rng()  # of this image, in this epoch
    rng.manual_seed(rng.initial_seed() + number)  # and of this draw of it
    image = image.flip(-1) if torch.rand((), generator=rng) < 0.5 else image
    return (image * (0.75 + 0.5 * torch.rand((), generator=rng))).clamp(0, 1), label


def train(folder: Path, epochs: int, workers: int) -> bool:
    """Train a small network; returns whether each image that is held back was seen once in each epoch."""
    files, held_back = Files(folder / "train", read=None), Files(folder / "val", read=None)
    names = [Path(path).parent.name for path in files.paths]
    classes, count = sorted(set(names)), Counter(names)

    def decode(path: str) -> tuple[Tensor, int]:
        with Image.open(path) as image:
            pixels = numpy.array(image.convert("RGB").resize((32, 32)))
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255, classes.index(Path(path).parent.name)

    device = (torch.accelerator.is_available() and torch.accelerator.current_accelerator()) or "cpu"
    torch.manual_seed(0)
    sampler = WeightedRandomSampler([1 / count[name] for name in names], len(names), generator=torch.Generator())
    drawn = Pipeline(files, sampler=sampler).with_seed(0).map(decode, concurrency=workers).cache(memory_bytes=1 << 30)
    loader = drawn.enumerate().map(augment, concurrency=workers).batch(32).to(device)
    check = Pipeline(held_back).map(decode, concurrency=workers).batch(32).to(device)
    model = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1568, len(classes))).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    whole = True
    with loader, check:  # threads and memory stay from one epoch to the next
        for epoch in range(epochs):
            seen: Counter[str] = Counter()
            for images, labels in loader.progress(f"epoch {epoch}"):
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.update(classes[label] for label in labels.tolist())
            with torch.no_grad():
                right = torch.cat([model(images).argmax(1) == labels for images, labels in check])
            print(f"epoch {epoch}: loss {loss.item():.6f}, accuracy {right.float().mean():.2f}, {dict(seen)}")
            whole = whole and len(right) == len(held_back)
    return whole


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4, help="threads that decode and augment")
    options = parser.parse_args()
    raise SystemExit(0 if train(options.folder, options.epochs, options.workers) else 1)
