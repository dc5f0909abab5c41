"""PLoRA's products on scattered rows, against the model's own meaning."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with CUDA builds of torch only")

from xc_ray.engine.kernels.low_rank import add_low_rank
from xc_ray.model.config import PLoRAConfig
from xc_ray.model.plora import PLoRALinear

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "out", "rank"), [(32, 48, 3), (40, 200, 16), (256, 130, 256)])
@pytest.mark.parametrize("picture_rows", [[0], [1, 2, 5, 6], [*range(3, 150), 170, 299]])
def test_picture_rows_get_the_low_rank_product_and_others_nothing(
    picture_rows: list[int], size: int, out: int, rank: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = PLoRALinear(size, out, PLoRAConfig(rank, 0.5)).to(DEVICE, dtype)
    x = torch.randn(300, size).to(DEVICE, dtype)
    y = torch.randn(300, out).to(DEVICE, dtype)
    rows = torch.tensor(picture_rows, device=DEVICE)
    with torch.inference_mode():
        want = linear.add_low_rank(y.clone(), x, rows)
        got = add_low_rank(y.clone(), x, rows, linear.Plora_A.weight, linear.Plora_B.weight, 0.5)
    step = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(got, want, rtol=2 * step, atol=8 * step)
    others = torch.ones(300, dtype=torch.bool)
    others[picture_rows] = False
    assert torch.equal(got[others], y[others])
    assert not torch.equal(got[rows], y[rows])


def test_some_columns_of_a_wider_tensor_can_be_added_to() -> None:
    linear = PLoRALinear(32, 48, PLoRAConfig(4, 2.0)).to(DEVICE)
    x, wide = torch.randn(9, 32, device=DEVICE), torch.randn(9, 96, device=DEVICE)
    rows, before = torch.tensor([1, 5], device=DEVICE), wide.clone()
    with torch.inference_mode():
        want = linear.add_low_rank(wide[:, 48:].clone(), x, rows)
        add_low_rank(wide[:, 48:], x, rows, linear.Plora_A.weight, linear.Plora_B.weight, 2.0)
    torch.testing.assert_close(wide[:, 48:], want)
    assert torch.equal(wide[:, :48], before[:, :48])
