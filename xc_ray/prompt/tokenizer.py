"""Text <-> ids by the published `tokenizer.model` (SentencePiece BPE with byte fallback).

`encode` does what the original tokenizer does, control strings included. `encode_untrusted` is for
everything that comes from users, histories, system texts and data sets: whatever the text says, no
control id comes out.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from xc_ray.errors import CheckpointError, InvalidRequest

TOKENIZER_FILE = "tokenizer.model"
_REPLACEMENT = "�"
# The vocabulary's reserved pieces: turn marks are two of them, none may come from typed text.
_RESERVED = re.compile(r"\[UNUSED_TOKEN_\d+\]")


class Tokenizer:
    """One `tokenizer.model`: exact with the original on `encode`, safe on `encode_untrusted`."""

    def __init__(self, model: str | Path | bytes) -> None:
        """Reads a model file, or its bytes.

        Raises:
            CheckpointError: no such file, or not a SentencePiece model.
        """
        where = "the given bytes" if isinstance(model, bytes) else str(model)
        self._sp = SentencePieceProcessor()
        try:
            data = model if isinstance(model, bytes) else Path(model).read_bytes()
            self._sp.LoadFromSerializedProto(data)
        except FileNotFoundError:
            raise CheckpointError(
                f"{where} is missing; copy it from the published checkpoint"
            ) from None
        except (RuntimeError, OSError) as e:
            raise CheckpointError(f"{where} is not a SentencePiece model: {e}") from None
        self._pieces: list[str] = self._sp.IdToPiece(list(range(len(self))))
        specials = (self.unk_id, self.bos_id, self.eos_id)
        self._special = {self._pieces[i]: i for i in specials if i >= 0}
        reserved = {p: i for i, p in enumerate(self._pieces) if _RESERVED.fullmatch(p)}
        self.control_ids = frozenset(self._special.values()) | frozenset(reserved.values())
        self._split_special = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")
        self._bytes = [self._bytes_of(i) for i in range(len(self))]

    def __len__(self) -> int:
        """Number of pieces."""
        return int(self._sp.GetPieceSize())

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return Tokenizer, (self.to_bytes(),)

    @property
    def longest_piece(self) -> int:
        """The most characters that one id may stand for."""
        return max(map(len, self._pieces))

    def to_bytes(self) -> bytes:
        """The content of its `tokenizer.model`."""
        return bytes(self._sp.serialized_model_proto())

    @property
    def bos_id(self) -> int:
        """Id of `<s>`, -1 if the vocabulary has none."""
        return int(self._sp.bos_id())

    @property
    def eos_id(self) -> int:
        """Id of `</s>`, -1 if the vocabulary has none."""
        return int(self._sp.eos_id())

    @property
    def unk_id(self) -> int:
        """Id of `<unk>`; with byte fallback only the typed string gives it."""
        return int(self._sp.unk_id())

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of an id, `▁` for a space."""
        return self._pieces[token]

    def id_of(self, piece: str) -> int | None:
        """The id of a piece as the vocabulary spells it, None if it has none."""
        token = int(self._sp.PieceToId(piece))
        return token if self._pieces[token] == piece else None

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Ids of trusted text; `<s>`, `</s>`, `<unk>`, `[UNUSED_TOKEN_k]` become their ids."""
        _check_unicode(text)
        ids = [self.bos_id] if bos else []
        for part in self._split_special.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._sp_encode(part))
        return ids

    def encode_untrusted(self, text: str) -> list[int]:
        """Ids of anybody's text: control strings are spelled out as the characters they are.

        Raises:
            InvalidRequest: the text holds half a surrogate pair, which no encoding can carry.
        """
        _check_unicode(text)
        ids: list[int] = []
        start = 0
        for match in _RESERVED.finditer(text):
            # Cut after "[": no piece spans two calls, and neither half is a reserved piece.
            ids.extend(self._sp_encode(text[start : match.start() + 1]))
            start = match.start() + 1
        ids.extend(self._sp_encode(text[start:]))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without `<s>`, `</s>`, `<unk>`; a byte of no character becomes U+FFFD."""
        return decode_bytes(b"".join([self._bytes[i] for i in ids]))

    def bytes_of(self, token: int) -> bytes:
        """The bytes an id adds to the text; empty for `<s>`, `</s>`, `<unk>`."""
        return self._bytes[token]

    def _sp_encode(self, text: str) -> list[int]:
        return list(self._sp.EncodeAsIds(text))

    def _bytes_of(self, token: int) -> bytes:
        if token in self._special.values():
            return b""
        if self._sp.IsByte(token):
            return bytes([int(self._pieces[token][3:-1], 16)])
        return self._pieces[token].replace("▁", " ").encode()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequest(
            f"the text holds half a surrogate pair (U+{ord(text[e.start]):04X} at character "
            f"{e.start}); send valid Unicode"
        ) from None


def decode_bytes(data: bytes) -> str:
    """UTF-8 to text, one U+FFFD for each byte of no character (as SentencePiece does)."""
    parts = []
    while data:
        try:
            parts.append(data.decode())
            break
        except UnicodeDecodeError as e:
            parts.append(data[: e.start].decode() + _REPLACEMENT * (e.end - e.start))
            data = data[e.end :]
    return "".join(parts)


class TextStream:
    """Ids in, text out, as soon as it is certain.

    Half characters and possible stop strings are held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        """Text ends before the first of the `stop` strings to be complete.

        Raises:
            InvalidRequest: a stop string is empty.
        """
        self._tokenizer = tokenizer
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise InvalidRequest("a stop string is empty; leave it out", param="stop")
        self._pending = b""  # bytes that are not text yet
        self._held = ""  # text that may yet become a stop string
        self.stopped = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids make certain.

        After a stop string, `stopped` is set and nothing follows.
        """
        if self.stopped:
            return ""
        self._pending += b"".join([self._tokenizer.bytes_of(i) for i in ids])
        text = decode_bytes(self._pending)
        whole = text.rstrip(_REPLACEMENT)
        self._pending = self._pending[
            len(self._pending) - _tail_bytes(self._pending, len(text) - len(whole)) :
        ]
        return self._release(whole)

    def finish(self) -> str:
        """What was held back, once no more ids come."""
        if self.stopped:
            return ""
        text = self._release(decode_bytes(self._pending))
        self._pending = b""
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        # The first to be complete counts, whichever chunks the text comes in.
        hits = [(at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            self.stopped, self._held = True, ""
            return text[: min(hits)[1]]
        keep = max(_overlap(text, s) for s in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _tail_bytes(data: bytes, replacements: int) -> int:
    """Bytes of `data` behind the last `replacements` U+FFFD of its text.

    A U+FFFD that is spelled out has three, a bad byte one.
    """
    end = len(data)
    for _ in range(replacements):
        end -= 3 if data[:end].endswith(_REPLACEMENT.encode()) else 1
    return len(data) - end


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - n :]):
            return n
    return 0


def load_tokenizer(folder: str | Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint whose model has `vocab_size` ids.

    Raises:
        CheckpointError: no `tokenizer.model`, or one of another vocabulary.
    """
    path = Path(folder) / TOKENIZER_FILE
    tokenizer = Tokenizer(path)
    if len(tokenizer) != vocab_size:
        raise CheckpointError(
            f"{path} has {len(tokenizer):,} pieces, config.json tells a vocabulary of "
            f"{vocab_size:,}: it belongs to another model"
        )
    return tokenizer
