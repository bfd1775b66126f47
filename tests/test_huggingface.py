"""Hugging Face `datasets` as sources: map-style and iterable ones, without a copy and without a download."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from aioloader import DataLoader, Pipeline
from tests._support import Face, Steps, collect, on_both_faces

ROWS = 50


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The package, offline, with its caches in a folder that goes away."""
    folder = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its imports
            datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        yield datasets


@pytest.fixture
def rows(hf: Any) -> Any:
    """A map-style dataset in memory."""
    return hf.Dataset.from_dict(
        {
            "x": [[float(n), n / 2] for n in range(ROWS)],
            "label": list(range(ROWS)),
            "text": [f"t{n}" for n in range(ROWS)],
        }
    )


def labels(batches: list[Any]) -> list[int]:
    return [int(label) for batch in batches for label in batch["label"]]


@on_both_faces
def test_a_dataset_is_a_sequence(rows: Any, face: Face) -> None:
    """Shuffled as any other; `with_format("torch")` gives tensors, and so batches of tensors."""
    loader = Pipeline(rows.with_format("torch")).shuffle(seed=1).batch(8)
    first, second = collect(loader, face), collect(loader, face)
    assert labels(first) != labels(second)
    assert sorted(labels(first)) == sorted(labels(second)) == list(range(ROWS))
    assert first[0]["x"].shape == (8, 2)
    assert first[0]["x"].dtype == torch.float32
    assert torch.equal(first[0]["x"][:, 0], first[0]["label"].float())
    assert first[0]["text"] == [f"t{n}" for n in first[0]["label"].tolist()]
    assert len(loader) == 7


@pytest.mark.parametrize("arguments", [{}, {"num_workers": 2}, {"num_workers": 2, "worker_type": "process"}])
def test_the_drop_in_gives_torchs_batches(rows: Any, arguments: Any) -> None:
    """For the same seed; batches are asked for as wholes, by `__getitems__`."""
    data = rows.with_format("torch")
    torch.manual_seed(3)
    theirs = list(torch.utils.data.DataLoader(data, batch_size=8, shuffle=True))
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(data, batch_size=8, shuffle=True, **arguments)
        ours = list(loader)
        loader.close()
    assert labels(ours) == labels(theirs)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(ours, theirs, strict=True))


def test_rows_are_asked_for_in_groups(rows: Any) -> None:
    """One call for many decodes columns, which a call for each would do anew for each."""
    asked: list[int] = []
    data = rows.with_format("torch")
    plain = type(data)

    class Counting(plain):  # type: ignore[misc, valid-type]
        def __getitems__(self, keys: list[int]) -> Any:
            asked.append(len(keys))
            return super().__getitems__(keys)

    data.__class__ = Counting
    assert labels(collect(Pipeline(data).repeat(20).batch(10), "for")) == list(range(ROWS)) * 20
    assert max(asked, default=0) > 1


@on_both_faces
def test_an_iterable_dataset_is_a_stream(hf: Any, face: Face) -> None:
    """Read by one task, once, however many shards and samples side by side."""
    opened: list[list[int]] = []

    def generate(shards: list[int]) -> Iterator[dict[str, int]]:
        opened.append(shards)
        for shard in shards:
            yield from ({"label": 10 * shard + n} for n in range(10))

    data = hf.IterableDataset.from_generator(generate, gen_kwargs={"shards": [0, 1, 2]})
    loader = Pipeline(data).map(lambda row: row, concurrency=4).batch(4)
    for _ in range(2):
        assert labels(collect(loader, face)) == list(range(30))
    assert labels(collect(DataLoader(data, batch_size=4, num_workers=3), face)) == list(range(30))
    assert len(opened) == 9


def test_an_iterable_dataset_is_told_the_epoch(rows: Any) -> None:
    """So that its own shuffling differs from epoch to epoch; the drop-in leaves that to the user, as torch does."""
    data = rows.to_iterable_dataset(num_shards=5).shuffle(seed=0, buffer_size=10)
    loader = Pipeline(data).batch(10)
    first, second = labels(collect(loader, "for")), labels(collect(loader, "for"))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(ROWS))
    loader.set_epoch(0)
    assert labels(collect(loader, "for")) == first
    drop_in = DataLoader(data, batch_size=10)
    drop_in.set_epoch(1)
    assert labels(list(drop_in)) == labels(list(drop_in)) == second


def test_formats_of_an_iterable_dataset(rows: Any) -> None:
    """`with_format("torch")` makes tensors there too."""
    data = rows.to_iterable_dataset().with_format("torch")
    batch = next(iter(Pipeline(data).batch(5)))
    assert batch["x"].shape == (5, 2)
    assert isinstance(data, torch.utils.data.IterableDataset)


def test_a_cached_dataset_is_decoded_once(hf: Any) -> None:
    """`set_transform` runs once per row, and augmentation behind the cache in each epoch."""
    decoded: list[int] = []

    def decode(batch: dict[str, list[int]]) -> dict[str, Any]:
        decoded.extend(batch["label"])
        return {"label": [torch.tensor(label) for label in batch["label"]]}

    data = hf.Dataset.from_dict({"label": list(range(20))})
    data.set_transform(decode)
    loader = Pipeline(data).shuffle().cache(memory_bytes=1 << 20).map(lambda row: {"label": row["label"].add_(100)})
    for _ in range(3):
        assert sorted(int(row["label"]) for row in collect(loader, "for")) == list(range(100, 120))
    assert sorted(decoded) == list(range(20))


def test_a_row_that_fails_raises_at_its_place(hf: Any) -> None:
    """Also when it was asked for together with others."""

    def decode(batch: dict[str, list[int]]) -> dict[str, list[int]]:
        if 123 in batch["label"]:
            raise ValueError("no 123")
        return batch

    data = hf.Dataset.from_dict({"label": list(range(300))})
    data.set_transform(decode)
    with Steps(Pipeline(data), "for") as steps:
        found = steps.outcomes()
    assert str(found[123]) == "no 123"
    assert [row["label"] for row in found[:123] + found[124:]] == [*range(123), *range(124, 300)]
