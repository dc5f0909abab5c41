"""What passes between the deployments: plain data that pickles small, and imports no torch."""

import pickle
import subprocess
import sys
from array import array
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from xc_ray.prompt.tiles import Grid
from xc_ray.serve.messages import (
    AliasState,
    DecoderState,
    GenerateRequest,
    Picture,
    Sampling,
    Tokens,
    VersionState,
)

GREEDY = Sampling(16, 0.0, 0, 1.0, 0.0, 0.0, 1.0, 0)


def test_a_request_arrives_as_it_was_sent() -> None:
    picture = Picture(b"file", Grid(1, 2, (112, 56), (0, 0), (112, 56)))
    ids = array("i", [1, 2, 1024])
    request = GenerateRequest("r", ids, GREEDY, (picture,), 2, "cats@prod", "user ann")
    assert pickle.loads(pickle.dumps(request)) == request


def test_an_id_takes_four_bytes_on_the_way() -> None:
    ids = array("i", range(16_000))
    assert len(pickle.dumps(GenerateRequest("r", ids, GREEDY))) < 4 * len(ids) + 1000


def test_tokens_arrive_as_they_were_sent() -> None:
    tokens = Tokens(1, [5, 6], 2, "stop", [(-0.5, ((5, -0.5), (7, -1.0)))] * 2, 3, "cats@3")
    assert pickle.loads(pickle.dumps(tokens)) == tokens


def test_a_decoders_state_arrives_as_it_was_sent() -> None:
    state = DecoderState(
        "r1",
        "sha256:base",
        (VersionState("cats", 1, "sha256:one", 5.0, "device", "why"),),
        (AliasState("cats", "prod", ((1, 0.5), (2, 0.5)), ((1, 1.0),), "why"),),
        ("a sentence",),
    )
    assert pickle.loads(pickle.dumps(state)) == state


GRID = Grid(1, 2, (112, 56), (0, 0), (112, 56))


def test_of_a_picture_the_bytes_and_the_grid_make_its_name() -> None:
    pictures = [Picture(b"file", GRID), Picture(b"fil", GRID), Picture(b"file ", GRID)]
    changes: list[dict[str, Any]] = [
        {"rows": 2},
        {"rows": 2, "cols": 1},
        {"content": (111, 56)},
        {"offset": (0, 1)},
        {"canvas": (56, 112)},
    ]
    pictures += [Picture(b"file", replace(GRID, **change)) for change in changes]
    pictures += [Picture(b"file", GRID, salt="a"), Picture(b"afile", GRID), Picture(b"e", GRID)]
    pictures += [Picture(b"e", GRID, salt="fil")]
    assert len({picture.digest() for picture in pictures}) == len(pictures)
    assert Picture(b"file", GRID, "elsewhere").digest() == pictures[0].digest()


def test_whoever_reads_them_needs_no_torch() -> None:
    code = "import sys, xc_ray.serve.messages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Few values, so that what one field ends with is what another begins with.
texts = st.text("ab\0", max_size=3)
sizes = st.tuples(st.integers(0, 2), st.integers(0, 2))
pictures = st.builds(
    Picture,
    texts.map(str.encode),
    st.builds(Grid, st.integers(0, 2), st.integers(0, 2), sizes, sizes, sizes),
    salt=texts,
)


@settings(deadline=None)
@given(pictures, pictures)
def test_only_one_and_the_same_picture_has_a_name(one: Picture, other: Picture) -> None:
    assert (one.digest() == other.digest()) == (one == other)
