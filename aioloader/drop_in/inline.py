"""`num_workers=0`: the nodes of an epoch whose samples are made in the consumer's thread, inside `next()`."""

from collections.abc import Sequence

from aioloader.core.memory import Alloc
from aioloader.device import Transfer, pin_batch
from aioloader.drop_in.arguments import Arguments
from aioloader.drop_in.stages import collate_call, fetch_call, skips_in_batches
from aioloader.engine.inline import InlineMap, InlineSource
from aioloader.engine.node import FoldNode, Node
from aioloader.engine.progress import Progress
from aioloader.engine.skipping import SkipNode, SkipRule
from aioloader.engine.stream_source import warn_of_replay
from aioloader.executors.chunk import Call
from aioloader.executors.partial import over_partial
from aioloader.insight.meters import StageMeter
from aioloader.insight.policies import PolicyMeter
from aioloader.sources.sampled import Sampled
from aioloader.sources.sampler_order import draws_of
from aioloader.stages.base import Pass
from aioloader.stages.batch import BatchFold
from aioloader.stages.load_one import TriedInPlace

__all__ = ["inline_nodes"]


def inline_nodes(
    of: Arguments,
    data: Sampled,
    progress: Progress,
    this_pass: Pass,
    transfer: Transfer | None,
    alloc: Alloc,
) -> tuple[Node, list[StageMeter]]:
    """The last node of an epoch, and the meters of all of them, in order.

    Args:
        of: The arguments.
        data: What the loader reads.
        progress: Of the epoch.
        this_pass: Which epoch, for seeds.
        transfer: The loader's way to its device; None: there is none.
        alloc: Where the default collate puts batches.
    """
    epoch, draws = progress.epoch, draws_of(progress)
    data.begin(epoch, draws)
    if of.iterable:
        source = InlineSource(of.dataset, "source", epoch)
        before, middle = _batched(of, source, epoch)
        calls, log = [Call(collate_call(of, alloc), False, "collate")], None
    else:
        middle = source = InlineSource(data.of_epoch(epoch, draws).make(), "sampler", epoch, keys=True)
        before, dataset, log = None, of.dataset, None
        if of.policies is not None:
            log = PolicyMeter(of.policies)
            dataset = TriedInPlace(dataset, of.policies, lambda attempt: inline_map.retried(attempt), log)
        seed = this_pass.seed_of_samples((1,))  # the first function of the plan
        calls = [Call(fetch_call(of, alloc, dataset), False, "fetch", seed)]
    inline_map = InlineMap(middle, [*calls, *_to_device(of, transfer)], epoch, ordered=of.ordered)
    inline_map.meter.policies = log
    output: Node = inline_map
    meters = [source.meter, inline_map.meter]
    if before is not None:
        meters.insert(1, before.meter)
    if (skip := skips_in_batches(of)) is not None:
        rule = skip.with_ranks().rule(this_pass)
        output = SkipNode(inline_map, rule)
        meters.append(rule.meter)
    if progress.cursor is not None:
        output.resume(progress.cursor)
        if of.iterable:
            warn_of_replay(progress.cursor if of.skip_errors is None else progress.cursor[0], "source")
    return output, meters


def _batched(of: Arguments, source: Node, epoch: int) -> tuple[SkipRule | None, Node]:
    """What leaves samples of an iterable out, if anything does, and the node that groups them."""
    if of.batch_size is None:
        return None, source
    rule = None if of.skip_errors is None else SkipRule(of.skip_errors, epoch)
    if rule is not None:
        source = SkipNode(source, rule)
    return rule, FoldNode(source, BatchFold(of.batch_size, drop_last=of.drop_last))


def _to_device(of: Arguments, transfer: Transfer | None) -> Sequence[Call]:
    """What is done with batches at last."""
    if transfer is None:
        return ()
    if of.device is not None:
        return (Call(over_partial(transfer.send), False, f"to({of.device})"),)
    backend = transfer.backend
    return (Call(over_partial(lambda batch: pin_batch(batch, backend)), False, "pin_memory()"),)
