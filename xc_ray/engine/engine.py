"""Engine.add / abort / step: ids and embeddings in, ids out; the loop and nothing else."""

from collections import deque
from collections.abc import Sequence as Seq
from threading import Lock

import torch
from torch import Tensor

from xc_ray.engine.batch import build_batch
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.kv_cache import KVCache
from xc_ray.engine.runner import Runner
from xc_ray.engine.sampler import Sampled, Sampler
from xc_ray.engine.scheduler import Scheduler
from xc_ray.engine.sequence import FinishReason, SamplingParams, Sequence, StepOutput, TokenLogprob
from xc_ray.errors import InvalidRequest, PromptTooLong
from xc_ray.model.decoder import Decoder


class Engine:
    """Continuous batching over one decoder.

    `add` and `abort` may be called from any thread at any time; `step` from one thread only.
    Nothing is done outside `step`.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        self.decoder = decoder
        self.config = config
        self.vocab_size = decoder.config.decoder.vocab_size
        cache = KVCache(
            decoder.config.decoder,
            config.kv_cache_tokens,
            device=decoder.device,
            dtype=decoder.dtype,
        )
        self._scheduler = Scheduler(config, cache.ranges)
        self._runner = Runner(decoder, cache, config.max_num_seqs)
        self._sampler = Sampler(config.max_num_seqs, self.vocab_size, decoder.device)
        self._sequences: dict[str, Sequence] = {}
        # Requests to start and ids to end, in the order of the calls. Appending to a deque is
        # atomic: other threads never touch the scheduler itself.
        self._inbox: deque[Sequence | str] = deque()
        self._ids: set[str] = set()
        self._ids_lock = Lock()

    def add(
        self,
        request_id: str,
        ids: Seq[int],
        params: SamplingParams,
        image_embeddings: Seq[Tensor] = (),
    ) -> None:
        """Queues a request.

        Pictures stand in `ids` as virtual ids `vocab_size + row`; their embeddings (Ti, C) come in
        that order.

        Raises:
            InvalidRequest: empty, too long for the model or its cache, or rows and virtual ids do
            not match.
        """
        ids = list(ids)
        self._check(ids, params, image_embeddings)
        # They stay where they are (on the host when they come from another process): a step takes
        # the rows of its own chunk to the device.
        rows = None
        if image_embeddings:
            rows = (
                image_embeddings[0]
                if len(image_embeddings) == 1
                else torch.cat([*image_embeddings])
            )
        with self._ids_lock:
            if request_id in self._ids:
                raise InvalidRequest(f"request id {request_id!r} is in use; take another")
            self._ids.add(request_id)
        self._inbox.append(Sequence(request_id, ids, params, rows))

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; an unknown or finished one is left alone."""
        self._inbox.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._inbox or self._sequences)

    @property
    def num_running(self) -> int:
        """Requests that have room in the cache, in prefill or decode."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room in the cache, those added since the last step included."""
        added = sum(isinstance(item, Sequence) for item in tuple(self._inbox))
        return len(self._scheduler.waiting) + added

    @property
    def kv_usage(self) -> float:
        """Share of the cache that requests hold, 0 to 1."""
        ranges = self._scheduler.ranges
        return 1 - ranges.num_free / ranges.capacity

    def step(self) -> list[StepOutput]:
        """One forward step over all that can run.

        Returns the outputs of the requests that got something or ended.
        """
        outputs = self._take_in()
        work, started = self._scheduler.schedule()
        for sequence in started:
            self._runner.set_lane(sequence.lane, sequence.rope_length)
            self._sampler.reset(sequence.lane)
        if not work:
            return outputs
        logits = self._runner.run(build_batch(work, self.vocab_size, self.decoder.device))
        sampling = [w.sequence for w in work if w.samples]
        for w in work:
            w.sequence.num_computed += len(w.ids)
        if logits is not None:
            outputs += self._sample(logits, sampling)
        return outputs

    def _take_in(self) -> list[StepOutput]:
        outputs = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Sequence):
                self._sequences[item.request_id] = item
                self._scheduler.add(item)
            elif item in self._sequences:
                outputs.append(self._finish(self._sequences[item], (), FinishReason.ABORT))
        return outputs

    @torch.inference_mode()
    def _sample(self, logits: Tensor, sequences: Seq[Sequence]) -> list[StepOutput]:
        sampled = self._sampler(
            logits,
            [s.params for s in sequences],
            [s.lane for s in sequences],
            [s.num_tokens for s in sequences],
        )
        return [self._accept(s, i, sampled) for i, s in enumerate(sequences)]

    def _accept(self, sequence: Sequence, row: int, sampled: Sampled) -> StepOutput:
        token, logprob = sampled.ids[row], sampled.logprobs[row]
        sequence.generated.append(token)
        if token in sequence.params.stop_token_ids:
            return self._finish(sequence, (), FinishReason.STOP)
        logprobs = () if logprob is None else (logprob,)
        if len(sequence.generated) == sequence.params.max_tokens:
            return self._finish(sequence, (token,), FinishReason.LENGTH, logprobs)
        return StepOutput(sequence.request_id, (token,), len(sequence.generated), None, logprobs)

    def _finish(
        self,
        sequence: Sequence,
        ids: tuple[int, ...],
        reason: FinishReason,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> StepOutput:
        self._scheduler.finish(sequence)
        del self._sequences[sequence.request_id]
        self._ids.discard(sequence.request_id)
        sequence.image_embeddings = None
        return StepOutput(sequence.request_id, ids, len(sequence.generated), reason, logprobs)

    def _check(self, ids: list[int], params: SamplingParams, image_embeddings: Seq[Tensor]) -> None:
        total = len(ids) + params.max_tokens
        if not ids:
            raise InvalidRequest("the prompt has no tokens")
        if total > self.config.max_model_len:
            raise PromptTooLong(
                f"the prompt takes {len(ids):,} tokens and max_tokens is {params.max_tokens:,}, "
                f"together {total:,}; the model holds {self.config.max_model_len:,}",
                code="context_length_exceeded",
            )
        width = self.decoder.config.decoder.hidden_size
        for e in image_embeddings:
            if e.ndim != 2 or e.shape[1] != width:
                raise InvalidRequest(
                    f"embeddings of a picture have shape {tuple(e.shape)}, expected (rows, {width})"
                )
        virtual = [i for i in ids if i >= self.vocab_size]
        rows = sum(len(e) for e in image_embeddings)
        if virtual != list(range(self.vocab_size, self.vocab_size + rows)):
            raise InvalidRequest(
                f"the prompt has {len(virtual)} image positions and the pictures {rows} rows; "
                "they must match in number and order"
            )
        if min(ids) < 0:
            raise InvalidRequest(f"the prompt holds the id {min(ids)}; ids are 0 or more")
