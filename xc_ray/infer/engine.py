"""Rows in, answers out, many at once: prompts and pictures are made ready while the engine works.

rows -> threads: read pictures, count tokens -> Engine.add ┐
engine asks for pictures -> Pictures (a thread)  -> supply ┴-> step -> answers, as they end
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Self

import torch

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.lora import PackedAdapter
from xc_ray.engine.sequence import FinishReason, Image, SamplingParams, StepOutput
from xc_ray.errors import ConfigError, EngineError, XcRayError
from xc_ray.infer.model import Found
from xc_ray.infer.pictures import KEPT_ROWS, Picture, Pictures, Sources
from xc_ray.infer.rows import Row
from xc_ray.model.adapter import Adapter, load_adapter
from xc_ray.model.config import GENERATION_DEFAULTS, XComposerConfig
from xc_ray.model.weights import Checkpoint, default_dtype
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.plan import CPU_CACHE_REQUESTS, GB, decoder_plan, encoder_plan
from xc_ray.prompt.chat import render
from xc_ray.prompt.sequence import answer_room, build_prompt, picture_grids
from xc_ray.prompt.tiles import read_header
from xc_ray.prompt.tokenizer import Tokenizer, load_tokenizer
from xc_ray.train.question import Question

CPU_BATCH, GPU_BATCH = 16, 64
MAX_PREFILL_TOKENS = 4096
NUM_THREADS = 4  # that read and decode pictures
# Image tokens of rows that the engine has and that have not begun to answer: their embeddings wait
# on the device, 0.5 GB at 7B.
AHEAD_TOKENS = 65_536
# Of what is free on a GPU when we come; the rest is for what the allocator cannot join.
MEMORY_SHARE = 0.95


@dataclass(frozen=True)
class Options:
    """How rows are answered; `system` and `max_tiles` of None are the family's own.

    Greedy, and with the family's defaults for what is not here. With a temperature row i draws by
    the seed `seed + i`.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = GENERATION_DEFAULTS.top_p
    seed: int = 0
    system: str | None = None
    max_tiles: int | None = None

    def sampling(self, config: XComposerConfig, index: int, room: int) -> SamplingParams:
        """The parameters of one row whose answer has room for so many tokens.

        Raises:
            InvalidRequest: a value is out of its bounds.
        """
        return SamplingParams(
            max_tokens=room,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=GENERATION_DEFAULTS.top_k,
            repetition_penalty=GENERATION_DEFAULTS.repetition_penalty,
            seed=self.seed + index,
            stop_token_ids=config.stop_token_ids,
        )


@dataclass(frozen=True)
class Answer:
    """What came of a row: a text and why it ended, or an error."""

    row: Row
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class _Ready:
    """A row as the engine takes it, or what is wrong with it."""

    row: Row
    ids: list[int] = field(default_factory=list)
    params: SamplingParams | None = None
    pictures: tuple[Picture, ...] = ()
    error: str = ""

    @property
    def image_tokens(self) -> int:
        return sum(picture.num_rows for picture in self.pictures)


@dataclass
class _Open:
    """A row inside the engine."""

    ready: _Ready
    ids: list[int] = field(default_factory=list)
    begun: bool = False


