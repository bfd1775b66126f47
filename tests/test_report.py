"""The report: one page of HTML that needs nothing else, with what a person looks for."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aioloader import Pipeline, Retry, Stats
from aioloader.insight.report import page
from aioloader.insight.waits_plot import waits_plot
from tests._support import Face, Steps, on_both_faces

VOID = {"meta", "rect", "line", "br", "wbr"}


class Page(HTMLParser):
    """What is on a page; tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)


def failing() -> Pipeline:
    failed: set[int] = set()

    async def load(key: int) -> int:
        if key == 3 and key not in failed:
            failed.add(key)
            raise OSError("busy")
        if key == 5:
            raise KeyError(key)
        return key

    retry = Retry(3, on=OSError, wait_initial=0.0)
    return Pipeline(range(40)).map(load, retry=retry, concurrency=4).skip_errors().batch(4)


@on_both_faces
def test_a_report_says_what_there_is_to_know(face: Face, tmp_path: Path) -> None:
    loader = failing()
    with Steps(loader, face) as steps:
        steps.rest()
    loader.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = Page(text)
    assert "Pipeline(range).map(load).skip_errors().batch(4)" in shown.text
    assert " ".join(loader.explain().split()) in shown.text
    boxes = [attributes for tag, attributes in shown.tags if tag == "li"]
    assert len(boxes) == len(loader.stats().stages) + 1, "and your loop"
    assert "awaited on the loop, 4 places" in shown.text
    assert "1 error, 1 retry, tried again mostly after OSError" in shown.text
    assert "1 skipped" in shown.text
    assert [tag for tag, _ in shown.tags].count("svg") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_needs_no_network() -> None:
    """No script, no link, no image, no address that anything would be loaded from."""
    loader = failing()
    list(loader)
    shown = Page(page(repr(loader), loader.stats(), "nothing", [(0.0, 0.1)]))
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in shown.tags:
        assert not attributes.keys() & {"src", "href", "onload", "onclick"}
    style = page(repr(loader), loader.stats(), "nothing", []).split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|@font-face", style)


def test_before_the_first_batch_there_is_a_page(tmp_path: Path) -> None:
    Pipeline(range(4)).report(tmp_path / "report.html")
    assert "no batch yet" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text


def test_a_report_while_the_epoch_runs(tmp_path: Path) -> None:
    loader = failing()
    with Steps(loader, "for") as steps:
        steps.next()
        loader.report(tmp_path / "report.html")
        assert "epoch 0: 1 batches in" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
        steps.rest()


def test_names_cannot_write_the_page_and_secrets_stay_out() -> None:
    stats = Stats(None, 0.0, None, 0, 0.0, 0.0, 0.0, ())
    text = page("Pipeline(<script>alert(1)</script>)", stats, "https://user:secret@host/ & more", [])
    assert "<script>" not in text
    assert "&amp; more" in text
    assert "secret" not in text


def test_a_place_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    """By the path that was asked for: the half that is renamed has a name that nobody knows."""
    (tmp_path / "a folder.html").mkdir()
    (tmp_path / "a file").touch()
    for path in ("a folder.html", "a file/report.html", "missing/report.html"):
        with pytest.raises(OSError, match=r"\.html") as raised:
            Pipeline(range(4)).report(tmp_path / path)
        assert (raised.value.filename, raised.value.filename2) == (str(tmp_path / path), None)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a file", "a folder.html"]


def test_a_picture_has_a_bounded_size() -> None:
    """However many batches there were; each column shows the longest wait in it."""
    many = [(index * 0.01, 0.001 if index % 1000 else 0.5) for index in range(100_000)]
    drawn = waits_plot(many)
    assert drawn.count("<rect") <= 240
    assert ">100 ms</text>" in drawn
    assert len(drawn) < 30_000
    assert waits_plot([]) == ""
    Page(waits_plot([(0.0, 0.0)]))
