"""A chat request -> what a decoder is asked: pictures fetched, prompt measured, sampling."""

import asyncio
import secrets
from dataclasses import dataclass

from xc_ray.config import Limits, ServeConfig
from xc_ray.errors import InvalidRequest, MediaError, PromptTooLong
from xc_ray.model.config import GENERATION_DEFAULTS, XComposerConfig
from xc_ray.prompt.chat import ImageSlot, Message, has_system, render
from xc_ray.prompt.sequence import Prompt, answer_room, build_prompt, picture_grids
from xc_ray.prompt.tiles import read_header
from xc_ray.prompt.tokenizer import Tokenizer
from xc_ray.serve.fetch import Fetcher, MediaPolicy, Room
from xc_ray.serve.held import Holding
from xc_ray.serve.messages import GenerateRequest, Picture, Sampling
from xc_ray.serve.prefixes import Route, route_of
from xc_ray.serve.protocol import ChatCompletionRequest, ImagePart, ImageUrl

HIGH_DETAIL_TILES = 24


@dataclass(frozen=True)
class Order:
    """What a request means to the model; an answer may have `room` tokens, each choice."""

    prompt: Prompt
    pictures: list[Picture]
    room: int
    sampling: Sampling

    @property
    def tiles(self) -> int:
        """Of all pictures."""
        return sum(picture.grid.num_tiles for picture in self.pictures)


class Intake:
    """Takes requests of one served model."""

    def __init__(self, config: ServeConfig, model: XComposerConfig, tokenizer: Tokenizer) -> None:
        self._limits = config.limits
        self._shares_prefixes = config.decoder.prefix_cache
        self._model = model
        self._tokenizer = tokenizer
        self._longest_piece = tokenizer.longest_piece
        self.max_model_len = config.max_model_len or model.decoder.max_length
        self._fetcher = Fetcher(
            MediaPolicy(
                max_image_bytes=config.limits.max_image_bytes,
                timeout_s=config.media.timeout_s,
                allow_hosts=config.media.allow_hosts,
                allow_private=config.media.allow_private,
            )
        )

    async def take(self, chat: ChatCompletionRequest, salt: str, held: Holding) -> Order:
        """Fetches, measures and checks; what the caches keep is shared by those of one `salt`.

        Raises:
            Overloaded: the requests under way hold too much for the pictures that are fetched.
            MediaError: a picture cannot be fetched, or its header be read.
            PromptTooLong: it does not fit the model; says what would.
            InvalidRequest: a field that does not suit limits, answer or model.
        """
        budgets = [_budget(url, self._limits) for _, url in chat.images]
        data = await self._pictures(chat, held)
        # Long texts take milliseconds to encode, image headers may be slow to read: off the loop.
        prompt, pictures = await asyncio.to_thread(self._prompt, chat, data, budgets, salt)
        room = answer_room(
            prompt,
            self.max_model_len,
            max_tokens=chat.output_limit,
            tiles=[p.grid.num_tiles for p in pictures],
        )
        return Order(prompt, pictures, room, self._sampling(chat, room))

    def route(self, chat: ChatCompletionRequest, prompt: Prompt, request: GenerateRequest) -> Route:
        """By what a decoder is chosen. Reads every picture: about a millisecond for a megabyte."""
        answer_tokens = request.sampling.max_tokens * request.num_choices
        if not self._shares_prefixes:
            return Route(tokens=len(prompt.ids) + answer_tokens, adapter=request.adapter)
        return route_of(
            prompt,
            [picture.digest() for picture in request.pictures],
            start_of_turn=self._model.tokens.start_of_turn,
            system=has_system(self._model, _messages(chat)),
            answer_tokens=answer_tokens,
            adapter=request.adapter,
            salt=request.salt,
        )

    async def _pictures(self, chat: ChatCompletionRequest, held: Holding) -> list[bytes]:
        images = chat.images
        if len(images) > self._limits.max_images:
            raise InvalidRequest(
                f"the request has {len(images)} images, the limit is {self._limits.max_images}",
                param="messages",
                code="too_many_images",
            )
        room = Room(self._limits.max_request_bytes, taken=held.take)
        try:
            async with asyncio.TaskGroup() as group:
                fetches = [group.create_task(self._fetch(*image, room)) for image in images]
        except ExceptionGroup as failed:  # the others were cancelled
            raise failed.exceptions[0] from None
        return [fetch.result() for fetch in fetches]

    async def _fetch(self, where: str, image: ImageUrl, room: Room) -> bytes:
        try:
            return await self._fetcher.fetch(image.url, room)
        except MediaError as e:
            raise MediaError(f"{where}: {e.message}", param=where, code=e.code) from None

    def _sampling(self, chat: ChatCompletionRequest, room: int) -> Sampling:
        """Raises InvalidRequest if `min_tokens` or `logit_bias` do not suit answer or model."""
        if (chat.min_tokens or 0) > room:
            raise InvalidRequest(
                f"min_tokens is {chat.min_tokens:,} and the answer may have {room:,} tokens; "
                "lower it or raise max_tokens",
                param="min_tokens",
                code="invalid_value",
            )
        last = self._model.decoder.vocab_size - 1
        beyond = next((token for token in chat.logit_bias if token > last), None)
        if beyond is not None:
            raise InvalidRequest(
                f"logit_bias names the token id {beyond}, the model has 0 to {last}",
                param="logit_bias",
                code="invalid_value",
            )
        return _sampling(chat, room)

    def _prompt(
        self, chat: ChatCompletionRequest, data: list[bytes], budgets: list[int | None], salt: str
    ) -> tuple[Prompt, list[Picture]]:
        sizes = []
        for (where, _), file in zip(chat.images, data, strict=True):
            try:
                header = read_header(file, max_pixels=self._limits.max_image_pixels)
            except MediaError as e:
                raise MediaError(f"{where}: {e.message}", param=where, code=e.code) from None
            sizes.append((header.width, header.height))
        grids = picture_grids(self._model, sizes, budgets)
        messages = _messages(chat)
        self._check_length(messages)
        segments = render(self._model, messages)
        prompt = build_prompt(self._model, self._tokenizer, segments, grids)
        places = [where for where, _ in chat.images]
        return prompt, [Picture(*p, salt) for p in zip(data, grids, places, strict=True)]

    def _check_length(self, messages: list[Message]) -> None:
        """Refuses texts that are too long whatever they say: to encode 60 MB takes gigabytes."""
        texts = [part for m in messages for part in m.parts if isinstance(part, str)]
        length, most = sum(map(len, texts)), self.max_model_len * self._longest_piece
        if length > most:
            raise PromptTooLong(
                f"the texts have {length:,} characters, and the model holds "
                f"{self.max_model_len:,} tokens, {most:,} characters at the very most; "
                "shorten the text",
                param="messages",
                code="context_length_exceeded",
            )


