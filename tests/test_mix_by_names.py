"""`Pipeline.mix` by names: weights that follow a schedule, or are set while it runs, exact under resume."""

import json
import pickle
import random
import threading
from collections import Counter
from itertools import islice
from typing import Any

import pytest

from aioloader import Pipeline, Schedule
from aioloader.core.seeds import BLOCK, random_of_block
from aioloader.plan.shape import shape_of
from aioloader.stages.base import Pass
from aioloader.testing import assert_resumes_exactly
from tests._support import Face, Steps, collect, explained, notes, on_both_faces


def named(weights: Any, length: int = 10_000, **others: Any) -> Pipeline:
    sources = {"web": [f"w{n}" for n in range(length)], "code": [f"c{n}" for n in range(length)]}
    return Pipeline.mix(sources, weights, **others)


def batched(loader: Pipeline, size: int = 4) -> Pipeline:
    return loader.batch(size, collate_fn=list).prefetch(0)


def model(changes: dict[int, tuple[float, float]], count: int, *, seed: int = 0, epoch: int = 0) -> list[str]:
    """What a plain loop would draw; `changes` has the weights from a draw on."""
    draws_seed = Pass(epoch).seed(seed, "mix")
    given = Counter[int]()
    weights = (1.0, 1.0)
    found = []
    for draw in range(count):
        weights = changes.get(draw, weights)
        if not draw % BLOCK:
            generator = random_of_block(draws_seed, draw // BLOCK)
        point = generator.random() * sum(weights)
        index = 0 if point < weights[0] else 1
        found.append(f"{'wc'[index]}{given[index]}")
        given[index] += 1
    return found


@on_both_faces
def test_names_draw_as_a_list_does(face: Face) -> None:
    by_list = Pipeline.mix([range(100), range(100, 150)], [3, 1], seed=2)
    by_names = Pipeline.mix({"a": range(100), "b": range(100, 150)}, {"b": 1, "a": 3}, seed=2)
    assert collect(by_names, face) == collect(by_list, face)
    assert len(by_names) == 150


@on_both_faces
def test_a_source_of_weight_0_is_not_drawn(face: Face) -> None:
    assert collect(named({"web": 0, "code": 1}, 5), face) == [f"c{n}" for n in range(5)]


@on_both_faces
def test_steps_hold_from_their_step_on(face: Face) -> None:
    schedule = Schedule.steps({0: {"web": 1, "code": 0}, 100: {"web": 1, "code": 3}, 300: {"code": 1, "web": 0}})
    found = collect(named(schedule), face, limit=400)
    assert found == model({0: (1, 0), 100: (1, 3), 300: (0, 1)}, 400)
    assert {one[0] for one in found[:100]} == {"w"}
    assert {one[0] for one in found[300:]} == {"c"}


@on_both_faces
def test_linear_weights_lie_on_a_line(face: Face) -> None:
    schedule = Schedule.linear({0: {"web": 1, "code": 0}, 1000: {"web": 0, "code": 1}})
    assert schedule(250) == {"web": 0.75, "code": 0.25}
    assert schedule(5000) == {"web": 0, "code": 1}
    found = collect(named(schedule), face, limit=1200)
    assert found == model({n: (1 - n / 1000, n / 1000) for n in range(1001)}, 1200)


@on_both_faces
def test_a_source_that_gets_its_weight_later_is_not_lost(face: Face) -> None:
    """The other one ends before: the draws up to then are left out."""
    schedule = Schedule.steps({0: {"web": 1, "code": 0}, 1000: {"web": 1, "code": 1}})
    assert collect(named(schedule, 20), face) == [f"w{n}" for n in range(20)] + [f"c{n}" for n in range(20)]


@on_both_faces
def test_weights_set_hold_from_the_draw_that_is_told(face: Face) -> None:
    loader = batched(named({"web": 1, "code": 1}))
    changes: dict[int, tuple[float, float]] = {0: (1, 1)}
    found: list[str] = []
    with Steps(loader, face) as steps:
        for weights in ((0, 1), (5, 1), (1, 0)):
            found += [one for batch in steps.rest(25) for one in batch]
            at = loader.set_weights({"web": weights[0], "code": weights[1]})
            assert at is not None
            assert len(found) <= at <= len(found) + 64
            changes[at] = weights
        found += [one for batch in steps.rest(50) for one in batch]
    assert found == model(changes, 500)
    assert {one[0] for one in found[-100:]} == {"w"}


@on_both_faces
def test_a_draw_can_be_said(face: Face) -> None:
    """So ranks that say it at the same step draw alike, whatever each has made ahead."""
    loader = batched(named({"web": 1, "code": 1}))
    with Steps(loader, face) as steps:
        found = [one for batch in steps.rest(5) for one in batch]
        assert loader.set_weights({"web": 0, "code": 1}, at=200) == 200
        with pytest.raises(ValueError, match=r"draw 3 has been made already.*pass at="):
            loader.set_weights({"web": 1, "code": 1}, at=3)
        found += [one for batch in steps.rest(95) for one in batch]
    assert found == model({0: (1, 1), 200: (0, 1)}, 400)


@on_both_faces
def test_what_was_set_holds_in_later_epochs_and_before_the_first(face: Face) -> None:
    loader = batched(named({"web": 1, "code": 1}, 50))
    assert loader.set_weights({"web": 1, "code": 0}) is None
    first = [one for batch in collect(loader, face) for one in batch]
    assert first == [f"w{n}" for n in range(50)]
    state = json.loads(json.dumps(loader.state_dict()))
    again = batched(named({"web": 1, "code": 1}, 50))
    again.load_state_dict(state)
    assert [one for batch in collect(again, face) for one in batch] == first
    again.set_weights({"web": 0, "code": 1})
    assert [one for batch in collect(again, face) for one in batch] == [f"c{n}" for n in range(50)]


@on_both_faces
def test_a_state_does_not_grow_with_the_changes(face: Face) -> None:
    """It has the weights that hold where it goes on, and those of draws that were made ahead of that."""

    def make() -> Pipeline:
        return batched(named({"web": 1, "code": 1}, 2000).shuffle(buffer_size=8))

    loader = make()
    states, found = [], []
    with Steps(loader, face) as steps:
        for step in range(300):
            loader.set_weights({"web": 1 + step % 7, "code": 1 + step % 5})
            found.append(steps.next())
            states.append(loader.state_dict())
        found += steps.rest()
    changes = [len(json.loads(state["cursor"]["json"])["random"]["weights"][""]) for state in states]
    assert max(changes) < 30
    assert [loader.replay(step) for step in (0, 150, 299)] == [found[step] for step in (0, 150, 299)]
    rests = []
    for earlier in ([], [[[], 0, [1.0, 1.0]], [[], 1, [0.0, 1.0]]]):  # as states had them once
        varying = json.loads(states[-1]["cursor"]["json"])
        varying["random"]["weights"][""][:0] = earlier
        again = make()
        again.load_state_dict({**states[-1], "cursor": {"json": json.dumps(varying)}})
        assert again.state_dict() == states[-1]
        rests.append(collect(again, face))
    assert rests == [found[300:]] * 2


@on_both_faces
@pytest.mark.parametrize("seed", range(6))
def test_a_resume_goes_on_with_what_was_set(face: Face, seed: int) -> None:
    """At random places, with changes that were made, and that are to come."""
    random_ = random.Random(seed)

    def make() -> Pipeline:
        schedule = Schedule.linear({0: {"web": 1, "code": 2}, 300: {"web": 3, "code": 1}})
        return batched(named(schedule).map(str))

    loader = make()
    found: list[str] = []
    for _ in range(6):
        with Steps(loader, face) as steps:
            for _ in range(random_.randrange(1, 4)):
                found += [one for batch in steps.rest(random_.randrange(1, 12)) for one in batch]
                at = None if random_.random() < 0.5 else len(found) + random_.randrange(600, 700)
                loader.set_weights({"web": random_.random(), "code": random_.random()}, at=at)
            found += [one for batch in steps.rest(random_.randrange(1, 12)) for one in batch]
            state = pickle.loads(pickle.dumps(loader.state_dict()))
            rest = [one for batch in steps.rest(60) for one in batch]
        loader = make()
        loader.load_state_dict(state)
        with Steps(loader, face) as steps:
            assert [one for batch in steps.rest(60) for one in batch] == rest
        loader = make()
        loader.load_state_dict(state)


@on_both_faces
def test_weights_set_between_a_state_and_its_first_batch(face: Face) -> None:
    loader = batched(named({"web": 1, "code": 1}))
    with Steps(loader, face) as steps:
        head = [one for batch in steps.rest(10) for one in batch]
        state = loader.state_dict()
    again = batched(named({"web": 1, "code": 1}))
    again.load_state_dict(state)
    again.set_weights({"web": 0, "code": 1})
    with Steps(again, face) as steps:
        rest = [one for batch in steps.rest(10) for one in batch]
    assert head + rest == model({0: (1, 1), 40: (0, 1)}, 80)


@on_both_faces
@pytest.mark.parametrize("at", [None, 60])
@pytest.mark.parametrize("batches", [0, 10])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_state_between_a_state_and_its_first_batch_has_what_was_set(
    batches: int, at: int | None, repeated: bool, face: Face
) -> None:
    """Whoever loads that one goes on as this one does; the state that was loaded stays what it was."""

    def make() -> Pipeline:
        loader = named({"web": 1, "code": 1})
        return batched(loader.repeat(2) if repeated else loader)

    loader = make()
    with Steps(loader, face) as steps:
        head = [one for batch in steps.rest(batches) for one in batch]
        state = loader.state_dict()
    again = make()
    again.load_state_dict(state)
    again.set_weights({"web": 1, "code": 3})
    again.set_weights({"web": 0, "code": 1}, at=at)
    between = json.loads(json.dumps(again.state_dict()))
    assert between == again.state_dict() != state
    for state_now, one in ((between, make()), (None, again)):
        if state_now is not None:
            one.load_state_dict(state_now)
            assert one.state_dict() == between
        found = head + [sample for batch in collect(one, face, limit=20) for sample in batch]
        assert found == model({0: (1, 1), batches * 4 if at is None else at: (0, 1)}, len(found))
    third = make()
    third.load_state_dict(between)
    third.load_state_dict(state)
    assert third.state_dict() == state


@on_both_faces
def test_what_is_set_takes_the_place_of_what_was_to_come_later(face: Face) -> None:
    loader = batched(named({"web": 1, "code": 1}))
    with Steps(loader, face) as steps:
        found = [one for batch in steps.rest(5) for one in batch]
        loader.set_weights({"web": 1, "code": 0}, at=200)
        loader.set_weights({"web": 0, "code": 1}, at=100)
        found += [one for batch in steps.rest(70) for one in batch]
    assert found == model({0: (1, 1), 100: (0, 1)}, 300)


@on_both_faces
def test_a_draw_can_be_said_before_the_first(face: Face) -> None:
    """Also of a later epoch, and in a state that is taken before it."""
    loader = batched(named({"web": 1, "code": 1}, 100))
    assert loader.set_weights({"web": 0, "code": 1}, at=40) == 40
    again = batched(named({"web": 1, "code": 1}, 100))
    again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for one in (loader, again):
        assert [x for batch in collect(one, face, limit=20) for x in batch] == model({0: (1, 1), 40: (0, 1)}, 80)


@on_both_faces
def test_a_state_counts_more_than_what_was_set_before_it_was_loaded(face: Face) -> None:
    state = batched(named({"web": 1, "code": 1})).state_dict()
    loader = batched(named({"web": 1, "code": 1}))
    loader.set_weights({"web": 0, "code": 1})
    loader.load_state_dict(state)
    assert [x for batch in collect(loader, face, limit=20) for x in batch] == model({0: (1, 1)}, 80)


def test_resume_at_every_batch() -> None:
    schedule = Schedule.linear({0: {"web": 1, "code": 0}, 40: {"web": 0, "code": 1}})
    assert_resumes_exactly(lambda: batched(named(schedule, 30)))
    assert_resumes_exactly(lambda: batched(named(schedule, 12).repeat(3)))
    assert_resumes_exactly(lambda: batched(named(schedule, 30).shard(1, 2)))


@on_both_faces
def test_nested_mixes_are_told_apart_by_their_names(face: Face) -> None:
    inner = named({"web": 1, "code": 1})
    loader = batched(Pipeline.mix({"text": inner, "math": [f"m{n}" for n in range(10_000)]}, {"text": 1, "math": 1}))
    loader.set_weights({"web": 1, "code": 0})
    loader.set_weights({"text": 3, "math": 1})
    with Steps(loader, face) as steps:
        counts = Counter(one[0] for batch in steps.rest(100) for one in batch)
    assert set(counts) == {"w", "m"}
    assert counts["w"] > 2 * counts["m"]


@on_both_faces
def test_what_each_source_has_given_is_told(face: Face) -> None:
    loader = batched(named({"web": 3, "code": 1}, 40))
    collect(loader, face)
    given = {stage.name: stage.samples for stage in loader.stats().stages if stage.name.startswith("mix: ")}
    assert given == {"mix: web": 40, "mix: code": 40}
    assert "mix: " not in explained(loader)


@on_both_faces
@pytest.mark.parametrize("repeated", [False, True])
def test_what_each_source_has_given_is_in_the_state(repeated: bool, face: Face) -> None:
    """So statistics count on after a resume, as if there had been none."""

    def make() -> Pipeline:
        loader = named({"web": 3, "code": 1}, 40)
        return batched(loader.repeat(2) if repeated else loader)

    def given(loader: Pipeline) -> dict[str, int]:
        told = [stage for stage in loader.stats().stages if stage.name.startswith("mix: ")]
        assert len(told) in (0, 2), "one for each source, however many rounds there were"
        return {stage.name: stage.samples for stage in told}

    loader = make()
    with Steps(loader, face) as steps:
        steps.rest(9)
        state = json.loads(json.dumps(loader.state_dict()))
    again = make()
    again.load_state_dict(state)
    with Steps(again, face) as steps:
        head = given(again)
        first = steps.next()
        assert sum(given(again).values()) >= 40
        steps.rest()
    assert first
    assert given(again) == ({"mix: web": 80, "mix: code": 80} if repeated else {"mix: web": 40, "mix: code": 40})
    assert sum(head.values()) in (0, 36)  # before the first batch nothing runs


def test_a_state_from_before_counts_were_in_it_is_loaded() -> None:
    """As one that was saved by an earlier version."""
    loader = batched(named({"web": 3, "code": 1}, 40))
    steps = iter(loader)
    head = [next(steps) for _ in range(9)]
    state = loader.state_dict()
    varying = json.loads(state["cursor"]["json"])
    assert sum(varying["cursor"][4]) == 36
    again = batched(named({"web": 3, "code": 1}, 40))
    again.load_state_dict({**state, "cursor": {"json": json.dumps(varying | {"cursor": varying["cursor"][:3]})}})
    assert head + list(again) == list(batched(named({"web": 3, "code": 1}, 40)))
    loader.close()
    for broken in ([0], [0, -1], "xx"):
        varying["cursor"][4] = broken
        with pytest.raises(ValueError, match="cursor"):
            again.load_state_dict({**state, "cursor": {"json": json.dumps(varying)}})


@on_both_faces
def test_epochs_of_each_source_are_told(face: Face) -> None:
    """How often it has been gone through, in a mix that ends after so many samples."""
    sources: dict[str, Any] = {
        "small": Pipeline(range(10)).map(str).repeat(),
        "large": Pipeline(range(1000)),
        "stream": lambda: iter(range(1000)),
    }
    loader = Pipeline.mix(sources, {"small": 1, "large": 1, "stream": 1}).take(300).batch(10, collate_fn=list)
    assert len(collect(loader, face)) == 30
    told = {stage.name: stage for stage in loader.stats().stages if stage.name.startswith("mix: ")}
    assert told["mix: small"].epochs == told["mix: small"].samples / 10 > 8
    assert told["mix: large"].epochs == told["mix: large"].samples / 1000
    assert told["mix: stream"].epochs is None


@on_both_faces
def test_an_endless_source_in_a_mix(face: Face) -> None:
    sources: dict[str, Any] = {"small": Pipeline(["s0", "s1"]).repeat(), "large": [f"l{n}" for n in range(10_000)]}
    with Steps(batched(Pipeline.mix(sources, {"small": 1, "large": 1})), face) as steps:
        found = [one for batch in steps.rest(50) for one in batch]
    small = [one for one in found if one[0] == "s"]
    assert small == [f"s{n % 2}" for n in range(len(small))]
    assert len(small) > 50


@on_both_faces
def test_an_error_names_its_source(face: Face) -> None:
    def broken(n: int) -> int:
        raise KeyError(n)

    def ends() -> Any:
        yield 1
        raise OSError("disk")

    loader = Pipeline.mix({"good": Pipeline([1]).map(broken), "bad": ends}, {"good": 1, "bad": 1})
    with Steps(loader, face) as steps:
        errors = [one for one in steps.outcomes() if isinstance(one, Exception)]
    said = {type(error): notes(error) for error in errors}
    assert "source 'good' of the mix" in said[KeyError]
    assert "source 'bad' of the mix" in said[OSError]


def test_ranks_say_the_draw() -> None:
    loaders = [batched(named({"web": 1, "code": 1}).shard(rank, 2)) for rank in range(2)]
    with pytest.raises(ValueError, match="needs at="):
        loaders[0].set_weights({"web": 1, "code": 0})
    found = []
    for loader in loaders:
        steps = iter(loader)
        mine = [one for batch in islice(steps, 5) for one in batch]
        loader.set_weights({"web": 1, "code": 0}, at=2000)
        found.append(mine + [one for batch in islice(steps, 495) for one in batch])
    dealt = [one for pair in zip(*found, strict=True) for one in pair]
    assert dealt == model({0: (1, 1), 2000: (1, 0)}, 4000)


def by_step(step: int) -> dict[str, float]:
    """More and more of the code, with a jump."""
    assert not threading.current_thread().name.startswith("aioloader-loop")
    return {"web": 1000.0 - step % 500, "code": step % 500 + (500.0 if step > 300 else 0.0)}


@on_both_faces
def test_a_function_of_the_step_gives_the_weights(face: Face) -> None:
    """As a plain loop that calls it at each draw."""
    loader = batched(named(by_step))
    with Steps(loader, face) as steps:
        found = [one for batch in steps.rest(250) for one in batch]
    weights = {step: (by_step(step)["web"], by_step(step)["code"]) for step in range(1000)}
    assert found == model(weights, 1000)


def test_a_function_is_asked_again_after_a_resume() -> None:
    assert_resumes_exactly(lambda: named(by_step, 400).batch(40, collate_fn=list))
    loader = named(by_step, 400).batch(40, collate_fn=list)
    assert list(loader.in_process()) == list(loader)


@on_both_faces
def test_weights_set_take_the_place_of_a_function(face: Face) -> None:
    """It is not asked for what they hold for."""
    asked: list[int] = []

    def weights(step: int) -> dict[str, float]:
        asked.append(step)
        return {"web": 1, "code": 0}

    loader = batched(named(weights))
    loader.set_weights({"web": 0, "code": 1}, at=10)
    with Steps(loader, face) as steps:
        found = [one for batch in steps.rest(200) for one in batch]
    assert [one[0] for one in found] == ["w"] * 10 + ["c"] * 790
    assert max(asked) < 256


@on_both_faces
def test_a_function_that_leaves_nothing_ends_the_mix(face: Face) -> None:
    """Nobody knows what it would say later."""
    loader = batched(Pipeline.mix({"a": range(3), "b": range(100)}, lambda _: {"a": 1, "b": 0}))
    assert collect(loader, face) == [[0, 1, 2]]
    with pytest.raises(TypeError, match="no length"):
        len(loader)


@on_both_faces
def test_a_function_that_fails_is_an_error_at_its_step(face: Face) -> None:
    def weights(step: int) -> dict[str, float]:
        return {"web": 1.0 / (300 - step), "code": 1}

    loader = batched(named(weights), 16)
    with Steps(loader, face) as steps:
        outcomes = steps.outcomes()
    assert [type(one) for one in outcomes] == [list] * 19 + [ZeroDivisionError], "300 draws, the last 12 a short batch"
    assert sum(map(len, outcomes[:-1])) == 300
    assert "weights of the mix at step 300, by <function" in notes(outcomes[-1])

    async def later(step: int) -> dict[str, float]:
        return weights(step)

    with pytest.raises(TypeError, match="a plain one"):
        named(later)
    with pytest.raises(ValueError, match="'code' has no weight"):
        named(lambda _: {"web": 1})


@pytest.mark.parametrize(
    ("weights", "error", "said"),
    [
        ([1, 1], TypeError, "must be a dict, a Schedule or a function of the step"),
        ({"web": 1}, ValueError, "'code' has no weight"),
        ({"web": 1, "books": 1, "code": 1}, ValueError, "'books' is no source"),
        ({"web": 0, "code": 0}, ValueError, "more than 0"),
        ({"web": -1, "code": 1}, ValueError, "not negative"),
        ({"web": float("nan"), "code": 1}, ValueError, "finite"),
        ({"web": 10**400, "code": 1}, ValueError, "finite"),
        ({"web": 1e308, "code": 1e308}, ValueError, "finite"),
        ({"web": True, "code": 1}, TypeError, "numbers"),
        ({"web": "1", "code": 1}, TypeError, "numbers"),
        (Schedule.steps({0: {"web": 1}}), ValueError, "web|code"),
    ],
)
def test_weights_that_are_none(weights: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        named(weights)


@pytest.mark.parametrize(
    ("points", "error", "said"),
    [
        ({}, ValueError, "got none"),
        ({5: {"a": 1}}, ValueError, "begins at step 0"),
        ({0: {"a": 1}, 7: {"a": 1}, 3: {"a": 1}}, ValueError, "increase"),
        ({0: {"a": 1}, 7: {"b": 1}}, ValueError, "is no source"),
        ({0: {"a": 1}, -7: {"a": 1}}, ValueError, "step"),
        ({0: {}}, ValueError, "one source"),
        ({0: 3}, TypeError, "dict"),
    ],
)
def test_schedules_that_are_none(points: Any, error: type[Exception], said: str) -> None:
    for make in (Schedule.steps, Schedule.linear):
        with pytest.raises(error, match=said):
            make(points)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (0.5, TypeError), ("1", TypeError)])
