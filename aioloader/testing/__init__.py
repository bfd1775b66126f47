"""Fakes for tests of loaders, of ours and of yours: steered by states, never by time."""

from aioloader.testing.device import FakeBackend, FakeEvent, FakeStream, Launch
from aioloader.testing.resume import assert_resumes_exactly
from aioloader.testing.sources import (
    FaultySource,
    Gate,
    RecordingSource,
    SourceEvent,
    SyncFaultySource,
    SyncRecordingSource,
    virtual_order,
)

__all__ = [
    "FakeBackend",
    "FakeEvent",
    "FakeStream",
    "FaultySource",
    "Gate",
    "Launch",
    "RecordingSource",
    "SourceEvent",
    "SyncFaultySource",
    "SyncRecordingSource",
    "assert_resumes_exactly",
    "virtual_order",
]
