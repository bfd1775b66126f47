"""Random numbers that belong to a sample: the same for any concurrency, worker type and number of ranks."""

import random
from typing import TYPE_CHECKING, Any

import torch

from aioloader.core.keys import key_text
from aioloader.core.seeds import derive_seed
from aioloader.executors.current_sample import current_sample

if TYPE_CHECKING:
    import numpy

__all__ = ["SampleRng", "sample_rng"]


class SampleRng(torch.Generator):
    """A `torch.Generator` of one sample, with the generators of numpy and of Python's `random` beside it.

    Each of the three goes on where it was when it is asked for again for the same sample.
    """

    _sample_seed: int
    _numpy: Any = None
    _random: random.Random | None = None

    @classmethod
    def of(cls, seed: int) -> "SampleRng":
        """One that begins with `seed`, in [0, 2**63)."""
        rng = cls()
        rng.manual_seed(seed)
        rng._sample_seed = seed
        return rng

    def numpy(self) -> "numpy.random.Generator":
        """For code that draws from numpy."""
        if self._numpy is None:
            import numpy

            self._numpy = numpy.random.default_rng(self._sample_seed)
        found: numpy.random.Generator = self._numpy
        return found

    def random(self) -> random.Random:
        """For code that draws from Python's `random`."""
        if self._random is None:
            self._random = random.Random(self._sample_seed)
        return self._random


def sample_rng() -> SampleRng:
    """The random numbers of the sample at hand; inside a function of `map` or `filter`, or a dataset's `__getitem__`.

    They depend on the loader's seed, the epoch, the stage and the sample's key alone: its index or path, or what it was
    loaded by. So an augmentation is the same with one worker and with eight, in threads, processes or on the loop,
    on any number of ranks, and after a resume; and another one in the next epoch.

    ```python
    def augment(image: torch.Tensor) -> torch.Tensor:
        rng = aioloader.sample_rng()
        return image + 0.1 * torch.randn(image.shape, generator=rng)
    ```

    The seed is that of `Pipeline.with_seed(seed)` or `DataLoader(seed=...)`; without one, a loader draws one for itself
    and keeps it in its state.

    Raises:
        RuntimeError: There is no sample at hand.
    """
    sample = current_sample.get()
    name = None if sample is None else sample.name
    if sample is None or name is None or sample.seed is None:
        raise RuntimeError(
            "sample_rng() gives the random numbers of a sample, got a call where there is none; call it inside a "
            "function that a loader runs: of map or filter, or a dataset's __getitem__"
        )
    whose = (name, name.position, sample.seed)
    if sample.rng is not None and sample.rng[0] == whose:
        found: SampleRng = sample.rng[1]
        return found
    rng = SampleRng.of(derive_seed(sample.seed, key_text(name.key)))
    sample.rng = (whose, rng)
    return rng
