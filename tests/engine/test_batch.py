import pytest
import torch
from torch import Tensor

from xc_ray.engine.batch import Batch, build_batch, to_device
from xc_ray.engine.sequence import Image, SamplingParams, Sequence, Work

VOCAB = 100
CPU = torch.device("cpu")


def sequence(
    prompt: list[int], lane: int, *, generated: tuple[int, ...] = (), slot: int = -1
) -> Sequence:
    """Its images are runs of virtual ids from 100 on; row r of them all is (2 r, 2 r + 1)."""
    starts: list[int] = []
    sizes: list[int] = []
    for place, token in enumerate(prompt):
        if token >= VOCAB and (not place or prompt[place - 1] < VOCAB):
            starts.append(place)
            sizes.append(0)
        if token >= VOCAB:
            sizes[-1] += 1
    rows = torch.arange(2.0 * sum(sizes)).view(-1, 2).split(sizes) if sizes else ()
    images = tuple(Image(len(r), embeddings=r) for r in rows)
    params = SamplingParams(max_tokens=4)
    made = Sequence("a", prompt, params, images, tuple(starts), lane=lane, slot=slot)
    made.generated = list(generated)
    return made


def prefill(it: Sequence, start: int = 0, stop: int | None = None) -> Work:
    stop = len(it.prompt) if stop is None else stop
    return Work(it, start, stop, samples=stop == it.num_tokens, decode=False)


def decode(it: Sequence) -> Work:
    return Work(it, it.num_tokens - 1, it.num_tokens, samples=True, decode=True)


def build(*work: Work) -> Batch:
    return build_batch(work, VOCAB, CPU)


def rows_of_images(batch: Batch) -> list[int]:
    rows = batch.image_rows
    if isinstance(rows, slice):
        return list(range(rows.start, rows.stop))
    return [] if rows is None else rows.tolist()


