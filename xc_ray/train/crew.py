"""One function over many items in processes of their own, results in the order of the items.

A process gets the function once. It ends by itself when its connection does, so that nothing is
left of a caller that was killed.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

from xc_ray.errors import XcRayError

CHUNK = 16  # items that travel together

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class _Member:
    process: BaseProcess
    line: "Connection[Any, Any]"
    chunk: int = 0  # the number of the one it works on


def in_processes(
    function: Callable[[Item], Result], items: Iterator[Item], processes: int
) -> Iterator[Result]:
    """`map(function, items)`; all processes end with the iteration, however it ends.

    Raises:
        XcRayError: what the function raised, or a process that came to its end.
    """
    members = [_start(function) for _ in range(processes)]
    try:
        yield from _results(members, items)
    finally:
        for member in members:
            member.line.close()
            member.process.kill()
        for member in members:
            member.process.join()


def _start(function: Callable[[Any], Any]) -> _Member:
    # Never a fork: it would copy locks that this process's threads hold.
    context = multiprocessing.get_context("spawn")
    line, other_end = context.Pipe()
    process = context.Process(target=_work, args=(function, other_end), daemon=True)
    process.start()
    other_end.close()
    return _Member(process, line)


def _results(members: list[_Member], items: Iterator[Any]) -> Iterator[Any]:
    free = list(members)
    busy: dict[Connection[Any, Any], _Member] = {}
    early: dict[int, list[Any]] = {}  # chunks that came before those in front of them
    sent = given = 0
    while True:
        while free and (chunk := list(islice(items, CHUNK))):
            member = free.pop()
            member.chunk, sent = sent, sent + 1
            _send(member, chunk)
            busy[member.line] = member
        if not busy:
            return
        for line in cast("list[Connection[Any, Any]]", wait(list(busy))):
            member = busy.pop(line)
            early[member.chunk] = _received(member)
            free.append(member)
        while given in early:
            yield from early.pop(given)
            given += 1


def _send(member: _Member, chunk: list[Any]) -> None:
    try:
        member.line.send(chunk)
    except OSError:
        raise _ended(member) from None


def _received(member: _Member) -> list[Any]:
    try:
        answer = member.line.recv()
    except (EOFError, OSError):
        raise _ended(member) from None
    if isinstance(answer, XcRayError):
        raise answer
    return cast("list[Any]", answer)


def _ended(member: _Member) -> XcRayError:
    member.process.join(1.0)
    return XcRayError(
        f"a process that checks rows ended with exit code {member.process.exitcode}: for want of "
        "memory if that is -9, else see its own message (a script that starts this must do so "
        'below `if __name__ == "__main__":`)'
    )


def _work(function: Callable[[Any], Any], line: "Connection[Any, Any]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the caller ends us
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the caller has gone
        while True:
            chunk = line.recv()
            answer: list[Any] | XcRayError
            try:
                answer = [function(item) for item in chunk]
            except XcRayError as e:
                answer = e
            line.send(answer)
