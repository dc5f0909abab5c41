"""References: what is one, what they are made of, and how a request names a model."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xc_ray.errors import InvalidRequest
from xc_ray.registry.reference import MAX_VERSION, ModelName, Reference, check_alias, check_name

DIGEST = "sha256:" + "0a" * 32
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,95}", fullmatch=True).filter(lambda x: ".." not in x)
ALIASES = st.from_regex(r"[a-z][a-z0-9_-]{0,31}", fullmatch=True)
SELECTORS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.integers(1, MAX_VERSION).map(lambda version: {"version": version}),
    ALIASES.map(lambda alias: {"alias": alias}),
    st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True).map(lambda digest: {"digest": digest}),
)
REFERENCES = st.builds(lambda name, by: Reference(name, **by), NAMES, SELECTORS)


@given(REFERENCES)
def test_reference_is_read_as_it_is_written(ref: Reference):
    assert Reference.parse(str(ref)) == ref


@given(
    st.text(st.characters(categories=["L", "N", "P"])).filter(lambda x: "@" not in x), REFERENCES
)
def test_model_name_is_read_as_it_is_written(base: str, ref: Reference):
    if base:
        assert ModelName.parse(f"{base}:{ref}") == ModelName(base, ref)
    if base and ":" not in base:
        assert ModelName.parse(base) == ModelName(base)


@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_refused(text: str):
    refused = False
    try:
        found = Reference.parse(text)
    except InvalidRequest:
        refused = True
    assert refused or str(found) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Cats",
        "-cats",
        ".cats",
        "ca..ts",
        "ca/ts",
        "../cats",
        "cats\n",
        "cäts",
        "a" * 97,
    ],
)
def test_name_out_of_the_grammar_is_refused(text: str):
    with pytest.raises(InvalidRequest, match="is no name in the registry; it is 1 to 96 of a-z"):
        check_name(text)
    with pytest.raises(InvalidRequest):
        Reference.parse(text)


@pytest.mark.parametrize("alias", ["", "Prod", "1", "pr.od", "prod\n", "a" * 33, "_x"])
def test_alias_out_of_the_grammar_is_refused(alias: str):
    with pytest.raises(InvalidRequest, match="is no alias; it is 1 to 32 of a-z"):
        check_alias(alias)


@pytest.mark.parametrize(
    "text",
    ["", "0", "01", "100000000", "-1", "PROD", "sha256:00", "1@2", DIGEST.upper(), "1\n"],
)
def test_selector_out_of_the_grammar_is_refused_and_quoted(text: str):
    with pytest.raises(InvalidRequest) as caught:
        Reference.parse(f"cats@{text}")
    assert repr(f"cats@{text}") in caught.value.message
    assert "neither a version (1 to 99999999), nor an alias" in caught.value.message
    assert "write NAME, NAME@VERSION, NAME@ALIAS or NAME@sha256:DIGEST" in caught.value.message


def test_reference_takes_one_selector():
    with pytest.raises(InvalidRequest, match="takes one of version, alias, digest"):
        Reference("cats", version=1, alias="prod")
    with pytest.raises(InvalidRequest, match="version 0 of 'cats' is not 1 to 99999999"):
        Reference("cats", version=0)


@pytest.mark.parametrize(
    ("text", "base", "adapter"),
    [
        ("demo", "demo", None),
        ("InternLM/XComposer2.5-7B", "InternLM/XComposer2.5-7B", None),
        ("demo:cats", "demo", Reference("cats")),
        ("demo:cats@3", "demo", Reference("cats", version=3)),
        ("demo:cats@prod", "demo", Reference("cats", alias="prod")),
        (f"demo:cats@{DIGEST}", "demo", Reference("cats", digest=DIGEST)),
        ("host:8000/demo:cats", "host:8000/demo", Reference("cats")),
    ],
)
def test_model_of_a_request_is_parted_at_the_last_colon(text: str, base: str, adapter):
    assert ModelName.parse(text) == ModelName(base, adapter)
    assert str(ModelName.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("demo@3", "asks for a version of the base, but the server has one base only"),
        (f"demo@{DIGEST}", "asks for a version of the base"),
        ("demo@3:cats", "has no base without '@' before the ':'"),
        (":cats", "has no base"),
        ("", "has no base"),
        ("demo:Cats", "model 'demo:Cats': 'Cats' is no name in the registry"),
        ("demo:", "model 'demo:': '' is no name"),
        ("demo:cats@", "'' is neither a version"),
    ],
)
def test_model_that_cannot_be_is_refused_as_the_field_model(text: str, message: str):
    with pytest.raises(InvalidRequest) as caught:
        ModelName.parse(text)
    assert message in caught.value.message
    assert caught.value.param == "model"
