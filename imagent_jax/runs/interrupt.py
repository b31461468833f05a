"""Handling of Ctrl-C and SIGTERM during a run."""

import signal
import threading


class Interrupt:
    """Context manager: Ctrl-C and SIGTERM set `asked` to the signal, which requests a stop after the current step.

    SIGTERM also sets `stop`, which aborts rollouts in progress; a resumed run samples the same rollouts again. A second signal
    raises KeyboardInterrupt.
    """

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
