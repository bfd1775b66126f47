"""The examples run, on small data, and do what they say."""

import io
import json
import runpy
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from aioloader import Pipeline
from tests._servers import S3Server
from tests._support import Started

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> dict[str, Any]:
    """The names of an example, as `python examples/{name}.py` has them, not run."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=f"examples_{name}")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Of torch's own: on a machine that does other things too, they wait for each other for most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("how", [[], ["--live"]], ids=["map", "live"])
def test_rollouts_train_a_policy(capsys: pytest.CaptureFixture[str], how: list[str]) -> None:
    """The policy gets better while it plays; what it learns from is never much older than it is."""
    example("rollouts")["main"](["--updates", "40", *how])
    first, second = capsys.readouterr().out.splitlines()
    said = first.split()
    assert said[:2] == ["mean", "reward"]
    assert float(said[5]) > float(said[2])
    oldest = int(second.removeprefix("no step was older than ").removesuffix(" updates"))
    assert oldest <= 3 or how


@pytest.mark.parametrize("arguments", [[], ["--completion-order"]])
def test_grpo_goes_on_from_its_checkpoint_with_rollouts_in_flight(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """It checks itself: every prompt once per epoch, and none too old."""
    example("grpo")["main"](arguments)
    reward, trained, flight = capsys.readouterr().out.splitlines()
    assert float(reward.split()[2]) < float(reward.split()[-4])
    assert " of 192 groups trained on" in trained
    assert int(flight.split()[0]) > 0
    assert flight.endswith("staleness at most 1")


@pytest.mark.parametrize("forgotten", ["max_staleness", "load_state_dict"])
def test_grpo_finds_out_what_is_forgotten(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks can fail: without admission groups get too old, without the state they are trained on twice."""
    monkeypatch.setattr(Pipeline, forgotten, lambda self, _: self)
    with pytest.raises(SystemExit, match="updates old" if forgotten == "max_staleness" else "trained on twice"):
        example("grpo")["main"]([])


def test_huggingface_trains_on_a_cached_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of a `datasets.Dataset`, decoded once and augmented in each epoch."""
    pytest.importorskip("datasets")
    example("huggingface")["main"](["--rows", "400", "--epochs", "30"])
    said = capsys.readouterr().out.split()
    assert float(said[1]) > 0.9
    assert said[3] == said[5] == "400"


def test_s3_tar_training_streams_shards_each_epoch(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a server that speaks S3."""
    image_module = pytest.importorskip("PIL.Image")

    def shard(first: int) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            for number in range(first, first + 20):
                image = io.BytesIO()
                image_module.new("RGB", (8, 8), (number, 0, 255 - number)).save(image, "PNG")
                for extension, content in (("png", image.getvalue()), ("cls", str(number % 10).encode())):
                    info = tarfile.TarInfo(f"{number:05}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return file.getvalue()

    bucket = s3_server.make_bucket()
    store = s3_server.store(bucket)
    for number in range(3):
        store.put(f"train/shard-{number:03}.tar", shard(20 * number))
    del store
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    example("s3_tar_training")["main"]([bucket, "train/shard-{000..002}.tar", "--endpoint", s3_server.endpoint])
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said] == ["epoch 0: 60 samples", "epoch 1: 60 samples"]


def test_jsonl_that_grows_makes_a_step_when_its_rows_are_written(tmp_path: Path) -> None:
    """Another process than the one that writes: this one."""
    pytest.importorskip("watchfiles")
    path = tmp_path / "rows.jsonl"
    path.touch()

    def rows(first: int) -> str:
        found: list[dict[str, Any]] = [{"x": [number / 10, 1.0], "y": number / 5} for number in range(first, first + 4)]
        return "".join(f"{json.dumps(row)}\n" for row in found)

    script = str(EXAMPLES / "jsonl_that_grows.py")
    command = [sys.executable, script, str(path), "--steps", "3", "--batch-size", "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process, path.open("a") as file:
        assert process.stdout is not None
        try:
            for step in range(1, 4):
                file.write(rows(4 * step))
                file.flush()
                line = Started(process.stdout.readline).outcome()
                assert line.startswith(f"step {step}: 4 rows, loss ")
            assert process.stdout.read() == ""
        finally:
            process.kill()
    assert process.returncode == 0


def test_sqlite_that_grows_goes_on_where_its_last_run_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A batch with a broken row is named, and rows that come while it waits are trained on."""
    path, state = tmp_path / "rows.db", tmp_path / "state.json"
    table = example("sqlite_that_grows")
    table["make_table"](path)

    def add(rows: Sequence[tuple[str, float]]) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.executemany("INSERT INTO samples(x, y) VALUES (?, ?)", rows)

    def run(steps: int) -> list[str]:
        table["main"]([str(path), "--steps", str(steps), "--batch-size", "2", "--state", str(state)])
        return [line.partition(", loss")[0] for line in capsys.readouterr().out.splitlines()]

    add([("[0.1, 1.0]", 0.2), ("[0.2, 1.0", 0.4), *[("[0.3, 1.0]", 0.6)] * 4])
    first = run(2)
    assert [line.partition(":")[0] for line in first] == ["left out", "step 1", "step 2"]
    assert "key 2, epoch 0, position 1" in first[0]
    assert json.loads(state.read_text())["batches"] == 3
    add([("[0.6, 1.0]", 1.2)] * 4)
    assert run(2) == ["step 1: 2 rows", "step 2: 2 rows"]

    command = [sys.executable, str(EXAMPLES / "sqlite_that_grows.py"), str(path), "--steps", "2", "--batch-size", "2"]
    with subprocess.Popen([*command, "--state", str(state)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for step in (1, 2):
                add([("[0.7, 1.0]", 1.4)] * 2)
                assert Started(process.stdout.readline).outcome().startswith(f"step {step}: 2 rows, loss ")
            assert process.stdout.read() == ""
        finally:
            process.kill()
    assert process.returncode == 0
