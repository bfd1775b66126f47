"""The four programs that somebody begins with: images, text, a service, a REST API; as their users run them."""

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
import torch

from aioloader import Pipeline
from aioloader.testing import FaultPlan, Gate
from tests._servers import HttpServer
from tests._support import DEADLINE, Started
from tests.test_examples import EXAMPLES, example, one_thread

__all__ = ["one_thread"]  # a fixture

PROGRAMS = ("finetune", "online", "rest_api", "vision")
BY_HAND = re.compile(
    r"sleep|Semaphore|while True|default_collate|pad_sequence|Counter\(.*skip|generate_latest|time\(\)"
)
"""What the loader does for them: waits, limits, packing, exporters."""


def run(name: str, *arguments: object) -> list[str]:
    """The lines that a program prints, which ends with 0 and says nothing to its standard error but progress."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * DEADLINE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    return done.stdout.splitlines()


@contextmanager
def started(command: Sequence[str]) -> Iterator["subprocess.Popen[str]"]:
    """A program that runs meanwhile, and writes its lines at once."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(stream: IO[str] | None) -> str:
    """The next line, within a deadline."""
    assert stream is not None
    line: str = Started(stream.readline).outcome()
    return line


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_fits_a_page_and_leaves_the_work_to_the_loader(name: str) -> None:
    """Under 80 lines; no retry, limiter, packer, exporter or skip list of its own."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert not BY_HAND.findall(text)


# -- images ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG and JPEG files: 40 cats and 8 dogs, and 7 and 5 that are held back."""
    image_module = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("pets")
    noise = random.Random(0)
    for part, counts in (("train", {"cat": 40, "dog": 8}), ("val", {"cat": 7, "dog": 5})):
        for name, count in counts.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                image = image_module.new("RGB", (48, 40), (200, 40, 40) if name == "cat" else (40, 40, 200))
                image.paste((noise.randrange(256),) * 3, (0, 0, 10 + number % 20, 12))
                image.save(folder / part / name / f"{number:02}.{'png' if number % 2 else 'jpg'}")
    return folder


def test_vision_trains_and_does_not_depend_on_its_workers(pets: Path) -> None:
    """Rare images are drawn as often as common ones, and each of those that are held back is seen."""
    one, several = (run("vision", pets, "--epochs", 3, "--workers", workers) for workers in (1, 6))
    assert one == several
    assert [line.partition(",")[0].rpartition(" ")[0] for line in one] == [f"epoch {n}: loss" for n in range(3)]
    assert "accuracy 1.00" in one[-1]
    drawn: Counter[str] = Counter()
    for line in one:
        drawn.update(json.loads(line[line.index("{") :].replace("'", '"')))
    assert drawn.total() == 3 * 48
    assert drawn["dog"] > 3 * 48 / 3  # a sixth of the images


