"""The loss over learnt tokens."""

from torch import Tensor
from torch.nn import functional as F

from xc_ray.train.data import IGNORED


def supervised_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the learnt next tokens: logits (T, V), labels (T,) -> scalar.

    The flat batch may hold several conversations: the first position of each is BOS or a picture
    and never learnt, so that nothing is predicted across a border.
    """
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED)
