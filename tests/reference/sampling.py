"""The distribution a token is drawn from, one number at a time, in Python floats."""

import math
from collections import Counter
from collections.abc import Sequence

from xc_ray.engine.sequence import SamplingParams


def distribution(
    logits: Sequence[float], params: SamplingParams, generated: Sequence[int] = ()
) -> dict[int, float]:
    """Probability of every id that may be drawn.

    Bias, penalties, temperature, then top-k, top-p (1904.09751) of what top-k keeps, and min-p
    (2407.01082); ids as likely as the last one kept are kept too.
    """
    scores = list(logits)
    for token, bias in params.logit_bias:
        scores[token] += bias
    scores = penalised(scores, params, generated)
    best = max(scores)
    if params.greedy:
        return {scores.index(best): 1.0}
    levels = sorted(scores, reverse=True)
    if params.top_k:
        last = levels[: params.top_k][-1]
        scores = [s if s >= last else -math.inf for s in scores]
    weights = [math.exp((s - best) / params.temperature) for s in scores]
    least = params.min_p * max(weights)
    if params.top_p < 1:
        nucleus: list[float] = []
        for weight in sorted(weights, reverse=True):
            if sum(nucleus) >= params.top_p * sum(weights):
                break
            nucleus.append(weight)
        least = max(least, nucleus[-1])
    kept = {token: w for token, w in enumerate(weights) if w >= least and w > 0}
    total = sum(kept.values())
    return {token: w / total for token, w in kept.items()}


def penalised(
    logits: Sequence[float], params: SamplingParams, generated: Sequence[int]
) -> list[float]:
    """Repetition penalty (1909.05858), then presence and frequency penalties, on generated ids."""
    scores = list(logits)
    for token, count in Counter(generated).items():
        score = scores[token]
        score = (
            score / params.repetition_penalty if score > 0 else score * params.repetition_penalty
        )
        scores[token] = score - params.presence_penalty - params.frequency_penalty * count
    return scores


def logprobs(logits: Sequence[float]) -> list[float]:
    """Log-softmax of the model's own scores."""
    return [math.log(p) for p in _softmax(logits)]


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]
