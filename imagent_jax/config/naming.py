"""Your own Python in a config: what 'package.module:name' names."""

import importlib
from typing import Any


def import_path(path: str, what: str) -> Any:
    """What stands at `path`, 'package.module:name'; modules are found as Python finds them, also in the current folder.

    Raises:
        ValueError: it cannot be imported; the sentence begins with `what`, the setting that asks for it.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does as it is imported
        raise ValueError(f"{what} {path!r} cannot be imported ({error}); write 'package.module:name'.") from error
