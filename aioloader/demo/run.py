"""The demo from start to end: write the images, start the server, run each contender, show the table."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from aioloader.demo.contender import Assignment, ContenderError, Loader, Outcome, run_contender
from aioloader.demo.data import write_digits
from aioloader.demo.memory import MEANING as MEMORY_MEANING
from aioloader.demo.server import DemoServer
from aioloader.demo.table import render

WIDTH = 80
"""Columns of what is shown."""

CONNECTIONS = 128
"""How many images are fetched at once by asynchronous clients."""


@dataclass(frozen=True)
class Settings:
    """The options of `python -m aioloader demo`."""

    epochs: int = 3
    latency_ms: float = 20.0
    batch_size: int = 64
    workers: int = 2
    device: str = "cpu"
    min_accuracy: float = 0.95


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    name: str
    outcome: Outcome
    peak_bytes: int
    requests: int


def run(settings: Settings) -> int:
    """Run the demo, with its progress on standard error and its table on standard output; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="aioloader-demo-") as folder:
        split = write_digits(Path(folder))
        _tell(
            f"{len(split.train)} images to train on and {len(split.test)} to test on, a PNG file each; "
            f"the server answers after {settings.latency_ms:g} ms"
        )
        contenders: list[tuple[Loader, str]] = [
            ("async for", "aioloader, async for"),
            ("for", "aioloader, for"),
            ("torch", f"torch, {settings.workers} workers"),
        ]
        results = []
        with DemoServer(Path(folder), settings.latency_ms / 1000) as server:
            for loader, name in contenders:
                task = Assignment(
                    loader=loader,
                    name=name,
                    folder=folder,
                    url=server.url,
                    epochs=settings.epochs,
                    batch_size=settings.batch_size,
                    device=settings.device,
                    workers=settings.workers,
                    connections=CONNECTIONS,
                )
                served_before = server.served()
                try:
                    outcome, peak_bytes = run_contender(task)
                except ContenderError as error:
                    _tell(f"aioloader demo: {error}")
                    return 1
                results.append(Result(name, outcome, peak_bytes, server.served() - served_before))
    _tell("")
    print(report(settings, results, images=len(split.train)))
    failed = failures(settings, results, images=len(split.train))
    for failure in failed:
        _tell(f"aioloader demo: {failure}")
    return 1 if failed else 0


def report(settings: Settings, results: list[Result], *, images: int) -> str:
    """Return the table, the meaning of its columns, and what `explain()` says of each loader."""
    header = ["", "first", "samples/s", "waited", "memory", "accuracy", "requests"]
    rows = [
        [
            result.name,
            f"{result.outcome.first_batch_s:.2f} s",
            f"{result.outcome.samples_per_s:.0f}",
            f"{result.outcome.waited_share:.0%}",
            f"{result.peak_bytes / 1e6:.0f} MB",
            f"{result.outcome.accuracy:.3f}",
            str(result.requests),
        ]
        for result in results
    ]
    notes = [
        "first: from the start of the first epoch to its first batch, worker start included, imports not.",
        "samples/s: over whole epochs, training included.",
        "waited: the fraction of that time in which the training loop waited for a batch.",
        f"memory: at its peak, {MEMORY_MEANING}; each loader ran in a separate process, torch and network included.",
        f"accuracy: on images that were not trained on; at least {settings.min_accuracy:g} is expected.",
        f"requests: images that the server sent for that row; {settings.epochs} epochs of {images} images "
        f"are {settings.epochs * images}.",
        f"aioloader sends up to {CONNECTIONS} requests at once from one process. A torch worker fetches one image at a "
        "time; --workers sets how many there are.",
    ]
    explained = [result for result in results if result.outcome.explanation]
    parts = [
        render(header, rows),
        "\n".join(fill(note, WIDTH, initial_indent="- ", subsequent_indent="  ") for note in notes),
        *(fill(f"{result.name}: {result.outcome.explanation}", WIDTH, break_on_hyphens=False) for result in explained),
    ]
    return "\n\n".join(parts)


def failures(settings: Settings, results: list[Result], *, images: int) -> list[str]:
    """Return a line for each broken promise: every image is fetched once per epoch, and the network learns."""
    requests = settings.epochs * images
    inaccurate = [
        f"the test accuracy must be at least {settings.min_accuracy:g}, got {result.outcome.accuracy:.3f} with "
        f"{result.name!r}; more --epochs raise it"
        for result in results
        if result.outcome.accuracy < settings.min_accuracy
    ]
    miscounted = [
        f"each image must be fetched once per epoch, {requests} requests, got {result.requests} with {result.name!r}; "
        "please report this as a bug"
        for result in results
        if result.requests != requests
    ]
    return inaccurate + miscounted


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
