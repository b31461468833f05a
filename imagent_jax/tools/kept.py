"""Replies of servers kept on disk by what was asked, so that a run that is resumed or repeated gets the same ones."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def kept_path(folder: Path, *asked: Any) -> Path:
    """Return the file of what was asked, JSON values, in a folder that several processes may share."""
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return folder / key[:2] / f"{key}.json"


def read_kept(path: Path, use: Callable[[Any], T]) -> T | None:
    """Return what `use` makes of a record; None: there is none.

    A damaged record, for which `use` raises ValueError, TypeError or KeyError, is deleted, and there is none then.
    """
    try:
        return use(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        path.unlink(missing_ok=True)
        return None


def keep(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all. Of several processes that ask the same, the first one's record stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{uuid.uuid4()}.part")
    try:
        part.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)
