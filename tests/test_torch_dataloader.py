"""`as_torch_dataloader`: what trainers ask of a torch `DataLoader`, what they rebuild of it, and where its state is."""

import inspect
import json
import pickle
import sys
from collections.abc import Iterator
from itertools import chain
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch.utils.data import DistributedSampler, IterableDataset, SequentialSampler

from aioloader import DataLoader, Pipeline
from aioloader.integrations import as_torch_dataloader, transformers_callback
from aioloader.integrations.torch_dataloader import TorchDataLoader

N = 20
STEPS = 5


async def load(key: int) -> int:
    return key


def make_pipeline() -> Any:
    return Pipeline(range(N)).shuffle(seed=1).map(load).batch(4, collate_fn=list)


def make_dataloader() -> Any:
    return DataLoader(range(N), batch_size=4, shuffle=True, seed=1, num_workers=2, collate_fn=list)


def make_unseeded() -> Any:
    return DataLoader(range(N), batch_size=4, shuffle=True, collate_fn=list)


makers = pytest.mark.parametrize("make", [make_pipeline, make_dataloader, make_unseeded])


def numbers() -> Iterator[int]:
    yield from range(N)


# -- what it is ----------------------------------------------------------------------------------------------------


@makers
def test_it_is_a_dataloader_with_the_same_batches(make: Any) -> None:
    loader = make()
    bridge = as_torch_dataloader(loader)
    assert isinstance(bridge, torch.utils.data.DataLoader)
    assert isinstance(bridge.dataset, IterableDataset)
    assert bridge.loader is loader
    assert len(bridge) == len(bridge.dataset) == STEPS  # type: ignore[arg-type]
    torch.manual_seed(3)
    epochs = [list(bridge) for _ in range(2)]
    torch.manual_seed(3)
    alone = make()
    assert epochs == [list(alone) for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(chain.from_iterable(epoch)) == list(range(N)) for epoch in epochs)


def test_what_trainers_read_of_it() -> None:
    """Batches are whole, so `batch_size` is None, as torch's own is then; and there is nothing to pin or to seed."""
    bridge = as_torch_dataloader(make_pipeline().to("cpu"))
    assert (bridge.batch_size, bridge.num_workers, bridge.drop_last, bridge.batch_sampler) == (None, 0, False, None)
    assert bridge.device == "cpu"
    assert as_torch_dataloader(make_dataloader()).device is None
    assert as_torch_dataloader(DataLoader(range(4), device="cpu")).device == "cpu"
    assert repr(bridge) == f"as_torch_dataloader({bridge.loader!r})"


def test_a_stream_has_no_length() -> None:
    """`hasattr(dataset, "__len__")` is what Keras asks; `len` raises `TypeError`, as torch's."""
    bridge = as_torch_dataloader(Pipeline(numbers).batch(4))
    assert not hasattr(bridge.dataset, "__len__")
    with pytest.raises(TypeError):
        len(bridge)
    assert len(list(bridge)) == STEPS
    assert len(as_torch_dataloader(Pipeline(numbers).batch(4).with_length(STEPS))) == STEPS


def test_batches_are_not_converted() -> None:
    """torch's default for whole batches would make tensors of arrays."""
    bridge = as_torch_dataloader(Pipeline(range(4)).batch(2, collate_fn=np.array))
    assert all(isinstance(batch, np.ndarray) for batch in bridge)


