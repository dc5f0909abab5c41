"""Metrics of an ingress that also remember what they are told."""

from collections import Counter

from xc_ray.serve.observe import IngressMetrics


class RecordedIngressMetrics(IngressMetrics):
    """`outcomes` by outcome and code, `tokens` by kind, `limits` by limit and key; seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.limits: Counter[tuple[str, str]] = Counter()
        self.first_tokens: list[float] = []
        self.intervals: list[float] = []
        self.num_open = 0

    def opened(self) -> None:
        self.num_open += 1
        super().opened()

    def closed(self, outcome: str, code: str) -> None:
        self.num_open -= 1
        super().closed(outcome, code)

    def ended(self, outcome: str, code: str) -> None:
        self.outcomes[outcome, code] += 1
        super().ended(outcome, code)

    def first_token(self, seconds: float) -> None:
        self.first_tokens.append(seconds)
        super().first_token(seconds)

    def token_interval(self, seconds: float) -> None:
        self.intervals.append(seconds)
        super().token_interval(seconds)

    def answered(self, *, prompt: int, image: int, cached: int, generated: int, tiles: int) -> None:
        parts = {"image": image, "cached": cached, "tiles": tiles}
        self.tokens.update({"prompt": prompt, "generated": generated, **parts})
        super().answered(
            prompt=prompt, image=image, cached=cached, generated=generated, tiles=tiles
        )

    def key_refused(self, limit: str, key: str) -> None:
        self.limits[limit, key] += 1
        super().key_refused(limit, key)
