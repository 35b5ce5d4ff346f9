"""Two steps of work on the same items, where the second step runs in parallel with the first step of later items.

first(item 0)  first(item 1)  first(item 2) ...          the caller's thread
               second(0)      second(1)     ...          separate threads
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Item = TypeVar("Item")
Half = TypeVar("Half")
Whole = TypeVar("Whole")


def overlap(
    items: Iterable[Item], first: Callable[[Item], Half], second: Callable[[Half], Whole], num_threads: int
) -> Iterator[Whole]:
    """Yield `second(first(item))` of every item, in the order in which the results are ready.

    `first` runs in the caller's thread, one item at a time and in order; `second` runs in `num_threads` threads. When
    all of them are busy, the next result of `first` waits for a free thread, so at most `num_threads` + 1 results of
    `first` exist at any time. An exception of `first` or `second` is raised here once no thread is running `second` any
    more, and later items are not begun.
    """
    running: set[Future[Whole]] = set()
    with ThreadPoolExecutor(num_threads, thread_name_prefix="capgap-second") as pool:
        for item in items:
            half = first(item)
            done = {future for future in running if future.done()}
            if not done and len(running) == num_threads:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
            running -= done
            yield from (future.result() for future in done)
            running.add(pool.submit(second, half))
            del half
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
