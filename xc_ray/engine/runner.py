"""One forward step: a batch in, logits and chosen ids out; the state of every lane stays here.

A lane is a running sequence's row of device state: its block table, its rope frequencies, the
token it chose last, its sampling parameters, its adapter's slot. Steps are launched in order on one
stream, so a step may use what the one before it will have written; nothing here waits for the
device.
"""

from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from xc_ray.engine.attention import PagedAttend, Rows, Span
from xc_ray.engine.batch import Batch, build_batch, to_device
from xc_ray.engine.config import EngineConfig
from xc_ray.engine.kernels.lora_layout import Tiles
from xc_ray.engine.kv_cache import KVCache
from xc_ray.engine.lora import LoraOps, LoraPool
from xc_ray.engine.sampler import Sampler
from xc_ray.engine.sequence import MAX_LOGPROBS, Image, SamplingParams, Sequence, Work
from xc_ray.model.decoder import Decoder
from xc_ray.model.ops import PLAIN, Ops
from xc_ray.model.plora import ImageRows
from xc_ray.model.rope import inverse_frequencies, rope_table


class Runner:
    """The model, the cache and the lanes' state; one lane more than sequences, for padding."""

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        device, d = decoder.device, decoder.config.decoder
        self.decoder = decoder
        self.device = device
        self.ops: Ops = PLAIN
        if device.type == "cuda":
            # Triton comes with CUDA builds of torch only.
            from xc_ray.engine.kernels.fused import FusedOps, join_gates

            join_gates(decoder)
            self.ops = FusedOps(device, config.max_num_seqs)
        self.cache = KVCache(d, config, device=device, dtype=decoder.dtype)
        self.sampler = Sampler(config.max_num_seqs, d.vocab_size, device)
        self.padding_lane = config.max_num_seqs
        self._wide = torch.promote_types(decoder.dtype, torch.float32)
        lanes = config.max_num_seqs + 1
        self.frequencies = torch.zeros(lanes, d.head_dim // 2, device=device, dtype=self._wide)
        self.last = torch.zeros(lanes, dtype=torch.int32, device=device)
        self.tables = torch.full(
            (lanes, config.max_blocks), self.cache.spare, dtype=torch.int32, device=device
        )
        self._plain_frequencies = self._frequencies(1)
        self._num_tabled = [0] * lanes  # blocks of each lane that its table holds
        self.lora = LoraPool(decoder, config) if config.max_loras else None
        self.slots = torch.full((lanes,), -1, dtype=torch.int32, device=device)
        # In decode steps an adapter's small kernels run beside the base's large ones.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, sequences: Seq[Sequence]) -> None:
        """Gives lanes to sequences that begin, or begin anew."""
        if not sequences:
            return
        vocab = self.decoder.config.decoder.vocab_size
        limit = self.decoder.config.decoder.max_position_embeddings
        plain = [s for s in sequences if s.rope_length <= limit]
        lasts = [[*s.prompt[-1:], *s.generated[-1:]][-1] for s in sequences]
        lanes, plain_lanes, last, slots = to_device(
            [
                [s.lane for s in sequences],
                [s.lane for s in plain],
                [0 if token >= vocab else token for token in lasts],
                [s.slot for s in sequences],
            ],
            self.device,
        )
        self.slots.index_copy_(0, lanes, slots.to(torch.int32))
        self.last.index_copy_(0, lanes, last.to(torch.int32))
        self.frequencies[plain_lanes] = self._plain_frequencies
        for s in sequences:
            self._num_tabled[s.lane] = 0
            if s.rope_length > limit:
                self.frequencies[s.lane] = self._frequencies(s.rope_length)
        self.sampler.set_lanes([(s.lane, s.params, s.generated) for s in sequences])

    def update_tables(self, sequences: Seq[Sequence]) -> None:
        """Brings the block tables of sequences up to date."""
        width = self.tables.shape[1]
        places: list[int] = []
        blocks: list[int] = []
        for s in sequences:
            known = self._num_tabled[s.lane]
            if known < len(s.blocks):
                places += range(s.lane * width + known, s.lane * width + len(s.blocks))
                blocks += s.blocks[known:]
                self._num_tabled[s.lane] = len(s.blocks)
        if places:
            at, new = to_device([places, blocks], self.device)
            self.tables.view(-1).index_copy_(0, at, new.to(torch.int32))

    def warm_up(self, num_tokens: int) -> None:
        """Runs prompts of up to so many tokens in the padding lane, the longest in two chunks.

        Kernels compile and libraries plan here, not in the first request's time.
        """
        from xc_ray.engine.kernels.fused import CUDNN_STEP

        vocab = self.decoder.config.decoder.vocab_size
        nobody = Sequence("", [0] * num_tokens, SamplingParams(), lane=self.padding_lane)
        chunks = [(num_tokens // 2, num_tokens), (0, num_tokens)]
        chunks += [(0, stop) for stop in range(CUDNN_STEP, num_tokens, CUDNN_STEP)]
        works = [(nobody, *chunk) for chunk in chunks]
        works += [(sequence, 0, len(sequence.prompt)) for sequence in self._pictured(num_tokens)]
        if self.lora is not None:
            # Slot 0 is empty: an adapter of no rank. A short chunk, and a long one.
            user = replace(nobody, slot=0)
            works += [(user, max(0, num_tokens - 16), num_tokens), (user, 0, num_tokens)]
        for sequence, start, stop in works:
            last = stop == len(sequence.prompt)
            work = [Work(sequence, start, stop, samples=last, decode=False)]
            batch = build_batch(work, vocab, self.device)
            logits = self.logits(batch)
            if batch.num_sampling:
                self.choose(logits, batch.lanes[-1:], batch.positions[-1:] + 1)

    @torch.inference_mode()
    def largest_step(self, num_tokens: int, length: int) -> None:
        """Runs what takes most memory: a token of every lane, and so many rows of a picture.

        The picture ends a prompt of `length` tokens, whose keys are read back, and every row wants
        its logits edited and log-probabilities. A share that is too small for it is found out at
        the start.
        """
        rows = min(num_tokens, length)
        vocab = self.decoder.config.decoder.vocab_size
        lanes = self.padding_lane
        asker = Sequence("", [0] * 2, SamplingParams(), lane=self.padding_lane)
        # A picture and the token behind it, unless there is room for a token alone.
        reader = self._prompt(length - rows, (rows - 1,)) if rows > 1 else self._prompt(length, ())
        work = [Work(asker, 1, 2, samples=True, decode=True)] * (lanes - 1)
        work.append(Work(reader, length - rows, length, samples=True, decode=False))
        batch = build_batch(work, vocab, self.device)
        logits = self.logits(batch)
        at = torch.arange(len(logits), device=self.device)
        edited = self.sampler.edit(logits, at, at, torch.zeros(len(at), device=self.device))
        padding = torch.full_like(at, self.padding_lane)
        chosen = self.choose(edited, padding, at)
        self.sampler.logprobs(logits, chosen, min(MAX_LOGPROBS, vocab))

    def _pictured(self, num_tokens: int) -> list[Sequence]:
        """Prompts of as many tokens, but for the last all of pictures: of one, and of two apart."""
        half = num_tokens // 2
        sizes = (num_tokens - 1,), (half - 1, num_tokens - half - 1)
        return [self._prompt(0, rows) for rows in sizes if min(rows) > 0]

    def _prompt(self, num_text: int, rows: Seq[int]) -> Sequence:
        """A prompt in the padding lane: text, then pictures of so many rows with a token behind."""
        d, dtype = self.decoder.config.decoder, self.decoder.dtype
        prompt, images, starts, virtual = [0] * num_text, list[Image](), list[int](), d.vocab_size
        for num in rows:
            starts.append(len(prompt))
            prompt += [*range(virtual, virtual + num), 0]
            images.append(Image(num, embeddings=torch.zeros(num, d.hidden_size, dtype=dtype)))
            virtual += num
        return Sequence(
            "", prompt, SamplingParams(), tuple(images), tuple(starts), lane=self.padding_lane
        )

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Logits (S, V) of the rows that sample, in the weights' dtype; eager."""
        n = batch.num_decode
        ids = self.last[batch.lanes[:n]]
        if len(batch.ids):
            ids = torch.cat([ids, batch.ids]) if n else batch.ids
        x = self.decoder.model.tok_embeddings(ids)
        if batch.image_embeddings is not None:
            pictures = batch.image_embeddings.to(x.dtype)
            if isinstance(batch.image_rows, slice):
                x[batch.image_rows] = pictures
            else:
                x.index_copy_(0, batch.image_rows, pictures)
        slots = self._slots(batch.lanes, batch.positions)
        rows = Rows(
            slots,
            n,
            batch.lanes[:n],
            batch.positions[:n],
            self.tables,
            self._blocks_for(batch.max_length),
            tuple(self._span(*chunk) for chunk in batch.chunks),
        )
        attend = self._attend(rows, batch.chunks)
        wanted = None if batch.samples_images else batch.sample_rows
        ops = self._ops(batch)
        hidden = self._hidden(
            x, batch.lanes, batch.positions, attend, ops, batch.image_rows, wanted
        )
        if wanted is None and batch.sample_rows is not None:
            hidden = hidden.index_select(0, batch.sample_rows)
        if not batch.num_sampling:
            return hidden.new_empty(0, self.decoder.config.decoder.vocab_size)
        return self.ops.head(self.decoder.output, hidden)

    @torch.inference_mode()
    def decode(
        self,
        lanes: Tensor,
        positions: Tensor,
        num_blocks: int,
        out: Tensor | None = None,
        *,
        adapters: bool = False,
    ) -> Tensor:
        """Logits (S, V) of one token a lane (S,), the one it chose last; can be captured.

        With `adapters` those of the lanes count; on a GPU only.
        """
        x = self.decoder.model.tok_embeddings(self.last[lanes])
        # The fused kernel finds a new token's slot itself.
        slots = self._slots(lanes, positions) if self.ops is PLAIN else positions
        rows = Rows(slots, len(lanes), lanes, positions, self.tables, num_blocks)
        ops = self._adapters_of_lanes(lanes) if adapters else self.ops
        hidden = self._hidden(x, lanes, positions, self._attend(rows), ops)
        return self.ops.head(self.decoder.output, hidden, out)

    @torch.inference_mode()
    def choose(self, logits: Tensor, lanes: Tensor, places: Tensor) -> Tensor:
        """New ids (S,) int32 of lanes at places of their sequences; each lane keeps its own."""
        chosen = self.sampler.choose(logits, lanes, places)
        self.last.index_copy_(0, lanes, chosen.clamp(min=0))
        return chosen

    def _hidden(
        self,
        x: Tensor,
        lanes: Tensor,
        positions: Tensor,
        attend: PagedAttend,
        ops: Ops,
        image_rows: ImageRows = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        rope = rope_table(positions, self.frequencies[lanes])
        hidden: Tensor = self.decoder(x, rope, attend, image_rows, ops, wanted)
        return hidden

    def _ops(self, batch: Batch) -> Ops:
        """The ops of a batch: those of its rows that have an adapter add it."""
        if self.lora is None or not batch.adapters:
            return self.ops
        if self.ops is PLAIN:
            return LoraOps(self.ops, self.lora, batch.adapters, batch.sample_adapters)
        if not batch.chunks:
            return self._adapters_of_lanes(batch.lanes)
        from xc_ray.engine.kernels.fused import FusedOps
        from xc_ray.engine.kernels.lora_ops import FusedLoraOps, cut_rows

        assert isinstance(self.ops, FusedOps)
        tiles = cut_rows(batch.adapters, len(batch.positions), self.device)

        def wanted() -> Tiles | None:
            segments = batch.sample_adapters
            return cut_rows(segments, batch.num_sampling, self.device) if segments else None

        return FusedLoraOps(self.ops, self.lora.slots, self.lora.of_module, tiles, wanted)

    def _adapters_of_lanes(self, lanes: Tensor) -> Ops:
        """The same for one row a lane, found on the device; can be captured."""
        from xc_ray.engine.kernels.fused import FusedOps
        from xc_ray.engine.kernels.lora_ops import DecodeLoraOps, group_rows

        assert self.lora is not None
        assert isinstance(self.ops, FusedOps)
        tiles = group_rows(self.slots[lanes], len(self.lora.slots.pool))
        assert self._side is not None
        return DecodeLoraOps(self.ops, self.lora.slots, self.lora.of_module, tiles, self._side)

    def _attend(self, rows: Rows, chunks: Seq[tuple[int, int, int]] = ()) -> PagedAttend:
        if self.ops is PLAIN:
            return PagedAttend(self.cache, rows)
        from xc_ray.engine.kernels.fused import FusedAttend, Lengths

        return FusedAttend(self.cache, rows, Lengths(chunks, self.device) if chunks else None)

    def _slots(self, lanes: Tensor, positions: Tensor) -> Tensor:
        size = self.cache.block_size
        return self.tables[lanes, positions // size] * size + positions % size

    def _span(self, num_past: int, num_new: int, lane: int) -> Span:
        if not num_past:
            return Span(0, num_new, None)
        return Span(num_past, num_new, self.tables[lane, : self._blocks_for(num_past + num_new)])

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.block_size)

    def _frequencies(self, rope_length: int) -> Tensor:
        config = self.decoder.config.decoder
        return inverse_frequencies(config, rope_length, device=self.device, dtype=self._wide)