def test_it_can_be_pickled() -> None:
    """Strategies that spawn their ranks do so."""
    bridge = as_torch_dataloader(Pipeline(range(N)).shuffle(seed=1).batch(4), read_ahead=1)
    again = pickle.loads(pickle.dumps(bridge))
    assert isinstance(again, TorchDataLoader)
    assert again.dataset.read_ahead == 1
    assert torch.equal(torch.cat(list(again)), torch.cat(list(bridge)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (range(4), "takes an aioloader.Pipeline or an aioloader.DataLoader, got range; wrap other things"),
        (torch.utils.data.DataLoader(range(4)), "got DataLoader"),  # type: ignore[arg-type]
        (as_torch_dataloader(Pipeline(range(4))), "a torch DataLoader already"),
    ],
)
def test_what_is_no_loader_is_refused(given: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        as_torch_dataloader(given)


@pytest.mark.parametrize(("given", "words"), [(-1, "at least 0, got -1"), (2, "0 or 1, got 2")])
def test_read_ahead_is_checked(given: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"read_ahead must be {words}"):
        as_torch_dataloader(make_pipeline(), read_ahead=given)


# -- what trainers make of it ----------------------------------------------------------------------------------------


def instance_from_attributes(bridge: Any, **changed: Any) -> Any:
    """A new instance of its class from the attributes of an old one, as Lightning makes it for `predict`."""
    attributes = {name: value for name, value in vars(bridge).items() if not name.startswith("_")}
    attributes["multiprocessing_context"] = bridge.multiprocessing_context
    parameters = dict(inspect.signature(type(bridge).__init__).parameters)
    parameters.update(inspect.signature(torch.utils.data.DataLoader.__init__).parameters)
    kept = {
        name: attributes[name]
        for name, parameter in parameters.items()
        if name in attributes and parameter.default is not attributes[name]
    }
    return type(bridge)(**(kept | {"sampler": None, "batch_sampler": None} | changed))


def test_a_new_instance_from_its_attributes_is_the_same() -> None:
    bridge = as_torch_dataloader(make_pipeline(), read_ahead=1)
    again = instance_from_attributes(bridge)
    assert isinstance(again, TorchDataLoader)
    assert again.loader is bridge.loader
    assert again.dataset.read_ahead == 1
    assert list(again) == list(make_pipeline())
    assert again.state_dict() == bridge.state_dict()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_workers": 2}, "num_workers must be 0 .* has workers of its own, got 2; pass num_workers to aioloader"),
        ({"batch_size": 8}, "batch_size must be None .* got 8; use its .batch"),
        ({"sampler": SequentialSampler(range(4))}, "sampler must be None"),
        ({"sampler": DistributedSampler(range(4), 2, 0)}, "sampler must be None .* use its .* .shard()"),  # type: ignore[arg-type]
        ({"batch_sampler": [[0, 1]]}, "batch_sampler must be None"),
        ({"shuffle": True}, "expected unspecified shuffle option"),  # torch's own words
    ],
)
def test_an_instance_that_would_do_something_else_is_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        instance_from_attributes(as_torch_dataloader(make_pipeline()), **changed)


def test_another_dataset_is_refused() -> None:
    with pytest.raises(TypeError, match="dataset must be that of an instance, got list"):
        instance_from_attributes(as_torch_dataloader(make_pipeline()), dataset=[1, 2])


def test_a_plain_dataloader_around_its_dataset_gives_the_same_batches() -> None:
    """As Ray, DeepSpeed and others make it: state and epoch are reached through the dataset."""
    bridge = as_torch_dataloader(make_pipeline())
    plain: Any = torch.utils.data.DataLoader(bridge.dataset, batch_size=None, collate_fn=bridge.collate_fn)
    assert len(plain) == STEPS
    assert list(plain) == list(make_pipeline())
    steps = iter(plain)
    next(steps)
    state = plain.dataset.state_dict()
    rest = list(steps)
    other: Any = torch.utils.data.DataLoader(as_torch_dataloader(make_pipeline()).dataset, batch_size=None)
    other.dataset.load_state_dict(json.loads(json.dumps(state)))
    assert list(other) == rest


