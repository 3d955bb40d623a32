"""A clean stop when the machine is about to go away (SIGTERM), or on Ctrl-C."""

import contextlib
import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """Raised where the run stops on SIGTERM or Ctrl-C; the state of a training has been saved."""


class PreemptionGuard:
    """Turns SIGTERM into a flag that the loop polls, and the first Ctrl-C into SIGTERM.

    With one process the handler is this class's own. With several, `jax.distributed` catches the
    signal on whichever process gets it and makes all of them stop at the same poll. A second Ctrl-C
    ends the process at once. One in the background, which ignores Ctrl-C, goes on doing so.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: object = None
        self._interrupt: object = None
        self._polls = 0

    def __enter__(self) -> "PreemptionGuard":
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        self._interrupt = signal.getsignal(signal.SIGINT)
        if self._interrupt is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *unused: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._previous)
        signal.signal(signal.SIGINT, self._interrupt)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        self._received = True

    def _interrupted(self, signum: int, frame: FrameType | None) -> None:
        del signum, frame
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        # Not `print`, at work on which the signal may have come; a pipe's reader may have gone.
        with contextlib.suppress(OSError):
            os.write(
                2,
                b"Ctrl-C: it stops where it can save all; once more ends it at once.\n",
            )

    def reached(self) -> bool:
        """Returns whether to stop; every process asks equally often, and gets the same answer."""
        if jax.process_count() == 1:
            return self._received
        # The place at which all stop is agreed on as a number of polls that none has reached yet.
        self._polls += 1
        return multihost_utils.reached_preemption_sync_point(self._polls)
