"""`python -m aioloader top`: a live view from a real exposition, in narrow and wide terminals."""

import sys
from collections.abc import Iterator
from io import StringIO
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from rich.console import Console

import aioloader.top as top
from aioloader import Pipeline
from aioloader.__main__ import main
from aioloader.metrics import PrometheusCollector
from tests._support import Steps


async def fetch_an_image_from_a_store_that_is_far_away(key: int) -> int:
    if key == 3:
        raise OSError("gone")
    return key


def loaded() -> Pipeline:
    return Pipeline(range(40)).map(fetch_an_image_from_a_store_that_is_far_away, concurrency=32).skip_errors().batch(4)


def exposition(loader: Pipeline, name: str = "train") -> str:
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(loader, name))
    return generate_latest(registry).decode()


def drawn(rendered: Any, width: int) -> list[str]:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(rendered)
    return capture.get().splitlines()


@pytest.mark.parametrize("width", [80, 140])
def test_what_is_shown_fits_and_has_rates(width: int) -> None:
    loader = loaded()
    with Steps(loader, "for") as steps:
        steps.rest(2)
        before = top.parse(exposition(loader))
        steps.rest()
        now = top.parse(exposition(loader))
    lines = drawn(top.view(before, now, 2.0, width), width)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("train  epoch 0  4 batches/s  waits ")
    header, *rows = lines[1:6]
    assert header.split()[:3] == ["stage", "at", "work"]
    assert ("p99 wait" in header) is (width == 140)
    assert "failed" in header
    (row,) = (row for row in rows if row.startswith("map(fetch_an_image"))
    assert "0/32" in row
    assert row.split()[-1] == "1", "one has failed"
    assert not any("…" in row for row in rows[2:]), "only a long name is cut"


def test_a_long_name_of_a_loader_is_cut_and_no_figure_is() -> None:
    """So that the line is one line."""
    loader = loaded()
    with Steps(loader, "for") as steps:
        steps.rest()
    name = "validation on a set with a name that is much too long for it"
    now = top.parse(exposition(loader, name))
    first, header, *_ = drawn(top.view({}, now, 0.0, 80), 80)
    assert first.startswith("validation on")
    assert "…  epoch 0" in first
    assert "p99 " in first
    assert header.startswith("stage")


def test_names_of_stages_have_place() -> None:
    """On 100 columns no less than on 80."""
    loader = loaded()
    with Steps(loader, "for") as steps:
        steps.rest()
    now = top.parse(exposition(loader))
    longest = [
        max(len(line.split("  ")[0]) for line in drawn(top.view({}, now, 0.0, width), width)[2:]) for width in (80, 100)
    ]
    assert longest[1] >= longest[0]


def test_the_first_look_has_no_rates() -> None:
    loader = loaded()
    list(loader)
    lines = drawn(top.view({}, top.parse(exposition(loader)), 0.0, 140), 140)
    assert "batches/s" in lines[0]
    assert "%" not in "".join(lines)


def test_a_process_that_began_anew_has_no_rates_either() -> None:
    """Its counters are less than they were."""
    long, short = loaded(), loaded()
    list(long)
    with Steps(short, "for") as steps:
        steps.next()
        lines = drawn(top.view(top.parse(exposition(long)), top.parse(exposition(short)), 1.0, 140), 140)
    assert "-" not in lines[0]


@pytest.mark.parametrize(
    ("url", "means"),
    [
        ("9108", "http://localhost:9108/metrics"),
        ("host:9108", "http://host:9108/metrics"),
        ("https://host/", "https://host/metrics"),
        ("http://host/a/b", "http://host/a/b"),
    ],
)
def test_addresses_may_be_short(url: str, means: str) -> None:
    assert top.address(url) == means
    with pytest.raises(ValueError, match="http or https"):
        top.address("ftp://host")


@pytest.fixture
def port() -> Iterator[int]:
    loader = loaded()
    list(loader)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(loader))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


def test_once_prints_and_ends(port: int, capsys: Any) -> None:
    assert main(["top", str(port), "--once", "--interval", "0.1"]) == 0
    assert capsys.readouterr().out.startswith("train  epoch 0")


def test_what_cannot_be_read_is_said(capsys: Any) -> None:
    registry = CollectorRegistry()
    server, thread = start_http_server(0, "127.0.0.1", registry)
    url = f"127.0.0.1:{server.server_port}"
    assert main(["top", url, "--once"]) == 1
    assert "register a PrometheusCollector" in capsys.readouterr().err
    server.shutdown()
    server.server_close()
    thread.join()
    assert main(["top", url, "--once"]) == 1
    assert "Connection refused" in capsys.readouterr().err
    assert main(["top", "ftp://host"]) == 1
    assert "http or https" in capsys.readouterr().err


def test_a_live_view_outlives_a_restart(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that fail are told, and the last view stays."""
    looks = 0
    scrape = top._scrape

    def sometimes(url: str) -> Any:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise OSError("connection refused")
        if looks == 4:
            raise KeyboardInterrupt
        return scrape(url)

    monkeypatch.setattr(top, "_scrape", sometimes)
    monkeypatch.setattr(top, "sleep", lambda _: None)
    shown = StringIO()
    console = Console(width=100, force_terminal=True, color_system=None, file=shown)
    with pytest.raises(KeyboardInterrupt):
        top.run(str(port), interval=1.0, once=False, console=console)
    assert "no answer for 1.0 s: connection refused" in shown.getvalue()


def test_without_rich_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("aioloader.__main__.find_spec", lambda name: None if name == "rich" else sys)
    assert main(["top", "9108"]) == 1
    assert "top needs rich; run: pip install 'aioloader[top]'" in capsys.readouterr().err
