"""What is in a state, and states that say something else."""

import json
from collections.abc import Mapping
from typing import Any

from aioloader.plan.state import contents_of

__all__ = ["contents_of", "edited"]


def edited(state: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of `state` with other values for these keys, wherever they are in it; `...` leaves a key out."""
    varying = json.loads(state["cursor"]["json"])
    copy = dict(state)
    for key, value in changes.items():
        parts = varying if key in varying else copy
        if value is ...:
            del parts[key]
        else:
            parts[key] = value
    if copy.get("cursor") == state["cursor"]:
        copy["cursor"] = {"json": json.dumps(varying)}
    return copy
