"""The command line: `python -m aioloader demo`, `doctor`, `index`, `skipped` and `top`."""

import argparse
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from aioloader.version import __version__

DEMO_NEEDS = {"aiohttp": "aiohttp", "numpy": "numpy", "PIL": "pillow", "psutil": "psutil", "sklearn": "scikit-learn"}
"""Modules that the demo imports, with the names under which they are installed."""

TOP_NEEDS = {"prometheus_client": "prometheus-client", "rich": "rich"}
"""The same for `top`."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code; what is wrong goes to standard error."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "skipped":
            return _skipped(options.files)
        if options.command == "top":
            return _top(options.url, options.interval, once=options.once)
        if options.command == "index":
            return _index(options.archives, check=options.check)
        return _doctor() if options.command == "doctor" else _demo(options)
    except KeyboardInterrupt:
        print("aioloader: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m aioloader", description="An asyncio-native data loader for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"aioloader {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "doctor", help="show versions, event loop, accelerator and limits, and what is missing for what"
    )
    skipped = commands.add_parser(
        "skipped",
        help="sum up reports of skip_errors",
        description="Reads the reports that skip_errors(report=...) has written, all as one, and prints how many "
        "errors of which kinds there were, the first and the last one, and the keys that failed most often.",
    )
    skipped.add_argument("files", nargs="+", metavar="FILE", type=Path, help="a report, one line of JSON per error")
    index = commands.add_parser(
        "index",
        help="write indexes beside tar archives, for TarShards(index=True)",
        description="Reads each tar archive once, checks it as TarShards does, and writes where its samples are to a "
        "file beside it: train-000.tar.index for train-000.tar. An index belongs to one version of its archive.",
    )
    index.add_argument(
        "archives", nargs="+", metavar="ARCHIVE", help="a path, a glob or a URL; 's3://bucket/*.tar' is looked up there"
    )
    index.add_argument("--check", action="store_true", help="write nothing: compare each index with its archive")
    top = commands.add_parser(
        "top",
        help="show what loaders do, live, from their metrics",
        description="Reads the metrics that aioloader.metrics.PrometheusCollector gives, again and again, and shows "
        "what each stage does. Ctrl-C ends it.",
    )
    top.add_argument("url", metavar="URL", help="a port, host:port, or the whole address of the metrics")
    top.add_argument("--interval", type=_number(0.1, 3600), default=1.0, help="seconds between two looks (default: 1)")
    top.add_argument("--once", action="store_true", help="look twice, print it, and end")
    demo = commands.add_parser(
        "demo",
        help="train on images behind a slow server, beside torch's DataLoader",
        description="Trains a small network three times on images behind a slow server: with `async for`, with `for` "
        "and with torch's DataLoader. Then shows what each took.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--epochs", type=_at_least_one, default=3, help="rounds over all images, for each loader")
    demo.add_argument(
        "--latency-ms", type=_number(0, 60_000), default=20.0, help="what an answer waits, in milliseconds"
    )
    demo.add_argument("--batch-size", type=_at_least_one, default=64, help="images in a batch")
    demo.add_argument("--workers", type=_at_least_one, default=2, help="num_workers, the same for both DataLoaders")
    demo.add_argument("--device", default="cpu", help="where to train, for instance cuda")
    demo.add_argument(
        "--min-accuracy", type=_number(0, 1), default=0.95, help="fail when the test accuracy stays below"
    )
    return parser


def _demo(options: argparse.Namespace) -> int:
    missing = [name for module, name in DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        print(f"aioloader: the demo needs {', '.join(missing)}; run: pip install 'aioloader[demo]'", file=sys.stderr)
        return 1
    from aioloader.demo.run import Settings, run

    settings = {name: value for name, value in vars(options).items() if name != "command"}
    return run(Settings(**settings))


def _top(url: str, interval: float, *, once: bool) -> int:
    missing = [name for module, name in TOP_NEEDS.items() if find_spec(module) is None]
    if missing:
        print(f"aioloader: top needs {', '.join(missing)}; run: pip install 'aioloader[top]'", file=sys.stderr)
        return 1
    from aioloader.top import run

    return run(url, interval=interval, once=once)


def _doctor() -> int:
    from aioloader.doctor import collect, describe

    print(describe(collect()))
    return 0


def _skipped(files: list[Path]) -> int:
    from aioloader.insight.skip_report import summary

    try:
        print(summary(files))
    except OSError as error:
        print(f"aioloader: cannot read {str(error.filename)!r}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _index(archives: list[str], *, check: bool) -> int:
    from aioloader.indexer import index_archives

    return index_archives(archives, check=check)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
