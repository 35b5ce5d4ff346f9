"""Two kinds of work on the same items, the second one of which goes on beside the first.

first(item 0)  first(item 1)  first(item 2) ...          the caller's thread
               second(0)      second(1)     ...          threads of its own
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
    """`second(first(item))` of every item, in the order in which they come to an end.

    `first` runs in the caller's thread, an item at a time and in order; `second` in `num_threads` threads. Where all of
    them are busy the next result of `first` waits for one, so at most `num_threads` + 1 results of `first` exist at any
    time. What either raises is raised here, as soon as no `second` is at work any more; items after it are not begun.
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
