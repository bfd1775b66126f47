"""What aioloader costs and what it gains, each figure beside a rival's in the same run: `python -m bench`."""
