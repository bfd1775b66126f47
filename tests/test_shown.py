"""What a person sees in a terminal: tables, reprs, progress bars, versions, and errors that suggest what was meant."""

import asyncio
import contextlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import aioloader
import aioloader.engine.starving as starving
from aioloader import DataLoader, Pipeline, Stats, UnknownLengthError
from aioloader.insight.units import amount, duration, nbytes
from tests._support import Face, Steps, collect, on_both_faces

ROOT = Path(__file__).parent.parent


async def load(key: int) -> int:
    if key == 5:
        raise OSError("no such sample")
    return key


def a_function_with_quite_a_long_name_that_says_all_it_does(sample: int) -> int:
    return sample


# -- statistics --------------------------------------------------------------------------------------------------------


@on_both_faces
def test_statistics_are_a_table_of_at_most_100_columns(face: Face) -> None:
    long = a_function_with_quite_a_long_name_that_says_all_it_does
    loader = Pipeline(range(40)).map(load, concurrency=4).map(long).map(long).batch(2)
    assert "no batch yet" in str(loader.stats())
    with Steps(loader, face) as steps:
        steps.outcomes()
    shown = str(loader.stats())
    lines = shown.splitlines()
    assert lines[0].startswith("epoch 0: 20 batches in ")
    header = next(line for line in lines if line.startswith("stage"))
    assert header.split()[:3] == ["stage", "places", "at"]
    (row,) = (line for line in lines if line.startswith("map(load) "))
    assert row.split()[1] == "4"
    assert "map(load): 1 error" in lines
    assert max(map(len, lines)) <= 100
    assert "…" in shown, "the long name is cut"


def test_what_is_explained_is_wrapped() -> None:
    """`explain()` is for people: no line has more than 100 columns."""
    loader = Pipeline(range(40)).map(load, concurrency=4).batch(2)
    with Steps(loader, "for") as steps:
        steps.outcomes()
    lines = loader.explain().splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 100


@on_both_faces
def test_times_are_explained_in_the_units_of_the_table(face: Face) -> None:
    """ "87 µs each", and not 0.0869 ms."""

    def slow(key: int) -> int:
        time.sleep(0.004)  # so that it is the limit
        return key

    loader = Pipeline(range(60)).map(slow).batch(2)
    with Steps(loader, face) as steps:
        steps.outcomes()
    assert re.search(r"[\d.]+ (µs|ms|s) each", loader.explain())
    assert not re.search(r"\b0\.\d+ ms", loader.explain())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 µs"),
        (3.4e-6, "3.4 µs"),
        (0.012, "12 ms"),
        (0.9996, "1.0 s"),
        (6.32, "6.3 s"),
        (99.0, "99 s"),
        (125.0, "2 min 5 s"),
        (7500.0, "2 h 5 min"),
        (400_000.0, "111 h"),
    ],
)
def test_durations_are_in_units_that_suit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_amounts_and_sizes() -> None:
    assert [amount(1234), amount(2.5), amount(12_345_678), amount(0.05)] == ["1,234", "2.5", "12.3 M", "0.05"]
    assert [nbytes(12), nbytes(3.4e6), nbytes(2e9)] == ["12 B", "3.4 MB", "2.0 GB"]


@on_both_faces
def test_waits_of_the_consumer_have_percentiles(face: Face) -> None:
    """The first batch is told apart: it is about the start."""
    loader = Pipeline(range(4)).map(load)
    with Steps(loader, face) as steps:
        steps.rest()
    stats = loader.stats()
    assert 0 < stats.waits.p50 <= stats.waits.p95 <= stats.waits.p99 <= stats.waits.max
    assert stats.waits.sum == pytest.approx(stats.waited_seconds)
    assert stats.waits.max <= stats.waited_seconds


# -- reprs -------------------------------------------------------------------------------------------------------------


