"""What a process does that is forked from this one while another thread is busy."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from threading import Event, Thread
from typing import Any

import pytest

needs_forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")


def in_a_fork(busy: Callable[[Event, Event], None], call: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Fork while a thread is busy, and return what a call returns in the new process.

    Args:
        busy: What the thread does: it sets the first event where it is to be forked, and then waits for the second.
        call: What the new process does.
        seconds: How long it may take.
    """
    there, leave = Event(), Event()
    thread = Thread(target=busy, args=(there, leave))
    thread.start()
    assert there.wait(seconds)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(call()), daemon=True)
    child.start()
    try:
        assert receiver.poll(seconds), "the process waits for a thread that it does not have"
        return receiver.recv()
    finally:
        child.kill()
        child.join()
        leave.set()
        thread.join(seconds)
