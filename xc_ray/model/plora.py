"""Partial LoRA (2401.16420): y = W x on every row, + scaling · B A x on picture rows only."""

from torch import Tensor, nn
from torch.nn import functional as F

from xc_ray.model.config import PLoRAConfig

# Which rows of a flat batch are picture rows: (Ti,) int64, or a slice where they stand together,
# so that views serve in place of copies; None for none.
ImageRows = Tensor | slice | None


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

    def forward(self, x: Tensor, image_rows: ImageRows = None) -> Tensor:
        """x (T, in) -> (T, out), with B A x added on the picture rows."""
        return self.add_low_rank(F.linear(x, self.weight, self.bias), x, image_rows)

    def add_low_rank(self, y: Tensor, x: Tensor, image_rows: ImageRows) -> Tensor:
        """Adds scaling · B A x to the picture rows of y (T, out), in place."""
        if image_rows is None:
            return y
        if isinstance(image_rows, slice):
            low = self.Plora_A(x[image_rows])  # (Ti, R)
            y[image_rows].addmm_(low, self.Plora_B.weight.T, alpha=self.plora_scaling)
            return y
        low = self.Plora_B(self.Plora_A(x.index_select(0, image_rows)))  # (Ti, out)
        return y.index_add_(0, image_rows, low, alpha=self.plora_scaling)
