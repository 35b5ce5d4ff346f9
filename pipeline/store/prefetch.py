"""Items that threads make ahead of the consumer and hand over in order.

    numbers --> at most `ahead` items in the making or ready --> consumer

Threads are used rather than processes because zstd and numpy release Python's global lock, and nothing has to be copied
between address spaces.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(
    numbers: Iterable[int], make: Callable[[int], Item], num_threads: int, ahead: int
) -> Generator[Item, None, None]:
    """Yield `make(number)` for each number, in order; an error in a thread is raised in the place of its item.

    When the iterator ends or is closed, it waits for the items in the making and leaves no thread behind.

    Args:
        numbers: Numbers of the items; iterated in the consumer's thread.
        make: Makes an item; called in several threads at once.
        num_threads: Number of threads; 0 makes each item when it is asked for.
        ahead: Largest number of items that are in the making or ready.
    """
    if not num_threads:
        yield from map(make, numbers)
        return
    # kept in a local name: if Python exits while this iterator is open, module globals are gone before it is closed
    is_ending = sys.is_finalizing
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="capgap-decode")
    pending: deque[Future[Item]] = deque()
    left = iter(numbers)
    try:
        for number in left:
            pending.append(pool.submit(make, number))
            if len(pending) >= ahead:
                break
        while pending:
            item = pending.popleft().result()
            for number in left:
                pending.append(pool.submit(make, number))
                break
            if not pending:
                # closed before the last item, because the consumer may never ask for another
                pool.shutdown()
            yield item
    finally:
        # when Python exits, it has already waited for the threads, and they are gone
        if not is_ending():
            pool.shutdown(cancel_futures=True)
