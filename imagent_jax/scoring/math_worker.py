"""The process of `expressions`: reads [reference, prediction] as lines of JSON and writes a verdict for each."""

import json
import logging
import resource
import sys
import time

from math_verify import LatexExtractionConfig, parse, verify

CPU_S, MEMORY = 3, 2 << 30
"""Processor seconds of one verdict; bytes of memory. SIGXCPU ends the process at once, in C code too."""


def verdict(reference: str, prediction: str) -> str:
    """Return "equal", "different" or "no reference"."""
    expected, found = (parse(text, [LatexExtractionConfig()], parsing_timeout=0) for text in (reference, prediction))
    if all(isinstance(value, str) for value in expected):  # what math-verify could not parse
        return "no reference"
    return "equal" if verify(expected, found, timeout_seconds=0) else "different"


def main() -> None:
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + CPU_S, most))
        try:
            said = verdict(*json.loads(line))
        except Exception:  # MemoryError and RecursionError are among them
            said = "different"
        print(said, flush=True)


if __name__ == "__main__":
    main()
