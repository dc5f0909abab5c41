"""A data set's name -> conversations, with their pictures where they can be read from anywhere.

The door for whoever reads a data set: training's preflight, and `infer`.
"""

from collections.abc import Iterator

from xc_ray.errors import ConfigError, DataError, InvalidRequest, MediaError
from xc_ray.registry.store import Missing
from xc_ray.source import SHOWN_CHARS, read_source
from xc_ray.train.formats import parse_row
from xc_ray.train.rows import Conversation, PictureSource, Place
from xc_ray.train.sources import Value, absolute, is_stored, open_source, stored


class DataSet:
    """The rows of a data set in order, each a conversation or why it is none.

    Pictures are absolute: a path, a URL, an address in object storage, or bytes. It may be read
    more than once; its length counts bad rows too.

    Opening, reading and counting raise:
        ConfigError: an address that is none.
        DataError: no such data set, a package that is missing, or a list that is no JSON.
        RegistryError: object storage fails.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._source = open_source(name)

    def __len__(self) -> int:
        return self._source.num_rows()

    def __iter__(self) -> Iterator[tuple[Place, Conversation | InvalidRequest]]:
        for number, value in self._source.rows():
            yield Place(self.name, number), _conversation(value, self._source.home)


def read_picture(source: PictureSource) -> bytes:
    """File bytes of a conversation's picture.

    Raises:
        MediaError: one line that names the source and what is wrong with it.
        RegistryError: object storage fails; a picture that is missing there is a MediaError.
    """
    if not isinstance(source, str) or not is_stored(source):
        return read_source(source)
    try:
        store, key = stored(source)
        return store.get(key)
    except (ConfigError, DataError, Missing) as e:
        raise MediaError(f"cannot read the picture {source[:SHOWN_CHARS]!r}: {e.message}") from None


def _conversation(value: Value, home: str) -> Conversation | InvalidRequest:
    if isinstance(value, InvalidRequest):
        return value
    try:
        said = parse_row(value)
        pictures = tuple(
            absolute(picture, home) if isinstance(picture, str) else picture
            for picture in said.pictures
        )
    except InvalidRequest as e:
        return e
    return Conversation(said.messages, pictures)
