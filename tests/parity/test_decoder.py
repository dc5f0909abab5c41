"""The decoder against the original: logits, hidden states, cached decoding, padding, long inputs.

The letters are those of the golden data: **a** text only, **b** text and pictures, **c** greedy
continuation, **d** padded batches, **e** longer than max_position_embeddings.
"""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.golden import CACHED_LOGITS, EMBEDDINGS, LOGITS, Variant, assert_close
from tests.parity.slow import CachedAttend, decode, forward, outputs_of, steps_at_one_base
from xc_ray.model.decoder import Decoder
from xc_ray.model.rope import inverse_frequencies

STEP_MARGIN = 2 * LOGITS  # two logits that are nearer than this may change places


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def stored(variant: Variant, *names: str) -> tuple[Tensor, ...]:
    """Golden tensors, single inputs without their batch dimension; skips if one is not there."""
    missing = [name for name in names if name not in variant.decoded]
    if missing:
        pytest.skip(f"{variant}/decoder.safetensors has no {', '.join(missing)}")
    single = re.compile(r"[abe]\.(input_ids|inputs_embeds|im_mask|position_ids)|.*_last_logits")
    tensors = ((name, variant.decoded[name]) for name in names)
    return tuple(t.squeeze(0) if single.fullmatch(name) else t for name, t in tensors)


def assert_logits(variant: Variant, case: str, logits: Tensor) -> None:
    """Logits (T, V) against what is stored of them: all rows, some rows, sums, largest."""
    golden = variant.decoded
    checked = 0
    if f"{case}.logits" in golden:
        assert_close(logits, golden[f"{case}.logits"].view_as(logits), LOGITS, f"{case}.logits")
        checked += 1
    if f"{case}.logits_at" in golden:
        positions = golden[f"{case}.positions"].long()
        at = golden[f"{case}.logits_at"]
        assert_close(logits[positions], at.view(-1, at.shape[-1]), LOGITS, f"{case}.logits_at")
        checked += 1
    if f"{case}.logsumexp" in golden:
        sums = golden[f"{case}.logsumexp"].view(-1)
        assert_close(logits.logsumexp(-1), sums, LOGITS, f"{case}.logsumexp")
        checked += 1
    if f"{case}.argmax" in golden:
        best = golden[f"{case}.argmax"].view(-1, 1).long()
        behind = logits.max(-1).values - logits.gather(1, best).squeeze(1)
        assert behind.max() <= STEP_MARGIN, f"{case}.argmax: position {behind.argmax()} differs"
        checked += 1
    assert checked, f"nothing is stored of the logits of {case}"


def assert_hidden_states(variant: Variant, case: str, hidden: list[Tensor]) -> None:
    """What is stored of the hidden states (T, C): embeddings, layers, the last after the norm."""
    pattern = re.compile(re.escape(case) + r"\.hidden\.(\d+)(?:\.every(\d+))?")
    for match in filter(None, map(pattern.fullmatch, variant.decoded)):
        ours = hidden[int(match[1])][:: int(match[2] or 1)]
        assert_close(ours, variant.decoded[match[0]], LOGITS, match[0])


