"""Threads that work a bounded number of items ahead."""

import concurrent.futures
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def usual_number() -> int:
    """Returns how many threads read and decode images."""
    return min(8, max(2, os.cpu_count() or 2))


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Yields `work(item)` of every item, in order; what `work` raises is raised here.

    `Executor.map` would queue a quarter of a million calls at once and hold all their results.

    Args:
      work: is called in a thread. What has not begun when the iterator is closed is left out.
      items: taken as they are needed.
      threads: number of threads.
      ahead: items begun beyond the one that is waited for.
    """
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending: deque[concurrent.futures.Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