def test_a_schedule_has_weights_from_step_0_on(step: Any, error: type[Exception]) -> None:
    """Before that there are none, and none between two steps."""
    for make in (Schedule.steps, Schedule.linear):
        schedule = make({0: {"a": 1}, 10: {"a": 2}})
        with pytest.raises(error, match="the step of a Schedule must be"):
            schedule(step)
        assert schedule(0) == {"a": 1}
        assert schedule(10**12) == {"a": 2}


@pytest.mark.parametrize("weights", [{"a": 1, "b": 1}, Schedule.steps({0: {"a": 1, "b": 1}}), lambda _: {"a": 1}])
def test_weights_by_names_need_sources_with_names(weights: Any) -> None:
    with pytest.raises(TypeError, match=r"are for sources with names, got a list of 2; write Pipeline\.mix\({'a'"):
        Pipeline.mix([range(3), range(3)], weights)


def test_set_weights_where_there_is_no_such_mix() -> None:
    with pytest.raises(ValueError, match="it has none"):
        Pipeline(range(3)).set_weights({"a": 1})
    loader = named({"web": 1, "code": 1})
    with pytest.raises(ValueError, match="'web', 'code'"):
        loader.set_weights({"web": 1})
    with pytest.raises(TypeError, match="dict"):
        loader.set_weights([1, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="more than 0"):
        loader.set_weights({"web": 0, "code": 0})
    with pytest.raises(ValueError, match="at"):
        loader.set_weights({"web": 1, "code": 0}, at=-1)
    with pytest.raises(ValueError, match="2 have the sources"):
        Pipeline.zip(loader, named({"web": 1, "code": 1})).set_weights({"web": 1, "code": 0})
    with pytest.raises(ValueError, match="in_process"):
        loader.in_process().set_weights({"web": 1, "code": 0})
    with pytest.raises(ValueError, match="mix"):
        Pipeline.mix({}, {})
    with pytest.raises(TypeError, match="names of sources"):
        Pipeline.mix({1: range(3)}, {1: 1})  # type: ignore[dict-item]


def test_a_state_of_other_weights_is_refused() -> None:
    loader = batched(named({"web": 1, "code": 1}))
    next(iter(loader))
    loader.set_weights({"web": 1, "code": 0})
    state = json.loads(json.dumps(loader.state_dict()))
    with pytest.raises(ValueError, match="another pipeline"):
        batched(named({"web": 2, "code": 1})).load_state_dict(state)
    text = json.dumps(state)
    assert "[1.0,0.0]" in text
    broken = json.loads(text.replace("[1.0,0.0]", "[1.0]"))
    with pytest.raises(ValueError, match="random"):
        batched(named({"web": 1, "code": 1})).load_state_dict(broken)


def test_a_schedule_is_plain_data() -> None:
    schedule = Schedule.steps({0: {"a": 1, "b": 0}, 10: {"b": 1, "a": 0}})
    assert repr(pickle.loads(pickle.dumps(schedule))) == repr(schedule)
    assert repr(schedule) == "Schedule.steps({0: {'a': 1.0, 'b': 0.0}, 10: {'a': 0.0, 'b': 1.0}})"
    sources = {"b": range(3), "a": range(3)}
    assert shape_of(Pipeline.mix(sources, schedule)._plan) == shape_of(
        Pipeline.mix(sources, Schedule.steps({0: {"b": 0, "a": 1}, 10: {"a": 0, "b": 1}}))._plan
    )
