"""`aioloader.memory`: blocks are lent, come back when the last view has died, and are lent again."""

import gc
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset

from aioloader import DataLoader
from aioloader.core.memory import tensor_over
from aioloader.memory.lease import lease
from aioloader.memory.pool import IDLE_ALLOCATIONS, SMALLEST_BYTES, BatchMemory
from tests._support import Child, Started

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[BatchMemory]:
    """Memory that holds nothing after the test."""
    memory = BatchMemory()
    yield memory
    memory.close()
    gc.collect()
    assert memory.bytes_held == 0


def a_batch(memory: BatchMemory, value: int, nbytes: int = MIB) -> torch.Tensor:
    """A batch full of `value`."""
    return memory.alloc((nbytes // 4,), torch.int32).fill_(value)


def make_cycle(tensor: torch.Tensor) -> None:
    """Leave garbage behind that only the collector finds, and that holds `tensor`."""
    cycle: list[Any] = [tensor]
    cycle.append(cycle)


# -- leases ------------------------------------------------------------------------------------------------------------


def test_on_free_is_called_once_when_the_last_view_has_died() -> None:
    """A slice of a view of the tensor is enough to keep the lease."""
    freed: list[str] = []
    tensor = tensor_over(lease(bytearray(64), 64, lambda: freed.append("freed")), (4, 4), torch.float32)
    view = tensor.view(torch.uint8)[1:]
    del tensor
    last = view.numpy()[0, 0:1]
    del view
    assert freed == []
    del last
    assert freed == ["freed"]


def test_a_lease_over_any_writable_buffer_reads_and_writes_it() -> None:
    """What is written to the tensor stands in the block: for instance a shared memory segment."""
    block = mmap.mmap(-1, 4096)
    tensor = tensor_over(lease(block, 4096, list), (2, 2), torch.int64, offset=64).fill_(7)
    assert int.from_bytes(block[64:72], sys.byteorder) == 7
    assert tensor.untyped_storage().nbytes() == 32
    with pytest.raises(BufferError):
        block.close()
    del tensor
    block.close()


@pytest.mark.parametrize("block", [b"read-only", bytearray(3)])
def test_a_block_that_cannot_be_lent_is_refused(block: Any) -> None:
    """Read-only, or too small."""
    with pytest.raises((TypeError, ValueError)):
        lease(block, 9, list)


def test_on_free_may_lend_the_block_again_at_once() -> None:
    """The dead lease still exports the buffer while `on_free` runs, which does not matter."""
    block = bytearray(8)
    again: list[Any] = []
    lent = lease(block, 8, lambda: again.append(lease(block, 8, list)))
    del lent
    again[0][0:2] = b"hi"
    assert block[:2] == b"hi"


def test_what_on_free_raises_is_reported_and_goes_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch dies wherever the user drops it, which is no place for an exception of ours."""
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))

    def fail() -> None:
        raise LookupError

    lease(bytearray(8), 8, fail)
    assert reported == [LookupError]


def test_a_tensor_over_a_lease_is_no_view() -> None:
    """It has no base, so autograd's rules for views do not hold for it."""
    tensor = tensor_over(lease(bytearray(48), 48, list), (3, 4), torch.float32)
    assert not tensor._is_view()
    assert tensor._base is None
    assert tensor.is_contiguous()


# -- used again ----------------------------------------------------------------------------------------------------


def test_a_dropped_batch_is_the_next_ones_memory(memory: BatchMemory) -> None:
    """One block serves them all."""
    addresses = {a_batch(memory, value).data_ptr() for value in range(1000)}
    assert len(addresses) == 1
    assert (memory.blocks_made, memory.blocks_reused) == (1, 999)
    assert memory.bytes_held == MIB


def test_a_consumer_that_holds_the_last_batch_needs_two_blocks(memory: BatchMemory) -> None:
    """As `for batch in loader` does: the old one is dropped when the new one is there."""
    for value in range(1000):
        batch = a_batch(memory, value)
    assert batch[0] == 999
    assert memory.blocks_made == 2


def test_kept_batches_keep_their_memory(memory: BatchMemory) -> None:
    """Nobody overwrites them."""
    kept = [a_batch(memory, value) for value in range(20)]
    assert memory.blocks_made == 20
    assert all((batch == value).all() for value, batch in enumerate(kept))


DTYPES = [
    value
    for name in sorted(vars(torch))
    if isinstance(value := getattr(torch, name), torch.dtype) and "torch.q" not in str(value)
]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", sorted(set(DTYPES), key=str), ids=str)
def test_every_dtype_gets_memory_like_torchs(memory: BatchMemory, dtype: torch.dtype) -> None:
    """bool, complex, bfloat16, float8 and whatever else there is."""
    ours, torchs = memory.alloc((MIB, 1), dtype), torch.empty((MIB, 1), dtype=dtype)
    assert (ours.dtype, ours.shape, ours.stride()) == (torchs.dtype, torchs.shape, torchs.stride())
    assert ours.untyped_storage().nbytes() == torchs.untyped_storage().nbytes()
    assert memory.blocks_made == 1


@pytest.mark.parametrize("shape", [(0,), (0, MIB), (), (SMALLEST_BYTES - 1,)], ids=str)
def test_small_and_empty_tensors_are_torchs(memory: BatchMemory, shape: tuple[int, ...]) -> None:
    """malloc has them at hand."""
    tensor = memory.alloc(shape, torch.uint8)
    assert tensor.shape == shape
    assert memory.blocks_made == 0


def test_the_default_device_of_the_caller_does_not_matter(memory: BatchMemory) -> None:
    """Batches are collated on the host."""
    with torch.device("meta"):
        tensors = [memory.alloc((2 * MIB,), torch.uint8), memory.alloc((2,), torch.uint8)]
    assert [tensor.device.type for tensor in tensors] == ["cpu", "cpu"]


@pytest.mark.parametrize("nbytes", [MIB, MIB + 1, 3 * MIB - 1, 9 * MIB, 38535168, 100 * MIB])
def test_a_block_is_at_most_a_quarter_larger_than_its_batch(memory: BatchMemory, nbytes: int) -> None:
    """And always large enough."""
    tensor = memory.alloc((nbytes,), torch.uint8)
    assert nbytes <= memory.bytes_held <= nbytes * 5 // 4
    tensor[-1] = 1


def test_a_shorter_last_batch_takes_the_block_of_a_full_one(memory: BatchMemory) -> None:
    """Down to half of the size."""
    for nbytes in (8 * MIB, 5 * MIB, 4 * MIB, 8 * MIB):
        a_batch(memory, 1, nbytes)
    assert memory.blocks_made == 1


def test_a_tiny_batch_does_not_hold_a_large_block(memory: BatchMemory) -> None:
    """Whoever keeps it would keep all of the block."""
    a_batch(memory, 1, 8 * MIB)
    tiny = a_batch(memory, 2, 2 * MIB)
    assert memory.blocks_made == 2
    assert tiny[0] == 2


# -- bounded -------------------------------------------------------------------------------------------------------


def test_a_peak_is_given_back(memory: BatchMemory) -> None:
    """Blocks that nobody needs for `IDLE_ALLOCATIONS` allocations are dropped."""
    kept = [a_batch(memory, value) for value in range(50)]
    del kept
    for value in range(IDLE_ALLOCATIONS + 2):
        a_batch(memory, value)
    assert memory.bytes_held == MIB
    assert memory.blocks_made == 50


def test_sizes_that_are_not_used_any_more_are_given_back(memory: BatchMemory) -> None:
    """Also when the sizes in use are larger."""
    for nbytes in (MIB, 4 * MIB, 16 * MIB):
        a_batch(memory, 1, nbytes)
    assert memory.bytes_held == 21 * MIB
    for value in range(IDLE_ALLOCATIONS + 2):
        a_batch(memory, value, 64 * MIB)
    assert memory.bytes_held == 64 * MIB


@given(st.lists(st.integers(MIB, 64 * MIB), min_size=1, max_size=400), st.integers(1, 6))
@settings(max_examples=20)
def test_batches_of_many_sizes_hold_a_bounded_amount(sizes: list[int], out: int) -> None:
    """Nothing is touched here, so that no memory is really used. Each block fits its batch at most twice."""
    memory = BatchMemory()
    batches: deque[torch.Tensor] = deque(maxlen=out)
    for size in sizes:
        batches.append(memory.alloc((size,), torch.uint8))
        assert memory.bytes_held <= (IDLE_ALLOCATIONS + 2 * out + 1) * 80 * MIB
    assert memory.blocks_made + memory.blocks_reused == len(sizes)
    batches.clear()
    memory.close()
    assert memory.bytes_held == 0


def test_torchs_memory_serves_when_the_system_gives_no_mapping(
    memory: BatchMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what lay free is given back first."""
    a_batch(memory, 1)

    def refuse(*_: object, **__: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("aioloader.memory.pool.mmap.mmap", refuse)
    assert a_batch(memory, 5, 16 * MIB)[-1] == 5
    assert (memory.blocks_made, memory.bytes_held) == (1, 0)


# -- close -----------------------------------------------------------------------------------------------------------


def test_close_drops_free_blocks_and_later_those_that_come_back(memory: BatchMemory) -> None:
    """A batch that is kept stays as it is, and its block is unmapped when it dies."""
    kept, dropped = a_batch(memory, 3), a_batch(memory, 4)
    del dropped
    memory.close()
    memory.close()
    assert memory.bytes_held == MIB
    assert (kept == 3).all()
    del kept
    assert memory.bytes_held == 0


def test_after_close_memory_is_torchs(memory: BatchMemory) -> None:
    """An epoch that is still under way goes on."""
    memory.close()
    assert a_batch(memory, 1)[0] == 1
    assert memory.blocks_made == 0


def test_a_kept_batch_does_not_keep_the_rest() -> None:
    """With the memory object itself gone, only the block of that batch is left."""
    memory = BatchMemory()
    kept, other = a_batch(memory, 1), a_batch(memory, 2)
    blocks = weakref.WeakSet(memory._alive)
    del other
    gone = weakref.ref(memory)
    del memory
    gc.collect()
    assert gone() is None
    assert len(blocks) == 1
    assert (kept == 1).all()
    del kept
    assert len(blocks) == 0


# -- threads, garbage and forks --------------------------------------------------------------------------------------


def test_batches_dropped_in_other_threads_come_back(memory: BatchMemory) -> None:
    """Made in one thread, dropped in another."""
    for value in range(20):
        batch = [a_batch(memory, value)]
        Started(batch.clear).outcome()
    assert memory.blocks_made == 1


def test_many_threads_never_share_a_block(memory: BatchMemory) -> None:
    """Each finds its own value in what it holds, while others take and drop."""
    everybody_is_here = threading.Barrier(4)

    def work(number: int) -> None:
        everybody_is_here.wait()
        held: deque[tuple[int, torch.Tensor]] = deque(maxlen=3)
        for step in range(200):
            held.append((number * 1000 + step, a_batch(memory, number * 1000 + step)))
            assert all(bool((batch[:: MIB // 64] == value).all()) for value, batch in held)

    for thread in [Started(lambda number=number: work(number)) for number in range(4)]:  # type: ignore[misc]
        thread.outcome()
    assert memory.blocks_made <= 20  # those that are held, the new one, and one that a frame still refers to


def test_a_batch_in_a_cycle_comes_back_when_it_is_collected(memory: BatchMemory) -> None:
    """The callback then runs inside the garbage collector."""
    make_cycle(a_batch(memory, 1))
    gc.collect()
    a_batch(memory, 2)
    assert memory.blocks_made == 1


def test_a_batch_may_die_while_its_thread_holds_the_lock(memory: BatchMemory) -> None:
    """As when the collector runs inside `alloc`: nothing waits for the lock, and the next `alloc` finds the block."""
    make_cycle(a_batch(memory, 1))

    def die_inside() -> None:
        with memory._lock:
            gc.collect()

    Started(die_inside).outcome()
    a_batch(memory, 2)
    assert memory.blocks_made == 1


def test_a_finalizer_that_asks_for_a_batch_inside_alloc_gets_one(memory: BatchMemory) -> None:
    """The lock is reentrant: user code may run wherever objects are freed."""

    def ask_inside() -> int:
        with memory._lock:
            return int(a_batch(memory, 5)[0])

    assert Started(ask_inside).outcome() == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork_parent_and_child_have_their_own() -> None:
    """Live batches are apart from then on, and the child's memory works though a thread of its parent had the lock."""
    script = """
    import os, threading, torch
    from aioloader.memory.pool import BatchMemory

    torch.set_num_threads(1)  # the OpenMP threads of a parent do not live in its child, which would wait for them
    memory = BatchMemory()
    def batch(value):
        return memory.alloc((1 << 20,), torch.uint8).fill_(value)

    free, kept = batch(9), batch(1)
    del free
    locked, forked = threading.Event(), threading.Event()
    def hold():
        with memory._lock:
            locked.set()
            forked.wait()
    threading.Thread(target=hold).start()
    locked.wait()
    child = os.fork()
    if child == 0:
        assert (kept == 1).all()
        kept.fill_(2)
        del kept
        made = [batch(value) for value in range(3)]
        assert all((b == value).all() for value, b in enumerate(made))
        assert memory.blocks_made == 3, "the child starts without free blocks"
        del made
        batch(4)
        assert memory.blocks_made == 3
        os._exit(0)
    forked.set()
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert (kept == 1).all(), "the child wrote into its parent's batch"
    del kept
    batch(3)
    assert (memory.blocks_made, memory.blocks_reused) == (2, 1)
    """
    with Child(script) as child:
        assert child.finish() == (0, "", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gives_nothing_back() -> None:
    """What was lent by the parent is the parent's: `on_free` may send a message to somebody."""
    script = """
    import os
    from aioloader.memory.lease import lease

    lent = lease(bytearray(8), 8, lambda: print(f"freed by {os.getpid() == parent}", flush=True))
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        del lent
        os._exit(0)
    os.waitpid(child, 0)
    del lent
    """
    with Child(script) as child:
        assert child.finish() == (0, "freed by True\n", "")


EXITS = {
    "in a module": "sys.kept = batch()",
    "in a cycle": "c = [batch()]; c.append(c); torch.kept = c",
    "in torch's graph": """
w = torch.ones(1 << 18, requires_grad=True)
sys.kept = (w * batch().view(torch.float32)).sum()
""",
    "in a thread that never ends": """
def hold(here, b):
    here.set()
    threading.Event().wait()
here = threading.Event()
threading.Thread(target=hold, args=(here, batch()), daemon=True).start()
here.wait()
""",
    "in an exit hook": "atexit.register(lambda b: b.add_(1), batch())",
    "without its memory": "sys.kept = batch(); del memory, batch",
}


@pytest.mark.parametrize("where", EXITS)
def test_a_process_ends_well_with_a_batch_alive(where: str) -> None:
    """No crash and not a word, wherever the batch is when the interpreter ends."""
    script = f"""
import atexit, sys, threading, torch
from aioloader.memory.pool import BatchMemory
memory = BatchMemory()
def batch():
    return memory.alloc((1 << 20,), torch.uint8).fill_(1)
{EXITS[where]}
"""
    with Child(script) as child:
        assert child.finish() == (0, "", "")


# -- any order of taking, keeping and dropping -------------------------------------------------------------------------

VIEWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "itself": lambda batch: batch,
    "slice": lambda batch: batch[3:7],
    "numpy": lambda batch: batch.numpy()[::2],
    "memoryview": lambda batch: memoryview(batch.numpy().data),
    "bytes": lambda batch: batch.view(torch.uint8),
    "transposed": lambda batch: batch.view(64, -1).T[5],
    "storage": lambda batch: batch.untyped_storage(),
    "dlpack": lambda batch: torch.from_dlpack(batch),  # type: ignore[attr-defined]
}


def content(kept: Any) -> bytes:
    """What is seen through any of `VIEWS`."""
    if isinstance(kept, torch.UntypedStorage):  # `bytes` of one takes a microsecond per byte
        kept = torch.empty(0, dtype=torch.uint8).set_(kept)
    if isinstance(kept, torch.Tensor):
        return kept.numpy().tobytes()
    return bytes(kept)


steps = st.one_of(
    st.tuples(st.just("take"), st.integers(1, 3)),
    st.tuples(st.just("keep"), st.sampled_from(sorted(VIEWS))),
    st.tuples(st.just("drop"), st.integers(0, 100)),
)


@given(st.lists(steps, max_size=60))
@settings(max_examples=30)
def test_what_is_kept_never_changes(script: list[tuple[str, Any]]) -> None:
    """Whatever is taken, kept through any view, and dropped, in whatever order."""
    memory = BatchMemory()
    kept: list[tuple[Any, bytes]] = []
    batch = a_batch(memory, 0)
    for number, (what, how) in enumerate(script):
        if what == "take":
            batch = a_batch(memory, number, how * MIB)
        elif what == "keep":
            view = VIEWS[how](batch)
            kept.append((view, content(view)))
        elif kept:
            kept.pop(how % len(kept))
    assert all(content(view) == seen for view, seen in kept)
    made, held = memory.blocks_made, {id(view) for view, _ in kept}
    assert made <= len(script) + 1
    assert len(held) <= len(kept)


class Rows(Dataset[torch.Tensor]):
    """Four batches of two, of a megabyte each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((SMALLEST_BYTES // 2,), index, dtype=torch.uint8)


class RowsTogether(Rows):
    async def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class AwaitedRows:
    def __len__(self) -> int:
        return 8

    async def __getitem__(self, index: int) -> torch.Tensor:
        return Rows()[index]


class IteratedRows(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return map(Rows().__getitem__, range(8))


@pytest.mark.parametrize(
    ("dataset", "arguments"),
    [
        (Rows(), {"num_workers": 0}),
        (Rows(), {"num_workers": 2}),
        (Rows(), {"num_workers": 2, "skip_errors": True}),
        (Rows(), {"num_workers": 2, "retry": 2}),
        (Rows(), {"num_workers": 0, "retry": 2}),
        (RowsTogether(), {}),
        (RowsTogether(), {"skip_errors": True}),
        (AwaitedRows(), {}),
        (IteratedRows(), {"num_workers": 0}),
        (IteratedRows(), {"num_workers": 2}),
    ],
    ids=lambda part: type(part).__name__ if not isinstance(part, dict) else ",".join(part),
)
def test_batches_of_a_data_loader_are_in_the_memory_of_its_epoch(dataset: Any, arguments: dict[str, Any]) -> None:
    """In each of its epochs. What is torch's own can be resized."""
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=2, **arguments)
    for _ in range(2):
        batches = list(loader)
        assert [batch[:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        assert not any(batch.untyped_storage().resizable() for batch in batches)
