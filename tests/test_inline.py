"""`num_workers=0`: everything in the consumer's thread, and what may cut it short there."""

import threading
import warnings
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from aioloader import DataLoader
from aioloader.errors import ReplayWarning
from tests._support import DEADLINE


class Interrupted(Iterator[int]):
    """Counts to `count`; a Ctrl-C comes before sample number `at`, once. Not a generator, which that would end."""

    def __init__(self, count: int, at: int | None) -> None:
        self.count = count
        self.at = at
        self.next = 0

    def __next__(self) -> int:
        if self.next == self.at:
            self.at = None
            raise KeyboardInterrupt
        if self.next == self.count:
            raise StopIteration
        self.next += 1
        return self.next - 1


class Numbers(IterableDataset[int]):
    def __init__(self, at: int | None = None) -> None:
        self.at = at

    def __iter__(self) -> Iterator[int]:
        return Interrupted(9, self.at)


@pytest.mark.parametrize("at", range(9))
@pytest.mark.parametrize("batch_size", [None, 2, 4])
def test_what_was_read_before_a_ctrl_c_is_not_lost(batch_size: int | None, at: int) -> None:
    """The next `next()` goes on with it."""
    whole = list(DataLoader(Numbers(), batch_size, collate_fn=tuple if batch_size else None))
    iterator = iter(DataLoader(Numbers(at), batch_size, collate_fn=tuple if batch_size else None))
    found = []
    interrupts = 0
    while True:
        try:
            found.append(next(iterator))
        except KeyboardInterrupt:
            interrupts += 1
        except StopIteration:
            break
    assert (found, interrupts) == (whole, 1)


@pytest.mark.parametrize("at", range(9))
def test_a_ctrl_c_while_a_resume_reads_again_repeats_nothing(at: int) -> None:
    """Whether it comes in what is dropped, or in what is given."""
    loader = DataLoader(Numbers(), 2, collate_fn=tuple)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    again = DataLoader(Numbers(at), 2, collate_fn=tuple)
    again.load_state_dict(loader.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReplayWarning)
        rest = iter(again)
        with pytest.raises(KeyboardInterrupt):
            list(rest)
        found = list(rest)
    assert found == [(6, 7), (8,)][-len(found) :]
    assert len(found) == (2 if at < 8 else 1)


def test_threads_that_share_an_iterator_load_side_by_side() -> None:
    """Each sample reaches one of them, and none waits for what another one is making."""
    together = threading.Barrier(2, timeout=DEADLINE)

    def convert(sample: Any) -> Any:
        if sample:
            together.wait()
        return sample

    class Range(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

    iterator = iter(DataLoader(Range(), None, collate_fn=convert))
    found: list[list[int]] = [[next(iterator)], [], []]
    threads = [threading.Thread(target=its.extend, args=(iterator,)) for its in found[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(chain.from_iterable(found)) == [0, 1, 2, 3, 4]
