"""Metrics: what Prometheus scrapes over HTTP and OpenTelemetry's SDK reads, from real clients of both."""

import gc
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.openmetrics import exposition as open_metrics
from prometheus_client.openmetrics import parser as open_metrics_parser
from prometheus_client.parser import text_string_to_metric_families

import aioloader.metrics
from aioloader import DataLoader, Pipeline, Retry
from aioloader.insight.actors import ActorStats
from aioloader.insight.stats import Stats
from aioloader.metrics import OpenTelemetryInstruments, PrometheusCollector
from aioloader.metrics.families import FAMILIES
from aioloader.metrics.otel import _dotted
from tests._support import Face, Steps, on_both_faces

ROOT = Path(__file__).parent.parent


def failing() -> Pipeline:
    """10 batches of 2: one sample fails for good, one only at first."""
    seen: set[int] = set()

    async def load(key: int) -> int:
        if key == 7 and key not in seen:
            seen.add(key)
            raise OSError("busy")
        if key == 4:
            raise KeyError(key)
        return key

    return Pipeline(range(20)).map(load, retry=Retry(3, on=OSError, wait_initial=0.0), concurrency=4).batch(2)


def scraped(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """By name and sorted labels, as they come over HTTP."""
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        text = urlopen(f"http://127.0.0.1:{server.server_port}/metrics").read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    return {
        (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@on_both_faces
def test_prometheus_scrapes_what_statistics_say(face: Face) -> None:
    loader = failing()
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(loader))
    with Steps(loader, face) as steps:
        assert len(steps.outcomes()) == 10
        values = scraped(registry)
    stats = loader.stats()
    stage = ("loader=train", "position=1", "stage=map(load)")
    assert values["aioloader_batches_total", "loader=train"] == 10
    assert values[("aioloader_stage_samples_total", *stage)] == 20
    assert values[("aioloader_stage_errors_total", *stage)] == 1
    assert values[("aioloader_stage_retries_total", *stage)] == 1
    assert values[("aioloader_stage_concurrency", *stage)] == 4
    assert values[("aioloader_stage_busy_seconds_total", *stage)] == pytest.approx(stats.stages[1].busy_seconds)
    assert values["aioloader_batch_wait_seconds", "loader=train", "quantile=0.99"] == pytest.approx(stats.waits.p99)
    assert values["aioloader_batch_wait_seconds_sum", "loader=train"] == pytest.approx(stats.waited_seconds)
    assert values["aioloader_batch_wait_seconds_count", "loader=train"] == 9
    assert ("aioloader_stage_wait_seconds", "loader=train", "position=1", "quantile=0.5", "stage=map(load)") in values


@on_both_faces
def test_counters_go_on_from_epoch_to_epoch(face: Face) -> None:
    """Whether or not somebody scrapes in between."""
    loader = Pipeline(range(8)).map(abs).batch(2)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(loader))
    seen = []
    for scrapes in (True, False, True):
        with Steps(loader, face) as steps:
            steps.rest(3)
            if scrapes:
                seen.append(registry.get_sample_value("aioloader_batches_total", {"loader": "train"}))
            steps.rest()
        assert loader.stats().batches == 4
    assert seen == [3, 11]
    labels = {"loader": "train", "stage": "map(abs)", "position": "1"}
    assert registry.get_sample_value("aioloader_stage_samples_total", labels) == 24
    assert registry.get_sample_value("aioloader_epoch", {"loader": "train"}) == 2


def test_an_epoch_that_is_over_counts_once_while_the_next_begins() -> None:
    """Between the moment in which an epoch is added up and the one in which `stats` tells of the next."""
    loader = Pipeline(range(8)).batch(2)
    collector = PrometheusCollector(loader)
    registry = CollectorRegistry()
    registry.register(collector)
    seen: list[float | None] = []
    loader.before_epochs(lambda _: seen.append(registry.get_sample_value("aioloader_batches_total", {"loader": "a"})))
    collector.add(loader, "a")
    for _ in range(2):
        list(loader)
    loader.before_epochs(lambda _: seen.append(registry.get_sample_value("aioloader_batches_total", {"loader": "a"})))
    list(loader)
    assert seen == [0, 4, 8, 8]


def test_loaders_have_names() -> None:
    train, val = Pipeline(range(8)).batch(2), DataLoader(range(6), batch_size=3)
    list(train), list(val)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(train).add(val, "val"))
    assert registry.get_sample_value("aioloader_batches_total", {"loader": "train"}) == 4
    assert registry.get_sample_value("aioloader_batches_total", {"loader": "val"}) == 2
    with pytest.raises(ValueError, match="each loader needs a name of its own, got 'val'"):
        PrometheusCollector(train, "val").add(val, "val")
    with pytest.raises(ValueError, match="Duplicated timeseries"):  # of the registry: a metric has one block
        registry.register(PrometheusCollector(train))


def test_the_exposition_is_one_that_open_metrics_accepts() -> None:
    """Types, suffixes and quantiles, as its own parser checks them."""
    loader = failing()
    with Steps(loader, "for") as steps:
        steps.outcomes()
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(loader))
    written: Any = open_metrics.generate_latest
    parsed: Any = open_metrics_parser.text_string_to_metric_families
    families = {family.name: family for family in parsed(written(registry).decode())}
    assert families["aioloader_stage_samples"].type == "counter"
    assert families["aioloader_batch_wait_seconds"].type == "summary"
    assert set(families) == {family.name for family in FAMILIES}
    assert all(family.documentation for family in families.values())


