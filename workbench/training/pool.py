"""Many small independent jobs on a few CPU cores: worker processes, one bar, results in the order asked for."""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import get_context, parent_process
from typing import Any

import torch
from tqdm.auto import tqdm

from workbench.errors import WorkbenchError
from workbench.training.record import Record


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()  # returns when the parent is gone, however it went
        os._exit(1)


def _start_worker() -> None:
    # a killed parent cannot call its workers off: left alone, they would go on with their jobs
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # an interrupt of the whole group ends a worker without its traceback; the parent tells of it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)  # two threads on a shared core are several times slower than one


@lru_cache(maxsize=1)
def _pool(workers: int) -> ProcessPoolExecutor:
    """Workers that stay for the next call, since starting one costs seconds of imports; spawned, as a fork can hang."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)


def map_jobs(
    job: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    workers: int | None = None,
    cost: Callable[[Any], float] = lambda item: 1.0,
    record: Record | None = None,
    text: str = "jobs",
) -> list[Any]:
    """[job(item) for item in items], computed by `workers` processes (None: one a core), the dearest items first.

    job and items must pickle; cost(item) is any number in proportion to its time. With one worker, or on a GPU, the
    jobs run here one by one. The first error stops the rest and is raised; what the jobs stored themselves stays.
    """
    count = workers or os.cpu_count() or 1
    order = sorted(range(len(items)), key=lambda i: -cost(items[i]))
    results: list[Any] = [None] * len(items)
    done, total, ended = 0.0, sum(cost(item) for item in items) or 1.0, 0
    shape = "{l_bar}{bar}| {elapsed}<{remaining}"
    bar = tqdm(total=round(total), desc=text, leave=False, mininterval=0.5, disable=not items, bar_format=shape)

    def finished(i: int, result: Any) -> None:
        nonlocal done, ended
        results[i] = result
        done, ended = done + cost(items[i]), ended + 1
        bar.update(round(done) - bar.n)
        if record:
            record.progress(text, ended, len(items))

    with bar:
        if count == 1 or len(items) <= 1 or torch.cuda.is_available():
            for i in order:
                finished(i, job(items[i]))
            return results
        futures = {_pool(count).submit(job, items[i]): i for i in order}
        try:
            for future in as_completed(futures):
                finished(futures[future], future.result())
        except KeyboardInterrupt:
            _pool.cache_clear()  # its workers got the interrupt too
            raise
        except BrokenProcessPool:
            _pool.cache_clear()
            raise WorkbenchError(
                f"a worker of {text} was killed (out of memory?); lower workers, then resume"
            ) from None
        finally:
            for future in futures:
                future.cancel()
    return results