def test_the_repr_of_a_pipeline_has_its_seeds() -> None:
    loader = Pipeline(range(6)).shuffle(seed=3).map(load).shuffle(8).batch(2).prefetch(3).with_seed(7)
    assert repr(loader) == (
        "Pipeline(range).shuffle(seed=3).map(load).shuffle(8, seed=0).batch(2).prefetch(3).with_seed(7)"
    )
    mixed = Pipeline.mix([Pipeline(range(3)).shuffle(seed=4), range(4)], [1, 2.5], seed=5)
    assert repr(mixed) == "Pipeline.mix(Pipeline(range).shuffle(seed=4), Pipeline(range), weights=[1, 2.5], seed=5)"
    named = Pipeline.mix({"web": range(3), "code": range(4)}, {"web": 1, "code": 2})
    assert repr(named) == "Pipeline.mix(web=Pipeline(range), code=Pipeline(range), seed=0)"
    assert repr(DataLoader(range(4), batch_size=2, seed=8)) == "DataLoader(range, batch_size=2, num_workers=0, seed=8)"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"shuffle": True}, "shuffle=True, "),
        ({"sampler": [1, 0]}, "sampler=list, "),
        ({"shuffle": True, "shard": True}, "shuffle=True, shard=True, "),
        ({"drop_last": True}, ""),
    ],
)
def test_the_repr_of_a_dataloader_has_what_decides_its_order(arguments: dict[str, Any], shown: str) -> None:
    assert repr(DataLoader(range(4), 2, **arguments)) == f"DataLoader(range, batch_size=2, {shown}num_workers=0)"
    batches = DataLoader(range(4), batch_sampler=[[0, 1]])
    assert repr(batches) == "DataLoader(range, batch_size=None, batch_sampler=list, num_workers=0)"


@on_both_faces
def test_the_repr_of_an_iterator_says_where_it_is(face: Face) -> None:
    loader = Pipeline(range(4)).batch(2)
    with Steps(loader, face) as steps:

        def shown() -> str:
            return repr(steps._iterator)

        assert shown() == f"<iterator of `{face}` over Pipeline(range).batch(2): its epoch has not begun>"
        steps.next()
        assert shown().endswith("epoch 0, 1 batches handed out>")
        steps.rest()
        assert shown().endswith("epoch 0, 2 batches handed out, over>")


def test_the_repr_of_an_error_hides_secrets_and_can_be_printed() -> None:
    error = aioloader.BrokenDataError("https://user:secret@host/a.tar is broken at \udce9")
    assert "secret" not in repr(error)
    repr(error).encode()


# -- versions and errors -----------------------------------------------------------------------------------------------


