"""The distribution a token is drawn from, one number at a time, in Python floats."""

import math
from collections import Counter
from collections.abc import Sequence

from xc_ray.engine.sequence import SamplingParams


def distribution(
    logits: Sequence[float], params: SamplingParams, generated: Sequence[int] = ()
) -> dict[int, float]:
    """Probability of every id that may be drawn, after penalties, temperature, top-k and top-p."""
    scores = penalised(logits, params, generated)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    if params.greedy:
        return {ranked[0]: 1.0}
    kept = ranked[: params.top_k or len(ranked)]
    weights = _softmax([scores[i] / params.temperature for i in kept])
    nucleus: dict[int, float] = {}
    for token, weight in zip(kept, weights, strict=True):
        if sum(nucleus.values()) >= params.top_p and nucleus:
            break
        nucleus[token] = weight
    total = sum(nucleus.values())
    return {token: weight / total for token, weight in nucleus.items()}


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
