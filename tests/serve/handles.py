"""Deployment handles on objects of this process: the calls of Ray's, without Ray."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any


class LocalStream:
    """What a streaming call gives: an iterator that can be cancelled."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items
        self.cancelled = False

    def __aiter__(self) -> "LocalStream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        self.cancelled = True


class LocalCall:
    """One method of a handle; `made` are its calls, with what each returned."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self.made: list[tuple[tuple[Any, ...], Any]] = []

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        if inspect.isasyncgen(result):
            result = LocalStream(result)
        elif inspect.iscoroutine(result):
            result = asyncio.ensure_future(result)  # Ray's calls start at once, too
        self.made.append((args, result))
        return result


class LocalBroadcast:
    """A call to all replicas, of which there is one."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        async with asyncio.timeout(timeout_s):
            try:
                return [await self._method()]
            except Exception as e:
                if not return_exceptions:
                    raise
                return [e]


class LocalHandle:
    """A handle on `target`; `options` are taken and change nothing."""

    def __init__(self, target: object) -> None:
        self._target = target
        self._calls: dict[str, LocalCall] = {}

    def broadcast(self, method: str) -> "LocalBroadcast":
        return LocalBroadcast(getattr(self._target, method))

    def options(self, **_: Any) -> "LocalHandle":
        return self

    def __getattr__(self, name: str) -> LocalCall:
        if name not in self._calls:
            self._calls[name] = LocalCall(getattr(self._target, name))
        return self._calls[name]
