"""The demo model's tokenizer: characters, and the words that its questions and answers are made of.

A printed word is spelled out character by character, which is how it is read; words of the
questions, each with the space before it, are one token (also in a line that is printed). A
text takes the fewest tokens that it can (SentencePiece's unigram form with equal scores); what no
piece spells goes byte by byte.
"""

import re
from collections import Counter
from collections.abc import Iterator

from sentencepiece import sentencepiece_model_pb2

from xc_ray.demo.drawn.answers import COLOURS_ZH, KINDS_ZH, plural
from xc_ray.demo.drawn.phrasings import QUESTIONS
from xc_ray.demo.drawn.small_talk import SMALL_TALK
from xc_ray.demo.make import VOCAB_SIZE, train_tokenizer

ROLES = ("user", "assistant", "system")
PUNCTUATION = "，。？！：；、（）…°×÷·–—“”‘’"  # noqa: RUF001
_FIRST_FILLER = 0xF0000  # private characters: no text has them


def make_tokenizer() -> bytes:
    """A `tokenizer.model` of `VOCAB_SIZE` pieces, with the ids that `tiny_config` tells."""
    # protobuf makes its classes at import, where no type checker sees them.
    proto = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
    model = proto.FromString(train_tokenizer())
    kind = type(model.pieces[0])
    kept = [piece for piece in model.pieces if piece.type != kind.NORMAL]
    spellings = [*_characters(), *ROLES]
    spellings += _words(VOCAB_SIZE - len(kept) - len(spellings))
    spellings += [chr(_FIRST_FILLER + i) for i in range(VOCAB_SIZE - len(kept) - len(spellings))]
    del model.pieces[:]
    model.pieces.extend(kept)
    for spelling in spellings:
        model.pieces.add(piece=spelling, score=-1.0)
    model.trainer_spec.model_type = type(model.trainer_spec).UNIGRAM
    return bytes(model.SerializeToString())


def _texts() -> Iterator[str]:
    """What is asked and answered, as data."""
    for kinds in QUESTIONS.values():
        for phrasings in kinds.values():
            yield from phrasings
    for rows in SMALL_TALK.values():
        for said, answer in rows:
            yield from (*said, answer)
    for kind, chinese in KINDS_ZH.items():
        yield from (f"a {kind} and a {plural(kind)}", chinese)
    for colour, chinese in COLOURS_ZH.items():
        yield from (f"a {colour} and a {colour}", chinese)


def _characters() -> Iterator[str]:
    ascii_ = [chr(c) for c in range(0x21, 0x7F)]
    others = sorted({c for text in _texts() for c in text if ord(c) > 0x7F} - set(PUNCTUATION))
    yield from ("▁", *ascii_, *PUNCTUATION, *others)


def _words(most: int) -> list[str]:
    """The words that stand behind a space, the most frequent first."""
    counts = Counter(
        word for text in _texts() for word in re.findall(r"(?<= )[a-z]{2,}", text.lower())
    )
    by_use = sorted(counts, key=lambda word: (-counts[word], word))
    return [f"▁{word}" for word in by_use[:most]]