def _messages(chat: ChatCompletionRequest) -> list[Message]:
    slot = 0
    messages = []
    for message in chat.messages:
        parts: list[str | ImageSlot] = []
        for part in message.content:
            if isinstance(part, ImagePart):
                parts.append(ImageSlot(slot))
                slot += 1
            else:
                parts.append(part.text)
        messages.append(Message(message.role, tuple(parts)))
    return messages


def _budget(image: ImageUrl, limits: Limits) -> int | None:
    """The tile budget that a picture asks for, None for the family's own."""
    if image.max_tiles is not None:
        if image.max_tiles > limits.max_tiles:
            raise InvalidRequest(
                f"max_tiles is {image.max_tiles}, the limit here is {limits.max_tiles}",
                param="max_tiles",
            )
        return image.max_tiles
    if image.detail == "auto":
        return None
    return 1 if image.detail == "low" else min(HIGH_DETAIL_TILES, limits.max_tiles)


def _sampling(chat: ChatCompletionRequest, max_tokens: int) -> Sampling:
    """The request's sampling with the family's defaults where it says nothing."""
    family = GENERATION_DEFAULTS

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return Sampling(
        max_tokens=max_tokens,
        temperature=given(chat.temperature, family.temperature),
        top_k=family.top_k if chat.top_k is None else chat.top_k,
        top_p=given(chat.top_p, family.top_p),
        presence_penalty=given(chat.presence_penalty, 0.0),
        frequency_penalty=given(chat.frequency_penalty, 0.0),
        repetition_penalty=given(chat.repetition_penalty, family.repetition_penalty),
        seed=secrets.randbits(63) if chat.seed is None else chat.seed,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        min_p=given(chat.min_p, 0.0),
        min_tokens=chat.min_tokens or 0,
        ignore_eos=chat.ignore_eos,
        logit_bias=tuple(chat.logit_bias.items()),
    )
