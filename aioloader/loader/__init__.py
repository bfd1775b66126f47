"""What `Pipeline` and `DataLoader` share: a plan that is iterated, saved, resumed, paused and closed."""

from aioloader.loader.loader import Loader

__all__ = ["Loader"]
