"""`Pipeline`: the description of how samples become batches."""

from aioloader.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
