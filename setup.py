"""The description for package indexes; all else is in pyproject.toml.

The readme links to files beside it. Where it is shown without them, these links have to be whole addresses.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
LINK = re.compile(r"(?<=\]\()(?!https?:)(?=[^)\s]+\))")


def described() -> str:
    """The readme with links that lead somewhere from everywhere."""
    source = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Source"]
    parts = (ROOT / "README.md").read_text(encoding="utf-8").split("```")
    parts[::2] = [LINK.sub(f"{source}/blob/main/", text) for text in parts[::2]]  # the others are code
    parts[::2] = [text.replace("/blob/main/#", "#") for text in parts[::2]]  # headings of the readme itself
    return "```".join(parts)


setup(long_description=described(), long_description_content_type="text/markdown")
