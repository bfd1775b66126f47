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
    """A `torch.Generator` for one sample, which also has generators for numpy and for Python's `random`.

    A second call for the same sample returns the same generators, which go on where they were.
    """

    _sample_seed: int
    _numpy: Any = None
    _random: random.Random | None = None

    @classmethod
    def of(cls, seed: int) -> "SampleRng":
        """A generator seeded with `seed`, in [0, 2**63)."""
        rng = cls()
        rng.manual_seed(seed)
        rng._sample_seed = seed
        return rng

    def numpy(self) -> "numpy.random.Generator":
        """A generator of numpy."""
        if self._numpy is None:
            import numpy

            self._numpy = numpy.random.default_rng(self._sample_seed)
        found: numpy.random.Generator = self._numpy
        return found

    def random(self) -> random.Random:
        """A generator of Python's `random`."""
        if self._random is None:
            self._random = random.Random(self._sample_seed)
        return self._random


def sample_rng() -> SampleRng:
    """The random numbers of the current sample; call it in a function of `map` or `filter`, or in `__getitem__`.

    They depend only on the loader's seed, the epoch, the stage, and the sample's key: its index or path, or whatever it
    was loaded by. So an augmentation is the same with one worker and with eight, in threads, in processes and on the
    loop, on any number of ranks, and after a resume. It differs in the next epoch.

    ```python
    def augment(image: torch.Tensor) -> torch.Tensor:
        rng = aioloader.sample_rng()
        return image + 0.1 * torch.randn(image.shape, generator=rng)
    ```

    The seed is that of `Pipeline.with_seed(seed)` or `DataLoader(seed=...)`. Without one, the loader draws a seed and
    keeps it in its state.

    Raises:
        RuntimeError: There is no current sample.
    """
    sample = current_sample.get()
    name = None if sample is None else sample.name
    if sample is None or name is None or sample.seed is None:
        raise RuntimeError(
            "sample_rng() gives the random numbers of a sample, got a call where there is none; call it inside a "
            "function that a loader runs: of map or filter, or a dataset's __getitem__"
        )
    attempt = getattr(name, "attempts", 1)  # what is begun again has the same numbers, from the first one on
    identity = (name, name.position, sample.seed, attempt)
    if sample.rng is not None and sample.rng[0] == identity:
        found: SampleRng = sample.rng[1]
        return found
    rng = SampleRng.of(derive_seed(sample.seed, key_text(name.key)))
    sample.rng = (identity, rng)
    return rng