def test_worker_processes_of_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would each make all batches, beside the loader's own workers."""
    bridge = as_torch_dataloader(make_pipeline())
    monkeypatch.setattr("aioloader.integrations.dataset.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(RuntimeError, match="num_workers must be 0 for a loader as a torch DataLoader"):
        next(iter(bridge.dataset))


# -- state and epoch -------------------------------------------------------------------------------------------------


def trained(bridge: Any, stop: int, held: int = 0) -> tuple[list[Any], dict[str, Any], list[Any]]:
    """Train like a trainer that reads `held` batches ahead: what was trained, the state then, and what came later."""
    batches = iter(bridge)
    waiting: list[Any] = []
    before: list[Any] = []
    over = False
    while len(before) < stop:
        while len(waiting) <= held and not over:
            try:
                waiting.append(next(batches))
            except StopIteration:
                over = True
        if waiting:
            before.append(waiting.pop(0))
        else:
            batches, over = iter(bridge), False
    state = json.loads(json.dumps(bridge.state_dict()))
    later = [*waiting, *batches, *bridge]
    return before, state, later


@makers
@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("stop", [1, 3, STEPS - 1, STEPS, STEPS + 2])
def test_the_state_is_that_of_the_last_batch_trained_on(make: Any, held: int, stop: int) -> None:
    """However many are held: at the beginning, in the middle, at the end, and in a later epoch."""
    bridge = as_torch_dataloader(make(), read_ahead=held)
    _, state, later = trained(bridge, stop, held)
    again = as_torch_dataloader(make(), read_ahead=held)
    again.load_state_dict(state)
    assert again.state_dict() == state
    resumed = [*again, *again]
    assert resumed[: len(later)] == later


def test_a_state_before_the_first_batch_is_the_loader_s() -> None:
    bridge = as_torch_dataloader(make_pipeline(), read_ahead=1)
    assert bridge.state_dict() == bridge.loader.state_dict()
    iter(bridge)  # as Lightning does, which never uses it
    assert bridge.state_dict() == bridge.loader.state_dict()


def test_a_spare_iterator_changes_no_state() -> None:
    bridge = as_torch_dataloader(make_pipeline(), read_ahead=1)
    batches = iter(bridge)
    next(batches)
    next(batches)
    state = bridge.state_dict()
    assert state["batches"] == 1
    iter(bridge)
    assert bridge.state_dict() == state
    assert next(batches) is not None


def test_errors_keep_their_places_when_batches_are_held() -> None:
    """One that raises is one of those that were asked for."""

    def check(key: int) -> int:
        if key == 5:
            raise KeyError(key)
        return key

    def make() -> Any:
        return as_torch_dataloader(Pipeline(range(12)).map(check).batch(4, collate_fn=list), read_ahead=1)

    bridge = make()
    batches = iter(bridge)
    assert next(batches) == [0, 1, 2, 3]
    with pytest.raises(KeyError):
        next(batches)
    state = bridge.state_dict()
    assert state["batches"] == 1  # the error was read ahead
    again = make()
    again.load_state_dict(state)
    batches = iter(again)
    with pytest.raises(KeyError):
        next(batches)
    assert list(batches) == [[8, 9, 10, 11]]


def test_the_epoch_is_set_as_trainers_set_it() -> None:
    """By `set_epoch` of the loader, of its sampler, or of its dataset."""
    expected = list(make_pipeline())
    bridge: Any = as_torch_dataloader(make_pipeline())
    for place in (bridge, bridge.sampler, bridge.dataset):
        place.set_epoch(1)
        assert list(bridge) != expected
        place.set_epoch(0)
        assert list(bridge) == expected


def test_a_trainer_that_counts_from_zero_again_goes_on_in_the_epoch_of_the_state() -> None:
    """As Fabric does in a new process; nothing is dropped, and later epochs follow."""
    bridge = as_torch_dataloader(make_pipeline())
    for _ in range(2):
        list(bridge)
    batches = iter(bridge)
    next(batches)
    state = bridge.state_dict()
    later = [*batches, *bridge]
    again: Any = as_torch_dataloader(make_pipeline())
    again.load_state_dict(state)
    found: list[Any] = []
    for epoch in range(2):
        again.sampler.set_epoch(epoch)
        found += list(again)
    assert found == later


def test_a_distributed_sampler_is_told_the_epoch() -> None:
    """Through the sampler that trainers find."""
    sampler: Any = DistributedSampler(range(N), 2, 0, seed=1)  # type: ignore[arg-type]
    bridge: Any = as_torch_dataloader(DataLoader(range(N), batch_size=4, sampler=sampler))
    bridge.sampler.set_epoch(3)
    assert sampler.epoch == 3


# -- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What of Accelerate's `GradientState` the bridge uses, as in version 1.15."""
    state = SimpleNamespace(dataloader_references=[None], active_dataloader=None)
    module: Any = ModuleType("accelerate.state")
    module.is_initialized = lambda: True
    module.GradientState = lambda: state
    monkeypatch.setitem(sys.modules, "accelerate.state", module)
    return state


@makers
def test_accelerate_is_told_of_the_last_batch(accelerate: Any, make: Any) -> None:
    """While it is trained on, so that a last, incomplete accumulation is applied; without a length, too."""
    bridge = as_torch_dataloader(make())
    for _ in range(2):
        ends = []
        for _ in bridge:
            assert accelerate.dataloader_references == [None, bridge]
            ends.append(bridge.end_of_dataloader)
        assert ends == [False] * (STEPS - 1) + [True]
        assert accelerate.dataloader_references == [None]
    stream = as_torch_dataloader(Pipeline(numbers).batch(4))
    assert [stream.end_of_dataloader for _ in stream] == [False] * (STEPS - 1) + [True]


def test_accelerate_forgets_an_epoch_that_is_left(accelerate: Any) -> None:
    bridge = as_torch_dataloader(make_pipeline())
    for _ in bridge:
        break
    assert accelerate.dataloader_references == [None]


@pytest.mark.parametrize("held", [0, 1])
@pytest.mark.parametrize("stop", [1, STEPS - 1, STEPS, STEPS + 2])
def test_what_accelerate_lets_be_read_ahead_is_not_in_the_state(accelerate: Any, stop: int, held: int) -> None:
    make = make_pipeline
    _, state, later = trained(as_torch_dataloader(make(), read_ahead=held), stop, held)
    assert state["batches"] == stop % STEPS
    again = as_torch_dataloader(make())
    again.load_state_dict(state)
    assert [*again, *again][: len(later)] == later


def test_an_error_comes_after_the_batch_before_it_and_the_epoch_goes_on(accelerate: Any) -> None:
    def check(key: int) -> int:
        if key in (4, 9):
            raise KeyError(key)
        return key

    bridge = as_torch_dataloader(Pipeline(range(16)).map(check).batch(4, collate_fn=list))
    batches = iter(bridge)
    assert next(batches) == [0, 1, 2, 3]
    for key in (4, 9):
        with pytest.raises(KeyError) as raised:
            next(batches)
        assert raised.value.args == (key,)
    assert next(batches) == [12, 13, 14, 15]
    assert bridge.end_of_dataloader
    with pytest.raises(StopIteration):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


class Skips:
    """As `skip_first_batches` of Accelerate: whoever drops the first batches is the active loader meanwhile."""

    def __init__(self, bridge: TorchDataLoader, skip: int, accelerate: Any) -> None:
        self.dataset = bridge.dataset
        self.skip_batches = skip
        self.accelerate = accelerate
        self.base: Any = torch.utils.data.DataLoader(bridge.dataset, batch_size=None, collate_fn=bridge.collate_fn)

    def __iter__(self) -> Iterator[Any]:
        self.accelerate.active_dataloader = self
        for number, batch in enumerate(self.base):
            if number >= self.skip_batches:
                yield batch
        self.accelerate.active_dataloader = None


@pytest.mark.parametrize("skip", [2, 7])
def test_batches_before_a_loaded_state_are_not_dropped_twice(accelerate: Any, skip: int) -> None:
    """The Trainer of Hugging Face always skips; without a length it counts the batches of all epochs."""
    bridge = as_torch_dataloader(make_pipeline())
    _, state, later = trained(bridge, 2)
    again = as_torch_dataloader(make_pipeline())
    again.load_state_dict(state)
    assert [*Skips(again, skip, accelerate), *again] == later


def test_without_a_state_skipped_batches_are_made_and_dropped(accelerate: Any) -> None:
    """An order that depends on a seed is resumed so, too."""
    assert list(Skips(as_torch_dataloader(make_pipeline()), 2, accelerate)) == list(make_pipeline())[2:]


def test_where_accelerate_is_not_used_nothing_is_read_ahead(accelerate: Any) -> None:
    module: Any = sys.modules["accelerate.state"]
    module.is_initialized = lambda: False
    bridge = as_torch_dataloader(make_pipeline())
    next(batches := iter(bridge))
    assert bridge.loader.state_dict()["batches"] == 1
    assert accelerate.dataloader_references == [None]
    del batches


# -- Hugging Face's Trainer ------------------------------------------------------------------------------------------


def test_the_callback_takes_what_the_trainer_gets() -> None:
    with pytest.raises(TypeError, match="takes what get_train_dataloader returns, as_torch_dataloader"):
        transformers_callback(make_pipeline())


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of it for a callback."""
    module: Any = ModuleType("transformers")
    module.TrainerCallback = object
    monkeypatch.setitem(sys.modules, "transformers", module)


def trainer_state(step: int) -> Any:
    return SimpleNamespace(global_step=step, stateful_callbacks={}, max_steps=1000)


@pytest.mark.parametrize("make", [make_pipeline, lambda: Pipeline(numbers).batch(4, collate_fn=list)])
@pytest.mark.filterwarnings("ignore::aioloader.ReplayWarning")
@pytest.mark.usefixtures("transformers")
def test_the_callback_keeps_the_state_in_the_trainer_s(make: Any) -> None:
    """Which goes through JSON, into `trainer_state.json`."""
    arguments = SimpleNamespace(gradient_accumulation_steps=1, process_index=0)
    control = SimpleNamespace(should_save=True)
    bridge = as_torch_dataloader(make())
    callback: Any = transformers_callback(bridge)
    state = trainer_state(0)
    callback.on_train_begin(arguments, state, control)
    list(bridge)
    batches = iter(bridge)
    next(batches)
    state.global_step = STEPS + 1
    callback.on_step_end(arguments, state, control, model=None)
    kept = json.loads(json.dumps(state.stateful_callbacks))
    later = [*batches, *bridge]
    again = as_torch_dataloader(make())
    resumed = trainer_state(STEPS + 1)
    resumed.stateful_callbacks = kept
    transformers_callback(again).on_train_begin(arguments, resumed, control)
    found = list(again)
    again.set_epoch(1 if make is not make_pipeline else 2)  # it counts on from what it believes to be the epoch
    assert [*found, *again] == later


@pytest.mark.usefixtures("transformers")
def test_a_new_training_loads_nothing() -> None:
    bridge = as_torch_dataloader(make_pipeline())
    callback: Any = transformers_callback(bridge)
    state = trainer_state(0)
    state.stateful_callbacks["aioloader"] = {"states": [{}]}
    callback.on_train_begin(SimpleNamespace(gradient_accumulation_steps=1, process_index=0), state, None)
    assert list(bridge) == list(make_pipeline())