def test_a_collector_keeps_no_loader_alive() -> None:
    loader = Pipeline(range(8)).batch(2)
    list(loader)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(loader))
    del loader
    gc.collect()
    assert registry.get_sample_value("aioloader_batches_total", {"loader": "train"}) is None


def test_names_follow_the_rules_of_prometheus() -> None:
    dotted = [_dotted(family) for family in FAMILIES]
    assert len(set(dotted)) == len(dotted), "of OpenTelemetry"
    for family in FAMILIES:
        assert re.fullmatch(r"aioloader(_[a-z]+)+", family.name)
        assert not family.name.endswith("_total"), "the exposition adds it"
        assert family.kind != "counter" or family.name.rpartition("_")[2] not in ("count", "sum")
        assert family.help.endswith(".")


def read(reader: InMemoryMetricReader) -> dict[tuple[str, ...], Any]:
    """By name and sorted attributes."""
    data = reader.get_metrics_data()
    assert data is not None
    return {
        (metric.name, *(f"{key}={value!s}" for key, value in sorted((point.attributes or {}).items()))): (
            getattr(point, "value", None),
            metric.unit,
            type(metric.data).__name__,
        )
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }


@on_both_faces
def test_opentelemetry_reads_what_statistics_say(face: Face) -> None:
    loader = failing()
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instruments = OpenTelemetryInstruments(loader, meter=provider.get_meter("test"))
    for _ in range(2):
        with Steps(loader, face) as steps:
            steps.outcomes()
            values = read(reader)
    stage = ("loader=train", "position=1", "stage=map(load)")
    assert values["aioloader.batches", "loader=train"] == (20, "", "Sum")
    assert values[("aioloader.stage.samples", *stage)][0] == 40
    assert values[("aioloader.stage.errors", *stage)][0] == 2
    assert values[("aioloader.stage.busy", *stage)][1:] == ("s", "Sum")
    assert values[("aioloader.stage.under_way", *stage)] == (0, "", "Gauge")
    assert values["aioloader.batch_wait", "loader=train", "quantile=0.99"][1:] == ("s", "Gauge")
    assert values["aioloader.batch_wait.count", "loader=train"][0] == 18
    provider.shutdown()
    del instruments


def test_one_round_of_a_reader_sees_one_moment() -> None:
    """All instruments tell of the same snapshot; the next round takes another."""
    loader = Pipeline(range(8)).batch(2)
    list(loader)
    asked = 0
    stats = loader.stats

    def counted() -> Any:
        nonlocal asked
        asked += 1
        return stats()

    loader.stats = counted  # type: ignore[method-assign]
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instruments = OpenTelemetryInstruments(loader, meter=provider.get_meter("test"))
    read(reader)
    read(reader)
    assert asked == 2
    provider.shutdown()
    del instruments


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("PrometheusCollector", "prometheus_client", "prometheus"), ("OpenTelemetryInstruments", "opentelemetry", "otel")],
)
def test_what_is_not_installed_is_named(name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded.startswith((module, "aioloader.metrics."))]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [_Without(module), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'aioloader\[{extra}\]'"):
        getattr(aioloader.metrics, name)


class _Without:
    """Nothing of this name can be imported."""

    def __init__(self, module: str) -> None:
        self._module = module

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self._module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    board = json.loads((ROOT / "docs" / "grafana-dashboard.json").read_text(encoding="utf-8"))
    suffixes = {"counter": ("_total",), "gauge": ("",), "summary": ("", "_sum", "_count")}
    known = {family.name + suffix for family in FAMILIES for suffix in suffixes[family.kind]}
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"aioloader_\w+", query)}
    assert asked <= known
    assert len(asked) >= 15
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)


@on_both_faces
def test_metrics_of_actors_have_their_node(face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count for as long as the loader lives, so epochs are not added up."""
    loader = failing()
    actor = ActorStats("Ray worker 0", "10.0.0.7", 17, True, 5, 1.5, 3.0, 2, 1000)
    plain = Pipeline.stats

    def stats(self: Pipeline) -> Stats:
        found = plain(self)
        stages = [replace(stage, actors=(actor,)) if at == 1 else stage for at, stage in enumerate(found.stages)]
        return replace(found, stages=tuple(stages))

    monkeypatch.setattr(Pipeline, "stats", stats)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(loader))
    reader = InMemoryMetricReader()
    instruments = OpenTelemetryInstruments(loader, meter=MeterProvider([reader]).get_meter("m"))
    with Steps(loader, face) as steps:
        steps.outcomes()
    with Steps(loader, face) as steps:
        steps.outcomes()
        values = scraped(registry)
    labels = ("actor=Ray worker 0", "loader=train", "node=10.0.0.7", "position=1", "stage=map(load)")
    assert values[("aioloader_actor_samples_total", *labels)] == 5
    assert values[("aioloader_actor_busy_seconds_total", *labels)] == 1.5
    assert values[("aioloader_actor_received_bytes_total", *labels)] == 1000
    assert values[("aioloader_actor_restarts_total", *labels)] == 2
    assert values[("aioloader_actor_running", *labels)] == 1
    data = json.loads(reader.get_metrics_data().to_json())  # type: ignore[union-attr]
    names = {
        metric["name"]: point["attributes"]
        for resource in data["resource_metrics"]
        for scope in resource["scope_metrics"]
        for metric in scope["metrics"]
        for point in metric["data"]["data_points"]
    }
    assert names["aioloader.actor.samples"] == dict(label.split("=") for label in labels)
    del instruments
