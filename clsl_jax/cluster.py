"""Several processes that train one model: joining them, agreeing, failing together.

A process is one program on one host; it may have several devices. With one process every function
here is free.
"""

import contextlib
import hashlib
import os
import pathlib
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from clsl_jax.errors import InputError, Unavailable, first_line

Result = TypeVar("Result")
PATIENCE, LAST_WORDS = 3600, 10
_COUNT, _INDEX = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join() -> None:
    """Joins the other processes of this run; call it before JAX has started.

    Where the environment has JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES
    and JAX_PROCESS_ID, these say who takes part. Otherwise JAX finds it out by itself: on TPU pods,
    under Slurm (a task a GPU) and under Open MPI.

    Raises:
      InputError: if they are incomplete, or the others cannot be reached.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    given: dict[str, Any] = {}
    if address:
        given["coordinator_address"] = address
        for name, argument in ((_COUNT, "num_processes"), (_INDEX, "process_id")):
            value = os.environ.get(name, "")
            if not value.isdigit():
                raise InputError(
                    f"--distributed with JAX_COORDINATOR_ADDRESS={address}: {name} must be a "
                    f"number, found {value!r}."
                )
            given[argument] = int(value)
        if given["process_id"] >= given["num_processes"]:
            raise InputError(
                f"{_INDEX}={given['process_id']}: expected 0 to {given['num_processes'] - 1}."
            )
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            "--distributed: the other processes of this run cannot be joined "
            f"({first_line(error)}). Start it under Slurm, Open MPI or on a TPU pod, or set "
            f"JAX_COORDINATOR_ADDRESS=HOST:PORT, {_COUNT} and {_INDEX} for each process."
        ) from None


def meet(where: str) -> None:
    """Waits until every process has come here, for `PATIENCE` seconds at most.

    On a CPU the first collective over some devices waits half a minute for the others, no longer:
    what takes one process longer than another must be over before.

    Args:
      where: a name, used once.
    """
    if jax.distributed.is_initialized():
        client = multihost.get_jax_distributed_client()
        client.wait_at_barrier(f"clsl_jax {where}", 1000 * PATIENCE)


def leave(status: int) -> NoReturn:
    """Ends this process, one of several, which may be waiting for it.

    At a normal end JAX waits for all others, who may be waiting for this one in a collective, until
    after five minutes all of them are aborted with a status of JAX's own. Here those that end as
    well have `LAST_WORDS` seconds to say why, and then this one is gone. Where all end, none is
    aborted because process 0, which serves the others, was gone before them.
    """
    with contextlib.suppress(Exception):  # not all came
        client = multihost.get_jax_distributed_client()
        client.wait_at_barrier("clsl_jax leaves", 1000 * LAST_WORDS)
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def agree(work: Callable[[], Result]) -> Result:
    """Returns `work()`; if it cannot be done on one process, it fails on all of them.

    Args:
      work: without collectives; every process must call this.

    Raises:
      InputError: another process failed, `Unavailable` where it may be tried again; what `work`
        raised here, of any kind, is raised again.
    """
    if jax.process_count() == 1:
        return work()
    result, error, status = None, None, 0
    try:
        result = work()
    except Exception as raised:
        error, status = raised, raised.status if isinstance(raised, InputError) else 1
    found = multihost_utils.process_allgather(np.int32(status))
    if error is not None:
        raise error
    if found.any():
        final = found == InputError.status  # rather than what may be tried again
        failed = np.flatnonzero(final if final.any() else found)[0]
        kind = InputError if final.any() else Unavailable
        raise kind(f"Process {failed} cannot go on: see what it says.")
    return result


def from_first(work: Callable[[], str]) -> str:
    """Returns `work()` of process 0, on every process; if it cannot be done there, all fail.

    Args:
      work: without collectives; every process must call this.
    """
    text = agree(lambda: work() if jax.process_index() == 0 else "")
    if jax.process_count() == 1:
        return text
    sent = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    received = multihost_utils.broadcast_one_to_all(np.resize(sent, size))  # all of one shape
    return bytes(received).decode()


def check_alike(facts: Mapping[str, str]) -> None:
    """Makes sure that every process works on the same thing.

    Args:
      facts: {what it is: its digest or value}, the same names on every process.

    Raises:
      InputError: naming the facts that differ and the first process that has another one.
    """
    if jax.process_count() == 1:
        return
    digests = np.stack(
        [np.frombuffer(hashlib.sha256(v.encode()).digest(), np.uint8) for v in facts.values()]
    )
    found = multihost_utils.process_allgather(digests)  # [processes, facts, 32]
    differs = (found != found[:1]).any(axis=2)
    for place, name in enumerate(facts):
        others = np.flatnonzero(differs[:, place])
        if others.size:
            raise InputError(
                f"Process {others[0]} has other {name} than process 0: every process must read the "
                "same files. Compare what lies at data.dir, labels.file and model.embeddings there."
            )


def processes_here() -> int:
    """Returns how many of the processes run on this one's host, or in its container: 1 or more."""
    if jax.process_count() == 1:
        return 1
    name = socket.gethostname()
    with contextlib.suppress(OSError):  # hosts may have one name
        name += pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    digest = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8)
    found = multihost_utils.process_allgather(digest)  # [processes, 32]
    return int((found == found[jax.process_index()]).all(axis=1).sum())


def smallest(size: int) -> int:
    """Returns the smallest of the processes' sizes in bytes; with several, in whole mebibytes."""
    if jax.process_count() == 1:
        return size
    return int(multihost_utils.process_allgather(np.int32(size >> 20)).min()) << 20


def union(rows: set[int], count: int) -> set[int]:
    """Returns the row numbers below `count` that any process has."""
    if jax.process_count() == 1:
        return rows
    has = np.zeros(count, bool)
    has[list(rows)] = True
    return set(np.flatnonzero(multihost_utils.process_allgather(has).any(axis=0)).tolist())
