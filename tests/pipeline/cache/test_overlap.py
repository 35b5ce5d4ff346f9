from __future__ import annotations

import threading

import pytest

from capgap.pipeline.cache.overlap import overlap

WAIT_S = 1800  # a deadlock is reported rather than waited for


def test_the_first_half_goes_on_while_the_second_is_held_up_and_no_further_than_the_bound() -> None:
    begun: list[int] = []
    third_is_begun, may_end = threading.Event(), threading.Event()

    def first(item: int) -> int:
        begun.append(item)
        if len(begun) == 3:
            third_is_begun.set()
        return item

    def second(item: int) -> int:
        assert may_end.wait(WAIT_S)
        return item

    found: list[int] = []
    consumer = threading.Thread(target=lambda: found.extend(overlap(range(9), first, second, 2)))
    consumer.start()
    try:
        assert third_is_begun.wait(WAIT_S), "two are held up, so the third must have been begun beside them"
        # the third waits for a thread: a fourth would be one result more than the bound
        consumer.join(0.2)
        assert begun == [0, 1, 2]
    finally:
        may_end.set()
        consumer.join(WAIT_S)
    assert sorted(found) == list(range(9)) == begun


def test_what_the_second_half_raises_ends_all_and_what_was_at_work_comes_to_an_end() -> None:
    begun: list[int] = []
    ended: list[int] = []
    failed = threading.Event()

    def first(item: int) -> int:
        begun.append(item)
        if item == 2:
            assert failed.wait(WAIT_S)
        return item

    def second(item: int) -> None:
        if item == 0:
            failed.set()
            raise OSError(28, "No space left on device")
        ended.append(item)

    with pytest.raises(OSError, match="No space left on device"):
        list(overlap(range(100), first, second, 2))
    assert len(begun) < 10
    assert ended == begun[1 : 1 + len(ended)]
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if "capgap-second" in t.name]


def test_what_the_first_half_raises_waits_for_the_second_halves() -> None:
    ended: list[int] = []

    def first(item: int) -> int:
        if item == 3:
            raise ValueError("damaged")
        return item

    with pytest.raises(ValueError, match="damaged"):
        list(overlap(range(9), first, ended.append, 2))
    assert sorted(ended) == [0, 1, 2]


def test_nothing_to_do_is_done() -> None:
    assert list(overlap([], lambda item: item, lambda item: item, 2)) == []
