"""Where a stage is in its pipeline."""

__all__ = ["Address"]

Address = tuple[int, ...]
"""The numbers of the inputs on the way to it, where pipelines are combined, and its own number among the functions
there, from 1. It is the same wherever a part of the pipeline is built, and however often: seeds of random numbers,
kept workers and counters go by it."""
