"""What looking at a loader costs: `python -m bench.insight`.

The loader of `bench.overhead`, whose op costs nothing, so that all of the time is the loader's own: as it is; with
metrics that are scraped once a second, fifteen times as often as is usual; with a trace of one sample in a hundred.
"""

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from aioloader import Pipeline
from bench._harness import Contender, Epoch, Report, Target, Tick, by_for, parser_for, pick
from bench.overhead import BATCH, pipeline

SCRAPE_SECONDS: Final = 1.0

PLAIN: Final = "not looked at"
METRICS: Final = "metrics, a scrape a second"
TRACED: Final = "a trace of one sample in 100"
TARGETS: Final = [Target(METRICS, "time", PLAIN, 1.01), Target(TRACED, "time", PLAIN, 1.03)]


@contextmanager
def scraped(loader: Pipeline[Any]) -> Iterator[None]:
    """Somebody scrapes meanwhile, in another thread, as an HTTP server does."""
    from prometheus_client import CollectorRegistry, generate_latest

    from aioloader.metrics import PrometheusCollector

    registry, over = CollectorRegistry(), threading.Event()
    registry.register(PrometheusCollector(loader))

    def scrape() -> None:
        while not over.wait(SCRAPE_SECONDS):
            generate_latest(registry)

    thread = threading.Thread(target=scrape)
    thread.start()
    yield
    over.set()
    thread.join()


@contextmanager
def traced(loader: Pipeline[Any]) -> Iterator[None]:
    """One sample in a hundred is written."""
    with tempfile.TemporaryDirectory() as folder, loader.trace(Path(folder) / "trace.json", every=100):
        yield


def watched(samples: int, how: Callable[[Pipeline[Any]], AbstractContextManager[None]]) -> Epoch:
    """Epochs while somebody looks."""
    loader = pipeline(samples)
    plain = by_for(loader)

    def epoch(tick: Tick) -> None:
        with how(loader):
            plain(tick)

    return epoch


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser_for(__doc__).parse_args(arguments)
    samples = pick(options, full=4_000, quick=40, smallest=2) * BATCH
    report = Report("insight", options)
    report.compare(
        f"an async op that does not suspend, batches of {BATCH}",
        [
            Contender(PLAIN, lambda: by_for(pipeline(samples)), samples, limit=True),
            Contender(METRICS, partial(watched, samples, scraped), samples, needs=("prometheus_client",)),
            Contender(TRACED, partial(watched, samples, traced), samples),
        ],
        TARGETS,
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
