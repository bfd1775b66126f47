"""`Objects`: whole objects and ranges, by keys and by listings, from memory, folders, S3 and HTTP."""

import gc
import pickle
import sys
import warnings
from itertools import repeat
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.exceptions import PermissionDeniedError
from obstore.store import HTTPStore, LocalStore, MemoryStore, S3Store

from aioloader import BrokenDataError, DataLoader, Pipeline
from aioloader.core.memory import tensor_over_bytes
from aioloader.core.source import CursorSource
from aioloader.sources import Objects, ParquetRows, TarShards
from aioloader.testing import Gate
from tests._cursor_sources import assert_opens_at_every_cursor, outcomes
from tests._servers import HttpServer, S3Server
from tests._support import Child, Face, Started, Steps, collect, notes, on_both_faces

KEYS = [f"train/{number:03}" for number in range(20)]


def filled(store: Any, keys: list[str] = KEYS) -> Any:
    """`store` with objects of 10 bytes, the number of each in `keys`."""
    for number, key in enumerate(keys):
        obstore.put(store, key, bytes([number]) * 10)
    return store


@pytest.fixture
def memory() -> MemoryStore:
    return filled(MemoryStore())  # type: ignore[no-any-return]


# -- by keys -----------------------------------------------------------------------------------------------------------


@on_both_faces
def test_objects_come_in_the_order_of_their_keys(memory: MemoryStore, face: Face) -> None:
    loader = Pipeline(Objects(memory, [KEYS[3], KEYS[1], KEYS[3]]))
    assert len(loader) == 3
    assert collect(loader, face) == [bytes([3]) * 10, bytes([1]) * 10, bytes([3]) * 10]


def test_the_three_ways_to_read(memory: MemoryStore) -> None:
    assert list(Pipeline(Objects(memory, KEYS[:1]))) == [bytes(10)]
    (buffer,) = Pipeline(Objects(memory, KEYS[1:2], read="buffer"))
    assert type(buffer) is obstore.Bytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tensor,) = Pipeline(Objects(memory, KEYS[2:3], read="tensor"))
    assert torch.equal(tensor, torch.full((10,), 2, dtype=torch.uint8))


def test_a_sample_may_come_with_its_key(memory: MemoryStore) -> None:
    assert list(Pipeline(Objects(memory, KEYS[1:2], with_key=True))) == [(KEYS[1], bytes([1]) * 10)]
    assert list(Pipeline(Objects(memory, prefix="train", with_key=True)).take(1)) == [(KEYS[0], bytes(10))]


@on_both_faces
def test_shuffle_is_a_full_permutation_and_batches_follow(memory: MemoryStore, face: Face) -> None:
    loader = Pipeline(Objects(memory, KEYS, read="tensor")).shuffle(seed=1).map(lambda sample: sample[0]).batch(5)
    first, second = collect(loader, face), collect(loader, face)
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == list(range(20))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert len(loader) == len(first) == 4


@on_both_faces
def test_the_drop_in_takes_it_as_a_dataset(memory: MemoryStore, face: Face) -> None:
    objects = Objects(memory, KEYS, read="tensor", concurrency=7)
    loader = DataLoader(objects, batch_size=8, shuffle=True, seed=0)
    assert loader.concurrency == 7
    batches = collect(loader, face)
    assert [tuple(batch.shape) for batch in batches] == [(8, 10), (8, 10), (4, 10)]
    assert sorted(torch.cat(batches)[:, 0].tolist()) == list(range(20))
    assert DataLoader(objects, concurrency=3).concurrency == 3


def test_a_sampler_gives_the_numbers_of_keys(memory: MemoryStore) -> None:
    assert list(Pipeline(Objects(memory, KEYS), sampler=[5, 2])) == [bytes([5]) * 10, bytes([2]) * 10]


# -- by a listing ------------------------------------------------------------------------------------------------------


@on_both_faces
def test_a_prefix_is_listed_page_by_page(face: Face) -> None:
    """More than a page, in the order of the keys, and nothing of what is beside."""
    store = MemoryStore()
    keys = [f"train/{number:04}" for number in range(1500)]
    for key in [*keys, "training/no", "test/no", "train"]:
        obstore.put(store, key, key.encode())
    for prefix in ("train", "train/"):
        assert collect(Pipeline(Objects(store, prefix=prefix)).map(bytes.decode), face) == keys
    assert len(collect(Pipeline(Objects(store, prefix="")), face)) == 1503


