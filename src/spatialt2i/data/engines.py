"""Where shards are worked on: here, in processes, or on a cluster. Each yields them as they are done."""

from __future__ import annotations

import _thread
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

from spatialt2i.core.device import cpu_count
from spatialt2i.data.shard import Parts, Shard

Work = Callable[[Shard, Parts], None]


def in_processes(shards: Sequence[Shard], workers: int, parts: Parts, work: Work) -> Iterator[Shard]:
    """In processes of this machine, as many as it has cores where ``workers`` is 0."""
    workers = workers or cpu_count()
    if min(workers, len(shards)) <= 1:
        for shard in shards:
            work(shard, parts)
            yield shard
        return
    context = multiprocessing.get_context("spawn")
    life, ours = context.Pipe(duplex=False)  # closed when this process ends, however it does: then the workers end too
    pool = ProcessPoolExecutor(min(workers, len(shards)), mp_context=context, initializer=_prepare,
                               initargs=(life, parts))
    try:
        waiting = {pool.submit(_with_own_parts, work, shard): shard for shard in shards}
        for future in as_completed(waiting):
            future.result()
            yield waiting[future]
        pool.shutdown()
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)
        life.close()


_OWN: list[Parts] = []  # of a worker process


def _with_own_parts(work: Work, shard: Shard) -> None:
    work(shard, _OWN[0])


def _prepare(life: Connection, parts: Parts) -> None:
    """Give a worker its parts; make it leave Ctrl-C to its parent, and end with it, after requests under way."""
    _OWN.append(parts)
    over = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        if over.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)

    def watch() -> None:
        life.poll(None)  # returns when the other end is closed, because nothing is ever sent
        over.set()
        _thread.interrupt_main()  # which begins no more requests
        for thread in threading.enumerate():
            if thread not in (threading.current_thread(), threading.main_thread()) and not thread.daemon:
                thread.join()  # a request under way is paid for
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_ray(shards: Sequence[Shard], workers: int, parts: Parts, work: Work) -> Iterator[Shard]:
    """With Ray Data, on the cluster that it is connected to or else on this machine.

    An actor has a GPU of its own where the cluster has any, else a core; there are as many as that allows where
    ``workers`` is 0. The folder of the shards must be the same on all machines; replies of endpoints are kept there in
    SQLite files, which network file systems do not lock, so those are for one machine.
    """
    import ray

    class Worker:
        def __init__(self) -> None:
            self._parts = parts

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            for i in batch["i"]:
                work(shards[i], self._parts)
            return batch

    if not shards:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    total = ray.cluster_resources()
    kind = "GPU" if total.get("GPU") else "CPU"
    todo = ray.data.from_items([{"i": i} for i in range(len(shards))], override_num_blocks=len(shards))
    done = todo.map_batches(Worker, batch_size=1, concurrency=min(workers or int(total[kind]), len(shards)),
                            num_gpus=1 if kind == "GPU" else None, num_cpus=1)
    try:
        for row in done.iter_rows():
            yield shards[row["i"]]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what to do is in its message
