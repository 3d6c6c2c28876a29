"""Trials side by side: each in one process from its beginning to its end, so that a history depends on nothing but its seed."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.simulator.trials.scenarios import run_trial
from tests.simulator.trials.setup import Result, Setup


def run_all(setups: Sequence[Setup], jobs: int | None = None) -> list[Result]:
    """The results in the order of the setups. A trial that fails ends all of it, with the trial's setup in the message."""
    workers = min(len(setups), jobs or os.cpu_count() or 1)
    if workers == 1:
        return [_run(setup) for setup in setups]
    results: dict[int, Result] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        asked = {pool.submit(_run, setup): number for number, setup in enumerate(setups)}
        try:
            for done in as_completed(asked):
                results[asked[done]] = done.result()
                _show_progress(len(results), len(setups))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [results[number] for number in range(len(setups))]


def _run(setup: Setup) -> Result:
    try:
        return run_trial(setup)
    except Exception as error:
        raise RuntimeError(f"{setup}: {error!r}") from error


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)
