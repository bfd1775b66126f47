"""`python -m aioloader demo`: trains the same small network with three loaders, on images from a slow server."""
