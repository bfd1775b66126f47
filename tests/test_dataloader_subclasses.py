"""Classes of the user's that are made of `DataLoader`: what is done with one of torch's does the same here."""

# mypy: disable-error-code="misc, assignment, no-untyped-call"

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch.utils.data

import aioloader

CASES: dict[str, Callable[[Any], Any]] = {}


def case(program: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What is called with torch's `DataLoader`, and with ours; what it returns is compared."""
    CASES[program.__name__] = program
    return program


def batches(loader: Any) -> list[Any]:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in loader]


@case
def attributes_of_the_class_are_defaults_for_the_constructor(base: Any) -> Any:
    class Mine(base):
        batch_size = 4
        num_workers = 0
        drop_last = True

        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, self.batch_size, drop_last=self.drop_last)

    loader = Mine(range(10))
    return batches(loader), loader.batch_size, loader.drop_last, Mine.batch_size, Mine.drop_last


@case
def arguments_come_before_attributes_of_the_class(base: Any) -> Any:
    class Mine(base):
        batch_size = 7
        timeout = 5
        collate_fn = 9

    loader = Mine(range(10), 3)
    seen = loader.batch_size, loader.timeout, loader.collate_fn == 9, batches(loader)
    loader.timeout = 0
    loader.collate_fn = list
    refused = []
    for name in ("batch_size", "drop_last", "dataset", "sampler"):
        try:
            setattr(loader, name, 3)
        except ValueError as error:
            refused.append(str(error).split(" should")[0])
    return seen, loader.timeout, batches(loader), refused, Mine.batch_size


@case
def a_method_collates_and_calls_the_one_before_it(base: Any) -> Any:
    class First(base):
        def collate_fn(self, samples: list[int]) -> list[Any]:
            return ["first", *samples]

        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, 3, collate_fn=self.collate_fn)

    class Second(First):
        def collate_fn(self, samples: list[int]) -> list[Any]:
            return ["second", *super().collate_fn(samples)]

    return batches(Second(range(5)))


@case
def two_classes_beside_each_other(base: Any) -> Any:
    class Left(base):
        def collate_fn(self, samples: list[int]) -> list[Any]:
            return ["left", *super().collate_fn(samples)]

    class Right(base):
        batch_size = 4

        def collate_fn(self, samples: list[int]) -> list[Any]:
            return ["right", *samples]

    class Both(Left, Right):
        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, self.batch_size, collate_fn=self.collate_fn)

    return batches(Both(range(5))), Both.batch_size


@case
def class_methods_static_ones_and_what_is_computed_once(base: Any) -> Any:
    class Mine(base):
        factor = 2

        @classmethod
        def collate_fn(cls, samples: list[int]) -> list[int]:
            return [sample * cls.factor for sample in samples]

        @staticmethod
        def worker_init_fn(number: int) -> None: ...

        @functools.cached_property
        def num_workers(self) -> int:
            return 0

        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, 3, num_workers=self.num_workers, collate_fn=self.collate_fn)

    class More(Mine):
        factor = 3

    return batches(Mine(range(4))), batches(More(range(4))), More.collate_fn([1]), More.worker_init_fn(0)


@case
def a_mixin_after_it(base: Any) -> Any:
    class Mixin:
        batch_size = 5

        def collate_fn(self, samples: list[int]) -> int:
            return max(samples)

    class Mine(base, Mixin):
        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, self.batch_size, collate_fn=self.collate_fn)

    loader = Mine(range(10))
    return batches(loader), loader.batch_size, Mine.batch_size


@case
def a_property_is_set_and_read(base: Any) -> Any:
    class Mine(base):
        @property
        def drop_last(self) -> bool:
            return self._drops

        @drop_last.setter
        def drop_last(self, value: bool) -> None:
            self._drops = value

        @property
        def collate_fn(self) -> Any:
            return sum

        @collate_fn.setter
        def collate_fn(self, _: Any) -> None: ...

    loader = Mine(range(5), 2, drop_last=True)
    seen = loader.drop_last, batches(loader)
    loader.collate_fn = list
    return seen, batches(loader)


@case
def properties_are_set_once_and_read_when_an_epoch_begins(base: Any) -> Any:
    seen: list[Any] = []

    class Mine(base):
        @property
        def dataset(self) -> Any:
            return self._mine

        @dataset.setter
        def dataset(self, value: Any) -> None:
            seen.append(value)
            self._mine = [sample + 100 for sample in value]

        @property
        def timeout(self) -> float:
            return self.later

        @timeout.setter
        def timeout(self, value: float) -> None:
            self.prefetch_factor = None

        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, 3)
            self.later = 0.0

    loader = Mine(range(4))
    before = batches(loader)
    loader.collate_fn = list
    loader.drops = True
    return before, batches(loader), batches(loader), seen


