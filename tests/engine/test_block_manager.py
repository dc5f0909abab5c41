"""Blocks by a model of who holds what, and names by everything that keys and values depend on."""

import itertools
import struct
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from xc_ray.engine.block_manager import BlockManager, extend_hashes
from xc_ray.engine.sequence import Image, SamplingParams, Sequence

# Blocks


def test_blocks_are_given_until_there_are_no_more() -> None:
    it = BlockManager(3)
    assert it.num_available == 3
    first = it.allocate(2)
    assert first is not None
    assert it.allocate(2) is None
    assert it.num_available == 1  # nothing was taken by the call in vain
    last = it.allocate(1)
    assert last is not None
    assert sorted(first + last) == [0, 1, 2]
    assert it.allocate(0) == []
    it.free(first + last)
    assert it.num_available == 3


def test_a_named_block_is_found_until_its_room_is_needed() -> None:
    it = BlockManager(2)
    [block] = it.allocate(1) or []
    it.name(block, b"a")
    assert it.matching([b"a"]) == 1  # while it is held, too
    it.free([block])
    assert it.num_available == 2
    assert it.matching([b"a"]) == 1
    assert it.share([b"a"]) == [block]
    assert it.num_available == 1
    it.free([block])
    assert len(it.allocate(2) or []) == 2
    assert it.matching([b"a"]) == 0


def test_a_free_block_is_taken_before_one_that_is_kept() -> None:
    it = BlockManager(3)
    [kept] = it.allocate(1) or []
    it.name(kept, b"a")
    it.free([kept])
    assert kept not in (it.allocate(2) or [])
    assert it.matching([b"a"]) == 1


def test_the_block_released_longest_ago_goes_first_and_use_makes_it_new() -> None:
    it = BlockManager(3)
    blocks = it.allocate(3) or []
    for block, name in zip(blocks, (b"a", b"b", b"c"), strict=True):
        it.name(block, name)
    for block in blocks:
        it.free([block])
    it.free(it.share([b"a"]))  # used again
    assert it.allocate(1) == [blocks[1]]
    assert [it.matching([name]) for name in (b"a", b"b", b"c")] == [1, 0, 1]


def test_the_end_of_a_sequence_goes_before_its_beginning() -> None:
    """A beginning without its end can be shared, an end without its beginning cannot."""
    it = BlockManager(3)
    blocks = it.allocate(3) or []
    names = [b"a", b"b", b"c"]
    for block, name in zip(blocks, names, strict=True):
        it.name(block, name)
    it.free(blocks)
    it.allocate(1)
    assert it.matching(names) == 2
    it.allocate(1)
    assert it.matching(names) == 1


def test_a_match_ends_at_the_first_block_that_is_not_there() -> None:
    it = BlockManager(3)
    blocks = it.allocate(2) or []
    it.name(blocks[0], b"a")
    it.name(blocks[1], b"c")
    assert it.matching([b"a", b"b", b"c"]) == 1
    assert it.matching([b"b", b"a"]) == 0
    assert it.matching([]) == 0


def test_a_shared_block_is_free_when_all_have_given_it_back() -> None:
    it = BlockManager(1)
    blocks = it.allocate(1) or []
    it.name(blocks[0], b"a")
    assert it.share([b"a"]) == blocks
    it.free(blocks)
    assert it.num_available == 0
    it.free(blocks)
    assert it.num_available == 1


def test_of_two_blocks_with_the_same_content_the_first_keeps_the_name() -> None:
    it = BlockManager(2)
    first, second = it.allocate(2) or []
    it.name(first, b"a")
    it.name(second, b"a")
    it.free([second])
    assert it.share([b"a"]) == [first]


@pytest.mark.parametrize("held", [False, True])
def test_a_forgotten_name_is_found_no_more_and_its_block_is_no_waste(held: bool) -> None:
    it = BlockManager(1)
    blocks = it.allocate(1) or []
    it.name(blocks[0], b"a")
    if not held:
        it.free(blocks)
    it.forget(b"a")
    it.forget(b"unknown")
    assert it.matching([b"a"]) == 0
    if held:
        it.free(blocks)
    assert it.allocate(1) == blocks


