import pytest
import torch
from torch import Tensor, nn

from xc_ray.model.config import PLoRAConfig
from xc_ray.model.plora import ImageRows, PLoRALinear

T, IN, OUT, RANK, SCALING = 7, 6, 5, 3, 0.5


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def linear(request: pytest.FixtureRequest) -> PLoRALinear:
    torch.manual_seed(0)
    return PLoRALinear(IN, OUT, PLoRAConfig(RANK, SCALING), bias=request.param).double()


def rows(seed: int = 1) -> Tensor:
    return torch.randn(T, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_picture_rows_get_w_x_plus_scaled_b_a_x(linear: PLoRALinear) -> None:
    x, images = rows(), [1, 2, 5]
    y = linear(x, torch.tensor(images))
    for row in range(T):
        expected = linear.weight @ x[row]
        if linear.bias is not None:
            expected = expected + linear.bias
        if row in images:
            expected = expected + SCALING * linear.Plora_B.weight @ (linear.Plora_A.weight @ x[row])
        torch.testing.assert_close(y[row], expected)


@pytest.mark.parametrize(("first", "stop"), [(0, 1), (0, 7), (2, 5), (6, 7)])
def test_a_slice_of_picture_rows_is_as_good_as_their_list(
    first: int, stop: int, linear: PLoRALinear
) -> None:
    x = rows()
    listed = linear(x, torch.arange(first, stop))
    torch.testing.assert_close(linear(x, slice(first, stop)), listed, rtol=1e-12, atol=1e-12)
    outside = [row for row in range(T) if not first <= row < stop]
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x, slice(first, stop))[outside], plain[outside])


@pytest.mark.parametrize("images", [torch.tensor([1, 2]), slice(1, 3)])
def test_the_low_rank_part_is_added_in_place(images: ImageRows, linear: PLoRALinear) -> None:
    x = rows()
    y = nn.functional.linear(x, linear.weight, linear.bias).detach()
    with torch.no_grad():
        assert linear.add_low_rank(y, x, images) is y
    torch.testing.assert_close(y, linear(x, images))
    with torch.no_grad():
        assert torch.equal(linear.add_low_rank(y.clone(), x, None), y)


def test_text_rows_are_untouched_to_the_bit(linear: PLoRALinear) -> None:
    x = rows().float()
    linear = linear.float()
    y = linear(x, torch.tensor([0, 6]))
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(y[1:6], plain[1:6])
    assert not torch.equal(y[0], plain[0])


def test_without_pictures_it_is_a_plain_linear_map(linear: PLoRALinear) -> None:
    x = rows()
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    assert torch.equal(linear(x), plain)
    assert torch.equal(linear(x, torch.tensor([], dtype=torch.int64)), plain)


def test_the_input_is_left_as_it_was(linear: PLoRALinear) -> None:
    x = rows()
    before = x.clone()
    linear(x, torch.arange(T))
    assert torch.equal(x, before)


def test_gradients_reach_the_input_and_both_matrices(linear: PLoRALinear) -> None:
    x = rows().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: linear(x, torch.tensor([0, 3])), x)
    assert torch.autograd.gradcheck(lambda x: linear(x, slice(1, 4)), x)
    linear(x, torch.tensor([0, 3])).sum().backward()
    for weight in (linear.Plora_A.weight, linear.Plora_B.weight):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_its_tensors_have_the_published_names(linear: PLoRALinear) -> None:
    shapes = {n: tuple(p.shape) for n, p in linear.named_parameters()}
    assert shapes.pop("bias", (OUT,)) == (OUT,)
    assert shapes == {
        "weight": (OUT, IN),
        "Plora_A.weight": (RANK, IN),
        "Plora_B.weight": (OUT, RANK),
    }
