"""Torch's thread-local contexts, and user generators that hold one across a `yield`.

Grad mode, inference mode, autocast and the default device belong to a thread, not to a task. A generator that yields
inside `with torch.no_grad():` would switch gradients off for its consumer's loop body and for every other task of the
thread, so the engine compares the state around each step of a user generator and refuses.
"""

from typing import Final

import torch

from aioloader.errors import LeakedContextError

__all__ = ["NOTHING_SET", "ContextState", "check_leak", "context_state"]

ContextState = tuple[bool, bool, bool, int]

NOTHING_SET: Final[ContextState] = True, False, False, 0
"""Of a thread in which nobody has set anything."""

# `torch.device(...)` and friends, as contexts, stand on a stack whose length torch only tells privately.
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", torch.is_autocast_enabled)

_NAMES: Final = (
    "torch.no_grad() or torch.enable_grad()",
    "torch.inference_mode()",
    "torch.autocast(...)",
    "torch.device(...) or another torch function mode",
)


def context_state() -> ContextState:
    """The calling thread's grad mode, inference mode, autocast and depth of function modes; 0.2 µs."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _any_autocast(), _function_modes()


def check_leak(before: ContextState, source: str) -> None:
    """Refuse a generator whose last step left another state than `before`.

    Raises:
        LeakedContextError: It did. Grad mode is put back at once; the generator's own exit, which follows when it is
            closed, does so for the rest.
    """
    after = context_state()
    if after == before:
        return
    torch.set_grad_enabled(before[0])
    held = ", ".join(name for name, a, b in zip(_NAMES, before, after, strict=True) if a != b)
    raise LeakedContextError(
        f"{source} holds {held} across a `yield`: torch's contexts belong to the thread, so it would act on the code "
        f"that consumes the samples; leave the `with` block before each `yield`"
    )
