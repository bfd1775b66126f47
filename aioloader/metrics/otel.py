"""The instruments for OpenTelemetry."""

import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter

from aioloader.metrics.families import FAMILIES, Family, quantiles
from aioloader.metrics.totals import Observable, Point, Totals, check_name
from aioloader.version import __version__

__all__ = ["OpenTelemetryInstruments"]

_UNITS = {"seconds": "s", "bytes": "By", "ratio": "1"}


class OpenTelemetryInstruments:
    """Gives the statistics of loaders to OpenTelemetry, taken when a reader collects.

    ```python
    instruments = OpenTelemetryInstruments(loader, "train")  # of the global meter provider
    ```

    Names are those of Prometheus with dots: `aioloader.stage.samples`. What is a summary there is a gauge here, with an
    attribute `quantile`, and two counters, `.sum` and `.count`. Counters go on from epoch to epoch. Instruments keep no
    loader alive; keep this object for as long as they are to tell.

    Args:
        loader: A `Pipeline` or `DataLoader`.
        name: The value of its attribute `loader`.
        meter: Where the instruments are made; None: the meter `aioloader` of the global provider.
    """

    def __init__(self, loader: Observable, name: str = "train", *, meter: Meter | None = None) -> None:
        self._loaders: dict[str, Totals] = {}
        self._lock = threading.Lock()
        self._points: list[tuple[str, Point]] = []
        self._asked: set[str] = set()
        self.add(loader, name)
        meter = get_meter("aioloader", __version__) if meter is None else meter
        for family in FAMILIES:
            self._make(meter, family)

    def add(self, loader: Observable, name: str) -> Self:
        """Give the statistics of another loader, too.

        Raises:
            ValueError: There is one of this name already.
        """
        self._loaders[check_name(name, self._loaders)] = Totals(loader)
        return self

    def _make(self, meter: Meter, family: Family[Any]) -> None:
        name, unit = _dotted(family), _UNITS.get(family.unit, "")
        if family.kind == "counter":
            meter.create_observable_counter(name, [self._callback(name, family, _value)], unit, family.help)
        elif family.kind == "gauge":
            meter.create_observable_gauge(name, [self._callback(name, family, _value)], unit, family.help)
        else:
            meter.create_observable_gauge(name, [self._callback(name, family, _quantiles)], unit, family.help)
            for part, value in (("sum", _value), ("count", _count)):
                of = unit if part == "sum" else ""
                each = f"{name}.{part}"
                meter.create_observable_counter(each, [self._callback(each, family, value)], of, family.help)

    def _callback(
        self, name: str, family: Family[Any], values: Callable[[Point], Iterator[tuple[dict[str, str], float]]]
    ) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for loader, point in self._pull(name):
                if point.family is family:
                    labels = {"loader": loader} | point.labels
                    for more, value in values(point):
                        yield Observation(value, labels | more)

        return observe

    def _pull(self, name: str) -> list[tuple[str, Point]]:
        """The values for one instrument. A reader asks one after the other, and all of one round get the same ones."""
        with self._lock:
            if not self._asked or name in self._asked:
                self._asked = set()
                self._points = [
                    (loader, point) for loader, totals in list(self._loaders.items()) for point in totals.points()
                ]
            self._asked.add(name)
            return self._points


def _dotted(family: Family[Any]) -> str:
    """The name without its unit, which is told apart: `aioloader.stage.busy`, in seconds."""
    name = family.name.removesuffix(f"_{family.unit}") if family.unit else family.name
    for of in ("stage", "actor"):
        name = name.replace(f"_{of}_", f".{of}.", 1)
    return name if "." in name else name.replace("_", ".", 1)


def _value(point: Point) -> Iterator[tuple[dict[str, str], float]]:
    yield {}, point.value


def _count(point: Point) -> Iterator[tuple[dict[str, str], float]]:
    yield {}, point.number


def _quantiles(point: Point) -> Iterator[tuple[dict[str, str], float]]:
    if point.waits is not None:
        for quantile, seconds in quantiles(point.waits):
            yield {"quantile": quantile}, seconds