class Blocks(RuleBasedStateMachine):
    """Every block has a content: a new one with each allocation, named by a number."""

    SIZE = 6

    def __init__(self) -> None:
        super().__init__()
        self.it = BlockManager(self.SIZE)
        self.owners: list[list[int]] = []
        self.content: dict[int, int] = {}
        self.names: dict[bytes, int] = {}  # to the content that was named
        self.counter = itertools.count()

    @rule(count=st.integers(0, SIZE + 1))
    def allocate(self, count: int) -> None:
        before = self.it.num_available
        blocks = self.it.allocate(count)
        assert (blocks is None) == (count > before)
        if blocks is None:
            assert self.it.num_available == before
            return
        held = set(itertools.chain.from_iterable(self.owners))
        assert not held & set(blocks)
        assert len(set(blocks)) == count
        self.owners.append(blocks)
        for block in blocks:
            self.content[block] = next(self.counter)

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data())
    def name(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from([o for o in self.owners if o]))
        block = data.draw(st.sampled_from(owner))
        name = b"%d" % self.content[block]
        if data.draw(st.booleans()) and self.names:  # the same content computed twice
            name = data.draw(st.sampled_from(sorted(self.names)))
            if self.it.matching([name]):
                self.it.name(block, name)
                return
        self.it.name(block, name)
        if self.it._names.get(block) == name:
            self.names[name] = self.content[block]

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.names)), unique=True, max_size=3))
        matched = self.it.matching(names)
        blocks = self.it.share(names[:matched])
        assert [self.content[b] for b in blocks] == [self.names[n] for n in names[:matched]]
        self.owners.append(blocks)

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.names)))
        self.it.forget(name)
        assert not self.it.matching([name])

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.it.free(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @invariant()
    def every_block_is_held_or_available(self) -> None:
        held = Counter(itertools.chain.from_iterable(self.owners))
        assert self.it.num_available == self.SIZE - len(held)
        assert self.it._holders == [held[b] for b in range(self.SIZE)]
        available = [*self.it._free, *self.it._kept]
        assert sorted([*available, *held]) == list(range(self.SIZE))
        assert not set(self.it._free) & self.it._names.keys()

    def teardown(self) -> None:
        for blocks in self.owners:
            self.it.free(blocks)
        assert len(self.it.allocate(self.SIZE) or []) == self.SIZE
        assert not self.it._named


TestBlocksInAnyOrderOfOperations = Blocks.TestCase
TestBlocksInAnyOrderOfOperations.settings = settings(
    max_examples=150, stateful_step_count=30, deadline=None
)


# Names

SIZE = 4
VOCAB = 100


def sequence(
    ids: list[int], *, images: tuple[tuple[int, int, bytes], ...] = (), key: bytes = b""
) -> Sequence:
    """`images` are (first place, rows, digest); their virtual ids are put over `ids`."""
    ids, row = list(ids), VOCAB
    for start, num_rows, _ in images:
        ids[start : start + num_rows] = range(row, row + num_rows)
        row += num_rows
    return Sequence(
        "a",
        ids,
        SamplingParams(),
        tuple(Image(num_rows, digest) for _, num_rows, digest in images),
        tuple(start for start, _, _ in images),
        prefix_key=key,
    )


def names(*args: Any, **kwargs: Any) -> list[bytes]:
    return list(extend_hashes(sequence(*args, **kwargs), SIZE))


def num_common(one: list[bytes], other: list[bytes]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_only_full_blocks_have_names() -> None:
    assert [len(names(list(range(n)))) for n in (3, 4, 7, 8, 9)] == [0, 1, 1, 2, 2]


def test_a_block_is_named_by_its_ids_and_all_before_it() -> None:
    ids = list(range(12))
    assert num_common(names(ids), names([*ids, 5])) == 3
    for place, common in ((0, 0), (3, 0), (4, 1), (11, 2)):
        other = list(ids)
        other[place] += 50
        assert num_common(names(ids), names(other)) == common
        # The blocks behind are others too, though their own ids are the same.
        assert not set(names(ids)[common:]) & set(names(other)[common:])


def test_names_grow_with_the_answer_and_stay_as_they_were() -> None:
    it = sequence([1, 2, 3, 4, 5, 6])
    first = list(extend_hashes(it, SIZE))
    it.generated += [7]
    assert extend_hashes(it, SIZE) == first
    it.generated += [8, 9]
    assert extend_hashes(it, SIZE) == names(list(range(1, 10)))
    # A token in flight is not known yet.
    it.in_flight = 3
    assert len(extend_hashes(it, SIZE)) == 2


def test_images_of_one_size_are_told_apart_by_their_digests() -> None:
    ids = [1] * 16
    red, blue = ((5, 4, digest) for digest in (b"red", b"blue"))
    assert num_common(names(ids, images=(red,)), names(ids, images=(red,))) == 4
    assert num_common(names(ids, images=(red,)), names(ids, images=(blue,))) == 1


def test_an_image_without_a_digest_is_never_shared_nor_what_follows_it() -> None:
    ids = [1] * 24
    assert len(names(ids, images=((9, 2, b""),))) == 2
    assert len(names(ids, images=((8, 1, b""),))) == 2
    assert len(names(ids, images=((7, 1, b""),))) == 1
    assert len(names(ids, images=((0, 1, b"red"), (23, 1, b"")))) == 5
    assert len(names(ids, images=((0, 1, b""), (23, 1, b"red")))) == 0


def test_the_digest_counts_in_every_block_that_holds_a_row() -> None:
    ids = [1] * 20
    whole = names(ids, images=((3, 10, b"red"),))  # blocks 0 to 3
    other = names(ids, images=((3, 10, b"blue"),))
    assert num_common(whole, other) == 0
    # From within the image on, too: the names of blocks differ, not of the chain alone.
    assert not set(whole) & set(other)


@pytest.mark.parametrize("between", [b"", struct.pack("<q", -1), struct.pack("<qq", -1, 1)])
def test_one_image_is_not_two_whatever_its_digest_looks_like(between: bytes) -> None:
    one = names([1] * 4, images=((0, 2, b"a" + between + b"b"),))
    two = names([1] * 4, images=((0, 1, b"a"), (1, 1, b"b")))
    assert one != two


def test_where_an_image_begins_counts() -> None:
    """The virtual ids say it within a block; the row of the block's start says it behind."""
    one = names([1] * 8, images=((0, 8, b"a"),))
    two = names([1] * 8, images=((0, 4, b"a"), (4, 4, b"a")))
    assert num_common(one, two) == 1


def test_a_prefix_key_parts_everything() -> None:
    ids = list(range(8))
    assert not set(names(ids)) & set(names(ids, key=b"adapter"))
    assert not set(names(ids, key=b"one")) & set(names(ids, key=b"two"))
    assert names(ids, key=b"one") == names(ids, key=b"one")


# Some that look like what would stand between the digests of two images.
DIGESTS = st.sampled_from(
    [
        b"a",
        b"b",
        b"ab",
        *(b"a" + struct.pack(f, *n) + b"b" for f, n in (("<q", [1]), ("<qq", [1, 1]))),
    ]
)


@st.composite
def contents(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[tuple[int, int, bytes], ...], bytes]:
    """Ids of one block or two, images that do not overlap, a key; all of few values."""
    length = draw(st.sampled_from([SIZE, 2 * SIZE]))
    images = []
    start = 0
    while start < length and draw(st.booleans()):
        start += draw(st.integers(0, length - start - 1))
        rows = draw(st.integers(1, length - start))
        images.append((start, rows, draw(DIGESTS)))
        start += rows
    ids = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    for first, rows, _ in images:
        ids[first : first + rows] = [0] * rows
    return tuple(ids), tuple(images), draw(st.sampled_from([b"", b"k"]))


@settings(max_examples=400, deadline=None)
@given(contents(), contents())
def test_names_are_equal_where_contents_are_and_nowhere_else(one: Any, other: Any) -> None:
    """An image that goes on behind the block is the same as far as the block goes."""
    ours, theirs = (names(list(c[0]), images=c[1], key=c[2]) for c in (one, other))
    for i in range(min(len(ours), len(theirs))):
        stop = (i + 1) * SIZE
        seen = [
            (
                sequence(list(c[0]), images=c[1]).prompt[:stop],
                [(start, digest) for start, _, digest in c[1] if start < stop],
                c[2],
            )
            for c in (one, other)
        ]
        assert (ours[i] == theirs[i]) == (seen[0] == seen[1])


class Recorder:
    """Stands for blake2b: what it digests is what it was given, so that inputs can be compared."""

    def __init__(self, data: bytes = b"", *, digest_size: int) -> None:
        self.data = data
        self.digest_size = digest_size

    def update(self, data: bytes) -> None:
        self.data += data

    def digest(self) -> bytes:
        return self.data


@settings(max_examples=400, deadline=None)
@given(contents(), contents())
def test_different_contents_never_spell_the_same_input(one: Any, other: Any) -> None:
    """Of one block: everything behind the digest of what was before it, which is of fixed size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xc_ray.engine.block_manager.hashlib.blake2b", Recorder)
        spelt = [names(list(c[0])[:SIZE], images=_cut(c[1]), key=b"") for c in (one, other)]
    seen = [
        (sequence(list(c[0][:SIZE]), images=_cut(c[1])).prompt, [i[::2] for i in _cut(c[1])])
        for c in (one, other)
    ]
    assert (spelt[0] == spelt[1]) == (seen[0] == seen[1])


def _cut(images: tuple[tuple[int, int, bytes], ...]) -> tuple[tuple[int, int, bytes], ...]:
    """The images as far as the first block holds them."""
    return tuple((s, min(n, SIZE - s), d) for s, n, d in images if s < SIZE)
