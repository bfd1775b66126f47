"""The demo: its parts, and all of it in small."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import aioloader.demo.server as server_module
from aioloader.demo.client import SessionPerLoop, fetch
from aioloader.demo.contender import Assignment, ContenderError, Outcome, run_contender
from aioloader.demo.data import Split, decode, encode, read_split, write_digits
from aioloader.demo.memory import tree_memory_bytes
from aioloader.demo.run import Result, Settings, failures, report, run
from aioloader.demo.server import DemoServer
from aioloader.demo.table import render


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    """All digits in a folder, and how they are split."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, write_digits(folder)


@pytest.fixture
def server(written: tuple[Path, Split]) -> Iterator[DemoServer]:
    """The digits behind no latency."""
    with DemoServer(written[0], latency_s=0) as server:
        yield server


def test_every_digit_comes_back_pixel_for_pixel(written: tuple[Path, Split]) -> None:
    """Names, labels and pixels on disk are those of scikit-learn, 0..16 scaled to 0..1."""
    folder, split = written
    digits = load_digits()
    samples = sorted(split.train + split.test)
    assert [label for _, label in samples] == digits.target.tolist()
    pixels = np.stack([decode((folder / name).read_bytes()) for name, _ in samples])
    assert pixels.dtype == np.float32
    assert pixels.shape == (1797, 1, 8, 8)
    assert np.array_equal((pixels[:, 0] * 16).round(), digits.images)


def test_both_ends_of_the_range_are_exact() -> None:
    """0 becomes 0 and 16 becomes 1."""
    pixels = np.zeros((8, 8))
    pixels[0, 0] = 16
    assert decode(encode(pixels))[0, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_the_split_is_disjoint_and_read_as_it_was_written(written: tuple[Path, Split]) -> None:
    """A fifth tests, and no image is on both sides."""
    folder, split = written
    assert (len(split.train), len(split.test)) == (1437, 360)
    assert not set(split.train) & set(split.test)
    assert read_split(folder) == split


def test_the_server_sends_the_files_and_counts_them(written: tuple[Path, Split], server: DemoServer) -> None:
    """What comes over HTTP is the file; the connection is kept for the next one."""
    folder, split = written
    connection = HTTPConnection(server.url.removeprefix("http://"))
    for name, _ in split.test[:3]:
        connection.request("GET", f"/{name}")
        response = connection.getresponse()
        assert response.getheader("Content-Type") == "image/png"
        assert response.read() == (folder / name).read_bytes()
        assert connection.sock is not None
    connection.close()
    assert server.served() == 3


def test_what_is_not_an_image_of_the_folder_is_not_served(server: DemoServer) -> None:
    """The list of labels lies beside the images, and stays there."""
    connection = HTTPConnection(server.url.removeprefix("http://"))
    connection.request("GET", "/split.json")
    assert connection.getresponse().status == 404
    connection.close()
    assert server.served() == 0


def test_the_server_ends_with_its_standard_input(written: tuple[Path, Split]) -> None:
    """A parent that dies closes the pipe, and so ends the server."""
    command = [sys.executable, "-P", server_module.__file__, str(written[0]), "--latency-s", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) > 0
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_server_that_cannot_start_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its own error stands above, its exit code in the exception."""
    with pytest.raises(RuntimeError, match="ended with exit code 2 before it listened"):
        DemoServer(tmp_path, latency_s="soon").__enter__()  # type: ignore[arg-type]
    assert "invalid float value: 'soon'" in capfd.readouterr().err


def test_each_loop_has_its_session_until_it_closes(written: tuple[Path, Split], server: DemoServer) -> None:
    """Tasks of one loop share a session; the loop's end closes it; the next loop gets another."""
    sessions = SessionPerLoop(connections=4)
    name = written[1].test[0][0]

    async def fetch_twice() -> aiohttp.ClientSession:
        session, same = await asyncio.gather(sessions.get(), sessions.get())
        assert session is same
        await asyncio.gather(*(fetch(session, f"{server.url}/{name}") for _ in range(2)))
        return session

    first, second = asyncio.run(fetch_twice()), asyncio.run(fetch_twice())
    assert first is not second
    assert first.closed
    assert second.closed


def test_the_memory_of_a_tree_is_more_than_that_of_its_root() -> None:
    """Descendants count; a process that has ended counts nothing."""
    grandchild = "import sys; block = b'x' * 50_000_000; print(flush=True); sys.stdin.read()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert tree_memory_bytes(process.pid) > 50_000_000
        process.communicate()
    assert tree_memory_bytes(process.pid) == 0


def test_a_contender_that_fails_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its traceback reaches the terminal; the exception names it."""
    task = Assignment(
        "for", "nobody", str(tmp_path), "", epochs=1, batch_size=1, device="cpu", workers=1, connections=1
    )
    with pytest.raises(ContenderError, match="'nobody' must end with exit code 0, got 1"):
        run_contender(task)
    assert "split.json" in capfd.readouterr().err


def test_the_table_aligns_names_left_and_numbers_right() -> None:
    """Every column is as wide as its widest cell."""
    assert render(["", "rate"], [["slow", "1"], ["faster", "10000"]]).splitlines() == [
        "         rate",
        "------  -----",
        "slow        1",
        "faster  10000",
    ]


def _result(*, accuracy: float = 0.9751, requests: int = 4311) -> Result:
    outcome = Outcome(1.234, samples_per_s=88.8, waited_share=0.991, accuracy=accuracy, explanation="Slow.")
    return Result("torch", outcome, peak_bytes=284_000_000, requests=requests)


def test_the_report_shows_what_was_measured_and_nothing_else() -> None:
    """Each figure of a row is the outcome's, in the unit of its column."""
    text = report(Settings(), [_result()], images=1437)
    row = next(line for line in text.splitlines() if line.startswith("torch "))
    assert re.split(r"  +", row) == ["torch", "1.23 s", "89", "99%", "284 MB", "0.975", "4311"]
    assert "torch: Slow." in text


def test_a_row_that_kept_its_promises_fails_nothing() -> None:
    """Enough accuracy, and every image fetched once per epoch."""
    assert failures(Settings(), [_result()], images=1437) == []


def test_too_low_an_accuracy_fails() -> None:
    """The message has the rule, the value and the way out."""
    (failure,) = failures(Settings(), [_result(accuracy=0.9)], images=1437)
    assert failure == "the test accuracy must be at least 0.95, got 0.900 with 'torch'; more --epochs raise it"


def test_an_image_that_was_not_fetched_fails() -> None:
    """So a table cannot be made from fewer images than it says."""
    (failure,) = failures(Settings(), [_result(requests=4310)], images=1437)
    assert failure.startswith("each image must be fetched once per epoch, 4311 requests, got 4310 with 'torch'")


@pytest.mark.slow
def test_all_of_it_in_small(capfd: pytest.CaptureFixture[str]) -> None:
    """Three contenders fetch every image over HTTP, learn something, and stand in the table."""
    assert run(Settings(epochs=1, latency_ms=1, min_accuracy=0.5)) == 0
    shown = capfd.readouterr()
    rows = [line for line in shown.out.splitlines() if line.endswith("  1437")]
    assert [re.split(r"  +", row)[0] for row in rows] == ["aioloader, async for", "aioloader, for", "torch, 2 workers"]
    assert "aioloader, for, epoch 1/1: 23/23 batches" in shown.err
