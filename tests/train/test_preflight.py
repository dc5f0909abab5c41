"""Data sets, checked whole before training: what is counted, what is bad, and what is cut."""

import base64
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import VARIANTS
from xc_ray.config import DataFile, DataOptions
from xc_ray.errors import DataError, RegistryError, XcRayError
from xc_ray.model.config import Variant, XComposerConfig
from xc_ray.model.layout import read_layout
from xc_ray.prompt.chat import ImageSlot, Message, render
from xc_ray.prompt.sequence import build_prompt, picture_grids
from xc_ray.prompt.tiles import image_canvas, image_grid, make_canvas, open_image, read_header
from xc_ray.prompt.tokenizer import Tokenizer, load_tokenizer
from xc_ray.train.data import IGNORED
from xc_ray.train.preflight import Checked, check_rows, overlap, preflight
from xc_ray.train.report import SHOWN_FINDINGS

Row = dict[str, Any]


@dataclass(frozen=True)
class Kit:
    """A tiny model, and a folder for the data sets of one test."""

    config: XComposerConfig
    tokenizer: Tokenizer
    folder: Path

    def write(self, *rows: Row | str, name: str = "rows.jsonl") -> str:
        texts = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (self.folder / name).write_text("".join(f"{text}\n" for text in texts))
        return str(self.folder / name)

    def check(self, *names: str, processes: int = 1, **options: Any) -> Checked:
        files = [DataFile(path=name) for name in names]
        asked = DataOptions(train=files, **options)
        return preflight(files, asked, self.config, self.tokenizer, processes=processes)

    def refused(self, *rows: Row | str, **options: Any) -> DataError:
        with pytest.raises(DataError) as caught:
            self.check(self.write(*rows), **options)
        return caught.value


@pytest.fixture
def kit(tiny: Callable[[Variant], Path], tmp_path: Path) -> Kit:
    return make_kit(tiny("2.5"), tmp_path)


def make_kit(model: Path, folder: Path) -> Kit:
    config = read_layout(model).config
    return Kit(config, load_tokenizer(model, config.decoder.vocab_size), folder)


def asked(query: str, response: str | None = "This.", **more: Any) -> Row:
    return {"query": query, "response": response, **more}


def talk(*texts: str, **more: Any) -> Row:
    turns = [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)]
    return {"messages": turns, **more}


GOOD = asked("What is red?", "A colour.")


# ---------------------------------------------------------------- what is learnt


def test_rows_come_with_ids_labels_and_places_in_order(kit: Kit) -> None:
    name = kit.write(GOOD, "", asked("And blue?", "Another."))
    first, second = kit.check(name).rows
    assert [str(row.place) for row in (first, second)] == [f"{name}:1", f"{name}:3"]
    assert first.conversation.messages == (
        Message("user", ("What is red?",)),
        Message("assistant", ("A colour.",)),
    )
    learnt = [label for label in second.example.labels if label != IGNORED]
    assert kit.tokenizer.decode(learnt).startswith("Another.")


