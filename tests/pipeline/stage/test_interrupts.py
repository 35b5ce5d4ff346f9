from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from capgap.pipeline.stage.interrupts import interrupts_heard


def test_an_interrupt_that_was_swallowed_is_raised_at_the_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts_heard():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except BaseException:
            pass
        reached = True
    assert reached and signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_that_is_not_swallowed_ends_the_block_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_heard():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        raise AssertionError("it goes on")


def test_without_an_interrupt_nothing_is_raised_in_any_thread() -> None:
    with interrupts_heard():
        pass
    done: list[bool] = []

    def work() -> None:
        with interrupts_heard():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