def test_the_version_is_in_one_place() -> None:
    shown = subprocess.run([sys.executable, "-m", "aioloader", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"aioloader {aioloader.__version__}\n"
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{aioloader.__version__}"' not in project
    assert 'version = { attr = "aioloader.version.__version__" }' in project


INTERNAL = {
    "BrokenHeaderError": "a subclass of BrokenDataError that says where to go on",
    "ContenderError": "the demo's own, for its exit code",
    "LostError": "a subclass of BrokenDataError; a sample that a cache has lost is made again",
    "NullsError": "caught where it is raised",
    "SegmentsGoneError": "caught: what an actor had made is made again",
}


def test_every_error_that_may_be_raised_is_public() -> None:
    hidden = []
    for module in pkgutil.walk_packages(aioloader.__path__, "aioloader."):
        if module.name.endswith("__main__"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            if not (inspect.isclass(kind) and issubclass(kind, BaseException) and kind.__module__ == module.name):
                continue
            if not name.startswith("_") and name not in INTERNAL:
                hidden += [] if hasattr(aioloader, name) or hasattr(aioloader.testing, name) else [name]
    assert hidden == []


def test_a_length_that_nobody_knows_has_an_error_of_its_own() -> None:
    with pytest.raises(UnknownLengthError):
        len(Pipeline(range(4)).filter(bool))
    assert issubclass(UnknownLengthError, TypeError)


@pytest.mark.parametrize("make", [Pipeline, DataLoader])
@pytest.mark.parametrize(
    ("path", "suggested"),
    [
        ("data/train", "Files('data/train/**/*')"),
        ("images/*.png", "Files('images/*.png')"),
        (Path("data/notes.txt"), "Files('data/notes.txt')"),
        (Path("data"), "Files('data/**/*')"),
        ("train.jsonl", "Lines('train.jsonl', decode='json')"),
        ("s3://bucket/part-{000..099}.jsonl.zst", "Lines('s3://bucket/part-{000..099}.jsonl.zst', decode='json')"),
        (Path("train.csv"), "Lines('train.csv')"),
        ("data/*.parquet", "ParquetRows('data/*.parquet')"),
        ("shards/{000..099}.tar", "TarShards('shards/{000..099}.tar')"),
    ],
)
def test_a_path_suggests_what_reads_it(make: Any, path: Any, suggested: str) -> None:
    with pytest.raises(TypeError, match="must be ") as raised:
        make(path)
    assert f"pass aioloader.sources.{suggested} to read files" in str(raised.value)


def test_a_word_is_no_path() -> None:
    with pytest.raises(TypeError, match=r"pass \[it\] for one sample") as raised:
        Pipeline("hello")
    assert "Files" not in str(raised.value)


@pytest.mark.parametrize("make", [Pipeline, DataLoader])
def test_a_table_is_refused_with_the_way_to_its_rows(make: Any) -> None:
    frame = pd.DataFrame({"x": [1, 2], "y": [3.0, 4.0]})
    with pytest.raises(TypeError, match="DataFrame of pandas") as raised:
        make(frame)
    assert 'frame.to_dict("records")' in str(raised.value)
    assert collect(Pipeline(frame.to_dict("records")), "for") == [{"x": 1, "y": 3.0}, {"x": 2, "y": 4.0}]


def test_a_table_of_polars_is_refused_too() -> None:
    """Told by its name and module: polars is not needed to say so."""
    kind = type("DataFrame", (), {"__module__": "polars.dataframe.frame", "__len__": lambda _: 1})
    with pytest.raises(TypeError, match=r"frame\.to_dicts\(\)"):
        Pipeline(kind())


@pytest.mark.parametrize("make", [Pipeline, DataLoader])
def test_a_table_is_known_by_what_it_is_derived_from(make: Any) -> None:
    derived = type("GeoDataFrame", (pd.DataFrame,), {"__module__": "geopandas.geodataframe"})
    with pytest.raises(TypeError, match=r"a DataFrame of pandas, whose \[\] gives columns"):
        make(derived({"x": [1, 2]}))
    with pytest.raises(TypeError, match=r"a Table of pyarrow, .*: pass table\.to_pylist\(\)"):
        make(pytest.importorskip("pyarrow").table({"x": [1, 2]}))


@on_both_faces
@pytest.mark.parametrize("make", [Pipeline, lambda rows: DataLoader(rows, batch_size=None)])
def test_a_series_is_read_by_positions_or_refused(make: Any, face: Face) -> None:
    """After a filter or a sort its `[]` would give other rows, in another order, or none."""
    series = pd.Series([3.0, 1.0, 2.0])
    for whole in (series, series.sort_values().sort_index()):
        assert [float(value) for value in collect(make(whole), face)] == [3.0, 1.0, 2.0]
    for part in (series[series > 1], series.sort_values(), series[::-1], series[1:]):
        with pytest.raises(TypeError, match=r"a Series of pandas, .* pass series\.to_numpy\(\)"):
            make(part)
        assert [float(value) for value in collect(make(part.to_numpy()), face)] == part.tolist()


# -- progress ----------------------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize("style", ["tqdm", "rich"])
def test_a_bar_begins_at_the_resume_and_ends_at_the_end(face: Face, style: Any, capsys: Any) -> None:
    loader = Pipeline(range(10)).batch(2)
    with Steps(loader, face) as steps:
        steps.rest(2)
        state = loader.state_dict()
    resumed = Pipeline(range(10)).batch(2)
    resumed.load_state_dict(state)
    bars = watched(resumed.progress("read", style=style))
    with Steps(bars.loader, face) as steps:
        assert len(steps.rest()) == 3
    assert bars.moves[0] == ("opened", 5, 2)
    assert [move for move in bars.moves if move[0] == "moved"][:3] == [("moved", 3), ("moved", 4), ("moved", 5)]
    assert bars.moves[-1] == ("closed", True)
    shown = "".join(capsys.readouterr())
    assert "5/5" in shown


@on_both_faces
def test_a_bar_without_a_length_learns_it(face: Face, capsys: Any) -> None:
    loader = Pipeline(range(10)).filter(lambda key: key % 2).batch(2)
    with Steps(loader.progress(), face) as steps:
        assert len(steps.rest()) == 3
    assert "3/3" in "".join(capsys.readouterr())


@on_both_faces
def test_a_batch_that_raises_is_a_step_of_the_bar(face: Face, capsys: Any) -> None:
    bars = watched(Pipeline(range(8)).map(load).batch(2).progress())
    with Steps(bars.loader, face) as steps:
        assert [isinstance(one, OSError) for one in steps.outcomes()] == [False, False, True, False]
    assert ("moved", 3) in bars.moves
    assert bars.moves[-1] == ("closed", True)


@on_both_faces
def test_a_bar_is_closed_when_its_loop_is_left(face: Face, capsys: Any) -> None:
    bars = watched(Pipeline(range(8)).batch(2).progress())
    with Steps(bars.loader, face) as steps:
        steps.next()
        assert steps._iterator.state_dict()["batches"] == 1
    assert bars.moves[-1] == ("closed", False)


def test_without_a_drawer_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioloader.insight.progress_bar.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'aioloader\[progress\]'"):
        Pipeline(range(4)).progress()
    with pytest.raises(ValueError, match="style must be 'tqdm' or 'rich'"):
        Pipeline(range(4)).progress(style="curses")  # type: ignore[arg-type]


class watched:  # noqa: N801 - reads as a word
    """Notes what a bar is told."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.moves: list[tuple[Any, ...]] = []
        make = loader._open

        def opened() -> Any:
            total = None
            with contextlib.suppress(TypeError):
                total = len(loader)
            self.moves.append(("opened", total, loader._loader.first_step))
            return _Noted(make(), self.moves)

        loader._open = opened


class _Noted:
    def __init__(self, bar: Any, moves: list[tuple[Any, ...]]) -> None:
        self._bar = bar
        self._moves = moves

    def moved(self, batches: int) -> None:
        self._moves.append(("moved", batches))
        self._bar.moved(batches)

    def close(self, *, complete: bool) -> None:
        self._moves.append(("closed", complete))
        self._bar.close(complete=complete)


# -- `for` in a running loop -------------------------------------------------------------------------------------------


def test_a_loop_whose_other_tasks_starve_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starving, "LONG_SECONDS", 0.0)

    async def main() -> int:
        other = asyncio.create_task(asyncio.Event().wait())
        for _ in Pipeline(range(8)).batch(2):
            pass
        other.cancel()
        return 0

    with pytest.warns(RuntimeWarning, match="whose other tasks stand still") as told:
        asyncio.run(main())
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize("how", ["alone", "gives way", "a notebook"])
def test_a_loop_in_which_nobody_starves_is_left_alone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else is there; or each wait is followed by a turn of the loop; or it is a notebook's."""
    monkeypatch.setattr(starving, "LONG_SECONDS", 1e9 if how == "gives way" else 0.0)
    if how == "a notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", sys)

    async def main() -> None:
        other = asyncio.create_task(asyncio.Event().wait()) if how != "alone" else None
        loader = Pipeline(range(8)).batch(2)
        iterator = iter(loader)
        for _ in iterator:
            if how == "gives way":
                delivery: Any = iterator._delivery
                assert delivery._waited > 0
                await asyncio.sleep(0)
                assert delivery._waited == 0
        if other is not None:
            other.cancel()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())


def test_nothing_is_known_of_a_stats_that_was_made_by_hand() -> None:
    assert str(Stats(None, 0.0, None, 0, 0.0, 0.0, 0.0, ())) == "no epoch has begun: no batch yet"
