"""The file in the directory of a cache that says which pipeline its samples are from."""

import json
import os
import uuid
import zlib
from pathlib import Path
from typing import Any, Final

__all__ = ["CacheDescription"]

FORMAT: Final = 3
SUFFIXES: Final = {".index", ".samples", ".new"}  # of the other files in the directory


class CacheDescription:
    """Describes a pipeline, and compares that with what a directory says.

    The checksums in the indices of a cache start from its `checksum`.
    """

    def __init__(self, folder: Path, pipeline: str, version: str) -> None:
        self.path = folder / "cache.json"
        self._folder = folder
        self._pipeline = pipeline
        self._version = version
        self._text = _text(pipeline, version)
        self.checksum = zlib.crc32(self._text.encode())

    def matches(self) -> bool:
        """Whether the directory has this description; False when it has none, or a broken one.

        Raises:
            NotADirectoryError: It is a file.
            ValueError: It is the cache of another pipeline, or no cache.
        """
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            text = None
        except NotADirectoryError:
            raise NotADirectoryError(
                f"disk must be a directory, got the file {str(self._folder)!r}; pass another path"
            ) from None
        found = None if text is None else _parsed(text)
        if found is None:
            self._check_other_files(text)
            return False
        if found["format"] != FORMAT:
            raise ValueError(
                f"{self._folder} is a cache of format {found['format']!r}, and this is {FORMAT}; delete it, or pass "
                f"another directory"
            )
        for what, ours in (("pipeline", self._pipeline), ("version", self._version)):
            if found[what] != ours:
                raise ValueError(
                    f"the directory {str(self._folder)!r} keeps the samples of another {what}, {found[what]!r}, and "
                    f"this one is {ours!r}; pass a directory for each, or delete this one if it is out of date"
                )
        return True

    def _check_other_files(self, text: str | None) -> None:
        others = [other for other in self._folder.iterdir() if other != self.path] if self._folder.is_dir() else []
        strangers = [other.name for other in others if other.suffix not in SUFFIXES]
        if strangers:
            raise ValueError(
                f"the directory {str(self._folder)!r} holds {strangers[0]!r} and is no cache; pass one of its own, "
                f"which need not exist"
            )
        if text is not None and not others:
            raise ValueError(f"{self.path} does not describe a cache; delete the directory")

    def write(self) -> None:
        """Make the directory, and the file unless another process was faster."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f"{uuid.uuid4().hex}.new"
        try:
            draft.write_text(self._text, encoding="utf-8")
            if self.path.exists():  # a broken one
                draft.replace(self.path)
                return
            try:
                os.link(draft, self.path)  # unlike a rename, it does not replace another process's file
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                draft.replace(self.path)
        finally:
            draft.unlink(missing_ok=True)


def _text(pipeline: str, version: str) -> str:
    content = {"format": FORMAT, "pipeline": pipeline, "version": version}
    return json.dumps({**content, "checksum": zlib.crc32(json.dumps(content).encode())}, indent=1)


def _parsed(text: str) -> dict[str, Any] | None:
    """The content of a description; None: it is broken, or something else."""
    try:
        found = json.loads(text)
        if found["format"] == FORMAT and text != _text(found["pipeline"], found["version"]):
            return None
    except (ValueError, KeyError, TypeError):
        return None
    return {"pipeline": None, "version": None, **found}