def run_with_states(
    decoder: Decoder,
    x: Tensor,
    image_rows: Tensor | None = None,
    attend: CachedAttend | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Logits (T, V) and the hidden states on the way."""
    inner = decoder.model.layers[:-1]
    with outputs_of(*inner, decoder.model.norm) as states:
        hidden = forward(decoder, x, [len(x)], image_rows, attend)
    return decoder.logits(hidden), [x, *states]


def picture_rows(variant: Variant, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Case b's ids (-1, -2, … at the pictures) as virtual ids, and our pictures' embeddings."""
    told = [re.fullmatch(r"(\d+) image (.+)\.([^.]+)", s) for s in segments_of(variant)]
    pictures = [match for match in told if match]
    embeddings = [variant.embeddings(match[2], match[3]) for match in pictures]
    result = ids.long().clone()
    row = variant.config.decoder.vocab_size
    for number, (match, embedded) in enumerate(zip(pictures, embeddings, strict=True)):
        mine = result == -1 - number
        assert mine.sum() == int(match[1]) == len(embedded)
        result[mine] = torch.arange(row, row + len(embedded))
        row += len(embedded)
    assert (result >= 0).all()
    return result, torch.cat(embeddings)


def segments_of(variant: Variant) -> list[str]:
    segments: list[str] = variant.decoder_cases.get("b", {}).get("segments", [])
    return segments


def test_a_text_gives_the_originals_logits_and_hidden_states(variant: Variant) -> None:
    (ids,) = stored(variant, "a.input_ids")
    decoder = variant.model.decoder
    logits, hidden = run_with_states(decoder, decoder.embed(ids.long())[0])
    assert_logits(variant, "a", logits)
    assert_hidden_states(variant, "a", hidden)


def test_keys_and_values_of_a_text_match_the_original(variant: Variant) -> None:
    (ids,) = stored(variant, "a.input_ids")
    decoder, attend = variant.model.decoder, CachedAttend()
    run_with_states(decoder, decoder.embed(ids.long())[0], attend=attend)
    found = [
        m for name in variant.decoded if (m := re.fullmatch(r"a\.layer(\d+)\.(key|value)", name))
    ]
    if not found:
        pytest.skip("no keys and values are stored")
    for match in found:
        kept = attend.keys if match[2] == "key" else attend.values
        ours = kept[int(match[1])].transpose(0, 1)  # (Hk, T, D)
        assert_close(ours, variant.decoded[match[0]], LOGITS, match[0])


def test_text_and_pictures_given_as_embeddings_match_the_original(variant: Variant) -> None:
    x, im_mask, positions = stored(variant, "b.inputs_embeds", "b.im_mask", "b.position_ids")
    assert positions.tolist() == list(range(len(x)))
    image_rows = im_mask.nonzero().squeeze(1)
    logits, hidden = run_with_states(variant.model.decoder, x, image_rows)
    assert_logits(variant, "b", logits)
    assert_hidden_states(variant, "b", hidden)


def test_text_and_pictures_from_pixels_to_logits_match_the_original(variant: Variant) -> None:
    (ids,) = stored(variant, "b.input_ids")
    virtual, embeddings = picture_rows(variant, ids)
    decoder = variant.model.decoder
    x, image_rows = decoder.embed(virtual, embeddings)
    if "b.inputs_embeds" in variant.decoded:
        (golden,) = stored(variant, "b.inputs_embeds")
        assert_close(x, golden, EMBEDDINGS, "b.inputs_embeds")
    if "b.im_mask" in variant.decoded:
        (im_mask,) = stored(variant, "b.im_mask")
        assert image_rows is not None
        assert image_rows.tolist() == im_mask.nonzero().squeeze(1).tolist()
    logits, hidden = run_with_states(decoder, x, image_rows)
    assert_logits(variant, "b", logits)
    assert_hidden_states(variant, "b", hidden)
    whole = decoder.logits(variant.model(virtual, [len(virtual)], embeddings))
    assert_close(whole, logits, LOGITS, "the whole model's forward")


def test_without_plora_the_logits_are_far_off(variant: Variant) -> None:
    told = variant.decoder_cases.get("b", {}).get("max_abs_difference_without_plora")
    if told is None:
        pytest.skip(f"{variant}/decoder.json does not tell how far off they are")
    (ids,) = stored(variant, "b.input_ids")
    decoder = variant.model.decoder
    x, image_rows = decoder.embed(*picture_rows(variant, ids))
    with_plora = decoder.logits(forward(decoder, x, [len(x)], image_rows))
    without = decoder.logits(forward(decoder, x, [len(x)]))
    assert abs((with_plora - without).abs().max().item() - told) < 2 * LOGITS


def test_cached_decoding_after_pictures_matches_the_original(variant: Variant) -> None:
    ids, generated, golden = stored(variant, "b.input_ids", "c.generated", "c.step_logits")
    virtual, embeddings = picture_rows(variant, ids)
    steps = steps_at_one_base(variant.config.decoder, len(ids), len(generated))
    decoder = variant.model.decoder
    ours = decode(decoder, *decoder.embed(virtual, embeddings), steps)
    assert ours.ids == generated.tolist()[:steps]
    assert_close(torch.stack(ours.logits), golden[:steps], CACHED_LOGITS, "c.step_logits")


def test_greedy_decoding_gives_the_originals_ids_at_every_repetition_penalty(
    variant: Variant,
) -> None:
    """From embeddings the penalty sees generated ids, from ids the prompt's too."""
    told: Mapping[str, Any] = variant.decoder_cases.get("c", {})
    pattern = re.compile(r"(text_prompt_a_)?greedy_(?:(from_a)|repetition_penalty_([\d.]+))")
    cases = [(m, told[name]) for name in told if (m := pattern.fullmatch(name))]
    if not cases:
        pytest.skip(f"{variant}/decoder.json has no continuations")
    a, b = stored(variant, "a.input_ids", "b.input_ids")
    for match, golden in cases:
        from_text = bool(match[1] or match[2])
        ids, embeddings = (a.long(), None) if from_text else picture_rows(variant, b)
        decoder = variant.model.decoder
        steps = steps_at_one_base(variant.config.decoder, len(ids), len(golden))
        ours = decode(
            decoder,
            *decoder.embed(ids, embeddings),
            steps,
            penalty=float(match[3] or 1),
            penalised=ids.tolist() if from_text else (),
        )
        assert ours.ids == golden[:steps], match[0]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_padded_on_either_side_match_our_unpadded_flat_batch(
    variant: Variant, side: str
) -> None:
    case = "d" if side == "right" else "d.left"
    x, im_mask, mask = stored(variant, "d.inputs_embeds", "d.im_mask", "d.attention_mask")
    golden, golden_mask = stored(variant, f"{case}.logits", f"{case}.attention_mask")
    real = mask.bool()
    lengths = real.sum(1).tolist()
    assert lengths == variant.decoder_cases["d"]["lengths"] == golden_mask.sum(1).tolist()
    decoder = variant.model.decoder
    image_rows = im_mask[real].nonzero().squeeze(1)
    logits = decoder.logits(forward(decoder, x[real], lengths, image_rows))
    assert_close(logits, golden[golden_mask.bool()], LOGITS, case)


def test_an_input_past_the_limit_matches_a_fresh_original(variant: Variant) -> None:
    (ids,) = stored(variant, "e.input_ids")
    assert len(ids) > variant.config.decoder.max_position_embeddings
    decoder = variant.model.decoder
    x = decoder.embed(ids.long())[0]
    assert_logits(variant, "e.prefill", decoder.logits(forward(decoder, x, [len(x)])))


def test_a_short_input_after_a_long_one_equals_a_fresh_one(variant: Variant) -> None:
    """The original's rotary table keeps the length of the longest input ever seen."""
    long, short = (t.long() for t in stored(variant, "e.input_ids", "a.input_ids"))
    decoder = variant.model.decoder
    x = decoder.embed(short)[0]
    fresh = decoder.logits(forward(decoder, x, [len(x)]))
    forward(decoder, decoder.embed(long)[0], [len(long)])
    after = decoder.logits(forward(decoder, x, [len(x)]))
    assert torch.equal(after, fresh)
    assert_logits(variant, "a", after)
    both = forward(decoder, torch.cat((decoder.embed(long)[0], x)), [len(long), len(short)])
    assert_close(decoder.logits(both[len(long) :]), fresh, LOGITS, "beside the long one in a batch")
    told = variant.decoder_cases.get("e.short_after_long", {}).get("max_abs_difference_to_fresh")
    leaked = variant.decoded.get("e.short_after_long.logits")
    if leaked is not None and told:
        assert abs((leaked.view_as(fresh) - fresh).abs().max().item() - told) < 2 * LOGITS


def test_rotary_frequencies_are_those_of_the_inputs_own_length(variant: Variant) -> None:
    ids, fresh, after = stored(variant, "e.input_ids", "e.inv_freq_fresh", "e.inv_freq_after")
    config = variant.config.decoder
    scaling = config.rope_scaling
    # Ours hold the factor of linear scaling, the original divides the positions instead.
    folded = scaling.factor if scaling and scaling.type == "linear" else 1.0
    expected = {1: fresh, config.max_position_embeddings: fresh, len(ids): after}
    if "e.decode.inv_freq" in variant.decoded:
        (steps,) = stored(variant, "e.decode.inv_freq")
        first = variant.decoder_cases["e.decode"]["prefill_length"] + 1
        expected |= {first + number: golden for number, golden in enumerate(steps)}
    for length, golden in expected.items():
        ours = inverse_frequencies(config, length) * folded
        assert_close(ours, golden, 1e-7, f"a sequence of {length}")


def test_cached_decoding_up_to_the_limit_matches_the_original(variant: Variant) -> None:
    """Past the limit the original turns new keys by another base than the cached ones."""
    ids, generated, golden = stored(
        variant, "e.input_ids", "e.decode.generated", "e.decode.step_logits"
    )
    start = variant.decoder_cases["e.decode"]["prefill_length"]
    steps = steps_at_one_base(variant.config.decoder, start, len(golden))
    assert steps > 1
    decoder = variant.model.decoder
    x, _ = decoder.embed(ids[:start].long())
    ours = decode(decoder, x, None, steps, forced=generated.tolist())
    assert_close(torch.stack(ours.logits), golden[:steps], CACHED_LOGITS, "e.decode.step_logits")
    chosen = min(steps, len(generated))
    assert ours.ids[:chosen] == generated.tolist()[:chosen]


def test_one_forward_across_the_limit_matches_the_original(variant: Variant) -> None:
    ids, generated, golden = stored(
        variant, "e.input_ids", "e.decode.generated", "e.decode.one_forward_last_logits"
    )
    start = variant.decoder_cases["e.decode"]["prefill_length"]
    whole = torch.cat((ids[:start], generated)).long()
    decoder = variant.model.decoder
    hidden = forward(decoder, decoder.embed(whole)[0], [len(whole)])
    assert_close(decoder.logits(hidden[-1:])[0], golden, LOGITS, "e.decode.one_forward_last_logits")
