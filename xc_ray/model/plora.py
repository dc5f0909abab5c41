"""Partial LoRA (2401.16420): y = W x on every row, + scaling · B A x on picture rows only."""

from torch import Tensor, nn

from xc_ray.model.config import PLoRAConfig


class PLoRALinear(nn.Linear):
    """A linear map whose `Plora_A`, `Plora_B` (published names) act on picture rows alone.

    The original also has dropout on the way into A while training; PLoRA stays frozen here and has
    none.
    """

    def __init__(
        self, in_features: int, out_features: int, plora: PLoRAConfig, *, bias: bool = False
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.Plora_A = nn.Linear(in_features, plora.rank, bias=False)
        self.Plora_B = nn.Linear(plora.rank, out_features, bias=False)
        self.plora_scaling = plora.scaling

    def forward(self, x: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """x (T, in) -> (T, out); `image_rows` (Ti,) int64: the rows of pictures, None for none."""
        y = super().forward(x)
        if image_rows is None:
            return y
        low = self.Plora_B(self.Plora_A(x.index_select(0, image_rows)))  # (Ti, out)
        return y.index_add_(0, image_rows, low, alpha=self.plora_scaling)
