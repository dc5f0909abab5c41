"""The plain meaning of every op, against its formula."""

import pytest
import torch
from torch import Tensor, nn

from tests.reference import attention as reference
from tests.reference.rope import rotated
from xc_ray.demo.make import tiny_config
from xc_ray.model.attention import DenseAttend
from xc_ray.model.config import PLoRAConfig
from xc_ray.model.decoder import Decoder, RMSNorm
from xc_ray.model.ops import PLAIN, Ops
from xc_ray.model.plora import ImageRows, PLoRALinear

T, WIDTH, INNER = 5, 6, 9
SCALING = 0.5
ROWS: list[tuple[ImageRows, list[int]]] = [
    (None, []),
    (torch.tensor([1, 2, 4]), [1, 2, 4]),
    (slice(1, 4), [1, 2, 3]),
]
image_rows = pytest.mark.parametrize(("rows", "listed"), ROWS, ids=["none", "tensor", "slice"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def linear(inside: int, outside: int, seed: int = 0) -> PLoRALinear:
    torch.manual_seed(seed)
    made = PLoRALinear(inside, outside, PLoRAConfig(2, SCALING)).double()
    return made.requires_grad_(False)


def formula(module: PLoRALinear, x: Tensor, listed: list[int]) -> Tensor:
    """W x, + scaling · B A x where a row is an image's."""
    rows = []
    for number, row in enumerate(x):
        y = module.weight @ row
        if number in listed:
            y = y + SCALING * (module.Plora_B.weight @ (module.Plora_A.weight @ row))
        rows.append(y)
    return torch.stack(rows)


@image_rows
def test_linear_adds_the_low_rank_part_to_image_rows(rows: ImageRows, listed: list[int]) -> None:
    module, x = linear(WIDTH, INNER), numbers(T, WIDTH)
    torch.testing.assert_close(PLAIN.linear(module, x, rows), formula(module, x, listed))


@image_rows
def test_linear_add_is_the_residual_plus_the_linear_map(rows: ImageRows, listed: list[int]) -> None:
    module, x, residual = linear(WIDTH, INNER), numbers(T, WIDTH), numbers(T, INNER, seed=1)
    expected = residual + formula(module, x, listed)
    torch.testing.assert_close(PLAIN.linear_add(module, x, rows, residual), expected)


@image_rows
def test_gated_is_silu_of_the_first_times_the_second(rows: ImageRows, listed: list[int]) -> None:
    w1, w3 = linear(WIDTH, INNER, 1), linear(WIDTH, INNER, 2)
    x = numbers(T, WIDTH)
    gate, up = formula(w1, x, listed), formula(w3, x, listed)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(PLAIN.gated(w1, w3, x, rows), expected)


def test_norm_is_the_modules_own() -> None:
    norm = RMSNorm(WIDTH, 1e-5).double()
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    x = numbers(T, WIDTH)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(PLAIN.norm(norm, x), expected)


def test_head_gives_logits_in_the_weights_dtype_and_into_a_given_place() -> None:
    module = nn.Linear(WIDTH, INNER, bias=False).bfloat16().requires_grad_(False)
    x = numbers(T, WIDTH).bfloat16()
    logits = PLAIN.head(module, x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, x @ module.weight.T)
    out = torch.empty_like(logits)
    assert PLAIN.head(module, x, out) is out
    assert torch.equal(out, logits)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_unpacks_turns_and_attends(groups: int) -> None:
    """A group of a packed row: its query heads, the key head, the value head."""
    heads, size = 4, 4
    each = heads // groups
    packed = numbers(T, groups, each + 2, size)
    angles = [0.7, 0.1]
    half = torch.arange(T)[:, None] * torch.tensor(angles, dtype=torch.float64)
    full = torch.cat([half, half], -1)
    out = PLAIN.attention(DenseAttend([T]), 0, packed, (full.cos(), full.sin()))

    def turned(head: Tensor) -> Tensor:
        rows = [rotated(row.tolist(), place, angles) for place, row in enumerate(head)]
        return torch.tensor(rows, dtype=torch.float64)

    q = torch.stack([turned(packed[:, h // each, h % each]) for h in range(heads)], 1)
    k = torch.stack([turned(packed[:, g, each]) for g in range(groups)], 1)
    v = torch.stack([packed[:, g, each + 1] for g in range(groups)], 1)
    torch.testing.assert_close(out, reference.causal_attention(q, k, v))


def test_the_plain_meaning_of_a_row_does_not_depend_on_its_place() -> None:
    assert PLAIN.of_rows(torch.tensor([3, 1])) is PLAIN


class RowByRow(Ops):
    """Adds to each row its own number times a constant: what an adapter of its own would do."""

    def __init__(self, own: Tensor) -> None:
        self.own = own  # (T,)
        self.narrowed: list[list[int]] = []

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        return super().linear(module, x, image_rows) + 0.1 * self.own[:, None]

    def of_rows(self, rows: Tensor) -> Ops:
        self.narrowed.append(rows.tolist())
        return RowByRow(self.own[rows])


@pytest.mark.parametrize("wanted", [[0, 4], [4, 2, 1], [3], list(range(5)), []])
def test_the_last_layer_goes_on_with_the_ops_of_the_wanted_rows(wanted: list[int]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(tiny_config("2.5")).double().requires_grad_(False)
    size = decoder.config.decoder.head_dim
    x = numbers(T, decoder.config.decoder.hidden_size)
    half = torch.arange(T)[:, None] * numbers(1, size // 2).abs()
    angles = torch.cat([half, half], -1)
    rope = (angles.cos(), angles.sin())
    ops = RowByRow(torch.arange(1.0, T + 1).double())
    whole = decoder(x, rope, DenseAttend([T]), None, ops)
    assert not ops.narrowed
    rows = torch.tensor(wanted, dtype=torch.int64)
    narrow = decoder(x, rope, DenseAttend([T]), None, ops, rows)
    torch.testing.assert_close(narrow, whole[rows])
    assert ops.narrowed == ([wanted] if wanted else [])  # once: in the last layer