def listing(store: Any, prefix: str) -> CursorSource:
    keys = Objects(store, prefix=prefix).keys
    assert isinstance(keys, CursorSource)
    return keys


def test_a_listing_opens_at_every_cursor(tmp_path: Path) -> None:
    """Also in a folder, which the system lists in no order."""
    keys = ["b/1", "a/b", "a-b", "a.b", "a/a", "c", "b/0", "z/9", "b0"]
    for store in (filled(MemoryStore(), keys), filled(LocalStore(tmp_path), keys)):
        assert assert_opens_at_every_cursor(listing(store, "")) == sorted(keys)


def test_a_listing_may_be_behind_its_end(memory: MemoryStore) -> None:
    assert outcomes(listing(memory, "train/"), cursor="train/999") == []


@on_both_faces
def test_a_prefix_without_objects_is_an_error_that_says_what_was_searched(memory: MemoryStore, face: Face) -> None:
    with Steps(Pipeline(Objects(memory, prefix="validation/")), face) as steps:
        found = steps.outcomes()
    assert len(found) == 1
    assert isinstance(found[0], FileNotFoundError)
    assert "Objects: no object below the prefix 'validation/' in <obstore.store.MemoryStore" in str(found[0])


def test_it_can_be_sharded_and_shuffled_as_any_stream(memory: MemoryStore) -> None:
    loader = Pipeline(Objects(memory, prefix="train"))
    parts = [list(loader.shard(rank, 2).shuffle(buffer_size=4)) for rank in range(2)]
    assert sorted(sample[0] for part in parts for sample in part) == list(range(20))


def test_a_listing_has_no_length_and_no_numbers(memory: MemoryStore) -> None:
    objects = Objects(memory, prefix="train")
    with pytest.raises(TypeError, match="has no length"):
        len(objects)
    with pytest.raises(TypeError, match="has no length"):
        len(Pipeline(objects))
    with pytest.raises(TypeError, match="has no length, as it lists while it reads; pass it to Pipeline"):
        DataLoader(objects, shuffle=True)


@on_both_faces
@pytest.mark.parametrize("how", ["keys, shuffled", "keys, in the drop-in", "prefix", "prefix, in a buffer"])
def test_it_goes_on_where_its_state_says(memory: MemoryStore, face: Face, how: str) -> None:
    """With any concurrency; for a listing from the last key on."""

    def loader(concurrency: int) -> Any:
        keyed = Objects(memory, KEYS, read="tensor", concurrency=concurrency)
        listed = Objects(memory, prefix="train", read="tensor", concurrency=concurrency)
        match how:
            case "keys, shuffled":
                return Pipeline(keyed).shuffle(seed=3).batch(3)
            case "keys, in the drop-in":
                return DataLoader(keyed, batch_size=3, shuffle=True, seed=3)
            case "prefix":
                return Pipeline(listed).batch(3)
        return Pipeline(listed).shuffle(buffer_size=5, seed=3).batch(3)

    whole = [batch[:, 0].tolist() for batch in collect(loader(64), face)]
    first = loader(5)
    with Steps(first, face) as steps:
        assert [batch[:, 0].tolist() for batch in steps.rest(3)] == whole[:3]
        state = pickle.loads(pickle.dumps(first.state_dict()))
    second = loader(2)
    second.load_state_dict(state)
    assert [batch[:, 0].tolist() for batch in collect(second, face)] == whole[3:]


# -- ranges ------------------------------------------------------------------------------------------------------------


