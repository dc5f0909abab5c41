"""How a decoder layer is computed: `Ops` in plain torch; the engine hands in faster ones.

The layers say what is computed, once, for training and serving. Whoever runs them may hand in an
`Ops` that does the same with fewer kernels; results differ by rounding alone.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from xc_ray.model.attention import Attend
from xc_ray.model.plora import ImageRows
from xc_ray.model.rope import rotate

Rope = tuple[Tensor, Tensor]


class Ops:
    """The plain meaning; `image_rows` is passed to the linear maps (see `PLoRALinear`)."""

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """RMSNorm of x (T, C)."""
        result: Tensor = module(x)
        return result

    def linear(self, module: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """x (T, in) -> (T, out)."""
        result: Tensor = module(x, image_rows)
        return result

    def linear_add(
        self, module: nn.Module, x: Tensor, image_rows: ImageRows, residual: Tensor
    ) -> Tensor:
        """Residual (T, out), which is given up, + the linear map of x (T, in)."""
        return residual + self.linear(module, x, image_rows)

    def gated(self, w1: nn.Module, w3: nn.Module, x: Tensor, image_rows: ImageRows) -> Tensor:
        """silu(w1 x) · w3 x: (T, C) -> (T, inner)."""
        return F.silu(self.linear(w1, x, image_rows)) * self.linear(w3, x, image_rows)

    def head(self, module: nn.Module, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Hidden states (S, C) -> logits (S, V), in the weights' dtype; into `out` if given."""
        result: Tensor = module(x)
        return result if out is None else out.copy_(result)

    def attention(self, attend: Attend, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """Packed projections (T, Hk, H / Hk + 2, D), not rotated -> (T, H, D)."""
        return attend(layer, *unpack(qkv, *rope))

    def of_rows(self, rows: Tensor) -> "Ops":
        """The same for rows (S,) int64 of the batch alone, in this order."""
        del rows  # what is computed here does not depend on where a row stands
        return self


def unpack(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed projections -> queries (T, H, D) and keys (T, Hk, D), rotated, and values (T, Hk, D).

    qkv (T, Hk, H / Hk + 2, D), of which the values are a view; cos and sin (T, D).
    """
    rows, groups, packed, size = qkv.shape
    q = qkv[:, :, :-2].reshape(rows, groups * (packed - 2), size)
    return rotate(q, cos, sin), rotate(qkv[:, :, -2], cos, sin), qkv[:, :, -1]


PLAIN = Ops()
