"""Fakes for tests of loaders, aioloader's and yours. Tests steer them by states, never by time."""

from aioloader.testing.device import FakeBackend, FakeEvent
from aioloader.testing.device_streams import FakeStream, Launch
from aioloader.testing.fault_plan import Fault, FaultError, FaultPlan
from aioloader.testing.faulty import FaultySource, SyncFaultySource
from aioloader.testing.gate import Gate
from aioloader.testing.ordering import virtual_order
from aioloader.testing.recording import RecordingSource, SourceEvent, SyncRecordingSource
from aioloader.testing.resume import assert_resumes_exactly

__all__ = [
    "FakeBackend",
    "FakeEvent",
    "FakeStream",
    "Fault",
    "FaultError",
    "FaultPlan",
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
