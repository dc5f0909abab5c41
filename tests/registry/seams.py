"""A store with a seam: a test steps in before or after a call, and counts what was sent."""

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from xc_ray.registry.store import Entry, ObjectStore


class SeamStore(ObjectStore):
    """A memory store; `before(verb, key)` is called first, `age` makes objects look older."""

    def __init__(self, inner: ObjectStore | None = None) -> None:
        inner = inner or ObjectStore.open("memory://")
        super().__init__(inner.location)
        self.inner = inner
        self.before: Callable[[str, str], None] = lambda verb, key: None
        self.sent: list[str] = []
        self.age: dict[str, timedelta] = {}

    def older(self, hours: float) -> None:
        """Everything that is there now gets older by some hours."""
        for one in self.list(""):
            self.age[one.key] = self.age.get(one.key, timedelta()) + timedelta(hours=hours)

    def _aged(self, one: Entry) -> Entry:
        return Entry(one.key, one.size, one.modified - self.age.get(one.key, timedelta()))

    def _write(self, key: str) -> None:
        self.before("put", key)
        self.sent.append(key)
        self.age.pop(key, None)

    def get(self, key: str) -> bytes:
        self.before("get", key)
        return self.inner.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        self.before("get", key)
        return self.inner.get_range(key, start, stop)

    def entry(self, key: str) -> Entry:
        self.before("entry", key)
        return self._aged(self.inner.entry(key))

    def put(self, key: str, data: bytes | Path) -> None:
        self._write(key)
        self.inner.put(key, data)

    def put_chunks(self, key: str, chunks: Iterator[bytes], size: int) -> None:
        self._write(key)
        self.inner.put_chunks(key, chunks, size)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self.before("create", key)
        return self.inner.put_if_absent(key, data)

    def list(self, prefix: str, *, after: str | None = None) -> list[Entry]:
        self.before("list", prefix)
        return [self._aged(one) for one in self.inner.list(prefix, after=after)]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.before("delete", key)
        self.inner.delete(keys)
