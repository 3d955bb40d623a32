"""A clean stop when the machine is about to go away (SIGTERM)."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """Raised where the run stops because of SIGTERM; the state of a training has been saved."""


class PreemptionGuard:
    """Turns SIGTERM into a flag that the loop polls.

    With one process the handler is this class's own. With several, `jax.distributed` catches the
    signal on whichever process gets it and makes all of them stop at the same poll.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: object = None
        self._polls = 0

    def __enter__(self) -> "PreemptionGuard":
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._received = True

    def reached(self) -> bool:
        """Returns whether to stop; every process asks equally often, and gets the same answer."""
        if jax.process_count() == 1:
            return self._received
        # The place at which all stop is agreed on as a number of polls that none has reached yet.
        self._polls += 1
        return multihost_utils.reached_preemption_sync_point(self._polls)