def test_rows_know_which_data_set_they_are_of(kit: Kit) -> None:
    one, two = kit.write(GOOD, name="a"), kit.write(asked("x"), asked("y"), name="b")
    assert [row.part for row in kit.check(one, two).rows] == [0, 1, 1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("max_tiles", [None, 2])
def test_training_sees_the_ids_and_pixels_that_serving_does(
    tiny: Callable[[Variant], Path],
    tmp_path: Path,
    picture: Callable[..., bytes],
    variant: Variant,
    max_tiles: int | None,
) -> None:
    kit = make_kit(tiny(variant), tmp_path)
    files = [picture(300, 90), picture(90, 310, "blue", "JPEG")]
    for name, data in zip(("a.png", "b.jpg"), files, strict=True):
        (tmp_path / name).write_bytes(data)
    system = {"role": "system", "content": "Be brief."}
    turns = talk("<image>One.<image>Compare.", "Red and blue.")["messages"]
    name = kit.write({"messages": [system, *turns], "images": ["a.png", "b.jpg"]})
    (row,) = kit.check(name, max_tiles=max_tiles).rows

    question = [
        Message("system", ("Be brief.",)),
        Message("user", (ImageSlot(0), "One.", ImageSlot(1), "Compare.")),
    ]
    headers = [read_header(data) for data in files]
    sizes = [(header.width, header.height) for header in headers]
    grids = picture_grids(kit.config, sizes, [max_tiles] * 2)
    prompt = build_prompt(kit.config, kit.tokenizer, render(kit.config, question), grids)

    # Elsewhere than in 2.5 serving repeats BOS behind each picture, as the original chat does.
    shared = row.example.ids[: next(i for i, x in enumerate(row.example.labels) if x != IGNORED)]
    bos = kit.config.tokens.bos
    assert [bos, *(i for i in prompt.ids if i != bos)] == shared
    assert [span.length for span in row.example.spans] == [span.length for span in prompt.spans]
    if variant == "2.5":
        assert prompt.ids == shared
        assert row.example.spans == prompt.spans
    assert [one.grid for one in row.pictures] == grids
    budget = max_tiles or kit.config.default_max_tiles(2)
    for one, data in zip(row.pictures, files, strict=True):
        learnt = open_image(Path(one.source).read_bytes())
        pixels = make_canvas(learnt, one.grid, tiled=kit.config.family.tiled)
        assert np.array_equal(pixels, image_canvas(kit.config, open_image(data), budget))


def test_the_familys_transform_gives_its_own_grids(kit: Kit, picture: Callable[..., bytes]) -> None:
    (kit.folder / "a.png").write_bytes(picture(90, 30))
    name = kit.write(asked("What?", images=["a.png"]))
    ours, theirs = (kit.check(name, image_transform=how) for how in ("serving", "family"))
    budget = kit.config.default_max_tiles(1)
    assert ours.rows[0].pictures[0].grid == image_grid(kit.config, (90, 30), budget)
    assert theirs.rows[0].pictures[0].grid == image_grid(kit.config, (90, 30), budget, "family")
    assert ours.rows[0].pictures[0].grid != theirs.rows[0].pictures[0].grid
    assert ours.digest != theirs.digest


def test_pictures_have_an_address_or_bring_their_bytes(
    kit: Kit, picture: Callable[..., bytes]
) -> None:
    data = picture()
    (kit.folder / "a.png").write_bytes(data)
    coded = base64.b64encode(data).decode()
    images = ["a.png", f"data:image/png;base64,{coded}", {"bytes": coded}]
    (row,) = kit.check(kit.write(asked("What?", images=images)), max_length=4096).rows
    assert [one.source for one in row.pictures] == [str(kit.folder / "a.png"), "", ""]
    assert [one.data for one in row.pictures] == [None, data, data]
    assert len({one.digest for one in row.pictures}) == 1


# ---------------------------------------------------------------- the report


def test_the_report_counts_good_rows(kit: Kit, picture: Callable[..., bytes]) -> None:
    (kit.folder / "a.png").write_bytes(picture(300, 90))
    name = kit.write(GOOD, asked("What?", images=["a.png"]), "{", asked("Open?", None))
    checked = kit.check(name, on_bad_row="skip")
    report, rows = checked.report, checked.rows
    assert (report.num_rows, report.num_good, len(report.problems)) == (4, 2, 2)
    assert report.num_pictures == 1
    assert report.num_tiles == rows[1].pictures[0].grid.num_tiles > 1
    assert report.num_tokens == sum(len(row.example.ids) for row in rows)
    assert report.num_image_tokens == rows[1].example.spans[0].length
    assert report.num_supervised == sum(row.example.num_supervised for row in rows)
    assert report.longest == len(rows[1].example.ids)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["num_rows"] == 4
    assert values["problems"][0] == {
        "source": name,
        "row": 3,
        "kind": "json",
        "reason": report.problems[0].reason,
    }


def test_for_people_the_report_is_a_table_and_the_first_bad_rows(kit: Kit) -> None:
    name = kit.write(GOOD, *["{"] * (SHOWN_FINDINGS + 5))
    lines = str(kit.check(name, on_bad_row="skip").report).splitlines()
    assert lines[0].split() == ["rows", "26"]
    assert [line.split() for line in lines[1:3]] == [["good", "1"], ["bad", "25"]]
    assert f"  {name}:2: line 2 is not JSON: " in lines[lines.index("bad rows:") + 1]
    assert lines[-1] == "  … and 5 more"


def test_the_same_row_twice_is_a_warning(kit: Kit, picture: Callable[..., bytes]) -> None:
    for name in ("a.png", "copy.png"):
        (kit.folder / name).write_bytes(picture())
    (kit.folder / "b.png").write_bytes(picture(colour="blue"))
    images = ("a.png", "b.png", "copy.png")
    name = kit.write(*(asked("What?", images=[one]) for one in images))
    checked = kit.check(name)
    assert len(checked.rows) == 3
    assert [str(one) for one in checked.report.warnings] == [
        f"{name}:3: it is the same as {name}:1"
    ]


def test_validation_rows_that_are_learnt_are_found(kit: Kit) -> None:
    training = kit.check(kit.write(GOOD, asked("a"), name="train"))
    validation = kit.check(kit.write(asked("b"), GOOD, name="validation"))
    (found,) = overlap(training, validation)
    assert str(found).endswith(
        f"validation:2: it is for validation and the same as {training.rows[0].place}"
    )


def test_the_digest_is_of_what_is_learnt_and_its_order(
    kit: Kit, picture: Callable[..., bytes]
) -> None:
    (kit.folder / "a.png").write_bytes(picture())
    rows = [GOOD, asked("What?", images=["a.png"])]
    digest = kit.check(kit.write(*rows)).digest
    assert len(digest) == 64
    assert digest == kit.check(kit.write(*rows, name="elsewhere")).digest
    assert digest == kit.check(kit.write({**GOOD, "id": 7}, rows[1])).digest
    others = [
        kit.check(kit.write(*rows[::-1])).digest,
        kit.check(kit.write(rows[0])).digest,
        kit.check(kit.write(GOOD | {"response": "A hue."}, rows[1])).digest,
    ]
    (kit.folder / "a.png").write_bytes(picture(colour="blue"))
    others.append(kit.check(kit.write(*rows)).digest)
    assert len({digest, *others}) == 5


# ---------------------------------------------------------------- bad rows


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ("{", "json", "line 2 is not JSON: Expecting property name"),
        ({"a": 1}, "format", 'the row has the columns a, expected {"conversations"'),
        (talk("a", "b")["messages"][1:], "format", "the row is [{'role': 'assistant'"),
        ({"messages": [*talk("a")["messages"]] * 2}, "format", "messages[1] has role 'user'"),
        (asked("a", images=["no.png"]), "picture", "cannot read the picture '"),
        (asked("a", images=["text.png"]), "picture", "text.png': the 5 bytes are not an image"),
        (asked("a", images=["cut.png"]), "picture", "cut.png': the PNG image of "),
        (asked("a", images=["data:image/png;base64,aGk="]), "picture", "the picture in the row"),
        (asked("a", None), "answer", "the conversation has no answer"),
        (asked("a", " \n"), "answer", "the answer is empty"),
        (talk("a", "b", "c", ""), "answer", "answer 2 of 2 is empty"),
        (asked("a\ud800"), "format", "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_told_with_its_reason(
    kit: Kit, picture: Callable[..., bytes], row: Any, kind: str, message: str
) -> None:
    (kit.folder / "text.png").write_bytes(b"hello")
    (kit.folder / "cut.png").write_bytes(picture(200, 200)[:-40])
    row = row if isinstance(row, str) else json.dumps(row)
    error = kit.refused(GOOD, row, GOOD)
    assert error.message.startswith(f"1 of 3 rows are bad: {kit.folder}/rows.jsonl:2: ")
    assert message in error.message
    assert error.param is None
    (found,) = error.report.problems
    assert (found.place.number, found.kind) == (2, kind)
    skipped = kit.check(str(kit.folder / "rows.jsonl"), on_bad_row="skip")
    assert [row.place.number for row in skipped.rows] == [1, 3]
    assert skipped.report == error.report


def test_the_error_shows_the_first_bad_rows_and_how_to_go_on(kit: Kit) -> None:
    error = kit.refused(GOOD, *["{"] * 5)
    assert error.message.startswith("5 of 6 rows are bad: ")
    assert "rows.jsonl:4: " in error.message
    assert "rows.jsonl:5: " not in error.message
    assert "; … and 2 more; mend them, or leave them out with on_bad_row: skip" in error.message
    twin = pickle.loads(pickle.dumps(error))
    assert (twin.message, twin.report) == (error.message, error.report)


@pytest.mark.parametrize("on_bad_row", ["fail", "skip"])
def test_a_data_set_without_a_good_row_is_an_error(kit: Kit, on_bad_row: str) -> None:
    error = kit.refused("{", on_bad_row=on_bad_row)
    assert "none of the 1 rows can be learnt from: " in error.message
    assert kit.refused(on_bad_row=on_bad_row).message.endswith(": there is no row in it")


def test_a_store_that_fails_is_no_bad_row(kit: Kit) -> None:
    picture = "s3://bucket/a.png?endpoint=http://127.0.0.1:9&timeout_s=0.1"
    name = kit.write(GOOD, asked("a", images=[picture]))
    with pytest.raises(RegistryError):
        kit.check(name, on_bad_row="skip", processes=2)


# ---------------------------------------------------------------- too long


def test_a_long_row_is_bad_unless_it_is_to_be_left_out(kit: Kit) -> None:
    long = talk("a" * 50, "b", "c", "d")
    error = kit.refused(GOOD, long, max_length=40)
    assert ", max_length is 40; shorten it, raise max_length or set on_long to" in error.message
    assert error.report.problems[0].kind == "length"
    checked = kit.check(str(kit.folder / "rows.jsonl"), max_length=40, on_long="skip")
    assert [row.place.number for row in checked.rows] == [1]
    assert (checked.report.num_skipped, checked.report.problems) == (1, ())
    assert checked.report.warnings[0].kind == "length"
    error = kit.refused(long, max_length=40, on_long="skip")
    assert "none of the 1 rows can be learnt from" in error.message


def test_the_limit_is_the_models_own_unless_given(kit: Kit) -> None:
    limit = kit.config.decoder.max_length
    long = asked("7" * 2 * limit)
    assert f"max_length is {limit:,}" in kit.refused(long).message
    assert kit.check(kit.write(long), max_length=3 * limit).report.num_good == 1


def test_a_text_that_fits_exactly_is_whole(kit: Kit) -> None:
    name = kit.write(talk("one?", "two.", "three and four?", "five."))
    size = kit.check(name).report.longest
    assert kit.check(name, max_length=size).report.longest == size
    with pytest.raises(DataError, match=f"takes {size} tokens, max_length is {size - 1}"):
        kit.check(name, max_length=size - 1)


def test_cut_history_drops_the_oldest_turns_and_their_pictures(
    kit: Kit, picture: Callable[..., bytes]
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (kit.folder / name).write_bytes(
            picture(colour={"a": "red", "b": "blue"}.get(name[0], "lime"))
        )
    system = {"role": "system", "content": "Be brief."}
    turns = talk("<image>One?", "1", "<image>Two?", "2", "<image>Three?", "3")["messages"]
    images = ["a.png", "b.png", "c.png"]
    long = kit.write({"messages": [system, *turns], "images": images}, name="long")
    short = kit.write({"messages": [system, *turns[2:]], "images": images[1:]}, name="short")
    size = kit.check(short).report.longest
    (cut,), (expected,) = (
        kit.check(name, max_length=size, on_long="cut_history").rows for name in (long, short)
    )
    assert cut.example == expected.example
    assert cut.pictures == expected.pictures
    assert cut.conversation == expected.conversation
    report = kit.check(long, max_length=size, on_long="cut_history").report
    assert [str(one) for one in report.warnings] == [
        f"{long}:1: its oldest turn was cut, max_length is {size:,}"
    ]


def test_cut_history_keeps_the_last_question_and_answer_whole(kit: Kit) -> None:
    row = talk("one?", "two.", "three and four?", "five.")
    size = kit.check(kit.write(talk("three and four?", "five."))).report.longest
    error = kit.refused(row, max_length=size - 1, on_long="cut_history")
    told = f"its last question and answer alone take {size} tokens, max_length is {size - 1}"
    assert told in error.message
    assert "set on_long" not in error.message
    checked = kit.check(str(kit.folder / "rows.jsonl"), max_length=size, on_long="cut_history")
    assert checked.report.longest == size


def test_cut_history_keeps_a_picture_of_the_whole_conversation(
    kit: Kit, picture: Callable[..., bytes]
) -> None:
    (kit.folder / "a.png").write_bytes(picture())
    row = talk("a" * 40, "b", "What?", "This.", images=["a.png"])
    size = kit.check(kit.write(talk("What?", "This.", images=["a.png"]))).report.longest
    (cut,) = kit.check(kit.write(row), max_length=size, on_long="cut_history").rows
    assert len(cut.pictures) == 1


def test_fewer_pictures_have_the_budget_of_fewer(kit: Kit, picture: Callable[..., bytes]) -> None:
    (kit.folder / "a.png").write_bytes(picture(900, 900))
    row = talk("<image>One?", "1", "<image>Two?", "2", images=["a.png"] * 2)
    alone = talk("<image>Two?", "2", images=["a.png"])
    (both,) = kit.check(kit.write(row), max_length=1 << 20).rows
    (one,) = kit.check(kit.write(alone), max_length=1 << 20).rows
    least = max(len(both.example.ids) - 1, len(one.example.ids))
    if len(one.example.ids) < len(both.example.ids):
        (cut,) = kit.check(kit.write(row), max_length=least, on_long="cut_history").rows
        assert cut.pictures == one.pictures


# ---------------------------------------------------------------- processes


def test_many_processes_find_what_one_does(kit: Kit, picture: Callable[..., bytes]) -> None:
    (kit.folder / "a.png").write_bytes(picture())
    rows: list[Row | str] = [asked(f"{i}?", images=["a.png"] * (i % 3)) for i in range(70)]
    rows[33] = "{"
    name = kit.write(*rows)
    calls: list[tuple[str, int, int]] = []
    files = [DataFile(path=name)]
    options = DataOptions(train=files)
    many = check_rows(
        files,
        options,
        kit.config,
        kit.tokenizer,
        processes=2,
        progress=lambda *call: calls.append(call),
    )
    assert many == check_rows(files, options, kit.config, kit.tokenizer, processes=1)
    assert calls == [("checking rows", i, 70) for i in range(1, 71)]


def test_a_progress_that_stops_ends_the_processes(kit: Kit) -> None:
    name = kit.write(*[GOOD] * 100)

    def stop(what: str, done: int, total: int) -> None:
        raise XcRayError("interrupted")

    files = [DataFile(path=name)]
    before = children()
    with pytest.raises(XcRayError, match="interrupted"):
        check_rows(
            files,
            DataOptions(train=files),
            kit.config,
            kit.tokenizer,
            processes=2,
            progress=stop,
        )
    assert children() == before


def children(of: int | None = None) -> set[int]:
    """Processes that a process started, but for Python's own tracker of resources."""
    task = Path(f"/proc/{of or os.getpid()}/task")
    pids = {int(p) for one in task.glob("*/children") for p in one.read_text().split()}
    return {p for p in pids if b"resource_tracker" not in _command(p)}


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


SCRIPT = """
import sys
from pathlib import Path
from xc_ray.config import DataFile, DataOptions
from xc_ray.model.layout import read_layout
from xc_ray.prompt.tokenizer import load_tokenizer
from xc_ray.train.preflight import preflight

def main():
    model, name = sys.argv[1:]
    config = read_layout(Path(model)).config
    tokenizer = load_tokenizer(model, config.decoder.vocab_size)
    files = [DataFile(path=name)]
    show = lambda *call: print(*call, flush=True)
    options = DataOptions(train=files)
    preflight(files, options, config, tokenizer, processes=2, progress=show)
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_check_that_was_ended(
    kit: Kit, tiny: Callable[[Variant], Path], end: signal.Signals
) -> None:
    name = kit.write(*[GOOD] * 5000)
    script = kit.folder / "script.py"
    script.write_text(SCRIPT + 'if __name__ == "__main__":\n    main()\n')
    with subprocess.Popen(
        [sys.executable, str(script), str(tiny("2.5")), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("checking rows 1 5000")
        started = children(running.pid)
        assert len(started) == 2
        running.send_signal(end)
        running.communicate(timeout=20)
    assert running.returncode == -end
    deadline = time.monotonic() + 10
    while any(_command(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_script_that_starts_itself_again_is_told_how_not_to(
    kit: Kit, tiny: Callable[[Variant], Path]
) -> None:
    script = kit.folder / "script.py"
    script.write_text(SCRIPT + "main()\n")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny("2.5")), kit.write(GOOD)],
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    last = textwrap.shorten(done.stderr.splitlines()[-1], 300)
    assert "a process that checks rows ended with exit code 1" in last
    assert 'below `if __name__ == "__main__":`' in last