def test_ranges_as_one_pair_a_mapping_and_a_sequence() -> None:
    store = MemoryStore()
    for name in "ab":
        obstore.put(store, name, f"{name}123456789".encode())
    assert list(Pipeline(Objects(store, ["a", "b"], ranges=(0, 2)))) == [b"a1", b"b1"]
    assert list(Pipeline(Objects(store, ["a", "b"], ranges={"b": (1, 3)}))) == [b"a123456789", b"12"]
    assert list(Pipeline(Objects(store, ["a", "a", "b"], ranges=[(0, 1), (1, 3), None]))) == [
        b"a",
        b"12",
        b"b123456789",
    ]
    assert list(Pipeline(Objects(store, ["a"], ranges=[[0, 10]]))) == [b"a123456789"]
    assert list(Pipeline(Objects(store, prefix="", ranges=(0, 2)))) == [b"a1", b"b1"]
    assert list(Pipeline(Objects(store, prefix="", ranges={"a": (0, 2)}))) == [b"a1", b"b123456789"]


@on_both_faces
def test_a_range_that_an_object_does_not_have_stands_at_its_place(memory: MemoryStore, face: Face) -> None:
    """Stores give what there is, without a word."""
    loader = Pipeline(Objects(memory, KEYS[:3], ranges=[(0, 2), (8, 12), (0, 2)]))
    with Steps(loader, face) as steps:
        found = steps.outcomes()
    assert [found[0], found[2]] == [bytes(2), bytes([2, 2])]
    assert isinstance(found[1], BrokenDataError)
    assert str(found[1]) == f"the object '{KEYS[1]}' ends at byte 10, but bytes 8 to 12 were requested"
    assert f"aioloader: object '{KEYS[1]}', bytes 8 to 12 of <obstore" in notes(found[1])


# -- real stores -------------------------------------------------------------------------------------------------------


@on_both_faces
def test_s3_by_keys_by_prefix_and_by_ranges(s3_server: S3Server, face: Face) -> None:
    store = filled(s3_server.store(s3_server.make_bucket()))
    obstore.put(store, "train/empty", b"")
    contents = [bytes([number]) * 10 for number in range(20)]
    assert collect(Pipeline(Objects(store, KEYS)), face) == contents
    assert collect(Pipeline(Objects(store, prefix="train")), face) == [*contents, b""]
    assert collect(Pipeline(Objects(store, KEYS, ranges=(2, 4))), face) == [content[:2] for content in contents]
    assert assert_opens_at_every_cursor(listing(store, "train/")) == [*KEYS, "train/empty"]
    del store


@on_both_faces
def test_a_key_that_is_missing_stands_at_its_place(s3_server: S3Server, face: Face) -> None:
    store = filled(s3_server.store(s3_server.make_bucket()), ["a", "c"])
    with Steps(Pipeline(Objects(store, ["a", "b", "c"])), face) as steps:
        found = steps.outcomes()
    assert [found[0], found[2]] == [bytes(10), bytes([1]) * 10]
    assert isinstance(found[1], FileNotFoundError)
    assert "Object at location b not found" in str(found[1])
    assert notes(found[1]).splitlines() == [
        f"aioloader: object 'b' of {store!r}",
        "aioloader: stage Objects.fetch, key 'b', epoch 0, position 1",
    ]
    del store


@on_both_faces
def test_what_goes_wrong_on_the_wire(http_server: HttpServer, face: Face) -> None:
    """What is worth it is tried again by the store; what is not stands at its place, and the next object follows."""
    names = ["fine", "busy", "reset", "broken", "gone", "secret", "last"]
    http_server.files = {name: name.encode() for name in names if name != "gone"}
    http_server.faults = {
        "busy": iter([503, 500]),
        "reset": iter(["reset"]),
        "broken": repeat(500),
        "secret": repeat(403),
    }
    store = http_server.store()
    with Steps(Pipeline(Objects(store, names)), face) as steps:
        found = steps.outcomes()
    assert [found[place] for place in (0, 1, 2, 6)] == [b"fine", b"busy", b"reset", b"last"]
    for place, kind in ((3, Exception), (4, FileNotFoundError), (5, PermissionDeniedError)):
        assert isinstance(found[place], kind), found[place]
        assert f"aioloader: object '{names[place]}' of " in notes(found[place])
    del store


