"""Engine.add / abort / step: ids and embeddings in, ids out; the loop and nothing else."""

import logging
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from xc_ray.engine.batch import Batch, build_batch, to_device
from xc_ray.engine.block_manager import BlockManager
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.cuda_graph import DecodeGraphs
from xc_ray.engine.lora import PackedAdapter
from xc_ray.engine.request import check_embeddings, make_sequence
from xc_ray.engine.runner import Runner
from xc_ray.engine.sampler import to_logprobs
from xc_ray.engine.scheduler import Schedule, Scheduler
from xc_ray.engine.sequence import (
    FinishReason,
    Image,
    SamplingParams,
    Sequence,
    SequenceStatus,
    StepOutput,
    TokenLogprob,
    Work,
)
from xc_ray.engine.slots import AdapterSlots, SlotStats
from xc_ray.errors import InvalidRequest
from xc_ray.model.adapter import Adapter
from xc_ray.model.decoder import Decoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Supply:
    """Embeddings that came for an image of a request."""

    sequence: Sequence
    index: int
    embeddings: Tensor


@dataclass(frozen=True)
class Launched:
    """A step that the device works at: what it will bring, and to whom.

    `results` are on the host once `done` has happened: a row of numbers for each sequence in
    `sampling`, the chosen id first, then a number for each of `pictured`, 0 where the chunk of its
    images held NaN or infinity.
    """

    work: list[Work]
    sampling: list[Sequence]
    pictured: list[Sequence]
    results: Tensor
    done: torch.cuda.Event | None

    def wait(self) -> tuple[list[list[float]], list[float]]:
        """The rows of numbers and the flags; waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        numbers = self.results.tolist()
        flags = len(numbers) - len(self.pictured)
        width = flags // len(self.sampling) if self.sampling else 1
        rows = [numbers[i : i + width] for i in range(0, flags, width)]
        return rows, numbers[flags:]


class Engine:
    """Continuous batching over one decoder.

    `add`, `supply` and `abort` may be called from any thread at any time; `step` from one thread
    only. Nothing is done outside `step`. With `overlap` a step launches the next forward pass
    before it reads the tokens of the one before, so that the host's work hides behind the device's.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        self.decoder = decoder
        self.config = config
        self.vocab_size = decoder.config.decoder.vocab_size
        self.failure: str | None = None  # why a whole step failed; the engine may not be sound
        self.num_prefilled = 0  # prompt tokens computed since the start, in steps that were read
        self.num_stepped = 0  # sequences in the step that was launched last
        self._runner = Runner(decoder, config)
        self._blocks = BlockManager(config.num_blocks)
        lora = self._runner.lora
        self._slots = (
            AdapterSlots(config.max_loras, lora.load, lora.loaded) if lora is not None else None
        )
        self._scheduler = Scheduler(config, self._blocks, self._slots)
        if decoder.device.type == "cuda":
            self._runner.warm_up(min(config.max_prefill_tokens, config.max_sequence_tokens))
        self._graphs: DecodeGraphs | None = None
        if decoder.device.type == "cuda":
            graphs = DecodeGraphs(self._runner, config.max_num_seqs)
            if config.cuda_graphs:
                graphs.capture()
                self._graphs = graphs
            else:
                graphs.warm_up()
            self._runner.largest_step(config.max_prefill_tokens, config.max_sequence_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: Launched | None = None
        self._stalled = False  # whether all that is left waits for embeddings
        # Requests to start, embeddings, and ids to end, in the order of the calls. Appending to a
        # deque is atomic: other threads never touch the scheduler itself.
        self._inbox: deque[Sequence | Supply | str] = deque()
        self._ids: dict[str, Sequence] = {}
        self._ids_lock = Lock()

    def add(
        self,
        request_id: str,
        ids: Seq[int],
        params: SamplingParams,
        images: Seq[Tensor | Image] = (),
        adapter: PackedAdapter | None = None,
        salt: bytes = b"",
    ) -> None:
        """Queues a request, for the base model or for it with an adapter of `pack`.

        Images stand in `ids` as virtual ids `vocab_size + row`, in order. A tensor is the
        embeddings (Ti, C) of an image that no other request shares; for an `Image` without
        embeddings they are asked for by `StepOutput.missing_images` where the cache has not got its
        rows. The cache shares blocks among requests of the same `salt` only.

        Raises:
            InvalidRequest: empty, too long for the model or the cache, rows and virtual ids do not
                match, an id that is not in the vocabulary, or an adapter where none has room.
        """
        config = self.decoder.config.decoder
        sequence = make_sequence(
            request_id, ids, params, images, adapter, config, self.config, salt
        )
        with self._ids_lock:
            if request_id in self._ids:
                raise InvalidRequest(f"request id {request_id!r} is in use; take another")
            self._ids[request_id] = sequence
        self._inbox.append(sequence)

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """An adapter as requests name it; takes a copy in host memory, from any thread.

        Raises:
            InvalidRequest: no room for adapters, or its rank is larger than `max_lora_rank`.
        """
        if self._runner.lora is None:
            raise InvalidRequest(
                "this engine has no room for adapters: max_loras is 0", param="model"
            )
        return self._runner.lora.pack(adapter)

    def supply(self, request_id: str, index: int, embeddings: Tensor) -> None:
        """Brings the embeddings (Ti, C) of a request's image; one that has ended is left alone.

        Raises:
            InvalidRequest: the request has no such image, or their shape is not its.
        """
        sequence = self._ids.get(request_id)
        if sequence is None:
            return
        if not 0 <= index < len(sequence.images):
            raise InvalidRequest(
                f"request {request_id!r} has {len(sequence.images)} images, not one at {index}"
            )
        rows, width = sequence.images[index].num_rows, self.decoder.config.decoder.hidden_size
        check_embeddings(embeddings, rows, width)
        self._inbox.append(Supply(sequence, index, embeddings))

    def abort(self, request_id: str) -> None:
        """Ends a request before the next step; an unknown or finished one is left alone."""
        self._inbox.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything; not so while all requests wait for embeddings."""
        if self._inbox or self._in_flight is not None:
            return True
        return bool(self._sequences) and not self._stalled

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
    def waiting_prompt_tokens(self) -> int:
        """Prompt tokens that are not computed and could be: up to the first image that is missing.

        What the cache holds of a request that waits is counted, too.
        """
        return self._scheduler.waiting_prompt_tokens

    @property
    def kv_usage(self) -> float:
        """Share of the cache that running requests hold, 0 to 1."""
        return 1 - self._blocks.num_available / self._blocks.num_blocks

    @property
    def num_preemptions(self) -> int:
        """How often a running request had to give its blocks up, since the start."""
        return self._scheduler.num_preemptions

    @property
    def adapters(self) -> tuple[str, ...]:
        """Digests of the adapters that have a slot on the device."""
        return self._slots.resident if self._slots is not None else ()

    @property
    def adapter_stats(self) -> SlotStats:
        """How often adapters came into slots and left them."""
        return self._slots.stats if self._slots is not None else SlotStats()

    def step(self) -> list[StepOutput]:
        """Launches one forward step over all that can run, and reads what is ready.

        Returns the outputs of the requests that got something or ended: those of this step, or with
        `overlap` of the step before. A step that fails ends its own requests with an error.
        """
        outputs = self._take_in()
        plan = self._scheduler.schedule()
        outputs += [
            StepOutput(s.request_id, (), len(s.generated), missing_images=missing)
            for s, missing in plan.missing
        ]
        self.num_stepped = len(plan.work)
        launched = self._launch_safely(plan, outputs)
        if self.config.overlap:
            launched, self._in_flight = self._in_flight, launched
        if launched is not None:
            outputs += self._collect(launched)
        if not plan.work and launched is None:
            self._stalled = not self._await_adapters()
        else:
            self._stalled = False
        return outputs

    def _await_adapters(self) -> bool:
        """With nothing else to do, waits until adapters are on the device; whether any was not."""
        if self._slots is None or not self._slots.loading:
            return False
        assert self._runner.lora is not None
        self._runner.lora.wait()
        return True

    def _take_in(self) -> list[StepOutput]:
        outputs = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Sequence):
                self._sequences[item.request_id] = item
                if missing := self._scheduler.add(item):
                    outputs.append(StepOutput(item.request_id, (), 0, missing_images=missing))
            elif isinstance(item, Supply):
                if item.sequence.status is not SequenceStatus.FINISHED:
                    item.sequence.images[item.index].embeddings = item.embeddings
            elif item in self._sequences:
                outputs.append(self._finish(self._sequences[item], (), FinishReason.ABORT))
        return outputs

    def _launch_safely(self, plan: Schedule, outputs: list[StepOutput]) -> Launched | None:
        try:
            return self._launch(plan)
        except Exception as e:  # whatever it is, those who wait must hear of it
            ids = [w.sequence.request_id for w in plan.work]
            logger.exception("a step of %d sequences failed: %s", len(ids), ", ".join(ids))
            # Who started with it has no lane yet, or shares what it should have computed.
            failed = [*(w.sequence for w in plan.work), *plan.started]
            outputs += self._fail(failed, f"the step failed: {type(e).__name__}: {e}")
            return None

    @torch.inference_mode()
    def _launch(self, plan: Schedule) -> Launched | None:
        runner = self._runner
        runner.start(plan.started)
        if not plan.work:
            return None
        runner.update_tables([w.sequence for w in plan.work])
        sampling = [w.sequence for w in plan.work if w.samples]
        pictured: list[Sequence] = []
        flags: list[Tensor] = []
        graphs = self._graphs
        graphed = None
        if (
            graphs is not None
            and graphs.can_use(len(plan.work))
            and all(w.decode for w in plan.work)
        ):
            graphed = graphs
            adapters = any(w.sequence.slot >= 0 for w in plan.work)
            lanes, positions = to_device(
                [[s.lane for s in sampling], [w.start for w in plan.work]], runner.device
            )
            logits = graphed.logits(lanes, positions, adapters=adapters)
        else:
            batch = build_batch(plan.work, self.vocab_size, runner.device)
            logits = runner.logits(batch)
            lanes, positions = _of_sampling(batch)
            pictured = [plan.work[i].sequence for i, _ in batch.pictures]
            flags = [rows.isfinite().all()[None] for _, rows in batch.pictures]
        results = flags
        if sampling:
            results = [*self._choose(sampling, logits, lanes, positions, graphed), *flags]
        for w in plan.work:
            _release_images(w.sequence)
        host, done = _to_host(results, runner.device)
        return Launched(plan.work, sampling, pictured, host, done)

    def _choose(
        self,
        sampling: Seq[Sequence],
        logits: Tensor,
        lanes: Tensor,
        positions: Tensor,
        graphed: DecodeGraphs | None,
    ) -> list[Tensor]:
        """Chosen ids (S,), or rows of (S, 1 + numbers of their log-probabilities)."""
        runner = self._runner
        most = max(
            (s.params.logprobs for s in sampling if s.params.logprobs is not None), default=None
        )
        rows, ids, values = _edits(sampling)
        if rows:
            at, tokens = to_device([rows, ids], runner.device)
            new = torch.tensor(values, dtype=torch.float64).to(runner.device)
            edited = runner.sampler.edit(logits, at, tokens, new)
            chosen = runner.choose(edited, lanes, positions + 1)
        elif graphed is not None:
            chosen = graphed.choose(len(sampling))
        else:
            chosen = runner.choose(logits, lanes, positions + 1)
        if most is None:
            return [chosen]
        numbers = runner.sampler.logprobs(logits, chosen, min(most, self.vocab_size))
        return [torch.cat([chosen[:, None].double(), numbers], 1)]

    def _collect(self, launched: Launched) -> list[StepOutput]:
        try:
            rows, flags = launched.wait()
        except Exception as e:  # whatever it is, those who wait must hear of it
            failed = [w.sequence for w in launched.work]
            ids = [s.request_id for s in failed]
            logger.exception("a step of %d sequences failed: %s", len(ids), ", ".join(ids))
            return self._fail(failed, f"the step failed: {type(e).__name__}: {e}")
        self.num_prefilled += sum(w.stop - w.start for w in launched.work if not w.decode)
        outputs = []
        for sequence, finite in zip(launched.pictured, flags, strict=True):
            if not finite and sequence.status is not SequenceStatus.FINISHED:
                error = "the embeddings of an image hold NaN or infinity"
                outputs.append(self._end_with_error(sequence, error))
        for sequence in dict.fromkeys(launched.pictured):
            sequence.num_unchecked -= 1
            if sequence.status is SequenceStatus.RUNNING:
                self._scheduler.name_blocks(sequence)
        for sequence, row in zip(launched.sampling, rows, strict=True):
            sequence.in_flight -= 1
            if sequence.status is not SequenceStatus.FINISHED:
                outputs.append(self._accept(sequence, row))
        return outputs

    def _accept(self, sequence: Sequence, row: list[float]) -> StepOutput:
        token, params = int(row[0]), sequence.params
        if token < 0:
            return self._end_with_error(sequence, "the logits hold NaN or infinity")
        sequence.generated.append(token)
        if token in params.stop_token_ids:
            return self._finish(sequence, (), FinishReason.STOP)
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            logprobs = (to_logprobs(row[1:], params.logprobs),)
        if len(sequence.generated) == sequence.max_generated:
            return self._finish(sequence, (token,), FinishReason.LENGTH, logprobs)
        if sequence.status is SequenceStatus.RUNNING:
            self._scheduler.name_blocks(sequence)
        return StepOutput(
            sequence.request_id,
            (token,),
            len(sequence.generated),
            None,
            logprobs,
            sequence.num_cached or 0,
        )

    def _finish(
        self,
        sequence: Sequence,
        ids: tuple[int, ...],
        reason: FinishReason,
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
    ) -> StepOutput:
        if error is None and sequence.status is SequenceStatus.RUNNING:
            self._scheduler.name_blocks(sequence)
        self._scheduler.finish(sequence, forget=error is not None)
        del self._sequences[sequence.request_id]
        del self._ids[sequence.request_id]
        for image in sequence.images:
            image.embeddings = None
        return StepOutput(
            sequence.request_id,
            ids,
            len(sequence.generated),
            reason,
            logprobs,
            sequence.num_cached or 0,
            error=error,
        )

    def _end_with_error(self, sequence: Sequence, error: str) -> StepOutput:
        return self._finish(sequence, (), FinishReason.ERROR, error=error)

    def _fail(self, sequences: Seq[Sequence], error: str) -> list[StepOutput]:
        """Ends all requests of a failed step; what they computed is not shared."""
        self.failure = error
        return [
            self._end_with_error(sequence, error)
            for sequence in sequences
            if sequence.status is not SequenceStatus.FINISHED
        ]


def _of_sampling(batch: Batch) -> tuple[Tensor, Tensor]:
    """Lanes and positions (S,) of the rows that sample."""
    if batch.sample_rows is None:
        return batch.lanes, batch.positions
    return batch.lanes[batch.sample_rows], batch.positions[batch.sample_rows]


def _release_images(sequence: Sequence) -> None:
    """Lets go of supplied embeddings that are computed; if need be they are asked for again."""
    for i, image in enumerate(sequence.images):
        end = sequence.image_starts[i] + image.num_rows
        if i in sequence.asked and image.embeddings is not None and end <= sequence.num_computed:
            image.embeddings = None
            sequence.asked.discard(i)


def _edits(sampling: Seq[Sequence]) -> tuple[list[int], list[int], list[float]]:
    """What is added to which logits, as rows, ids and values: biases, and −inf for stop ids."""
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, sequence in enumerate(sampling):
        params = sequence.params
        for token, bias in params.logit_bias:
            rows.append(row)
            ids.append(token)
            values.append(bias)
        # This step's own token is in flight already.
        if len(sequence.generated) + sequence.in_flight <= params.min_tokens:
            for token in params.stop_token_ids:
                rows.append(row)
                ids.append(token)
                values.append(float("-inf"))
    return rows, ids, values


def _to_host(results: list[Tensor], device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
    """All results of a step as one vector on the host, by one copy that nothing waits for."""
    if not results:
        return torch.empty(0), None
    if len(results) > 1:
        wide = torch.promote_types(results[0].dtype, torch.int32)
        results = [torch.cat([r.flatten().to(wide) for r in results])]
    packed = results[0].flatten()
    if device.type != "cuda":
        return packed, None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return host, done
