"""Ctrl-C and SIGTERM during a run."""

import signal


class Interrupt:
    """While open, Ctrl-C and SIGTERM set `asked` to the signal: stop after the current step. SIGTERM gives up rollouts
    in progress; they come again, the same. A second signal stops at once."""

    def __enter__(self) -> "Interrupt":
        self.asked = 0
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number
