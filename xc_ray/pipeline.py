"""READ FIRST: prompt + model + engine in one process, no Ray.

    pipe = Pipeline.load("demo")
    answer, history = pipe.chat("<img>photo.jpg</img>What is in the picture?")
    answer, history = pipe.chat("What colour is it?", history)

`serve/` makes the same calls across processes and adds only transport.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xc_ray.engine.config import EngineConfig
from xc_ray.engine.engine import Engine
from xc_ray.engine.sequence import Image, SamplingParams
from xc_ray.errors import InvalidRequest
from xc_ray.hub import resolve_model
from xc_ray.model.config import GENERATION_DEFAULTS, XComposerConfig
from xc_ray.model.weights import Checkpoint, default_dtype
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.prompt.chat import render
from xc_ray.prompt.query import History, ImageSource, conversation, history_pairs
from xc_ray.prompt.sequence import answer_room, build_prompt, picture_grids
from xc_ray.prompt.tiles import Grid, make_canvas, open_image, read_header
from xc_ray.prompt.tokenizer import TextStream, Tokenizer, load_tokenizer
from xc_ray.source import read_source

CACHED_PICTURES = 16
_SAMPLING = frozenset(f.name for f in fields(SamplingParams)) - {"stop_token_ids", "logprobs"}


@dataclass
class Pipeline:
    """One loaded model that chats; not for several threads at once."""

    config: XComposerConfig
    tokenizer: Tokenizer
    encoder: ImageEncoder
    engine: Engine
    _embeddings: OrderedDict[tuple[str, Grid], Tensor] = field(
        default_factory=OrderedDict, repr=False
    )

    @classmethod
    def load(
        cls,
        model: str | Path = "demo",
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        max_model_len: int | None = None,
    ) -> "Pipeline":
        """Loads `demo`, a folder or a hub id; bf16 on a GPU, fp32 on CPU unless told.

        Raises:
            CheckpointError: no such model, or its files are not one whole model.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or default_dtype(device)
        checkpoint = Checkpoint.open(resolve_model(str(model)))
        config = checkpoint.config
        length = max_model_len or config.decoder.max_length
        whole = checkpoint.load(device=device, dtype=dtype)
        return cls(
            config,
            load_tokenizer(checkpoint.folder, config.decoder.vocab_size),
            whole.vision,
            Engine(whole.decoder, EngineConfig(length, kv_cache_tokens=length, max_num_seqs=1)),
        )

    def chat(
        self,
        query: str,
        history: Sequence[Sequence[str]] | None = None,
        images: ImageSource | Sequence[ImageSource] | None = None,
        **options: Any,
    ) -> tuple[str, History]:
        """The whole answer, and the history with this turn; arguments as of `stream`."""
        pieces = []
        after: History = []
        for piece, after in self.stream(query, history, images, **options):  # noqa: B007 - the last one counts
            pieces.append(piece)
        return "".join(pieces), after

    def stream(
        self,
        query: str,
        history: Sequence[Sequence[str]] | None = None,
        images: ImageSource | Sequence[ImageSource] | None = None,
        *,
        system: str | None = None,
        max_tiles: int | None = None,
        stop: str | Sequence[str] = (),
        **sampling: Any,
    ) -> Iterator[tuple[str, History]]:
        """Yields each new piece of the answer with the history so far; the last piece may be empty.

        Pictures stand in `query` and in the history as `<img>path-or-URL</img>`, or as
        `<ImageHere>` marks that `images` (paths, URLs or file bytes) fill in order. `system`
        replaces the family's text, "" leaves it out. `sampling` are fields of `SamplingParams`;
        what is not given is the family's default.

        Raises:
            InvalidRequest: bad arguments, marks without pictures or the reverse, too many tokens,
                or another answer of this pipeline is still open.
            MediaError: a picture cannot be read.
        """
        params = self._params({k: v for k, v in sampling.items() if v is not None})
        text = TextStream(self.tokenizer, stop)
        before = history_pairs(history or ())
        given = [images] if isinstance(images, (str, bytes, Path)) else images or ()
        talk = conversation(self.config, before, query, system, given)
        pictures = [read_source(s) for s in talk.sources]
        sizes = [(h.width, h.height) for h in map(read_header, pictures)]
        grids = picture_grids(self.config, sizes, [max_tiles] * len(sizes))
        segments = render(self.config, talk.messages, unmarked_image=talk.unmarked)
        prompt = build_prompt(self.config, self.tokenizer, segments, grids)
        room = answer_room(
            prompt,
            self.engine.config.max_model_len,
            max_tokens=sampling.get("max_tokens"),
            tiles=[g.num_tiles for g in grids],
        )
        params = replace(params, max_tokens=room)
        rows = [self._embed(p, g) for p, g in zip(pictures, grids, strict=True)]
        answer = ""
        for piece in self._run(prompt.ids, params, rows, text):
            answer += piece
            yield piece, [*before, (query, answer)]

    def _run(
        self, ids: list[int], params: SamplingParams, images: list[Image], text: TextStream
    ) -> Iterator[str]:
        if self.engine.has_work:
            raise InvalidRequest(
                "another answer of this pipeline is still open; read it to its end or close it"
            )
        request = secrets.token_hex(8)
        self.engine.add(request, ids, params, images)
        try:
            while self.engine.has_work and not text.stopped:
                for output in self.engine.step():
                    yield text.push(output.ids)
            yield text.finish()
        finally:
            # A caller may stop listening, or press Ctrl-C, in the middle of an answer.
            self.engine.abort(request)
            self.engine.step()

    def _params(self, sampling: dict[str, Any]) -> SamplingParams:
        unknown = sorted(sampling.keys() - _SAMPLING)
        if unknown:
            raise InvalidRequest(
                f"unknown option {unknown[0]!r}; known are {', '.join(sorted(_SAMPLING))}"
            )
        defaults = {
            f.name: getattr(GENERATION_DEFAULTS, f.name) for f in fields(GENERATION_DEFAULTS)
        }
        seed = {"seed": secrets.randbits(63)}
        return SamplingParams(
            stop_token_ids=self.config.stop_token_ids, **{**defaults, **seed, **sampling}
        )

    def _embed(self, data: bytes, grid: Grid) -> Image:
        key = (hashlib.sha256(data).hexdigest(), grid)
        if key not in self._embeddings:
            canvas = make_canvas(open_image(data), grid, tiled=self.config.family.tiled)
            with torch.inference_mode():
                self._embeddings[key] = self.encoder([torch.from_numpy(canvas.copy())])[0]
            if len(self._embeddings) > CACHED_PICTURES:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(key)
        rows = self._embeddings[key]
        # The next turn over the same picture finds it, and what was said of it, in the cache.
        return Image(len(rows), repr(key).encode(), rows)