@on_both_faces
def test_a_body_that_is_cut_off_is_no_sample(http_server: HttpServer, face: Face) -> None:
    http_server.files = {"cut": bytes(1000), "next": b"next"}
    http_server.faults = {"cut": repeat("truncated")}
    store = http_server.store()
    with Steps(Pipeline(Objects(store, ["cut", "next"])), face) as steps:
        found = steps.outcomes()
    assert isinstance(found[0], Exception)
    assert "aioloader: object 'cut' of " in notes(found[0])
    assert found[1:] == [b"next"]
    del store


@on_both_faces
@pytest.mark.parametrize("concurrency", [1, 5])
def test_so_many_requests_are_under_way_and_no_more(http_server: HttpServer, face: Face, concurrency: int) -> None:
    http_server.files = {key: key.encode() for key in KEYS}
    http_server.gate = gate = Gate()
    store = http_server.store()
    loader = Pipeline(Objects(store, KEYS, concurrency=concurrency))

    def open_when_full() -> None:
        gate.wait_arrived(concurrency)
        gate.open_all()

    with Steps(loader, face) as steps:
        opening = Started(open_when_full)
        assert steps.rest() == [key.encode() for key in KEYS]
        opening.outcome()
    assert http_server.at_once == concurrency
    del store


@on_both_faces
def test_an_epoch_that_is_left_lets_go_of_its_requests(http_server: HttpServer, face: Face) -> None:
    """While some of them wait for their answers; the fixtures look for what is left."""
    http_server.files = {key: key.encode() for key in KEYS}
    http_server.gate = gate = Gate()
    gate.open(KEYS[0])
    store = http_server.store()
    with Steps(Pipeline(Objects(store, KEYS)), face) as steps:
        assert steps.next() == KEYS[0].encode()
        steps.until_arrived(gate, len(KEYS))
    gate.open_all()
    del store


def test_a_process_that_ends_with_requests_under_way_ends_quietly(http_server: HttpServer) -> None:
    """Answers come when the loop is gone."""
    http_server.files = {key: key.encode() for key in KEYS}
    http_server.gate = gate = Gate()
    gate.open(KEYS[0])
    script = """
        import sys
        from obstore.store import HTTPStore
        from aioloader import Pipeline
        from aioloader.sources import Objects, ParquetRows, TarShards

        store = HTTPStore(sys.argv[1], client_options={"allow_http": True})
        for sample in Pipeline(Objects(store, sys.argv[2:])):
            print(sample.decode(), flush=True)
            break
    """
    with Child(script, http_server.url, *KEYS) as child:
        child.until_line(KEYS[0])
        gate.open_all()
        assert child.finish() == (0, "", "")


HURRY: dict[str, Any] = {"client_options": {"timeout": "200ms"}, "retry_config": {"max_retries": 0}}


@on_both_faces
def test_an_object_that_hangs_is_given_up_as_soon_as_you_say(http_server: HttpServer, face: Face) -> None:
    """By the store's defaults it would take three minutes, and all behind it would wait."""
    http_server.files = {key: key.encode() for key in ("a", "b.tar", "c")}
    http_server.gate = gate = Gate()
    gate.open("a")
    gate.open("c")
    store = HTTPStore(http_server.url, client_options={"allow_http": True})
    for loader in (
        Pipeline(Objects(store, ["a", "b.tar", "c"], **HURRY)),
        Pipeline(TarShards("b.tar", store=store, **HURRY)),
        Pipeline(TarShards(f"{http_server.url}/b.tar", **HURRY)),
        Pipeline(ParquetRows("b.tar", store=store, **HURRY)),
    ):
        with Steps(loader, face) as steps:
            found = steps.outcomes()
        (error,) = [outcome for outcome in found if isinstance(outcome, Exception)]
        assert found[:1] + found[2:] in ([error], [b"a", b"c"])
        assert "b.tar" in notes(error)
        del found, error
    gate.open_all()
    del store, loader


def test_what_a_store_has_besides_stays() -> None:
    store = S3Store("bucket", prefix="a/b", region="here", client_options={"allow_http": True})
    other = Objects(store, ["a"], **HURRY)._store
    assert type(other) is S3Store
    assert (other.prefix, other.config) == (store.prefix, store.config)
    assert other.client_options == {"allow_http": "true", "timeout": "200ms"}
    assert other.retry_config is not None
    assert other.retry_config["max_retries"] == 0
    assert Objects(store, ["a"])._store is store


