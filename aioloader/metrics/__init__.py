"""Metrics of loaders for Prometheus and OpenTelemetry, taken from `stats()` when somebody asks for them.

Nothing happens per sample. `PrometheusCollector` needs the extra `prometheus`, `OpenTelemetryInstruments` the extra
`otel`; each is imported when it is named.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aioloader.metrics.otel import OpenTelemetryInstruments
    from aioloader.metrics.prometheus import PrometheusCollector

__all__ = ["OpenTelemetryInstruments", "PrometheusCollector"]

_PLACES = {"OpenTelemetryInstruments": ("otel", "otel"), "PrometheusCollector": ("prometheus", "prometheus")}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _PLACES[name]
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("aioloader"):
            raise
        raise ModuleNotFoundError(
            f"aioloader.metrics.{name} needs {error.name}, which is not installed; run: pip install "
            f"'aioloader[{extra}]'",
            name=error.name,
        ) from None
