import pytest
import torch

from xc_ray.engine.attention import Span
from xc_ray.engine.batch import Batch, build_batch
from xc_ray.engine.sequence import SamplingParams, Sequence, Work

VOCAB = 100
CPU = torch.device("cpu")


def sequence(
    prompt: list[int], start: int, lane: int, *, computed: int = 0, pictures: int = 0
) -> Sequence:
    rows = torch.arange(pictures * 2.0).view(pictures, 2) if pictures else None
    made = Sequence("a", prompt, SamplingParams(max_tokens=4), rows, lane=lane, start=start)
    made.num_computed = computed
    return made


def build(*work: Work) -> Batch:
    return build_batch(work, VOCAB, CPU)


def test_prompts_and_answers_lie_end_to_end_in_the_order_given() -> None:
    decoding = sequence([7, 8], start=20, lane=2, computed=2)
    decoding.generated.append(9)
    prompt = sequence([1, 2, 3], start=0, lane=0)
    batch = build(Work(decoding, [9]), Work(prompt, [1, 2, 3]))
    assert batch.ids.tolist() == [9, 1, 2, 3]
    assert batch.positions.tolist() == [2, 0, 1, 2]
    assert batch.slots.tolist() == [22, 0, 1, 2]
    assert batch.lanes.tolist() == [2, 0, 0, 0]
    assert batch.spans == (Span(20, 2, 1), Span(0, 0, 3))
    assert batch.sample_rows.tolist() == [0, 3]
    assert batch.image_rows is None
    assert batch.image_embeddings is None


def test_a_chunk_goes_on_where_the_last_one_ended() -> None:
    batch = build(Work(sequence([1, 2, 3, 4, 5], start=10, lane=1, computed=2), [3, 4]))
    assert batch.positions.tolist() == [2, 3]
    assert batch.slots.tolist() == [12, 13]
    assert batch.spans == (Span(10, 2, 2),)


def test_a_chunk_that_does_not_end_its_prompt_samples_nothing() -> None:
    chunk = sequence([1, 2, 3], start=0, lane=0)
    whole = sequence([4], start=5, lane=1)
    batch = build(Work(chunk, [1, 2]), Work(whole, [4]))
    assert batch.sample_rows.tolist() == [2]
    assert len(build(Work(chunk, [1, 2])).sample_rows) == 0


# A prompt of two pictures, of three rows and of two: 1, 3 rows, 2, 2 rows, 3
PROMPT = [1, VOCAB, VOCAB + 1, VOCAB + 2, 2, VOCAB + 3, VOCAB + 4, 3]


@pytest.mark.parametrize(
    ("computed", "length", "rows", "pictures"),
    [
        (0, 8, [1, 2, 3, 5, 6], [0, 1, 2, 3, 4]),
        (0, 3, [1, 2], [0, 1]),  # ends inside the first
        (2, 4, [0, 1, 3], [1, 2, 3]),  # begins inside the first, ends inside the second
        (3, 2, [0], [2]),
        (6, 2, [0], [4]),
        (5, 2, [0, 1], [3, 4]),
    ],
)
def test_a_chunk_takes_the_picture_rows_that_stand_in_it(
    computed: int, length: int, rows: list[int], pictures: list[int]
) -> None:
    seq = sequence(PROMPT, start=0, lane=0, computed=computed, pictures=5)
    batch = build(Work(seq, PROMPT[computed : computed + length]))
    assert batch.image_rows is not None
    assert batch.image_embeddings is not None
    assert batch.image_rows.tolist() == rows
    assert batch.image_embeddings[:, 0].tolist() == [2 * p for p in pictures]
    # Rows of pictures have an id that can be embedded, whatever it is.
    assert batch.ids.max() < VOCAB
    assert len(batch.ids) == length


@pytest.mark.parametrize(("computed", "length"), [(0, 1), (4, 1), (7, 1)])
def test_a_chunk_of_text_alone_has_no_picture_rows(computed: int, length: int) -> None:
    seq = sequence(PROMPT, start=0, lane=0, computed=computed, pictures=5)
    batch = build(Work(seq, PROMPT[computed : computed + length]))
    assert batch.image_rows is None
    assert batch.image_embeddings is None


def test_pictures_of_several_requests_keep_to_their_rows() -> None:
    first = sequence([1, VOCAB, VOCAB + 1], start=0, lane=0, pictures=2)
    second = sequence([5, 6], start=10, lane=1)
    third = sequence([VOCAB, 7], start=20, lane=2, pictures=1)
    third.image_embeddings = third.image_embeddings + 50
    batch = build(*(Work(s, s.prompt) for s in (first, second, third)))
    assert batch.image_rows is not None
    assert batch.image_embeddings is not None
    assert batch.image_rows.tolist() == [1, 2, 5]
    assert batch.image_embeddings[:, 0].tolist() == [0, 2, 50]


def test_integers_are_of_64_bits() -> None:
    batch = build(Work(sequence(PROMPT, start=0, lane=0, pictures=5), PROMPT))
    tensors = (batch.ids, batch.positions, batch.slots, batch.lanes, batch.sample_rows)
    assert {t.dtype for t in tensors} == {torch.int64}
