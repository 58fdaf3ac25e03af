"""Who has the floor: one reply or change of a conversation at a time, until it ends or is stopped; all are told.

    floor = Floor()
    with floor.take("cannot clear"): ...   # meanwhile another take raises; afterwards every observer is called
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from glm3kit.errors import Glm3KitError


class Floor:
    """The right to speak or to change something. It may be given back in another thread than it was taken in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._observers: list[Callable[[], None]] = []

    @property
    def taken(self) -> bool:
        """Whether somebody has it."""
        return self._lock.locked()

    @property
    def stopped(self) -> bool:
        """Whether whoever has it, or had it last, was asked to stop."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask whoever has it to stop, from any thread."""
        self._stop.set()

    def observe(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` with each `tell`; return a function that ends that."""
        self._observers.append(changed)
        return lambda: self._observers.remove(changed)

    def tell(self) -> None:
        """Tell all observers that something has changed."""
        for changed in list(self._observers):
            changed()

    @contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Have the floor; tell the observers when it is free again. what: begins the error's message.

        Raises Glm3KitError if somebody else has it.
        """
        if not self._lock.acquire(blocking=False):
            raise Glm3KitError(f"{what}: this session is still generating a reply; "
                               "read its stream to the end, close it, or call session.stop() first")
        self._stop.clear()
        try:
            yield
        finally:
            self._lock.release()
            self.tell()
