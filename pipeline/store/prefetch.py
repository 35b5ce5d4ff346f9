"""Work done ahead by threads, handed over in order.

    numbers --> at most `ahead` items in the making or ready --> consumer

Threads, not processes: zstd and numpy release Python's lock, and nothing has to be copied between address spaces.
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
    """`make` of each number, in order; an error in a thread is raised where its item would have come.

    Closing the iterator, or its end, waits for the items that are in the making and leaves no thread behind.

    Args:
        numbers: what to make; the consumer's thread takes from it.
        make: called in the threads, at once for several numbers.
        num_threads: 0 makes each item when it is asked for.
        ahead: items in the making or ready, at most.
    """
    if not num_threads:
        yield from map(make, numbers)
        return
    # kept here: when Python ends with this iterator open, the names of modules are gone before it is closed
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
                # the consumer may never ask again after the last item
                pool.shutdown()
            yield item
    finally:
        # at the end of Python its threads have been waited for, and are gone
        if not is_ending():
            pool.shutdown(cancel_futures=True)