@dataclass(frozen=True)
class Answerer:
    """One loaded base with at most one adapter; `answers` takes rows and gives them answered."""

    config: XComposerConfig
    tokenizer: Tokenizer
    encoder: ImageEncoder
    engine: Engine
    adapter: PackedAdapter | None = None

    @classmethod
    def load(
        cls,
        base: Found,
        adapter: Found | None = None,
        *,
        batch_size: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Answerer":
        """Loads them; bf16 on a GPU, fp32 on CPU unless told. `batch_size` rows run at once.

        Raises:
            CheckpointError: the files are not one whole model, or the adapter does not fit it.
            ConfigError: the device has no room.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or default_dtype(device)
        checkpoint = Checkpoint.open(base.folder)
        config = checkpoint.config
        tokenizer = load_tokenizer(checkpoint.folder, config.decoder.vocab_size)
        lora = None
        if adapter is not None:
            lora = load_adapter(adapter.folder, config, digest=adapter.digest, dtype=dtype)
        limits = engine_limits(config, torch.device(device), dtype, batch_size, lora)
        whole = checkpoint.load(device=device, dtype=dtype)
        engine = Engine(whole.decoder, limits)
        packed = engine.pack(lora) if lora is not None else None
        return cls(config, tokenizer, whole.vision, engine, packed)

    def answers(self, rows: Iterable[Row], options: Options) -> Iterator[Answer]:
        """Every row answered, in the order in which they end.

        Raises:
            EngineError: the engine failed as a whole; those not given yet have no answer.
        """
        wake = threading.Event()
        with (
            ThreadPoolExecutor(NUM_THREADS, "rows") as readers,
            ThreadPoolExecutor(NUM_THREADS, "canvases") as painters,
            Pictures(self.encoder, painters, self.engine.supply, wake.set) as pictures,
            _Ahead(self, rows, options, readers, wake) as ahead,
        ):
            yield from _Work(self, ahead, pictures, wake).run()

    def prepare(self, row: Row, options: Options, sources: Sources) -> _Ready:
        """Reads a row's pictures and counts its tokens; from any thread."""
        if row.question is None:
            return _Ready(row, error=row.error)
        try:
            return self._prepared(row, row.question, options, sources)
        except XcRayError as e:
            return _Ready(row, error=e.message)

    def _prepared(self, row: Row, question: Question, options: Options, sources: Sources) -> _Ready:
        config = self.config
        files = [sources.read(source) for source in question.pictures]
        sizes = [(h.width, h.height) for h in map(read_header, files)]
        grids = picture_grids(config, sizes, [options.max_tiles] * len(sizes))
        segments = render(config, question.messages, unmarked_image=question.unmarked)
        prompt = build_prompt(config, self.tokenizer, segments, grids)
        length = self.engine.config.max_model_len
        room = answer_room(
            prompt,
            length,
            max_tokens=max(1, min(options.max_tokens, length - len(prompt.ids))),
            tiles=[grid.num_tiles for grid in grids],
        )
        # In the order of the ids, as the engine counts them.
        pictures = tuple(
            Picture.of(files[span.image], grids[span.image], span.length) for span in prompt.spans
        )
        return _Ready(row, prompt.ids, options.sampling(config, row.index, room), pictures)


class _Ahead:
    """The next rows in their order, made ready by threads as far ahead as a batch is large."""

    def __init__(
        self,
        answerer: Answerer,
        rows: Iterable[Row],
        options: Options,
        threads: Executor,
        wake: threading.Event,
    ) -> None:
        self._answerer, self._options = answerer, options
        self._rows = iter(rows)
        self._threads, self._wake = threads, wake
        self._sources = Sources()
        self._coming: deque[Future[_Ready]] = deque()
        self._most = answerer.engine.config.max_num_seqs + NUM_THREADS
        self.ended = False  # whether every row was taken

    def head(self) -> _Ready | None:
        """The next row, if it is ready; it stays where it is."""
        self._fill()
        if not self._coming:
            self.ended = True
            return None
        return self._coming[0].result() if self._coming[0].done() else None

    def take(self) -> None:
        """Takes the head away."""
        self._coming.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for future in self._coming:
            future.cancel()

    def _fill(self) -> None:
        while len(self._coming) < self._most:
            row = next(self._rows, None)
            if row is None:
                return
            future = self._threads.submit(self._answerer.prepare, row, self._options, self._sources)
            future.add_done_callback(lambda _: self._wake.set())
            self._coming.append(future)


class _Work:
    """The loop: as many rows in the engine as it can use, until all have ended."""

    def __init__(
        self, answerer: Answerer, ahead: _Ahead, pictures: Pictures, wake: threading.Event
    ) -> None:
        self._answerer, self._engine = answerer, answerer.engine
        self._ahead, self._pictures, self._wake = ahead, pictures, wake
        self._open: dict[str, _Open] = {}
        # A few more than run: whoever takes a place that comes free has its pictures already.
        seqs = answerer.engine.config.max_num_seqs
        self._most = seqs + -(-seqs // 4)

    def run(self) -> Iterator[Answer]:
        """Answers, as they end."""
        while True:
            self._wake.clear()
            yield from self._feed()
            yield from self._failed_pictures()
            if self._engine.has_work:
                for output in self._engine.step():
                    yield from self._take(output)
                if self._engine.failure is not None:
                    # Nobody knows which row it was, nor what the device still holds.
                    raise EngineError(f"the engine failed: {self._engine.failure}")
            elif self._ahead.ended and not self._open:
                return
            else:
                self._wake.wait()

    def _feed(self) -> Iterator[Answer]:
        while len(self._open) < self._most and (ready := self._ahead.head()) is not None:
            waiting = sum(o.ready.image_tokens for o in self._open.values() if not o.begun)
            if waiting and waiting + ready.image_tokens > AHEAD_TOKENS:
                return
            self._ahead.take()
            if ready.error:
                yield Answer(ready.row, error=ready.error)
            else:
                yield from self._add(ready)

    def _add(self, ready: _Ready) -> Iterator[Answer]:
        assert ready.params is not None
        request = str(ready.row.index)
        images = [Image(p.num_rows, p.digest) for p in ready.pictures]
        try:
            self._engine.add(request, ready.ids, ready.params, images, self._answerer.adapter)
        except XcRayError as e:
            yield Answer(ready.row, error=e.message)
        else:
            self._open[request] = _Open(ready)

    def _failed_pictures(self) -> Iterator[Answer]:
        while not self._pictures.failures.empty():
            failure = self._pictures.failures.get()
            if (one := self._open.pop(failure.request, None)) is not None:
                self._engine.abort(failure.request)
                error = failure.error
                told = error.message if isinstance(error, XcRayError) else repr(error)
                yield Answer(one.ready.row, error=told)

    def _take(self, output: StepOutput) -> Iterator[Answer]:
        one = self._open.get(output.request_id)
        if one is None:  # aborted
            return
        for index in output.missing_images:
            self._pictures.ask(output.request_id, index, one.ready.pictures[index])
        one.ids += output.ids
        one.begun = one.begun or output.num_generated > 0
        if output.finish_reason is None:
            return
        del self._open[output.request_id]
        if output.finish_reason is FinishReason.ERROR:
            yield Answer(one.ready.row, error=f"the engine failed on this row: {output.error}")
            return
        text = self._answerer.tokenizer.decode(one.ids)
        reason = output.finish_reason.value
        yield Answer(one.ready.row, text, reason, output.num_generated)


def engine_limits(
    config: XComposerConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int | None = None,
    adapter: Adapter | None = None,
) -> EngineConfig:
    """The engine's limits: on a GPU what is free there, on CPU a few of the longest requests.

    Of `batch_size` rows those wait that the key/value cache has no room for.

    Raises:
        ConfigError: the GPU has no room for the model and its longest request.
    """
    length = config.decoder.max_length
    batch = batch_size or (GPU_BATCH if device.type == "cuda" else CPU_BATCH)
    tokens = min(batch, CPU_CACHE_REQUESTS) * length
    if device.type == "cuda":
        tokens = min(_tokens_that_fit(config, device, dtype, batch, adapter), batch * length)
    return EngineConfig(
        length,
        tokens,
        batch,
        MAX_PREFILL_TOKENS,
        max_loras=int(adapter is not None),
        max_lora_rank=adapter.rank if adapter is not None else 1,
    )


def _tokens_that_fit(
    config: XComposerConfig,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    adapter: Adapter | None,
) -> int:
    size, length = dtype.itemsize, config.decoder.max_length
    free, _ = torch.cuda.mem_get_info(device)
    vision = encoder_plan(config, 0, number_bytes=size, cuda_graphs=False, context=0)
    waiting = (AHEAD_TOKENS + KEPT_ROWS) * config.decoder.hidden_size * size
    plan = decoder_plan(
        config,
        int(free * MEMORY_SHARE) - vision.fixed - waiting,
        number_bytes=size,
        max_num_seqs=batch,
        max_prefill_tokens=MAX_PREFILL_TOKENS,
        max_model_len=length,
        adapter_slots=int(adapter is not None),
        adapter_rank=adapter.rank if adapter is not None else 1,
        context=0,  # it is there by now
    )
    if plan.kv_tokens < length:
        need = plan.fixed + vision.fixed + waiting + length * plan.kv_bytes_per_token
        raise ConfigError(
            f"{device} has {free / GB:.1f} GB free, and the model with its longest request "
            f"({length:,} tokens) takes {need / MEMORY_SHARE / GB:.1f} GB; free some, take another "
            "--device or lower --batch-size"
        )
    return plan.kv_tokens
