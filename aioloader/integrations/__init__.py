"""For programs that want more of a loader than to iterate it: nothing here is imported unless you ask for it."""

from aioloader.integrations.hf_trainer import transformers_callback
from aioloader.integrations.torch_dataloader import as_torch_dataloader

__all__ = ["as_torch_dataloader", "transformers_callback"]
