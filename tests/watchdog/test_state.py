"""What the watchdog's threads and the main thread tell each other, in every order."""

from __future__ import annotations

import sys
import threading

from muon_plugin.watchdog.state import State
from muon_plugin.watchdog.verdict import FAILED, FINISHED


def test_of_a_failure_and_a_lost_store_the_later_one_is_told_of_both():
    failed_first, lost_first = State(), State()
    assert failed_first.fail("E: a") is False
    assert failed_first.lose_store("gone") is True
    assert lost_first.lose_store("gone") is False
    assert lost_first.fail("E: a") is True


def test_exactly_one_thread_explains_a_failure_without_the_store():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(300):
            state, told, start = State(), [], threading.Barrier(2)

            def lose(state=state, told=told, start=start):
                start.wait()
                told.append(state.lose_store("gone"))

            other = threading.Thread(target=lose)
            other.start()
            start.wait()
            told.append(state.fail("E: a"))
            other.join()
            assert sorted(told) == [False, True]
            assert (state.fate.life, state.fate.error, state.fate.lost) == (FAILED, "E: a", "gone")
    finally:
        sys.setswitchinterval(interval)


def test_a_rank_that_leaves_has_finished_unless_it_failed():
    clean, failed = State(), State()
    clean.leave()
    failed.fail("E: a")
    failed.count(2)
    failed.leave()
    assert (clean.fate.life, failed.fate.life, failed.fate.order) == (FINISHED, FAILED, 2)
    assert clean.left.is_set()
    assert clean.changed.is_set()  # the last heartbeat does not wait a whole beat
    since = clean.fate.since
    clean.leave()
    assert clean.fate.since == since