def test_a_store_that_waits_for_nobody_takes_no_timeouts(memory: MemoryStore, tmp_path: Path) -> None:
    for store in (memory, LocalStore(tmp_path)):
        with pytest.raises(
            ValueError, match="takes client_options and retry_config for a store that is reached over a network, got "
        ):
            Objects(store, ["a"], **HURRY)
    with pytest.raises(ValueError, match="takes client_options and retry_config for a store, got paths"):
        ParquetRows(tmp_path / "x.parquet", **HURRY)
    with pytest.raises(ValueError, match="takes client_options and retry_config for a store, got paths"):
        TarShards(tmp_path / "x.tar", **HURRY)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_tensor_shares_the_memory_and_keeps_it_alive() -> None:
    class Memory(bytearray):
        pass

    memory = Memory(b"abc")
    tensor = tensor_over_bytes(memory)
    assert tensor.tolist() == [97, 98, 99]
    memory[0] = 0
    assert tensor.tolist() == [0, 98, 99]
    assert sys.getrefcount(memory) == 3
    view = tensor[1:]
    del tensor
    gc.collect()
    assert sys.getrefcount(memory) == 3
    del view
    assert sys.getrefcount(memory) == 2
    assert tensor_over_bytes(b"").shape == (0,)
    assert tensor_over_bytes(memoryview(b"xyz")[1:]).tolist() == [121, 122]
    with pytest.raises(TypeError):
        tensor_over_bytes(3)
    with pytest.raises(BufferError):
        tensor_over_bytes(memoryview(b"abcdef")[::2])


# -- bad arguments -----------------------------------------------------------------------------------------------------


def test_arguments_that_cannot_work_are_refused_where_they_are_written(memory: MemoryStore) -> None:
    def refused(kind: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(kind, match=match):
            Objects(*args, **kwargs)

    refused(TypeError, "Objects takes a store of obstore, got 's3://bucket' of type str; pass", "s3://bucket", ["a"])
    refused(ValueError, "takes either keys or prefix, got neither; prefix='' means all objects", memory)
    refused(ValueError, "takes either keys or prefix, got both", memory, ["a"], prefix="")
    refused(TypeError, "prefix must be a str, got 3 of type int", memory, prefix=3)
    refused(TypeError, r"keys must be a sequence of str, got 'a' of type str; for one object pass \[key\]", memory, "a")
    refused(TypeError, "keys must be a sequence of str, got <generator", memory, (key for key in "ab"))
    refused(TypeError, "keys must be str, got 1 of type int", memory, ["a", 1])
    refused(ValueError, "Objects needs at least one key, got none", memory, [])
    refused(ValueError, "read must be 'bytes', 'tensor' or 'buffer', got 'array'", memory, ["a"], read="array")
    refused(ValueError, "concurrency must be at least 1, got 0", memory, ["a"], concurrency=0)
    refused(ValueError, "ranges must be as many as keys, got 1 for 2", memory, ["a", "b"], ranges=[(0, 1)])
    refused(TypeError, "ranges must be a pair .* got 3 of type int", memory, ["a"], ranges=3)
    refused(
        TypeError, r"a range must be a pair of integers \(start, end\), got 'ab' for 'a'", memory, ["a"], ranges=["ab"]
    )
    refused(ValueError, r"a range must be 0 <= start < end, got \(3, 3\) for 'a'", memory, ["a"], ranges={"a": (3, 3)})
    refused(ValueError, r"a range must be 0 <= start < end, got \(-1, 3\)", memory, ["a"], ranges=(-1, 3))
    refused(TypeError, "with prefix, ranges must be one pair", memory, prefix="a", ranges=[(0, 1), (0, 2)])


def test_without_obstore_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ImportError, match=r"Objects needs the package obstore: pip install 'aioloader\[objects\]'"):
        Objects(object(), ["a"])


def test_it_can_be_pickled_where_the_store_can(tmp_path: Path) -> None:
    filled(LocalStore(tmp_path))
    objects = pickle.loads(pickle.dumps(Objects(LocalStore(tmp_path), prefix="train")))
    assert len(list(Pipeline(objects))) == 20