def test_vision_augments_by_numbers_of_the_image(
    pets: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever else draws from torch's generator changes nothing."""
    image_module = pytest.importorskip("PIL.Image")
    assert example("vision")["train"](pets, 1, 2)
    alone = capsys.readouterr().out
    opened = image_module.open

    def open_and_draw(path: str) -> Any:
        torch.rand(())
        return opened(path)

    monkeypatch.setattr(image_module, "open", open_and_draw)
    assert example("vision")["train"](pets, 1, 2)
    assert capsys.readouterr().out == alone


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def chats(tmp_path: Path) -> str:
    """Ninety questions in three files."""
    rng = random.Random(0)
    for part in range(3):
        lines = []
        for number in range(30):
            question = f"What is {part} and {number}? " * rng.randint(1, 3)
            lines.append(json.dumps({"question": question, "answer": f"It is {part + number}." * rng.randint(1, 9)}))
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{tmp_path}/*.jsonl"


def test_finetune_learns_from_every_line_in_every_epoch(chats: str) -> None:
    """In rows that are full."""
    lines = run("finetune", chats, "--epochs", 3)
    losses = [float(line.split()[3].rstrip(",")) for line in lines]
    assert losses == sorted(losses, reverse=True)
    for line in lines:
        documents, rows = int(line.split()[4]), int(line.split()[-2])
        assert documents == 90
        assert rows < 60


@pytest.mark.parametrize("program", ["vision", "finetune"])
def test_what_is_not_seen_is_told(
    program: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks of the programs can fail."""
    batch = Pipeline.batch
    monkeypatch.setattr(Pipeline, "batch", lambda self, size: batch(self.take(10), size))
    data = request.getfixturevalue("pets" if program == "vision" else "chats")
    assert example(program)["train"](data, *([1, 1] if program == "vision" else [1])) is False


# -- a service ---------------------------------------------------------------------------------------------------------

ONLINE = [sys.executable, "-u", str(EXAMPLES / "online.py"), "--port", "0"]


def url_of(process: "subprocess.Popen[str]") -> str:
    """Where a service listens."""
    found = re.search(r"http://[\d.:]+", line_of(process.stdout))
    assert found is not None
    return found[0]


def posted(url: str, sample: object) -> int:
    """The status of the answer to a post."""
    try:
        with urlopen(Request(f"{url}/samples", json.dumps(sample).encode()), timeout=DEADLINE) as answer:
            status: int = answer.status
            return status
    except HTTPError as error:
        with error:
            return error.code


class HalfAPost:
    """A client that has sent the header of a post, and not yet its body."""

    def __init__(self, url: str, number: int) -> None:
        self._body = json.dumps({"id": number, "x": [1, 2], "y": 3}).encode()
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=DEADLINE)
        self._connection.putrequest("POST", "/samples")
        self._connection.putheader("Content-Type", "application/json")
        self._connection.putheader("Content-Length", str(len(self._body)))
        self._connection.endheaders()

    def finish(self) -> int:
        """Send the rest; the status of the answer, 0 if there is none."""
        try:
            self._connection.send(self._body)
            with self._connection.getresponse() as answer:
                return answer.status
        except ConnectionError:
            return 0
        finally:
            self._connection.close()


def test_online_trains_on_what_it_accepts_and_refuses_what_it_has_no_place_for() -> None:
    """By real posts: 429 while all places are reserved, 400 for what is no sample, and an end by SIGTERM."""
    pytest.importorskip("prometheus_client.aiohttp")
    with started(ONLINE) as process:
        url = url_of(process)
        halves = [HalfAPost(url, number) for number in range(64)]
        accepted = 0
        while (status := posted(url, {"id": 100 + accepted, "x": [0.5, 1.0], "y": 1.0})) != 429:
            assert status == 202  # some of the 64 have not been read yet
            accepted += 1
        assert [half.finish() for half in halves[:60]] == [202] * 60
        no_samples: list[object] = [{}, {"id": 10**30, "x": [1, 2], "y": 3}, {"id": 1, "x": [1], "y": 2}, [], "x"]
        for wrong in no_samples:
            while (status := posted(url, wrong)) == 429:  # training is behind
                pass
            assert status == 400
        with urlopen(f"{url}/metrics", timeout=DEADLINE) as answer:
            assert 'aioloader_batches_total{loader="online"}' in answer.read().decode()
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, errors) == (0, "")
    assert [half.finish() for half in halves[60:]] == [0] * 4  # it did not wait for them, nor accept them
    assert said.splitlines()[-1] == f"trained on {60 + accepted} of {60 + accepted} accepted samples"


def test_online_ends_when_training_fails() -> None:
    """With another exit status than 0, instead of answering 429 for ever."""
    pytest.importorskip("prometheus_client.aiohttp")
    broken = """if True:
        import runpy, sys, torch
        def step(self):
            raise RuntimeError("the loss is lost")
        torch.optim.SGD.step = step
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    with started([*ONLINE[:2], "-c", broken, *ONLINE[2:]]) as process:
        url = url_of(process)
        assert posted(url, {"id": 1, "x": [0.5, 1.0], "y": 1.0}) == 202
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "the loss is lost" in errors


# -- a REST API --------------------------------------------------------------------------------------------------------

ITEMS, BATCH = 96, 16
ORDER = list(Pipeline(range(ITEMS)).shuffle(seed=0))
MISSING = (ORDER[7], ORDER[70])


def faults() -> FaultPlan:
    """A tenth of the first calls is throttled, and some fail in other ways; the second ones work."""
    return FaultPlan(seed=1, throttled=0.1, unavailable=0.05, reset=0.05, truncated=0.05, attempts=1)


@pytest.fixture
def api(http_server: HttpServer) -> HttpServer:
    """A service with items, two of which are missing."""
    return with_items(http_server)


def with_items(server: HttpServer) -> HttpServer:
    """The same, made of `server`."""
    server.media_type = "application/json"
    for item in range(ITEMS):
        if item not in MISSING:
            server.files[f"items/{item}"] = json.dumps({"x": [item / ITEMS, 1.0], "y": 2 * item / ITEMS}).encode()
    server.plan = faults()
    return server


def asked(server: HttpServer) -> Counter[str]:
    """How often each path was asked for, since the last look."""
    found = Counter(path for _, path, _ in server.requests)
    server.requests.clear()
    return found


@pytest.fixture(scope="module")
def whole(running_http_server: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Counter[str]]:
    """What a run of two epochs prints that nobody kills, and what it asks for."""
    running_http_server.reset()
    server = with_items(running_http_server)
    said = run("rest_api", server.url, tmp_path_factory.mktemp("whole"), "--items", ITEMS)
    assert server.at_once <= 32
    return said, asked(server)


def killed(api: HttpServer, folder: Path, steps: int) -> list[str]:
    """What a run prints that is killed after so many steps, or a little later."""
    command = [sys.executable, str(EXAMPLES / "rest_api.py"), api.url, str(folder), "--items", str(ITEMS)]
    with started(command) as process:
        said = [line_of(process.stdout).rstrip() for _ in range(steps)]
        process.send_signal(signal.SIGKILL)
        assert process.stdout is not None
        said += process.stdout.read().splitlines()
        assert process.wait(DEADLINE) == -signal.SIGKILL
    return said


@pytest.mark.slow
def test_rest_api_asks_for_each_item_once(whole: tuple[list[str], Counter[str]]) -> None:
    """In two epochs; more often for what is missing, and for what failed at first."""
    said, requests = whole
    assert len(said) == 2 * 6 + 1
    assert said[-1] == f"{ITEMS - 2} items, each 2 times; 2 are missing"
    failed = [item for item in range(ITEMS) if faults().fault(f"items/{item}") is not None]
    assert len(failed) > 10
    expected = {item: (2 if item in MISSING else 1) + (item in failed) for item in range(ITEMS)}
    assert requests == {f"items/{item}": count for item, count in expected.items()}


@pytest.mark.slow
def test_rest_api_goes_on_after_a_crash_in_which_it_waits_for_answers(
    api: HttpServer, tmp_path: Path, whole: tuple[list[str], Counter[str]]
) -> None:
    """With the steps that were to come; what it had trained on is not asked for again."""
    api.gate = Gate()
    api.gate.open(*(f"items/{item}" for item in ORDER[: 3 * BATCH]))  # 46 items, and none after them
    before = killed(api, tmp_path, 2)
    assert before == whole[0][:2]
    asked(api)
    api.gate.open_all()
    after = run("rest_api", api.url, tmp_path, "--items", ITEMS)
    assert after in (whole[0][1:], whole[0][2:])  # the second step may not have been saved
    trained = {f"items/{item}" for item in ORDER[: 2 * BATCH] if item not in MISSING}
    assert not trained & set(asked(api))


@pytest.mark.slow
def test_rest_api_may_be_killed_at_any_moment(
    api: HttpServer, tmp_path: Path, whole: tuple[list[str], Counter[str]]
) -> None:
    """In the middle of whatever it does after a step, in the second epoch."""
    before = killed(api, tmp_path, 8)
    after = run("rest_api", api.url, tmp_path, "--items", ITEMS)
    again = len(before) + len(after) - len(whole[0])
    assert again in (0, 1)  # the last step was printed, and perhaps not saved
    assert before[: len(before) - again] + after == whole[0]


def test_rest_api_tells_what_is_neither_trained_on_nor_missing(
    api: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its check can fail."""
    monkeypatch.setattr(Pipeline, "cache", lambda self, **_: self.skip(1))
    (tmp_path / "run").mkdir()
    assert asyncio.run(example("rest_api")["train"](api.url, tmp_path / "run", ITEMS, 1)) is False