@case
def a_property_over_what_a_parent_has(base: Any) -> Any:
    class Parent(base):
        num_workers = 1
        collate_fn = sum

    class Child(Parent):
        @property
        def collate_fn(self) -> Any:
            return self._mine

        @collate_fn.setter
        def collate_fn(self, value: Any) -> None:
            self._mine = value

    loader = Child(range(5), 3, collate_fn=list)
    first = batches(loader), loader.num_workers
    loader.collate_fn = max
    loader.num_workers = 0
    return first, batches(loader), loader.num_workers


@case
def names_that_are_arguments_here_alone(base: Any) -> Any:
    class Mine(base):
        device = "cuda:7"

        def seed(self, number: int) -> int:
            return number

        @functools.cached_property
        def shard(self) -> str:
            return "third"

    loader = Mine(range(5), 3)
    return batches(loader), loader.device, loader.seed(3), loader.shard


@case
def a_property_that_cannot_be_set(base: Any) -> Any:
    class Mine(base):
        @property
        def batch_size(self) -> int:
            return 3

    with pytest.raises(AttributeError):
        Mine(range(5), 3)


@case
def a_slot(base: Any) -> Any:
    class Mine(base):
        __slots__ = ("timeout",)

    loader = Mine(range(5), 3)
    return loader.timeout, batches(loader)


@case
def what_is_abstract_stays_so(base: Any) -> Any:
    class Before(base, abc.ABC):
        @abc.abstractmethod
        def collate_fn(self, samples: list[int]) -> Any: ...

    class Mixin(abc.ABC):
        @property
        @abc.abstractmethod
        def batch_size(self) -> int: ...

    class After(base, Mixin): ...

    for kind in (Before, After):
        with pytest.raises(TypeError, match="abstract"):
            kind(range(5))

    class Mine(Before):
        def collate_fn(self, samples: list[int]) -> Any:
            return samples

    return batches(Mine(range(5), 3))


@case
def what_is_set_before_the_constructor_is_called(base: Any) -> Any:
    class Mine(base):
        def __init__(self, dataset: Any) -> None:
            self.dataset, self.batch_size, self.timeout = dataset, 3, 7
            self.seed, self.device = 4, "cuda"
            super().__init__(self.dataset, self.batch_size)
            self.device = "cpu"

    loader = Mine(range(5))
    return batches(loader), loader.timeout, loader.seed, loader.device


@case
def a_dataclass(base: Any) -> Any:
    @dataclasses.dataclass(eq=False)
    class Mine(base):
        samples: Any
        batch_size: int = 3

        def __post_init__(self) -> None:
            super().__init__(self.samples, self.batch_size)

    return batches(Mine(range(5))), batches(Mine(range(5), 2))


@case
def what_is_patched_for_a_while(base: Any) -> Any:
    loader = base(range(5), 3)
    with mock.patch.object(loader, "collate_fn", sum):
        patched = batches(loader)
    return patched, batches(loader)


@case
def classes_that_watch_their_attributes(base: Any) -> Any:
    class Mine(base):
        def __setattr__(self, name: str, value: Any) -> None:
            self.__dict__.setdefault("names", []).append(name)
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Any:
            if name == "answer":
                return 42
            raise AttributeError(name)

    loader = Mine(range(5), 3)
    loader.collate_fn = list
    return batches(loader), loader.answer, hasattr(loader, "question"), "collate_fn" in loader.names


@case
def what_trainers_look_for(base: Any) -> Any:
    """They build a loader anew from its attributes and the signature of its constructor."""

    class Mine(base):
        def __init__(self, dataset: Any, *args: Any, extra: int = 3, **options: Any) -> None:
            self.extra = extra
            super().__init__(dataset, *args, **options)

    attributes = vars(Mine(range(5), 3, drop_last=True))
    names = [name for name in inspect.signature(torch.utils.data.DataLoader.__init__).parameters if name in attributes]
    return {name: attributes[name] for name in names if name in ("batch_size", "drop_last", "num_workers", "timeout")}


@case
def the_class_itself_has_none_of_them(base: Any) -> Any:
    return [name for name in ("dataset", "batch_size", "sampler", "num_workers") if hasattr(base, name)]


@pytest.mark.parametrize("name", CASES)
def test_a_class_does_what_it_does_with_torchs(name: str) -> None:
    assert CASES[name](aioloader.DataLoader) == CASES[name](torch.utils.data.DataLoader)
