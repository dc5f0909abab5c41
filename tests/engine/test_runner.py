"""The device state of lanes, and one step's logits against the dense form."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.traffic import GREEDY, Request, picture, request, scaled, text
from tests.reference.generate import dense_logits
from xc_ray.engine.batch import Batch, build_batch
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.runner import Runner
from xc_ray.engine.sequence import Sequence, Work
from xc_ray.model.decoder import Decoder
from xc_ray.model.rope import inverse_frequencies

Load = Callable[..., Decoder]
SIZE = 4


def runner_of(decoder: Decoder, **options: Any) -> Runner:
    return Runner(decoder, EngineConfig(64, 200, 3, 64, SIZE, **options))


def sequence(it: Request, lane: int, blocks: list[int]) -> Sequence:
    starts = [it.ids.index(i) for i in it.ids if i >= 1024 and i - 1 not in it.ids]
    made = Sequence("a", list(it.ids), it.params, tuple(it.images()), tuple(starts), lane=lane)
    made.blocks = blocks
    return made


def compute(runner: Runner, *work: Work) -> Tensor:
    runner.update_tables([w.sequence for w in work])
    return runner.logits(build_batch(work, 1024, runner.device))


def teach(runner: Runner, it: Sequence, token: int) -> None:
    """Makes a token the one that the sequence's lane chose last."""
    runner.last[it.lane] = token
    it.generated.append(token)


REQUEST = request(text(0, 3), picture(1, 6), text(1, 4))


def test_logits_of_chunks_and_of_decode_are_the_dense_ones(load: Load) -> None:
    runner = runner_of(load())
    it = sequence(REQUEST, 1, [7, 3, 9, 0])
    runner.start([it])
    assert len(compute(runner, Work(it, 0, 5, samples=False, decode=False))) == 0
    length = it.rope_length
    last = compute(runner, Work(it, 5, 13, samples=True, decode=False))
    for token in (5, 6):
        dense = dense_logits(load(), it.ids(0, it.num_tokens), REQUEST.rows, length)
        torch.testing.assert_close(last, dense[-1:])
        teach(runner, it, token)
        place = it.num_tokens - 1
        last = compute(runner, Work(it, place, place + 1, samples=True, decode=True))
        again = runner.decode(torch.tensor([1]), torch.tensor([place]), 4)
        torch.testing.assert_close(again, last)


def test_each_lane_has_its_own_table_rope_and_last_token(load: Load) -> None:
    """Past the position limit every sequence's length has its own base."""
    decoder = scaled(load(), 12)
    runner = runner_of(decoder)
    sequences = [
        sequence(request(text(n, 6), max_tokens=3 + 7 * n), n, [10 * n, 10 * n + 1])
        for n in range(3)
    ]
    runner.start(sequences)
    for it in sequences:
        own = inverse_frequencies(decoder.config.decoder, it.rope_length, dtype=torch.float64)
        assert torch.equal(runner.frequencies[it.lane], own)
    assert not torch.equal(runner.frequencies[0], runner.frequencies[2])
    compute(runner, *(Work(s, 0, 5, samples=False, decode=False) for s in sequences))
    work = [Work(s, 5, 6, samples=True, decode=True) for s in reversed(sequences)]
    for logits, w in zip(compute(runner, *work), work, strict=True):
        dense = dense_logits(decoder, w.sequence.prompt, None, w.sequence.rope_length)
        torch.testing.assert_close(logits, dense[-1])


def test_a_lane_that_begins_anew_has_nothing_of_the_one_before(load: Load) -> None:
    runner = runner_of(load())
    penalised = replace(GREEDY, repetition_penalty=2.0, temperature=1.0)
    old = sequence(request(text(0, 9)), 0, [1, 2, 3])
    old.params, old.generated = penalised, [5, 5, 6]
    runner.start([old])
    runner.update_tables([old])
    assert runner.tables[0, :3].tolist() == [1, 2, 3]
    assert [int(runner.last[0]), int(runner.sampler.counts[0, 5])] == [6, 2]
    new = sequence(request(text(1, 5)), 0, [8, 9])
    runner.start([new])
    runner.update_tables([new])
    assert runner.tables[0, :2].tolist() == [8, 9]
    assert runner.last[0] == new.prompt[-1]
    assert not runner.sampler.counts[0].any()


