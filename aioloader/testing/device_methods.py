"""What an object's own `to` and `pin_memory` do to its tensors on the fake device."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["DeviceMethods"]

TensorFunction = Callable[[torch.Tensor], torch.Tensor]


class DeviceMethods(TorchFunctionMode):
    """Redirects `Tensor.to` and `Tensor.pin_memory` to the fake device while an object's own method runs.

    Args:
        pin: In place of `Tensor.pin_memory`.
        to: In place of `Tensor.to`, whatever it is called with; None: that stays torch's.
    """

    def __init__(self, *, pin: TensorFunction, to: TensorFunction | None = None) -> None:
        super().__init__()
        self._pin = pin
        self._to = to

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return self._pin(args[0])
        if func is torch.Tensor.to and self._to is not None:
            return self._to(args[0])
        return func(*args, **(kwargs or {}))
