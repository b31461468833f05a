"""Files that a killed process leaves whole: JSON values that are appended a line each, and texts that take another's place."""

import json
import os
from pathlib import Path
from typing import Any


class Lines:
    """JSON values in a file, one a line. What a killed process left of a line is cut off.

    Attributes:
        values: those in the file, in order.
    Raises:
        ValueError: a line is damaged.
    """

    def __init__(self, path: Path):
        self.path, self.values = path, []
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            os.truncate(path, sum(map(len, lines[:-1])))
            lines.pop()
        for number, line in enumerate(lines, 1):
            try:
                self.values.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged ({error}); delete the line, and start again.") from None

    def add(self, *values: Any) -> None:
        """Append values; they are on disk when it returns."""
        self.values += values
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
            file.flush()
            os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
