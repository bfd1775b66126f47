"""`python -m aioloader demo`: the same small training three times, on images that stand behind a slow server."""
