import copy
import inspect
import pickle
import re

import pytest

from xc_ray import errors
from xc_ray.errors import (
    InvalidRequest,
    MediaError,
    Overloaded,
    PromptTooLong,
    RequestTooLarge,
    XcRayError,
)

FAMILIES: list[type[XcRayError]] = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, XcRayError)
]


def test_the_tree_in_the_module_docstring_is_the_tree_of_the_code() -> None:
    told = dict(re.findall(r"(\w+) +(\d{3})  ", errors.__doc__ or ""))
    assert told == {family.__name__: str(family.status) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_catching_the_root_catches_every_error(family: type[XcRayError]) -> None:
    with pytest.raises(XcRayError):
        raise family("no")


@pytest.mark.parametrize("family", [MediaError, PromptTooLong, RequestTooLarge])
def test_what_the_caller_can_mend_is_an_invalid_request(family: type[XcRayError]) -> None:
    assert issubclass(family, InvalidRequest)
    assert family.type == "invalid_request_error"


def test_being_overloaded_is_not_the_callers_fault() -> None:
    assert not issubclass(Overloaded, InvalidRequest)
    assert (Overloaded.status, Overloaded.type) == (429, "rate_limit_error")


def test_the_text_of_an_error_is_its_message() -> None:
    assert str(MediaError("the image is empty", param="messages")) == "the image is empty"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_crosses_a_process_border_whole(family: type[XcRayError]) -> None:
    error = family("what is wrong", param="max_tiles", code="invalid_image")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is family
        assert (twin.message, twin.param, twin.code) == (error.message, error.param, error.code)
        assert str(twin) == "what is wrong"


def test_param_and_code_are_empty_unless_given() -> None:
    error = InvalidRequest("no")
    assert error.param is None
    assert error.code is None
