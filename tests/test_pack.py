"""`pack`: every token of every document in one place, rows that say what is where, and a resume at each of them."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aioloader import Packed, Pipeline
from aioloader.stages.pack_plan import PackPlan
from aioloader.testing import FakeBackend, assert_resumes_exactly
from tests._support import Face, Steps, collect, notes, on_both_faces

SEQ_LEN = 32


def documents(count: int = 60, longest: int = 30) -> list[Tensor]:
    """Token `t` of document `d` is `1000 * d + t`."""
    return [1000 * number + torch.arange(1 + number * 7 % longest) for number in range(count)]


WAYS: dict[str, dict[str, Any]] = {
    "best_fit": {},
    "best_fit, few rows": {"open_rows": 3},
    "first_fit": {"strategy": "first_fit", "open_rows": 4},
    "split": {"strategy": "split"},
    "few documents": {"max_documents": 2, "open_rows": 3},
    "one document": {"max_documents": 1},
    "padded documents": {"pad_to": 4, "open_rows": 3},
    "padded and split": {"pad_to": 4, "strategy": "split"},
}
all_ways = pytest.mark.parametrize("way", WAYS)


def check_row(row: Packed, *, pad_to: int = 1, seq_len: int = SEQ_LEN) -> Counter[int]:
    """Segments, positions and `cu_seqlens` agree, and tokens are in order; returns the tokens."""
    ends = row.cu_seqlens.tolist()
    assert row.cu_seqlens.dtype == torch.int32
    assert len(ends) == len(row.keys) + 1
    assert ends[0] == 0
    assert row.tokens.shape == row.positions.shape == row.segments.shape == (seq_len,)
    assert row.max_seqlen == max(end - begin for begin, end in itertools.pairwise(ends))
    found: Counter[int] = Counter()
    for number, (begin, end) in enumerate(itertools.pairwise(ends), 1):
        assert (end - begin) % pad_to == 0
        assert row.segments[begin:end].tolist() == [number] * (end - begin)
        assert row.positions[begin:end].tolist() == list(range(end - begin))
        tokens = row.tokens[begin:end].to(torch.int64).tolist()
        tokens = tokens[: next((at for at in range(1, len(tokens)) if tokens[at] == -1), len(tokens))]
        assert end - begin - len(tokens) < pad_to
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        assert tokens[0] // 1000 == row.keys[number - 1]
        found.update(tokens)
    assert set(row.segments[ends[-1] :].tolist()) | set(row.positions[ends[-1] :].tolist()) <= {0}
    assert set(row.tokens[ends[-1] :].tolist()) <= {-1}
    return found


def all_tokens(rows: list[Packed], **how: Any) -> Counter[int]:
    return sum((check_row(row, **how) for row in rows), Counter())


# -- the plan ----------------------------------------------------------------------------------------------------------


def packed_lengths(lengths: list[int], plan: PackPlan, longest: int) -> list[list[tuple[int, int, int]]]:
    """The pieces of each row."""
    rows = []
    for document, length in enumerate(lengths):
        start = 0
        while start < length:
            while (row := plan.due()) is not None:
                rows.append(row)
            stop = plan.cut(start, length)
            if (row := plan.put(document, start, stop)) is not None:
                rows.append(row)
            assert len(plan.rows) <= longest
            start = stop
    while (row := plan.close_first()) is not None:
        rows.append(row)
    return [row.pieces for row in rows]


def test_each_token_is_in_one_row_and_no_row_is_too_long() -> None:
    """In two thousand generated cases."""
    for seed in range(2_000):
        rng = random.Random(seed)
        seq_len = rng.choice([1, 8, 40])
        strategy: Any = rng.choice(["best_fit", "first_fit", "split"])
        pad_to = rng.choice([1, 1, seq_len, 4 if seq_len > 1 else 1])
        most = rng.choice([None, None, 1, 3])
        open_rows = rng.choice([1, 2, 5])
        lengths = [rng.randint(1, rng.choice([3, seq_len, 3 * seq_len])) for _ in range(rng.randint(0, 80))]
        rows = packed_lengths(lengths, PackPlan(seq_len, strategy, open_rows, most, pad_to), open_rows)
        tokens = Counter((document, at) for row in rows for document, start, stop in row for at in range(start, stop))
        assert tokens == Counter((document, at) for document, length in enumerate(lengths) for at in range(length))
        assert all(sum(-(-(stop - start) // pad_to) * pad_to for _, start, stop in row) <= seq_len for row in rows)
        assert all(1 <= len(row) <= (most or 1 << 60) for row in rows)


def test_best_fit_pads_little() -> None:
    """Lengths as those of documents are, and rows of 4,096."""
    rng = random.Random(0)
    lengths = [max(1, int(rng.lognormvariate(6, 1))) for _ in range(20_000)]
    rows = packed_lengths(lengths, PackPlan(4096), 64)
    assert 1 - sum(lengths) / (4096 * len(rows)) <= 0.005


@pytest.mark.parametrize("strategy", ["best_fit", "first_fit"])
@pytest.mark.parametrize("rest", [[3000], [4096], [3000, 1096]])
def test_no_row_waits_for_ever_for_a_document_that_fits(strategy: Any, rest: list[int]) -> None:
    """A resume would read everything since then again."""
    plan = PackPlan(4096, strategy, open_rows=4)
    plan.put(0, 0, 2096)
    for number in range(1, 200):
        plan.due()
        plan.put(number, 0, rest[number % len(rest)])
    assert min((document for row in plan.rows.values() for document, _, _ in row.pieces), default=200) > 100


def test_strategies_choose_as_they_say() -> None:
    """Best fit takes the row that is filled best, first fit the oldest that has room, split whatever is next."""
    lengths = [5, 7, 3, 2]
    assert packed_lengths(lengths, PackPlan(10, "best_fit", 4), 4) == [
        [(1, 0, 7), (2, 0, 3)],
        [(0, 0, 5), (3, 0, 2)],
    ]
    assert packed_lengths(lengths, PackPlan(10, "first_fit", 4), 4) == [
        [(0, 0, 5), (2, 0, 3), (3, 0, 2)],
        [(1, 0, 7)],
    ]
    assert packed_lengths(lengths, PackPlan(10, "split"), 1) == [
        [(0, 0, 5), (1, 0, 5)],
        [(1, 5, 7), (2, 0, 3), (3, 0, 2)],
    ]


# -- rows --------------------------------------------------------------------------------------------------------------


@on_both_faces
@all_ways
def test_every_token_is_in_one_place(way: str, face: Face) -> None:
    """And the row says which document that is of."""
    how = WAYS[way]
    for longest in (30, 100):
        source = documents(longest=longest)
        rows = collect(Pipeline(source).pack(SEQ_LEN, pad_value=-1, **how), face)
        tokens = all_tokens(rows, pad_to=how.get("pad_to", 1))
        assert tokens == Counter(token for document in source for token in document.tolist())
        assert all(len(row.keys) <= (how.get("max_documents") or 99) for row in rows)


@on_both_faces
def test_long_rows_are_copied_in_threads(face: Face) -> None:
    """Short ones are not worth the hop; they are the same."""
    threads: dict[int, set[str]] = {32: set(), 1 << 14: set()}
    for seq_len, seen in threads.items():
        loader = Pipeline(documents()).pack(seq_len, pad_value=-1)
        assert all_tokens(collect(loader, face), seq_len=seq_len) == all_tokens(collect(loader, face), seq_len=seq_len)
        seen.update(stage.name for stage in loader.stats().stages if stage.concurrency > 1)
    assert not any(name.startswith("rows") for name in threads[32])
    assert any(name.startswith("rows") for name in threads[1 << 14])


@pytest.mark.parametrize("concurrency", [1, 8])
def test_rows_do_not_depend_on_concurrency(concurrency: int) -> None:
    """Nor on the face."""
    rows = list(Pipeline(documents()).map(torch.clone, concurrency=concurrency).pack(SEQ_LEN))
    expected = collect(Pipeline(documents()).pack(SEQ_LEN), "async for")
    assert [row.tokens.tolist() for row in rows] == [row.tokens.tolist() for row in expected]


@pytest.mark.parametrize(
    "kind",
    [
        lambda tokens: tokens,
        lambda tokens: tokens.tolist(),
        lambda tokens: tuple(tokens.tolist()),
        lambda tokens: tokens.numpy(),
        lambda tokens: tokens.to(torch.int32),
        lambda tokens: tokens.float().requires_grad_(),
        lambda tokens: np.repeat(tokens.numpy(), 2)[::2],
        lambda tokens: tokens.repeat_interleave(2)[::2],
    ],
)
def test_documents_are_tensors_arrays_or_lists(kind: Callable[[Tensor], Any]) -> None:
    """Of any layout; the row has their dtype."""
    source = list(map(kind, documents(20)))
    rows = list(Pipeline(source).pack(SEQ_LEN, pad_value=-1))
    assert all_tokens(rows) == Counter(token for document in documents(20) for token in document.tolist())
    assert rows[0].tokens.dtype == torch.as_tensor(source[0]).dtype
    assert not rows[0].tokens.requires_grad


def test_a_read_only_array_is_no_matter_for_a_warning() -> None:
    """As those of a memory-mapped file are; of the dtype that token files have."""
    tokens = np.arange(5, dtype=np.uint16)
    tokens.flags.writeable = False
    (row,) = Pipeline([tokens]).pack(8)
    assert row.tokens.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert row.tokens.dtype == torch.uint16


def test_all_fields_are_packed_alike() -> None:
    """Labels are padded so that the loss leaves them out; others as it is said."""
    source = [
        {"tokens": [1, 2], "labels": [2, 3], "weight": [0.5, 1.0]},
        {"labels": [5], "weight": [2.0], "tokens": [4]},
    ]
    (row,) = Pipeline(source).pack(5, pad_value={"tokens": 9})
    assert {name: field.tolist() for name, field in row.tokens.items()} == {
        "tokens": [1, 2, 4, 9, 9],
        "labels": [2, 3, 5, -100, -100],
        "weight": [0.5, 1.0, 2.0, 0.0, 0.0],
    }
    assert row.segments.tolist() == [1, 1, 2, 0, 0]
    (row,) = Pipeline(source).pack(5, pad_value={"labels": -1})
    assert row.tokens["labels"].tolist() == [2, 3, 5, -1, -1]
    (row,) = Pipeline(source).pack(6, pad_to=2)
    assert row.tokens["labels"].tolist() == [2, 3, 5, -100, -100, -100]
    assert row.cu_seqlens.tolist() == [0, 2, 4]


def test_rows_have_a_dtype_that_holds_all_their_documents() -> None:
    """No token is changed."""
    (row,) = Pipeline([torch.tensor([1], dtype=torch.int32), torch.tensor([1 << 40])]).pack(3)
    assert row.tokens.tolist() == [1, 1 << 40, 0]
    mixed = [np.array([7], dtype=np.uint16), np.array([-1]), np.array([1 << 31], dtype=np.uint32)]
    (row,) = Pipeline(mixed).pack(3)
    assert row.tokens.tolist() == [7, -1, 1 << 31]
    large = (1 << 24) + 1  # torch's rule says float32, which does not have it
    (row,) = Pipeline([torch.tensor([large]), torch.tensor([0.5])]).pack(2)
    assert row.tokens.tolist() == [large, 0.5]
    (row,) = Pipeline([torch.tensor([3]), torch.tensor([0.5])]).pack(2)
    assert row.tokens.dtype == torch.float32


@on_both_faces
@pytest.mark.parametrize(
    "mixed",
    [
        [torch.tensor([(1 << 53) + 1]), torch.tensor([0.5])],
        [torch.tensor([(1 << 24) + 1]), torch.tensor([1j])],
        [np.array([(1 << 64) - 1], dtype=np.uint64), np.array([1])],
    ],
    ids=["int64 and float", "int64 and complex", "uint64 and int64"],
)
def test_a_row_whose_tokens_no_dtype_holds_is_an_error(mixed: list[Any], face: Face) -> None:
    """No token is changed; others come."""
    with Steps(Pipeline([*mixed, [1, 2]]).pack(2), face) as steps:
        first, row = steps.outcomes()
    with pytest.raises(ValueError, match=r"no dtype holds all tokens of a row, of .*torch\.int64"):
        raise first
    assert row.tokens.tolist() == [1, 2]


@on_both_faces
def test_rows_collate_into_a_batch(face: Face) -> None:
    """With `cu_seqlens` of all rows one after the other, padding being sequences of its own."""
    rows = list(Pipeline(documents()).pack(SEQ_LEN))
    batches = collect(Pipeline(documents()).pack(SEQ_LEN).batch(4), face)
    assert all(isinstance(batch, Packed) for batch in batches)
    for number, batch in enumerate(batches):
        of_it = rows[4 * number : 4 * number + 4]
        for part in ("tokens", "positions", "segments"):
            assert torch.equal(getattr(batch, part), torch.stack([getattr(row, part) for row in of_it]))
        assert batch.keys == tuple(row.keys for row in of_it)
        ends = batch.cu_seqlens
        assert ends.dtype == torch.int32
        assert ends[0] == 0
        assert ends[-1] == SEQ_LEN * len(of_it)
        assert batch.max_seqlen == int(ends.diff().max())
        starts = (batch.positions.flatten() == 0) & (batch.segments.flatten() > 0)
        padding = [SEQ_LEN * at + int(row.cu_seqlens[-1]) for at, row in enumerate(of_it)]
        expected = {*starts.nonzero().flatten().tolist(), *padding, SEQ_LEN * len(of_it)}
        assert set(ends.tolist()) == expected


def test_fields_and_rows_inside_samples_collate_too() -> None:
    """A map may put rows wherever it likes."""
    source = [{"a": document} for document in documents(12)]
    (batch, *_) = Pipeline(source).pack(SEQ_LEN).map(lambda row: {"row": row, "n": len(row.keys)}).batch(2)
    assert batch["row"].tokens["a"].shape == (2, SEQ_LEN)
    assert batch["n"].tolist() == [len(keys) for keys in batch["row"].keys]


def test_rows_are_collated_once() -> None:
    """A batch of batches has no `cu_seqlens`."""
    with Steps(Pipeline(documents()).pack(SEQ_LEN).batch(2).batch(2), "for") as steps:
        assert "rows can be batched once" in str(steps.outcomes(1)[0])


def same(row: Any, other: Any) -> bool:
    """Bit for bit, whatever it is made of."""
    if isinstance(row, Tensor):
        return row.dtype == other.dtype and torch.equal(row, other)
    if isinstance(row, dict):
        return row.keys() == other.keys() and all(same(row[name], other[name]) for name in row)
    if isinstance(row, Packed):
        return isinstance(other, Packed) and all(map(same, row, other))
    return bool(row == other)


@on_both_faces
@all_ways
def test_a_batch_of_rows_gives_its_rows_again(way: str, face: Face) -> None:
    """Whether or not padding follows the last document of a row, and with the keys of its documents in `BatchInfo`."""
    for source in (documents(), [{"a": document, "labels": document} for document in documents()]):
        packed = Pipeline(source).pack(SEQ_LEN, pad_value=-1, **WAYS[way])
        rows = list(packed)
        again = collect(packed.batch(3).unbatch().with_info(), face)
        assert len(again) == len(rows)
        assert all(same(row, before) for (row, _), before in zip(again, rows, strict=True))
        assert [info.keys for _, info in again] == [row.keys for row in rows]
    assert any(row.cu_seqlens[-1] < SEQ_LEN for row in rows) or "split" in way


@on_both_faces
def test_a_row_gives_its_documents_again(face: Face) -> None:
    """Under their own keys; in pieces where they were cut, and with the padding of `pad_to`."""
    source = documents()
    pairs = collect(Pipeline(source).pack(SEQ_LEN).unbatch().with_info(), face)
    assert sorted(info.keys[0] for _, info in pairs) == list(range(len(source)))
    assert all(same(document, source[info.keys[0]]) for document, info in pairs)
    long = [{"a": torch.arange(70), "b": torch.arange(70.0)}, {"a": torch.arange(3), "b": torch.arange(3.0)}]
    pieces = collect(Pipeline(long).pack(SEQ_LEN, strategy="split", pad_to=2).unbatch(), face)
    assert [(len(piece["a"]), len(piece["b"])) for piece in pieces] == [(32, 32), (32, 32), (6, 6), (4, 4)]


def test_unpacked_rows_and_documents_resume_exactly() -> None:
    """In the middle of a batch, and of a row."""
    packed = Pipeline(documents(24)).pack(SEQ_LEN)
    assert len(assert_resumes_exactly(lambda: packed.batch(3).unbatch())) > 6
    assert len(assert_resumes_exactly(lambda: packed.unbatch())) > 24


@on_both_faces
@pytest.mark.parametrize(
    "changed", [{"keys": ()}, {"keys": ((1,),)}, {"keys": ((),) * 9}, {"cu_seqlens": torch.zeros(2)}]
)
def test_a_batch_whose_rows_nobody_can_tell_apart_is_an_error(changed: dict[str, Any], face: Face) -> None:
    """In its place; the next batch is taken apart."""

    packed = Pipeline(documents(12)).pack(SEQ_LEN)
    first_keys = next(iter(packed)).keys

    def change(batch: Packed) -> Packed:
        return batch._replace(**changed) if batch.keys[0] == first_keys else batch

    with Steps(packed.batch(2).map(change).unbatch(), face) as steps:
        first, second = steps.outcomes(2)
    assert "put the map that changes them after unbatch()" in str(first)
    assert isinstance(second, Packed)


@on_both_faces
@pytest.mark.parametrize("batch", [None, 3])
def test_a_device_gets_all_tensors_of_a_row(batch: int | None, face: Face) -> None:
    """Keys and `max_seqlen` stay what they are."""
    backend = FakeBackend(seed=1)
    rows = Pipeline([{"a": document, "labels": document} for document in documents(12)]).pack(SEQ_LEN)
    loader = (rows if batch is None else rows.batch(batch)).to(backend)
    with backend.stream(backend.new_stream()), Steps(loader, face) as steps:
        row = steps.next()
        assert isinstance(row, Packed)
        tensors = [*row.tokens.values(), row.positions, row.segments, row.cu_seqlens]
        assert all(map(backend.owns, tensors))
        assert type(row.max_seqlen) is int
        assert len(row.keys) == (batch or len(row.cu_seqlens) - 1)
        del row, tensors
    loader.close()
    backend.verify()
    backend.close()


@on_both_faces
def test_a_row_names_its_documents(face: Face) -> None:
    """In `BatchInfo`, and in itself."""
    for row, info in collect(Pipeline(documents()).shuffle(seed=1).pack(SEQ_LEN).with_info(), face):
        assert info.keys == row.keys
        assert len(info.positions) == len(row.keys)
    for batch, info in collect(Pipeline(documents()).pack(SEQ_LEN).batch(2).with_info(), face):
        assert tuple(map(tuple, info.keys)) == batch.keys


@on_both_faces
def test_a_row_names_the_sources_of_its_documents(face: Face) -> None:
    """Wherever it is mixed, and in batches of rows for each row."""

    def pack(source: Any) -> Pipeline:
        return Pipeline(source).pack(SEQ_LEN)

    def mix(first: Any, second: Any) -> Pipeline:
        return Pipeline.mix({"a": first, "b": second}, {"a": 1, "b": 2})

    for rows in (pack(mix(documents(), documents())), mix(pack(documents()), pack(documents()))):
        seen = set()
        for row, info in collect(rows.with_info(), face):
            assert info.sources == tuple(key.source for key in info.keys)
            assert len(info.sources) == len(row.keys)
            seen.update(info.sources)
        assert seen == {0, 1}
        for batch, info in collect(rows.batch(2).with_info(), face):
            assert info.sources == tuple(tuple(key.source for key in keys) for keys in info.keys)
            assert list(map(len, info.sources)) == list(map(len, batch.keys))
        for _, info in collect(rows.batch(2).unbatch().unbatch().with_info(), face):
            assert info.sources in ((0,), (1,))


# -- what is no document -----------------------------------------------------------------------------------------------


@on_both_faces
@pytest.mark.parametrize(
    ("bad", "how", "error", "match"),
    [
        ([], {}, ValueError, "at least 1 token, got 0"),
        (torch.zeros(2, 2), {}, ValueError, r"one dimension, got shape \[2, 2\]"),
        (torch.tensor(3), {}, ValueError, "one dimension"),
        (torch.ones(3).to_sparse(), {}, TypeError, "must be dense, got layout torch.sparse_coo"),
        ("text", {}, TypeError, "tokenize it in a map before"),
        (7, {}, TypeError, "list of numbers"),
        (None, {}, TypeError, "list of numbers"),
        (["a"], {}, TypeError, "must hold numbers"),
        ([[1], [2, 3]], {}, TypeError, "must hold numbers"),
        ([1] * 40, {"too_long": "error"}, ValueError, "40 tokens, and a row has 32"),
        ([1, 2], {"length": lambda document: 3 if len(document) == 2 else len(document)}, ValueError, "3 tokens, and"),
        ([1, 2], {"length": lambda document: 2.0 if len(document) == 2 else len(document)}, TypeError, "got 2.0"),
        ({"a": [1]}, {}, ValueError, "same fields, those before it had none, got 'a'"),
        (torch.tensor([1], dtype=torch.uint8), {"pad_value": -1}, ValueError, "cannot hold the padding -1"),
        (torch.tensor([True]), {"pad_value": 5}, ValueError, "cannot hold the padding 5"),
    ],
)
def test_what_is_no_document_is_an_error_that_names_it(
    bad: Any, how: Any, error: type[Exception], match: str, face: Face
) -> None:
    """And costs no other one."""
    good = documents(3)
    loader = Pipeline(range(4)).map([good[0], good[1], bad, good[2]].__getitem__).pack(SEQ_LEN, **how)
    with Steps(loader, face) as steps:
        first, row = steps.outcomes()
    with pytest.raises(error, match=match):
        raise first
    assert "stage pack(32), key 2, epoch 0, position 2" in notes(first)
    assert row.keys == (0, 1, 3)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"a": [1, 2], "b": [1]}, "of one length, got a: 2, b: 1"),
        ({"a": [1, 2], "name": "x"}, "the field 'name' of a document must be a tensor"),
        ({}, "of one length, got none"),
        ({"a": [1], "c": [1]}, "had 'a', 'b', got 'a', 'c'"),
        ({"a": [], "b": []}, "at least 1 token"),
    ],
)
def test_fields_that_do_not_fit_are_told(bad: Any, match: str) -> None:
    """By name."""
    good = {"a": [1, 2], "b": [3, 4]}
    with Steps(Pipeline([good, bad, good]).pack(8), "for") as steps:
        error, row = steps.outcomes()
    assert isinstance(error, TypeError | ValueError)
    with pytest.raises(type(error), match=match):
        raise error
    assert "key 1," in notes(error)
    assert row.keys == (0, 2)


@on_both_faces
def test_a_failed_document_costs_no_other_one(face: Face) -> None:
    """Whether `skip_errors` is before or after."""

    def load(document: Tensor) -> Tensor:
        if int(document[0]) // 1000 % 7 == 2:
            raise RuntimeError("bad")
        return document

    expected = Counter(token for at, document in enumerate(documents()) if at % 7 != 2 for token in document.tolist())
    pipeline = Pipeline(documents()).map(load)
    with Steps(pipeline.pack(SEQ_LEN, pad_value=-1), face) as steps:
        outcomes = steps.outcomes()
    rows = [outcome for outcome in outcomes if isinstance(outcome, Packed)]
    assert len(outcomes) - len(rows) == len(range(2, 60, 7))
    assert all_tokens(rows) == expected
    assert all_tokens(collect(pipeline.skip_errors().pack(SEQ_LEN, pad_value=-1), face)) == expected
    assert all_tokens(collect(pipeline.pack(SEQ_LEN, pad_value=-1).skip_errors(), face)) == expected


def test_what_is_too_long_may_be_left_out() -> None:
    """And is counted."""
    loader = Pipeline([[1] * 9, [2] * 3]).pack(8, too_long="drop")
    (row,) = loader
    assert row.keys == (1,)
    assert sum(stage.dropped for stage in loader.stats().stages) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5])
def test_a_padding_that_integers_cannot_hold_is_told(value: float) -> None:
    """Floats can."""
    with Steps(Pipeline([[1, 2]]).pack(4, pad_value=value), "for") as steps:
        assert f"of dtype torch.int64 cannot hold the padding {value!r}" in str(steps.outcomes()[0])
    (row,) = Pipeline([[1.0, 2.0]]).pack(3, pad_value=value)
    assert repr(row.tokens[2].item()) == repr(value)


# -- ranks and resume --------------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[..., Pipeline]] = {
    **{way: lambda way=way, **how: loaded(**how).pack(SEQ_LEN, **WAYS[way]) for way in WAYS},
    "long documents": lambda **how: loaded(longest=150, count=25, **how).pack(SEQ_LEN, open_rows=4),
    "long documents, split": lambda **how: loaded(longest=150, count=25, **how).pack(SEQ_LEN, strategy="split"),
    "long documents, dropped": lambda **how: loaded(longest=50, **how).pack(SEQ_LEN, too_long="drop"),
    "errors": lambda **how: loaded(longest=60, **how).pack(SEQ_LEN, too_long="error", open_rows=4),
    "shuffled, in batches": lambda **how: loaded(shuffled=True, **how).pack(SEQ_LEN, open_rows=4).batch(3),
    "dealt": lambda **how: loaded(**how).pack(SEQ_LEN, open_rows=4).shard(1, 3).batch(2),
    "repeated": lambda **how: loaded(count=25, **how).pack(SEQ_LEN, open_rows=4).repeat(2),
    "a stream": lambda **_: Pipeline(lambda: iter(documents())).pack(SEQ_LEN, open_rows=4),
    "several sources": lambda **how: Pipeline.interleave(loaded(count=20, **how), documents(9)).pack(SEQ_LEN),
}


def loaded(*, concurrency: int = 4, shuffled: bool = False, **how: Any) -> Pipeline:
    pipeline = Pipeline(documents(**how))
    return (pipeline.shuffle(seed=2) if shuffled else pipeline).map(torch.clone, concurrency=concurrency)


@pytest.mark.parametrize("name", LOADERS)
def test_it_resumes_exactly_at_every_row(name: str) -> None:
    """With other concurrency, on both faces."""
    assert_resumes_exactly(LOADERS[name], variants=({}, {"concurrency": 1}, {"concurrency": 16}), epochs=1)


@pytest.mark.parametrize("batch", [None, 12])
def test_any_number_of_ranks_goes_on(batch: int | None) -> None:
    """With the rows that were to come, of all pairs of world sizes; in batches, with the same global batch."""

    def make(rank: int, world_size: int) -> Pipeline:
        rows = Pipeline(documents(300)).pack(SEQ_LEN, open_rows=4).shard(rank, world_size)
        return rows if batch is None else rows.batch(batch // world_size, drop_last=True)

    def rows_of(given: Any) -> list[Any]:
        return [row.tolist() for row in ([given.tokens] if batch is None else given.tokens)]

    whole = [row.tokens.tolist() for row in Pipeline(documents(300)).pack(SEQ_LEN, open_rows=4)]
    for before in (1, 2, 3, 4):
        states, gone = set(), 0
        for rank in range(before):
            loader = make(rank, before)
            with Steps(loader, "for") as steps:
                gone += sum(len(rows_of(steps.next())) for _ in range(3))
                states.add(json.dumps(loader.state_dict()))
                loader.close()
        (state,) = states
        for after in (1, 2, 3, 4):
            ranks = []
            for rank in range(after):
                loader = make(rank, after)
                loader.load_state_dict(json.loads(state))
                ranks.append([row for given in loader for row in rows_of(given)])
            assert len(set(map(len, ranks))) == 1
            dealt = [rows[number] for number in range(len(ranks[0])) for rows in ranks]
            expected = whole[gone:]
            assert dealt[: len(expected)] == expected[: len(dealt)]


def test_the_state_is_as_large_as_the_open_rows_and_no_larger() -> None:
    """However long the epoch is."""
    loader = Pipeline([torch.zeros(5 + number % 20) for number in range(4_000)]).pack(64, open_rows=8)
    sizes = [len(json.dumps(loader.state_dict())) for _ in loader]
    assert max(sizes) < 3_000


def test_a_document_that_changed_since_is_an_error() -> None:
    """Of its own; and one that fails now costs no other one."""
    source: list[Any] = documents(40)

    def load(number: int) -> Any:
        return source[number]

    changes: list[Callable[[Tensor], Any]] = [lambda tokens: tokens[:-1], lambda _: "broken"]
    for change in changes:
        loader = Pipeline(range(40)).map(load).pack(SEQ_LEN, open_rows=4, pad_value=-1)
        source[:] = documents(40)
        with Steps(loader, "for") as steps:
            before = [steps.next() for _ in range(5)]
            state = loader.state_dict()
            loader.close()
        code = json.loads(state["cursor"]["json"])["cursor"][5]
        in_a_row = code[0][1]  # the first document of the oldest open row
        source[in_a_row] = change(source[in_a_row])
        loader.load_state_dict(state)
        with Steps(loader, "for") as steps:
            error, *after = steps.outcomes()
            assert f"key {in_a_row}," in notes(error)
        seen = all_tokens(before + after)
        assert seen == Counter(
            t for at, document in enumerate(documents(40)) if at != in_a_row for t in document.tolist()
        )


@on_both_faces
def test_without_a_fixed_order_documents_come_again_rather_than_never(face: Face) -> None:
    """And the state says so."""

    async def later(document: Tensor) -> Tensor:
        return document

    def make() -> Pipeline:
        return Pipeline(documents()).map(later, ordered=False, concurrency=8).pack(SEQ_LEN, open_rows=4)

    for taken in range(1, 20, 5):
        loader = make()
        with Steps(loader, face) as steps:
            rows = [steps.next() for _ in range(taken)]
            state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        assert state["guarantee"] == "at-least-once"
        rest = make()
        rest.load_state_dict(state)
        rows += collect(rest, face)
        assert {key for row in rows for key in row.keys} == set(range(60))


@on_both_faces
def test_a_source_among_several_that_fails_costs_no_document(face: Face) -> None:
    """Of those that go on."""

    async def broken() -> Any:
        for document in documents(7):
            yield document
        raise OSError("gone")

    with Steps(Pipeline.interleave(broken, documents(30)).pack(SEQ_LEN, open_rows=4), face) as steps:
        outcomes = steps.outcomes()
    rows = [outcome for outcome in outcomes if isinstance(outcome, Packed)]
    assert len(rows) == len(outcomes) - 1
    assert Counter(key for row in rows for key in row.keys) == Counter(
        key for row in Pipeline.interleave(documents(7), documents(30)).pack(SEQ_LEN) for key in row.keys
    )


def broken_cursors() -> list[Any]:
    good = [None, 0, 3, 0, 1, [[0, 1, 0, 4]]]
    changes = [
        (1, 4), (1, -1), (2, "x"), (3, -1), (4, 0), (5, 3), (5, [3]), (5, [[]]), (5, [[0]]), (5, [[0, 1, 0]]),
        (5, [[0, 3, 0, 4]]), (5, [[0, 1, 4, 4]]), (5, [[0, 1, 0, 64]]), (5, [[0, 1, 0, 4]] * 2),
    ]  # fmt: skip
    return [*([*good[:at], value, *good[at + 1 :]] for at, value in changes), good[:5], 3]


@pytest.mark.parametrize("cursor", broken_cursors())
def test_a_broken_cursor_is_refused(cursor: Any) -> None:
    """When it is loaded."""
    loader = Pipeline(documents()).pack(SEQ_LEN)
    state = loader.state_dict()
    state["cursor"] = {"json": json.dumps(json.loads(state["cursor"]["json"]) | {"cursor": cursor})}
    state["batches"] = 1
    with pytest.raises(Exception, match=r"cursor|expected|state"):
        loader.load_state_dict(state)


# -- arguments ---------------------------------------------------------------------------------------------------------


async def awaited(document: Any) -> int:
    return len(document)


@pytest.mark.parametrize(
    ("seq_len", "how", "error", "match"),
    [
        (0, {}, ValueError, "seq_len must be at least 1"),
        ("8", {}, TypeError, "seq_len"),
        (8, {"open_rows": 0}, ValueError, "open_rows"),
        (8, {"max_documents": 0}, ValueError, "max_documents"),
        (8, {"strategy": "worst_fit"}, ValueError, "'best_fit', 'first_fit', 'split'"),
        (8, {"too_long": "alone"}, ValueError, "'split', 'drop', 'error'"),
        (8, {"pad_to": 0}, ValueError, "pad_to"),
        (8, {"pad_to": 3}, ValueError, "seq_len=9"),
        (8, {"pad_value": "0"}, TypeError, "pad_value"),
        (8, {"pad_value": {"labels": None}}, TypeError, "pad_value"),
        (8, {"length": 3}, TypeError, "length must be a function"),
        (8, {"length": awaited}, TypeError, "sync function"),
    ],
)
def test_bad_arguments_are_refused_at_once(seq_len: Any, how: Any, error: type[Exception], match: str) -> None:
    """With the rule and what was found."""
    with pytest.raises(error, match=match):
        Pipeline(documents()).pack(seq_len, **how)


def test_its_length_is_not_known() -> None:
    """Only running it tells."""
    with pytest.raises(TypeError, match="as many rows as the lengths"):
        len(Pipeline(documents()).pack(SEQ_LEN))
