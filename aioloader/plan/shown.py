"""A pipeline as its user wrote it, in one line."""

from aioloader.plan.plan import Combined, Plan
from aioloader.sources.resolve import Indexable, source_name

__all__ = ["shown"]


def shown(plan: Plan) -> str:
    """Source and stages, with their seeds: what decides the order of samples is to be seen."""
    parts = [_source(plan), *(stage.shown for stage in plan.stages)]
    if plan.staleness is not None:
        parts.append(f"max_staleness({plan.staleness})")
    if plan.prefetch is not None:
        parts.append(f"prefetch({plan.prefetch})")
    if plan.seed is not None:
        parts.append(f"with_seed({plan.seed})")
    if plan.gives_info:
        parts.append("with_info()")
    return ".".join(parts)


def _source(plan: Plan) -> str:
    source = plan.source
    if isinstance(source, Combined):
        parts = [shown(inner) for inner in source.plans]
        if source.mixture is not None:
            parts = [f"{name}={part}" for name, part in zip(source.mixture.names, parts, strict=True)]
        if source.weights:
            parts.append(f"weights={[_number(weight) for weight in source.weights]}")
        if source.how == "mix":
            parts.append(f"seed={source.seed}")
        return f"Pipeline.{source.how}({', '.join(parts)})"
    data = source.data.data if isinstance(source.data, Indexable) else source.data.make
    return f"Pipeline({source.name or source_name(data)})"


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