def test_a_table_grows_with_its_sequence(load: Load) -> None:
    runner = runner_of(load())
    it = sequence(request(text(0, 5)), 2, [4, 5])
    runner.start([it])
    runner.update_tables([it])
    it.blocks += [11]
    runner.update_tables([it])
    runner.update_tables([it])
    spare = runner.cache.spare
    assert runner.tables[2].tolist() == [4, 5, 11, *[spare] * 13]
    assert (runner.tables[[0, 1, 3]] == spare).all()


def test_padding_writes_where_nobody_reads(load: Load) -> None:
    runner = runner_of(load())
    before = runner.cache.keys.clone()
    lanes = torch.full((2,), runner.padding_lane)
    runner.decode(lanes, torch.zeros(2, dtype=torch.int64), 4)
    spare = runner.cache.spare
    assert torch.equal(runner.cache.keys[:, :spare], before[:, :spare])
    assert not torch.equal(runner.cache.keys[:, spare], before[:, spare])


@pytest.mark.parametrize(("rows", "length"), [(16, 64), (64, 64), (100, 64), (1, 64), (1, 1)])
def test_the_largest_step_runs_and_leaves_nothing(
    rows: int, length: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of each lane, a picture's rows behind all that a prompt may have; nobody's block."""
    runner = runner_of(load())
    batches: list[Batch] = []
    logits = runner.logits

    def seen(batch: Batch) -> Tensor:
        batches.append(batch)
        return logits(batch)

    monkeypatch.setattr(runner, "logits", seen)
    runner.largest_step(rows, length)
    (batch,) = batches
    chunk = min(rows, length)
    assert (batch.num_decode, batch.num_sampling) == (2, 3)
    assert len(batch.positions) == 2 + chunk
    assert batch.chunks == ((length - chunk, chunk, runner.padding_lane),)
    pictures = 0 if batch.image_embeddings is None else len(batch.image_embeddings)
    assert pictures == chunk - 1
    assert not runner.cache.keys[:, : runner.cache.spare].any()
    assert not runner.sampler.counts.any()
    assert not runner.last[: runner.padding_lane].any()


def test_a_last_row_of_a_picture_is_no_last_token(load: Load) -> None:
    runner = runner_of(load())
    runner.start([sequence(request(text(0, 3), picture(1, 2)), 0, [1, 2])])
    assert runner.last[0] == 0


@pytest.mark.parametrize("chunk", [3, 12])
def test_an_8_bit_cache_moves_logits_by_little(chunk: int, load: Load) -> None:
    """Keys and values are kept within 2⁻⁴ of a number: logits, of deviation 1, within 0.15 here."""
    for seed in range(6):
        it = request(text(seed, 6), picture(seed, 5), text(seed + 9, 7), max_tokens=4)
        found = []
        for dtype in ("auto", "fp8"):
            runner = runner_of(load(), kv_cache_dtype=dtype)
            one = sequence(it, 0, [3, 8, 1, 12, 5, 6])
            runner.start([one])
            rows = []
            for start in range(0, 18, chunk):
                stop = min(18, start + chunk)
                logits = compute(runner, Work(one, start, stop, stop == 18, decode=False))
                rows.append(logits)
            for token in (5, 900):
                teach(runner, one, token)
                place = one.num_tokens - 1
                rows.append(compute(runner, Work(one, place, place + 1, True, decode=True)))
            found.append(torch.cat(rows))
        assert found[0].shape == (3, 1024)
        error = found[1] - found[0]
        assert 1e-6 < error.abs().max() < 0.15
        assert error.square().mean().sqrt() < 0.03 * found[0].std()
