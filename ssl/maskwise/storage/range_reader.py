"""Ranges of files in storage: from the cache or by request, several requests in flight."""

import collections
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from maskwise.storage.range_cache import RangeCache
from maskwise.storage.store import Store

Place = tuple[int, int, int]  # number of the file, offset, size


class RangeReader:
    """Read ranges of the files `addresses`; `expect` starts the requests for the ranges that follow.

    reads: requests in flight, and ranges held until they are read. Forked and pickled copies start without any.
    """

    def __init__(self, addresses: Sequence[str], store: Store, cache: RangeCache | None = None, reads: int = 16):
        self.addresses, self.store, self.cache, self.reads = list(addresses), store, cache, reads
        self._reset()

    def __getstate__(self) -> dict:
        kept = {"addresses", "store", "cache", "reads"}
        return {key: value for key, value in self.__dict__.items() if key in kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def read(self, number: int, start: int, size: int) -> bytes:
        """Return one range. Raises StorageError."""
        if self._process != os.getpid():
            self._reset()
        place = (number, start, size)
        with self._guard:
            future = self._started.get(place)
            self._uses[place] -= 1
            if self._uses[place] <= 0:
                self._started.pop(place, None)
                del self._uses[place]
            self._start()
        return future.result() if future is not None else self._get(place)

    def expect(self, places: Sequence[Place]) -> None:
        """Start reading these ranges, in their order; those expected before are given up."""
        if self._process != os.getpid():
            self._reset()
        with self._guard:
            self._uses = collections.Counter(places)
            self._waiting = collections.deque(self._uses)
            kept = {place: future for place, future in self._started.items() if place in self._uses}
            self._started = {place: one for place, one in kept.items() if not (one.done() and one.exception())}
            self._start()

    def map(self, function: Callable, items: Sequence) -> list:
        """Return [function(item) ...], several at once, in the order of the items. Raises the first error."""
        threads = Threads(min(self.reads, max(1, len(items))))
        futures = [threads.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            threads.close()

    def _get(self, place: Place) -> bytes:
        number, start, size = place
        data = self.cache.get(number, start, size) if self.cache else None
        if data is None:
            data = self.store.read(self.addresses[number], start, size)
            if self.cache:
                self.cache.put(number, start, data)
        return data

    def _start(self) -> None:
        while self._waiting and len(self._started) < self.reads:
            place = self._waiting.popleft()
            if place in self._uses and place not in self._started:
                if self._threads is None:
                    self._threads = Threads(self.reads)
                self._started[place] = self._threads.submit(self._get, place)

    def _reset(self) -> None:
        self._process = os.getpid()
        self._guard = threading.Lock()
        self._uses: collections.Counter[Place] = collections.Counter()
        self._waiting: collections.deque[Place] = collections.deque()
        self._started: dict[Place, Future] = {}
        self._threads: Threads | None = None


class Threads:
    """Threads that run functions and do not keep the process from ending, unlike those of a ThreadPoolExecutor."""

    def __init__(self, count: int):
        self.count = count
        self.work: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        for _ in range(count):
            threading.Thread(target=self._run, daemon=True).start()

    def submit(self, function: Callable, *arguments) -> Future:
        """Run function(*arguments) in a thread."""
        future: Future[Any] = Future()
        self.work.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Let the threads end after what was submitted."""
        for _ in range(self.count):
            self.work.put(None)

    def _run(self) -> None:
        while (item := self.work.get()) is not None:
            future, function, arguments = item
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)
