"""The committed subset: were it gone, every test would be skipped and nobody would know."""

from tests.parity.conftest import SUBSET
from tests.parity.golden import Golden
from xc_ray.model.config import FAMILIES

DECODER_CASES = ("a.input_ids", "b.input_ids", "c.generated", "e.input_ids", "e.decode.generated")


def test_the_committed_subset_holds_cases_of_every_kind_and_variant() -> None:
    subset = Golden(SUBSET)
    assert {variant.config.variant for variant in subset.variants} == set(FAMILIES)
    for cases in (
        subset.pictures(),
        subset.embeddings(),
        subset.towers(),
        subset.samples_with("loss"),
        subset.samples_with("grad_norms"),
        subset.samples_with_pictures(),
        subset.samples_with_system_turn(),
        subset.chats_with("generated"),
        subset.prompts(),
    ):
        assert {case.variant for case in cases} == set(subset.variants)
    assert {case.variant.config.family.tiled for case in subset.grids()} == {True}
    assert list(subset.processed_pictures())
    for variant in subset.variants:
        assert not set(DECODER_CASES) - variant.decoded.keys()
    assert any("d.logits" in variant.decoded for variant in subset.variants)
    assert subset.text_cases("cases")["cases"]
