"""Collate gives what torch's default_collate gives, into memory of our choice, and names the samples that differ."""

import collections
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils import collate as torch_collate

from aioloader.stages.collate import Collate
from tests._datasets import Point, assert_same


class Marked(torch.Tensor):
    """A tensor subclass."""


class Frozen(Mapping[str, Any]):
    """A mapping that cannot be changed, made from a dict."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def __getitem__(self, key: str) -> Any:
        return self.parts[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


@dataclass
class Box:
    """A type that torch's default_collate does not know."""

    width: int


class Hostile:
    """A sample whose every method raises."""

    def __len__(self) -> int:
        raise RuntimeError("hostile len")

    def __repr__(self) -> str:
        raise RuntimeError("hostile repr")


class Memory:
    """An `alloc` that remembers what it gave."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.given.append(torch.empty(tuple(shape), dtype=dtype))
        return self.given[-1]

    def gave(self, tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() == given.data_ptr() for given in self.given)


def fresh(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An `alloc` that can be pickled."""
    return torch.empty(tuple(shape), dtype=dtype)


def error_of(collate: Callable[..., object], *arguments: Any) -> Exception:
    try:
        collate(*arguments)
    except Exception as error:
        return error
    raise AssertionError("no error was raised")


def image(index: int, *shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + index


def complex_conjugate(index: int) -> torch.Tensor:
    return torch.complex(image(index, 2), image(index + 1, 2)).conj()


SAMPLES: dict[str, Callable[[int], Any]] = {
    "tensor": lambda i: image(i, 3, 4, 5),
    "scalar tensor": lambda i: torch.tensor(i),
    "empty tensor": lambda _: torch.empty(0, 3),
    "channels last image": lambda i: image(i, 4, 5, 3).permute(2, 0, 1),
    "channels last stack of images": lambda i: image(i, 2, 3, 4, 5).to(memory_format=torch.channels_last),
    "view with gaps": lambda i: image(i, 6, 6)[::2, ::3],
    "conjugate view": complex_conjugate,
    "gradient": lambda i: image(i, 2).requires_grad_(),
    "parameter": lambda i: torch.nn.Parameter(image(i, 2)),
    "subclass": lambda i: image(i, 2).as_subclass(Marked),
    "bfloat16": lambda i: image(i, 2).bfloat16(),
    "bool tensor": lambda i: image(i, 2) > 2,
    "array": lambda i: np.arange(6, dtype=np.int16).reshape(2, 3) + i,
    "array view with gaps": lambda i: (np.arange(12.0) + i)[::3],
    "array scalar": lambda i: np.float32(i),
    "array bool": lambda i: np.bool_(i % 2),
    "int": lambda i: i,
    "float": float,
    "bool": lambda i: i % 2 == 0,
    "str": str,
    "bytes": lambda i: bytes([i]),
    "tuple": lambda i: (image(i, 2), i),
    "list": lambda i: [image(i, 2), float(i)],
    "nested": lambda i: {"image": image(i, 2), "boxes": [Point(i, str(i)), (i, [np.arange(3) + i])]},
    "named tuple": lambda i: Point(image(i, 2), i),
    "ordered dict": lambda i: collections.OrderedDict(b=i, a=float(i)),
    "default dict": lambda i: collections.defaultdict(int, {"a": i}),
    "range": lambda i: range(i, i + 3),
    "empty tuple": lambda _: (),
    "empty dict": lambda _: {},
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_gives_what_torch_gives(kind: str) -> None:
    """Values, types, dtypes and strides are those of default_collate, with and without alloc."""
    for samples in ([SAMPLES[kind](0)], [SAMPLES[kind](index) for index in range(5)]):
        assert_same(Collate()(samples), default_collate(samples))
        assert_same(Collate(Memory())(samples), default_collate(samples))


@pytest.mark.parametrize(
    "samples",
    [
        pytest.param([torch.zeros(2), torch.ones(2, dtype=torch.float64)], id="float32 and float64"),
        pytest.param([torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.5)], id="int64 and float32"),
        pytest.param([torch.zeros(2, dtype=torch.bool), torch.full((2,), 7, dtype=torch.uint8)], id="bool and uint8"),
        pytest.param([np.zeros(2, np.float32), np.full(2, 1e300)], id="arrays of float32 and float64"),
        pytest.param([image(0, 2), image(1, 2).requires_grad_()], id="gradient in the second"),
        pytest.param([np.zeros(2), [1.0, 2.0]], id="array and list"),
        pytest.param([1, 2.5], id="int and float"),
        pytest.param([1, True], id="int and bool"),
        pytest.param(["a", 1], id="str and int"),
        pytest.param([{"a": 1}, {"a": 2, "b": 3}], id="one more key in the second"),
    ],
)
def test_mixes_are_promoted_as_torch_promotes_them(samples: list[Any]) -> None:
    """`torch.stack(out=...)` would cast in silence, so mixed dtypes never go to alloc's memory."""
    assert_same(Collate()(samples), default_collate(samples))
    assert_same(Collate(Memory())(samples), default_collate(samples))


def test_tensors_and_arrays_go_to_the_memory_that_alloc_gives() -> None:
    """Each tensor of the batch is the very memory of alloc, asked for with shape and dtype of the batch."""
    memory = Memory()
    batch = Collate(memory)([{"image": image(i, 3, 4), "mask": np.full((2, 2), i, np.uint8)} for i in range(5)])
    assert memory.gave(batch["image"])
    assert memory.gave(batch["mask"])
    assert [(given.shape, given.dtype) for given in memory.given] == [
        ((5, 3, 4), torch.float32),
        ((5, 2, 2), torch.uint8),
    ]


@pytest.mark.parametrize("kind", ["gradient", "parameter", "subclass", "channels last stack of images", "empty tensor"])
def test_alloc_is_not_asked_for_what_out_cannot_hold(kind: str) -> None:
    """Gradients, subclasses, odd strides and empty tensors are stacked as without alloc."""
    memory = Memory()
    Collate(memory)([SAMPLES[kind](index) for index in range(2)])
    assert memory.given == []


def test_gradients_reach_the_samples() -> None:
    """A batch of samples that require gradients is part of their graph, with alloc too."""
    samples = [image(index, 2).requires_grad_() for index in range(2)]
    Collate(Memory())(samples).sum().backward()
    assert all(sample.grad is not None for sample in samples)


def test_a_read_only_mapping_is_collated_as_torch_does() -> None:
    """A mapping without `update` is made anew from a dict."""
    batch = Collate()([Frozen({"a": 1}), Frozen({"a": 2})])
    assert isinstance(batch, Frozen)
    assert_same(batch["a"], torch.tensor([1, 2]))


def test_a_tuple_of_samples_and_an_array_of_samples_are_batches_too() -> None:
    """`__getitems__` may return any sequence, not only a list."""
    assert_same(Collate()((1, 2)), torch.tensor([1, 2]))
    assert_same(Collate()(cast(Any, np.arange(3.0))), torch.arange(3.0, dtype=torch.float64))


def test_types_that_the_user_registers_keep_their_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's map is read at each call: what is put there after our constructor counts."""
    collate = Collate(Memory())

    def collate_boxes(boxes: Sequence[Box], *, collate_fn_map: object) -> str:
        return "+".join(str(box.width) for box in boxes)

    monkeypatch.setitem(torch_collate.default_collate_fn_map, Box, collate_boxes)
    assert_same(collate([(Box(1), 1), (Box(2), 2)]), ["1+2", torch.tensor([1, 2])])


def test_a_function_that_the_user_registers_for_tensors_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone who replaced torch's own function for tensors gets theirs, and alloc is not asked."""

    def collate_sums(tensors: Sequence[torch.Tensor], *, collate_fn_map: object) -> float:
        return float(sum(tensor.sum() for tensor in tensors))

    memory = Memory()
    monkeypatch.setitem(torch_collate.default_collate_fn_map, torch.Tensor, collate_sums)
    assert Collate(memory)([torch.ones(2), torch.ones(2)]) == 4.0
    assert memory.given == []


def test_torchs_map_stays_as_it_is() -> None:
    """Nothing of ours is left in the process-wide map."""
    before = dict(torch_collate.default_collate_fn_map)
    Collate(Memory())([torch.ones(2)])
    assert torch_collate.default_collate_fn_map == before


def test_can_be_pickled() -> None:
    """A process worker gets its own copy."""
    collate = pickle.loads(pickle.dumps(Collate(fresh)))
    assert collate.alloc is fresh
    assert_same(collate([1, 2]), torch.tensor([1, 2]))


EQUAL = "pass collate_fn= that pads, or make the samples equal"
SAME_TYPE = "pass collate_fn=, or give every sample the same type"
REGISTER = "which cannot be batched; pass collate_fn=, or add the type to torch's default_collate_fn_map"
RETURN = "return a sample, or pass collate_fn= that drops None"

# What does not fit, and the note without its beginning. The keys are 4, 17 and 23.
MISFITS: dict[str, tuple[list[Any], str]] = {
    "shape": (
        [torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(3, 2)],
        f"sample 0 (key 4) has shape [3, 4], sample 2 (key 23) has shape [3, 2]; {EQUAL}",
    ),
    "shape in a mapping": (
        [{"image": torch.zeros(3, 32, 32)}, {"image": torch.zeros(3, 20, 32)}],
        f"sample 0 (key 4) has shape [3, 32, 32] at ['image'], sample 1 (key 17) has shape [3, 20, 32]; {EQUAL}",
    ),
    "shape deep down": (
        [{"a": [Point(1, (torch.zeros(size),))]} for size in (2, 2, 3)],
        f"sample 0 (key 4) has shape [2] at ['a'][0].y[0], sample 2 (key 23) has shape [3]; {EQUAL}",
    ),
    "shape of an array": (
        [(np.zeros(2), 0), (np.zeros((2, 1)), 0)],
        f"sample 0 (key 4) has shape [2] at [0], sample 1 (key 17) has shape [2, 1]; {EQUAL}",
    ),
    "device": (
        [torch.zeros(2), torch.zeros(2, device="meta")],
        "sample 0 (key 4) is on cpu, sample 1 (key 17) is on meta; move the samples to one device",
    ),
    "dtypes that torch does not promote": (
        [torch.zeros(2, dtype=torch.uint16), torch.zeros(2, dtype=torch.int16)],
        "sample 0 (key 4) has torch.uint16, sample 1 (key 17) has torch.int16; give every sample the same dtype",
    ),
    "length": (
        [{"words": [1, 2]}, {"words": [1]}],
        f"sample 0 (key 4) has length 2 at ['words'], sample 1 (key 17) has length 1; {EQUAL}",
    ),
    "missing key": (
        [{"m": {"a": 1, "b": 2}}, {"m": {"a": 1}}],
        "sample 1 (key 17) has no 'b' at ['m'], which sample 0 (key 4) has; "
        "pass collate_fn=, or give every sample the same keys",
    ),
    "None for the first": ([None, 1], f"the dataset, or a function after it, returned None for key 4; {RETURN}"),
    "None for the last": (
        [torch.zeros(2), torch.zeros(2), None],
        f"the dataset, or a function after it, returned None for key 23; {RETURN}",
    ),
    "None for all": ([None, None], f"the dataset, or a function after it, returned None for key 4; {RETURN}"),
    "None for a mapping": (
        [{"a": 1}, None],
        f"the dataset, or a function after it, returned None for key 17; {RETURN}",
    ),
    "None inside": (
        [(torch.zeros(2), 1), (None, 1)],
        f"sample 0 (key 4) has type Tensor at [0], sample 1 (key 17) is None; {SAME_TYPE}",
    ),
    "None inside the first": ([(1, None), (1, 2)], f"sample 0 (key 4) is None at [1], {REGISTER}"),
    "number and tensor": (
        [torch.zeros(2), 3],
        f"sample 0 (key 4) has type Tensor, sample 1 (key 17) has type int; {SAME_TYPE}",
    ),
    "number and str": ([1, "a"], f"sample 0 (key 4) has type int, sample 1 (key 17) has type str; {SAME_TYPE}"),
    "tuple and number": ([(1, 2), 3], f"sample 0 (key 4) has type tuple, sample 1 (key 17) has type int; {SAME_TYPE}"),
    "mapping and number": (
        [{"a": 1}, 3],
        f"sample 0 (key 4) has type dict, sample 1 (key 17) has type int; {SAME_TYPE}",
    ),
    "tensor and array": (
        [torch.zeros(2), np.zeros(2)],
        f"sample 0 (key 4) has type Tensor, sample 1 (key 17) is an array of dtype float64; {SAME_TYPE}",
    ),
    "unknown class": ([{"box": Box(1)}, {"box": Box(2)}], f"sample 0 (key 4) has type Box at ['box'], {REGISTER}"),
    "set": ([{1}, {2}], f"sample 0 (key 4) has type set, {REGISTER}"),
    "strings in an array": ([np.array(["ab"])], f"sample 0 (key 4) is an array of dtype <U2, {REGISTER}"),
    "sparse": ([torch.eye(2).to_sparse()] * 2, f"sample 0 (key 4) has layout torch.sparse_coo, {REGISTER}"),
    "nested tensor": (
        [torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged)] * 2,
        f"sample 0 (key 4) is a nested tensor, {REGISTER}",
    ),
    "big number": (
        [1, 2**70],
        f"sample 0 (key 4) is 1, sample 1 (key 17) is {2**70}; pass collate_fn=, or make the samples equal",
    ),
    "big first number": ([2**70], f"sample 0 (key 4) is {2**70}, {REGISTER}"),
    "no samples": ([], "the batch has no samples; a batch_sampler must not give empty lists"),
    "hostile": ([(1, 2), Hostile()], "samples with keys [4, 17]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_samples_that_do_not_fit_are_named(case: str) -> None:
    """The error is torch's, type and message, and its note says which samples differ, where, and the way out."""
    samples, expected = MISFITS[case]
    theirs = error_of(default_collate, samples)
    for collate in (Collate(), Collate(Memory())):
        ours = error_of(collate, samples, [4, 17, 23][: len(samples)])
        assert type(ours) is type(theirs)
        assert str(ours) == str(theirs)
        assert ours.__notes__ == [f"aioloader: cannot collate: {expected}"]


def test_without_keys_samples_are_named_by_their_place_in_the_batch() -> None:
    """A stream's samples have no keys."""
    with pytest.raises(RuntimeError) as caught:
        Collate()([torch.zeros(2), torch.zeros(3)])
    assert "sample 0 has shape [2], sample 1 has shape [3]; " in caught.value.__notes__[0]
    with pytest.raises(TypeError) as caught_none:
        Collate()([torch.zeros(2), None])
    assert "the dataset, or a function after it, returned None for sample 1; " in caught_none.value.__notes__[0]


def test_long_keys_are_cut_short_in_the_note() -> None:
    """A key may be a whole document; the note stays one line."""
    with pytest.raises(RuntimeError) as caught:
        Collate()([torch.zeros(2), torch.zeros(3)], keys=["k" * 10_000, "l" * 10_000])
    assert len(caught.value.__notes__[0]) < 300


def test_what_is_no_sequence_at_all_gets_torchs_error() -> None:
    """A `__getitems__` that returns an iterator, say: the note never hides the error."""
    with pytest.raises(TypeError, match="not subscriptable") as caught:
        Collate()(cast(Any, iter([1, 2])))
    assert caught.value.__notes__ == ["aioloader: cannot collate: these samples"]


def test_an_error_of_alloc_names_the_samples_of_the_batch() -> None:
    """Where no two samples differ, the note says which samples they were."""

    def alloc(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        raise MemoryError("no page-locked memory left")

    with pytest.raises(MemoryError, match="no page-locked memory left") as caught:
        Collate(alloc)([torch.zeros(2), torch.zeros(2)], keys=["a", "b"])
    assert caught.value.__notes__ == ["aioloader: cannot collate: samples with keys ['a', 'b']"]


def test_an_error_of_a_registered_function_stays_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The very object that the user's function raised, with our note."""
    failure = ValueError("boxes overlap")

    def collate_boxes(boxes: Sequence[Box], *, collate_fn_map: object) -> None:
        raise failure

    monkeypatch.setitem(torch_collate.default_collate_fn_map, Box, collate_boxes)
    with pytest.raises(ValueError, match="boxes overlap") as caught:
        Collate()([Box(1)], keys=[9])
    assert caught.value is failure
    assert failure.__notes__ == [f"aioloader: cannot collate: sample 0 (key 9) has type Box, {REGISTER}"]
