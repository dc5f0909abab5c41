"""KV blocks: allocate, share by prefix hash, free, evict by last use (paging, 2309.06180).

A full block is named by a hash chained over everything its keys and values depend on: the ids
before it and in it, the digests of the images whose rows it holds, and the sequence's prefix key
(adapter, scaled rope base). Sequences that begin alike share its blocks, which nobody writes again.
"""

import hashlib
import struct
from array import array
from collections import OrderedDict

from xc_ray.engine.sequence import Sequence


class BlockManager:
    """Counts who holds which of `num_blocks` blocks.

    A block is free, held (by one sequence or more), or kept: held by nobody, but named by a hash
    and reusable until another needs its room. The block released longest ago goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._kept: OrderedDict[int, None] = OrderedDict()  # longest ago first
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could give: free ones and kept ones."""
        return len(self._free) + len(self._kept)

    def matching(self, hashes: list[bytes]) -> int:
        """How many leading blocks of a sequence are in the cache."""
        for count, name in enumerate(hashes):
            if name not in self._named:
                return count
        return len(hashes)

    def share(self, hashes: list[bytes]) -> list[int]:
        """Holds the blocks of these hashes, all of which match."""
        blocks = [self._named[name] for name in hashes]
        for block in blocks:
            if not self._holders[block]:
                del self._kept[block]
            self._holders[block] += 1
        return blocks

    def allocate(self, count: int) -> list[int] | None:
        """Holds `count` blocks with nothing in them; None, and nothing done, if there are fewer."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                del self._named[self._names.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def name(self, block: int, name: bytes) -> None:
        """Lets others share a held block; of two with the same content the first is kept."""
        assert self._holders[block], "only a held block has content"
        if name not in self._named and block not in self._names:
            self._named[name], self._names[block] = block, name

    def forget(self, name: bytes) -> None:
        """Takes a name away, so that nobody shares its block from now on."""
        block = self._named.pop(name, None)
        if block is not None:
            del self._names[block]
            if block in self._kept:
                del self._kept[block]
                self._free.append(block)

    def free(self, blocks: list[int]) -> None:
        """Gives a sequence's blocks back; its last ones are the first to be reused."""
        for block in reversed(blocks):
            assert self._holders[block], f"block {block} was freed twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._names:
                self._kept[block] = None
            else:
                self._free.append(block)


def extend_hashes(sequence: Sequence, block_size: int) -> list[bytes]:
    """Hashes of the sequence's full blocks of known ids, as many as can be shared.

    They end before the first image without a digest. Every part has a fixed size or its length in
    front, so that different contents never spell the same bytes.
    """
    hashes = sequence.block_hashes
    known = len(sequence.prompt) + len(sequence.generated)
    while (len(hashes) + 1) * block_size <= known:
        start = len(hashes) * block_size
        images = _images_within(sequence, start, start + block_size)
        if any(not digest for _, digest in images):
            break
        digest = hashlib.blake2b(hashes[-1] if hashes else _root(sequence), digest_size=32)
        digest.update(array("q", sequence.ids(start, start + block_size)).tobytes())
        for row, name in images:
            digest.update(struct.pack("<qq", row, len(name)) + name)
        hashes.append(digest.digest())
    return hashes


def _root(sequence: Sequence) -> bytes:
    return hashlib.blake2b(sequence.prefix_key, digest_size=32).digest()


def _images_within(sequence: Sequence, start: int, stop: int) -> list[tuple[int, bytes]]:
    """(row of the image at the block's start, digest) of images with rows between two places."""
    return [
        (start - first, image.digest)
        for first, image in zip(sequence.image_starts, sequence.images, strict=True)
        if first < stop and start < first + image.num_rows
    ]