def numbers(rows: Tensor | None) -> list[int]:
    """Which rows of all images of a sequence these are."""
    return [] if rows is None else [int(n) // 2 for n in rows[:, 0]]


def test_decoding_rows_come_first_and_prompts_lie_end_to_end_behind() -> None:
    decoding = sequence([7, 8], lane=2, generated=(9,))
    first, second = sequence([1, 2, 3], lane=0), sequence([4, 5], lane=1)
    batch = build(decode(decoding), prefill(first), prefill(second))
    assert batch.num_decode == 1
    assert batch.ids.tolist() == [1, 2, 3, 4, 5]  # the device knows what the lane chose last
    assert batch.positions.tolist() == [2, 0, 1, 2, 0, 1]
    assert batch.lanes.tolist() == [2, 0, 0, 0, 1, 1]
    assert batch.chunks == ((0, 3, 0), (0, 2, 1))
    assert batch.sample_rows is not None
    assert batch.sample_rows.tolist() == [0, 3, 5]
    assert batch.num_sampling == 3
    assert batch.max_length == 3
    assert batch.image_rows is None
    assert batch.image_embeddings is None
    with pytest.raises(AssertionError, match="decoding rows come first"):
        build(prefill(first), decode(decoding))


def test_where_all_rows_sample_none_is_named() -> None:
    work = [decode(sequence([1] * n, lane=n, generated=(5,))) for n in (1, 4, 2)]
    batch = build(*work, prefill(sequence([7], lane=0)))
    assert batch.sample_rows is None
    assert batch.num_sampling == 4
    assert batch.max_length == 5
    assert batch.positions.tolist() == [1, 4, 2, 0]


def test_a_chunk_goes_on_where_the_last_one_ended() -> None:
    batch = build(prefill(sequence([1, 2, 3, 4, 5], lane=1), 2, 4))
    assert batch.ids.tolist() == [3, 4]
    assert batch.positions.tolist() == [2, 3]
    assert batch.chunks == ((2, 2, 1),)


def test_a_chunk_that_does_not_end_its_prompt_samples_nothing() -> None:
    chunk, whole = sequence([1, 2, 3], lane=0), sequence([4], lane=1)
    batch = build(prefill(chunk, 0, 2), prefill(whole))
    assert batch.sample_rows is not None
    assert batch.sample_rows.tolist() == [2]
    alone = build(prefill(chunk, 0, 2))
    assert alone.num_sampling == 0
    assert alone.sample_rows is not None
    assert len(alone.sample_rows) == 0


def test_a_preempted_answer_is_computed_again_with_its_prompt() -> None:
    it = sequence([1, 2, 3], lane=0, generated=(7, 8, 9))
    assert build(prefill(it, 0, 6)).ids.tolist() == [1, 2, 3, 7, 8, 9]
    assert build(prefill(it, 2, 5)).ids.tolist() == [3, 7, 8]
    assert build(prefill(it, 4, 6)).ids.tolist() == [8, 9]


# A prompt of two pictures, of three rows and of two: 1, 3 rows, 2, 2 rows, 3
PROMPT = [1, VOCAB, VOCAB + 1, VOCAB + 2, 2, VOCAB + 3, VOCAB + 4, 3]


@pytest.mark.parametrize(
    ("start", "stop", "rows", "pictures", "together"),
    [
        (0, 8, [1, 2, 3, 5, 6], [0, 1, 2, 3, 4], False),
        (0, 3, [1, 2], [0, 1], True),  # ends inside the first
        (2, 6, [0, 1, 3], [1, 2, 3], False),  # begins inside the first, ends inside the second
        (2, 3, [0], [1], True),  # begins and ends inside it
        (3, 5, [0], [2], True),
        (6, 8, [0], [4], True),
        (5, 7, [0, 1], [3, 4], True),
        (0, 1, [], [], False),
        (4, 5, [], [], False),
        (7, 8, [], [], False),
    ],
)
def test_a_chunk_takes_the_picture_rows_that_stand_in_it(
    start: int, stop: int, rows: list[int], pictures: list[int], together: bool
) -> None:
    batch = build(prefill(sequence(PROMPT, lane=0), start, stop))
    assert rows_of_images(batch) == rows
    assert numbers(batch.image_embeddings) == pictures
    assert isinstance(batch.image_rows, slice) == together
    # Rows of pictures have an id that can be embedded, whatever it is.
    assert batch.ids.max() < VOCAB
    assert len(batch.ids) == stop - start


def test_pictures_of_several_requests_keep_to_their_rows() -> None:
    decoding = sequence([7, 8], lane=3, generated=(9,))
    first, second = sequence([1, VOCAB, VOCAB + 1], lane=0), sequence([5, 6], lane=1)
    third = sequence([VOCAB, 7], lane=2)
    third.images[0].embeddings = third.images[0].embeddings + 50
    batch = build(decode(decoding), *(prefill(s) for s in (first, second, third)))
    assert rows_of_images(batch) == [2, 3, 6]
    assert batch.image_embeddings is not None
    assert batch.image_embeddings[:, 0].tolist() == [0, 2, 50]
    assert batch.ids.tolist() == [1, 0, 0, 5, 6, 0, 7]
    assert [(work, len(rows)) for work, rows in batch.pictures] == [(1, 2), (3, 1)]


def test_pictures_that_meet_are_one_slice() -> None:
    """The end of one prompt and the beginning of the next."""
    first, second = sequence([1, VOCAB, VOCAB + 1], lane=0), sequence([VOCAB, 2], lane=1)
    batch = build(prefill(first), prefill(second))
    assert batch.image_rows == slice(1, 4)
    assert numbers(batch.image_embeddings) == [0, 1, 0]


def test_integers_are_of_64_bits() -> None:
    batch = build(prefill(sequence(PROMPT, lane=0)))
    tensors = (batch.ids, batch.positions, batch.lanes, batch.sample_rows, batch.image_rows)
    assert {t.dtype for t in tensors if isinstance(t, Tensor)} == {torch.int64}
    assert sum(isinstance(t, Tensor) for t in tensors) == 5


def test_several_lists_take_one_copy_and_stay_apart() -> None:
    parts = to_device([[1, 2], [], [3]], CPU)
    assert [p.tolist() for p in parts] == [[1, 2], [], [3]]
    assert parts[0].untyped_storage().data_ptr() == parts[2].untyped_storage().data_ptr()


def test_rows_with_an_adapter_are_segments_by_slot() -> None:
    decoding = [
        sequence([7, 8], lane=n, generated=(9,), slot=slot) for n, slot in enumerate([2, -1])
    ]
    first, second, third = (
        sequence([1, 2, 3], lane=2, slot=0),
        sequence([4, 5], lane=3),
        sequence([6], lane=4, slot=2),
    )
    batch = build(*map(decode, decoding), prefill(first), prefill(second), prefill(third))
    assert batch.adapters == ((2, 0, 1), (0, 2, 3), (2, 7, 1))
    # Of the rows that sample: two that decode, and each prompt's last.
    assert batch.sample_adapters == ((2, 0, 1), (0, 2, 1), (2, 4, 1))


def test_a_chunk_that_samples_nothing_has_its_adapter_all_the_same() -> None:
    chunk, whole = sequence([1, 2, 3], lane=0, slot=1), sequence([4, 5], lane=1, slot=3)
    batch = build(prefill(chunk, 0, 2), prefill(whole))
    assert batch.adapters == ((1, 0, 2), (3, 2, 2))
    assert batch.sample_adapters == ((3, 0, 1),)


def test_image_rows_have_the_adapter_too() -> None:
    batch = build(prefill(sequence(PROMPT, lane=0, slot=0), 2, 7))
    assert batch.adapters == ((0, 0, 5),)
    assert batch.sample_adapters == ()


def test_where_nobody_has_an_adapter_there_are_no_segments() -> None:
    batch = build(decode(sequence([1], lane=0, generated=(2,))), prefill(sequence([1, 2], lane=1)))
    assert batch.adapters == batch.sample_adapters == ()
