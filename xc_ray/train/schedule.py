"""The learning rate of a step: warm-up, then cosine (1608.03983), linear or constant."""

import math

from xc_ray.config import StepOptions


def learning_rate(options: StepOptions, step: int, num_steps: int) -> float:
    """Of a step counted from 0: linear up to the peak over the warm-up, then down towards 0.

    The first step has a rate above 0 and the last one too.
    """
    warm = round(options.warmup * num_steps)
    if step < warm:
        return options.learning_rate * (step + 1) / (warm + 1)
    share = (step - warm) / max(1, num_steps - warm)  # 0 to just below 1
    match options.schedule:
        case "constant":
            return options.learning_rate
        case "linear":
            return options.learning_rate * (1 - share)
        case _:
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
