from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

from xc_ray.engine.kernels import sample
from xc_ray.engine.sampler import Sampler, chosen_ids
from xc_ray.engine.sequence import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF = float("inf")
ROWS = 3


def logits(rows: int, size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, size, generator=generator)).to(DEVICE, dtype)


def filled(params: list[SamplingParams], size: int) -> Sampler:
    sampler = Sampler(len(params), size, DEVICE)
    generated = [i * 7 % size for i in range(9)]
    sampler.set_lanes([(lane, p, generated) for lane, p in enumerate(params)])
    return sampler


def both(
    sampler: Sampler, scores: Tensor, lanes: list[int], positions: list[int], chunk: int = 64
) -> tuple[list[int], list[int]]:
    """Ids by the kernel, which counts them, and by plain torch."""
    batch = (scores, torch.tensor(lanes, device=DEVICE), torch.tensor(positions, device=DEVICE))
    table = (sampler.numbers.float(), sampler.wholes, sampler.counts)
    plain = chosen_ids(*batch, *table).tolist()
    shape = (len(lanes), -(-scores.shape[1] // sample.ALIGN) * sample.ALIGN)
    candidates = torch.full(shape, float("nan"), device=DEVICE)  # what is left there is not read
    ids = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    out = torch.empty(len(lanes), dtype=torch.int32, device=DEVICE)
    sample.choose(*batch, *table, candidates, ids, out, block=2 * chunk, chunk=chunk)
    return out.tolist(), plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [37, 200])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {},
        {"temperature": 3, "top_k": 5},
        {"top_k": 1000, "top_p": 0.8},
        {"temperature": 1.5, "top_p": 0.9},
        {"min_p": 0.05},
        {"temperature": 2, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
        {"top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3},
        {"temperature": 0, "repetition_penalty": 0.6, "frequency_penalty": 0.4},
    ],
)
def test_the_kernel_chooses_what_plain_torch_chooses(
    options: dict[str, Any], size: int, dtype: torch.dtype
) -> None:
    params = [SamplingParams(seed=seed, **options) for seed in (3, -1, 2**63 + 5)]
    kernel, plain = both(filled(params, size), logits(ROWS, size, dtype=dtype), [2, 0, 1], [9] * 3)
    assert kernel == plain


# The examples are fixed: once in a million, a draw falls where float32 and float64 differ.
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 150),
    temperature=st.floats(0.1, 20),
    top_k=st.integers(0, 40),
    top_p=st.sampled_from([1.0, 0.97, 0.8, 0.3, 1e-3, 1e-300]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    presence=st.floats(-2, 2),
    repetition=st.floats(0.5, 2),
)
def test_any_parameters_choose_alike(
    seed: int,
    size: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    presence: float,
    repetition: float,
) -> None:
    params = SamplingParams(
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        presence_penalty=presence,
        repetition_penalty=repetition,
    )
    kernel, plain = both(filled([params], size), logits(1, size, seed), [0], [seed])
    assert kernel == plain


def test_scores_equal_to_the_threshold_are_all_kept() -> None:
    row = torch.zeros(1, 70, device=DEVICE)
    row[0, 10:30] = 1
    for options in ({"top_k": 4}, {"top_p": 0.1}, {"min_p": 0.9}):
        params = SamplingParams(**options)
        sampler = filled([params], 70)
        drawn = set()
        for position in range(8):
            kernel, plain = both(sampler, row, [0], [position])
            assert kernel == plain
            drawn |= {*kernel}
        assert drawn <= {*range(10, 30)}
        assert len(drawn) > 4


def test_of_equal_bests_a_greedy_row_takes_the_lowest_id() -> None:
    row = torch.zeros(1, 300, device=DEVICE)
    row[0, [131, 132, 260]] = 1
    assert both(filled([SamplingParams(temperature=0)], 300), row, [0], [0])[0] == [131]


def test_chosen_ids_of_penalised_lanes_are_counted() -> None:
    params = [SamplingParams(frequency_penalty=1), SamplingParams(), SamplingParams(top_p=0.5)]
    sampler = filled(params, 50)
    before = sampler.counts.clone()
    (first, *_), _ = both(sampler, logits(4, 50), [0, 1, 2, sampler.padding_lane], [1] * 4)
    before[0, first] += 1
    assert torch.equal(sampler.counts, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_numbers_fail_alone(temperature: float) -> None:
    size = 150
    scores = logits(6, size)
    scores[0, 140] = float("nan")
    scores[1, 3] = INF
    scores[2] = -INF
    scores[3] = -INF
    scores[3, 77] = -1e30
    scores[4, 7] = INF  # an id that lane 4 has generated: its penalty does not hide it
    params = [SamplingParams(temperature=temperature)] * 4
    params += [SamplingParams(temperature=temperature, presence_penalty=1, top_k=3)] * 2
    sampler = filled(params, size)
    before = sampler.counts[4].clone()
    kernel, plain = both(sampler, scores, [*range(6)], [4] * 6)
    assert kernel == plain
    assert kernel[:5] == [-1, -1, -1, 77, -1]
    assert kernel[5] >= 0
    assert torch.equal(sampler.counts[4], before)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.1e-5},
        {"temperature": 1e300},
        {"repetition_penalty": 1e-300},
        {"repetition_penalty": 1e300, "top_p": 0.9},
        {"repetition_penalty": 1e300, "frequency_penalty": -2, "temperature": 1e300},
    ],
)
def test_extreme_parameters_draw_an_id(options: dict[str, Any]) -> None:
    kernel, plain = both(filled([SamplingParams(**options)], 50), logits(1, 50), [0], [3])
    assert kernel == plain
    assert kernel[0] >= 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
def test_a_graph_of_real_rows_draws_what_single_rows_draw() -> None:
    rows, size = 64, 92_544
    options: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_p": 0.8},
        {"top_k": 50, "top_p": 0.8, "repetition_penalty": 1.005},
        {"temperature": 1.5, "min_p": 0.02},
    ]
    params = [SamplingParams(seed=i, **options[i % 4]) for i in range(rows)]
    scores = logits(rows, size, dtype=torch.bfloat16)
    sampler = filled(params, size)
    lanes = torch.arange(rows, device=DEVICE)
    out = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    table = (sampler.numbers, sampler.wholes, sampler.counts)
    plain = chosen_ids(scores, lanes, lanes + 5, *table)
    alone = [
        filled(params, size).choose(scores[i : i + 1], lanes[i : i + 1], lanes[i : i + 1] + 5)
        for i in range(8)
    ]
    graph = torch.cuda.CUDAGraph()
    positions = lanes + 5
    with torch.cuda.graph(graph):
        sampler.choose(scores, lanes, positions, out)
    graph.replay()
    assert out[:8].tolist() == [int(ids) for ids in alone]
    assert (out == plain).float().mean() >= 0.95
