"""Ctrl-C and SIGTERM during a run."""

import signal
import threading


class Interrupt:
    """While open, Ctrl-C and SIGTERM set `asked` to the signal: stop after the current step. SIGTERM sets `stop` too, so that
    rollouts in progress are given up; they come again, the same. A second signal stops at once."""

    def __init__(self):
        self.asked, self.stop = 0, threading.Event()

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
        if number == signal.SIGTERM:
            self.stop.set()
