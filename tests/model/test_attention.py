import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.reference import attention as reference
from xc_ray.model.attention import DenseAttend, causal_attention

HEADS, KV_HEADS, SIZE = 4, 2, 8


def qkv(length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(length, heads, SIZE, dtype=torch.float64, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_the_textbooks(length: int, heads: int) -> None:
    q, k, v = qkv(length)
    k, v = k[:, :1].repeat(1, heads, 1), v[:, :1].repeat(1, heads, 1)
    k, v = k * torch.arange(1, heads + 1)[:, None], v + torch.arange(heads)[:, None]
    expected = reference.causal_attention(q, k, v)
    torch.testing.assert_close(causal_attention(q, k, v), expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_attention_in_chunks_is_attention_over_the_whole(chunks: list[int], seed: int) -> None:
    q, k, v = qkv(sum(chunks), seed)
    outs = []
    for i, size in enumerate(chunks):
        end = sum(chunks[: i + 1])
        outs.append(causal_attention(q[end - size : end], k[:end], v[:end]))
    torch.testing.assert_close(torch.cat(outs), causal_attention(q, k, v))


def test_a_later_token_changes_nothing_before_it() -> None:
    q, k, v = qkv(6)
    before = causal_attention(q, k, v)[:5].clone()
    q[5], k[5], v[5] = 9.0, 9.0, 9.0
    torch.testing.assert_close(causal_attention(q, k, v)[:5], before)


def test_sequences_of_one_batch_do_not_see_each_other() -> None:
    lengths = [3, 1, 5]
    parts = [qkv(n, seed) for seed, n in enumerate(lengths)]
    q, k, v = (torch.cat(t) for t in zip(*parts, strict=True))
    together = DenseAttend(lengths)(0, q, k, v)
    alone = torch.cat([reference.causal_attention(*part) for part in parts])
    torch.testing.assert_close(together, alone)


def test_a_batch_of_one_is_that_sequence() -> None:
    q, k, v = qkv(4)
    assert torch.equal(DenseAttend([4])(0, q, k, v), causal_attention(q, k, v))
