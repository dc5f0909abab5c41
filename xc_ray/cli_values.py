"""Values of options that several commands take: how they are read, and what is refused."""

import argparse
from collections.abc import Callable

from xc_ray.errors import XcRayError


def sampling(name: str, kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """Reads one field of `SamplingParams`, within the bounds that it has there."""

    def read(text: str) -> int | float:
        from xc_ray.engine.sequence import SamplingParams

        value = kind(text)
        try:
            SamplingParams(**{name: value})  # type: ignore[arg-type]  # one numeric field by its name
        except XcRayError as e:
            raise argparse.ArgumentTypeError(e.message) from None
        return value

    read.__name__ = kind.__name__  # argparse names the type: "invalid int value"
    return read


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


at_least_one = at_least(1)


def check_device(name: str) -> None:
    """Tries a `--device`.

    Raises:
        XcRayError: it cannot be used; says why.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:  # torch without CUDA asserts
        reason = str(e).split("\n", 1)[0]
        raise XcRayError(f"--device {name} cannot be used: {reason}") from None
