"""The collector for `prometheus_client`."""

from collections.abc import Iterable, Iterator
from typing import Any, Self

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from aioloader.metrics.families import FAMILIES, Family, quantiles
from aioloader.metrics.totals import Observable, Point, Totals, check_name

__all__ = ["PrometheusCollector"]


class PrometheusCollector(Collector):
    """Gives the statistics of loaders to Prometheus, taken when it scrapes.

    ```python
    from prometheus_client import REGISTRY, start_http_server

    REGISTRY.register(PrometheusCollector(loader, "train").add(validation, "val"))
    start_http_server(9108)
    ```

    Counters go on from epoch to epoch. A collector keeps no loader alive, and works from any thread. Register one
    collector for all loaders of a process: a metric may have one block in an exposition.

    Args:
        loader: A `Pipeline` or `DataLoader`.
        name: The value of its label `loader`.
    """

    def __init__(self, loader: Observable, name: str = "train") -> None:
        self._loaders: dict[str, Totals] = {}
        self.add(loader, name)

    def add(self, loader: Observable, name: str) -> Self:
        """Give the statistics of another loader, too.

        Raises:
            ValueError: There is one of this name already.
        """
        self._loaders[check_name(name, self._loaders)] = Totals(loader)
        return self

    def describe(self) -> Iterable[Metric]:
        """The names, so that a registry refuses a second collector."""
        return [_metric(family) for family in FAMILIES]

    def collect(self) -> Iterator[Metric]:
        """The values, as they are now."""
        metrics = {family.name: _metric(family) for family in FAMILIES}
        for name, totals in list(self._loaders.items()):
            for point in totals.points():
                _add(metrics[point.family.name], name, point)
        yield from metrics.values()


def _metric(family: Family[Any]) -> Metric:
    return Metric(family.name, family.help, family.kind)


def _add(metric: Metric, loader: str, point: Point) -> None:
    labels = {"loader": loader} | point.labels
    if point.waits is None:
        suffix = "_total" if point.family.kind == "counter" else ""
        metric.add_sample(metric.name + suffix, labels, point.value)
        return
    for quantile, seconds in quantiles(point.waits):
        metric.add_sample(metric.name, labels | {"quantile": quantile}, seconds)
    metric.add_sample(f"{metric.name}_sum", labels, point.value)
    metric.add_sample(f"{metric.name}_count", labels, point.number)
