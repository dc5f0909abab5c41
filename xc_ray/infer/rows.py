"""The rows of a data set as questions, those that cannot be used with the reason."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from xc_ray.errors import InvalidRequest
from xc_ray.model.config import XComposerConfig
from xc_ray.train.question import Question, as_question
from xc_ray.train.reading import DataSet
from xc_ray.train.rows import Place


@dataclass(frozen=True)
class Row:
    """One row, counted from 0; without a question if it cannot be used, and `error` says why."""

    index: int
    place: Place
    question: Question | None
    error: str = ""


def read_rows(
    dataset: DataSet, config: XComposerConfig, system: str | None = None, limit: int | None = None
) -> Iterator[Row]:
    """The first `limit` rows of a data set, or all; `system` is for those that have none.

    Raises:
        XcRayError: the data set itself cannot be read.
    """
    for index, (place, found) in enumerate(islice(dataset, limit)):
        try:
            if isinstance(found, InvalidRequest):
                raise found
            yield Row(index, place, as_question(found, config, system))
        except InvalidRequest as e:
            yield Row(index, place, None, e.message)
