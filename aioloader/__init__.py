"""An asyncio-native data loader for PyTorch: hundreds of samples under way in one process, by `for` or `async for`."""

from aioloader.core.limit import Limit
from aioloader.core.mixture import Schedule
from aioloader.core.policies import Hedge, Retry
from aioloader.core.rate import Rate
from aioloader.core.skip import Skip
from aioloader.dataloader import DataLoader
from aioloader.errors import (
    AioloaderError,
    BrokenDataError,
    ChannelClosedError,
    CutShortError,
    DeviceError,
    LeakedContextError,
    LengthWarning,
    LoaderClosedError,
    NothingPassesError,
    RankError,
    ReadAllWarning,
    ReplayWarning,
    SampleCancelledError,
    SourceUsedUpError,
    StateError,
    TooManySkippedError,
    UnevenWarning,
    UnknownLengthError,
    UnsplitWarning,
    WorkerDiedError,
)
from aioloader.insight.batch_info import BatchInfo
from aioloader.insight.gauges import Waits
from aioloader.insight.policies import PolicyStats
from aioloader.insight.stats import StageStats, Stats
from aioloader.pipeline import Pipeline
from aioloader.rng import SampleRng, sample_rng
from aioloader.stages.packed import Packed
from aioloader.version import __version__

__all__ = [
    "AioloaderError",
    "BatchInfo",
    "BrokenDataError",
    "ChannelClosedError",
    "CutShortError",
    "DataLoader",
    "DeviceError",
    "Hedge",
    "LeakedContextError",
    "LengthWarning",
    "Limit",
    "LoaderClosedError",
    "NothingPassesError",
    "Packed",
    "Pipeline",
    "PolicyStats",
    "RankError",
    "Rate",
    "ReadAllWarning",
    "ReplayWarning",
    "Retry",
    "SampleCancelledError",
    "SampleRng",
    "Schedule",
    "Skip",
    "SourceUsedUpError",
    "StageStats",
    "StateError",
    "Stats",
    "TooManySkippedError",
    "UnevenWarning",
    "UnknownLengthError",
    "UnsplitWarning",
    "Waits",
    "WorkerDiedError",
    "__version__",
    "sample_rng",
]
