import base64
import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import VARIANTS
from tests.local_http import Asked, CutOff, Reply, serving
from tests.pictures import shapes
from xc_ray import pipeline, source
from xc_ray.engine.sequence import SamplingParams
from xc_ray.errors import CheckpointError, InvalidRequest, MediaError, PromptTooLong
from xc_ray.model.config import Variant
from xc_ray.model.weights import Checkpoint
from xc_ray.model.xcomposer import XComposer
from xc_ray.pipeline import Pipeline
from xc_ray.prompt.tiles import image_canvas, open_image

# The defaults of the family, but the most likely token each time.
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
EXACT: dict[str, Any] = {**GREEDY, "repetition_penalty": 1.0}
# Drawn from the whole vocabulary with fixed luck: a picture in another place changes the answer.
WILD: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "seed": 3, "max_tokens": 30}
Load = Callable[[Variant], Pipeline]


@pytest.fixture(scope="module")
def load(tiny) -> Load:
    """A function that gives the tiny pipeline of a variant, in float64: no two paths differ."""
    loaded: dict[Variant, Pipeline] = {}

    def of(variant: Variant) -> Pipeline:
        if variant not in loaded:
            loaded[variant] = Pipeline.load(tiny(variant), device="cpu", dtype=torch.float64)
        return loaded[variant]

    return of


@pytest.fixture
def pipe(load) -> Iterator[Pipeline]:
    whole = load("2.5")
    yield whole
    assert whole.engine.kv_usage == 0
    assert not whole.engine.has_work


@pytest.fixture
def red(picture, tmp_path) -> Path:
    path: Path = tmp_path / "red.png"
    path.write_bytes(picture(90, 60, "red"))
    return path


@pytest.fixture
def blue(picture, tmp_path) -> Path:
    path: Path = tmp_path / "blue.png"
    path.write_bytes(picture(60, 200, "blue"))
    return path


# ---------------------------------------------------------------- the answer itself


class Dense:
    """The slow way: the prompt written out by hand, the whole model anew for every token."""

    def __init__(self, pipe: Pipeline, folder: Path) -> None:
        self.pipe = pipe
        self.model: XComposer = Checkpoint.open(folder).load(device="cpu", dtype=torch.float64)
        self.tokens = pipe.config.tokens
        self.ids: list[int] = []
        self.pictures: list[torch.Tensor] = []
        self.part_begins = True

    def begin_part(self) -> None:
        self.part_begins = self.pipe.config.family.bos_every_part or not self.ids

    def add(self, *items: str | int) -> "Dense":
        """Text, or the id of a turn mark."""
        if self.part_begins:
            self.ids.append(self.tokens.bos)
            self.part_begins = False
        for item in items:
            encode = self.pipe.tokenizer.encode_untrusted
            self.ids += [item] if isinstance(item, int) else encode(item)
        return self

    def turn(self, role: str, *parts: str | bytes) -> "Dense":
        self.add(self.tokens.start_of_turn, f"{role}\n")
        for part in parts:
            self.see(part) if isinstance(part, bytes) else self.add(part)
        return self.add(self.tokens.end_of_turn, "\n")

    def see(self, data: bytes, max_tiles: int | None = None) -> "Dense":
        budget = max_tiles or self.pipe.config.family.max_tiles
        canvas = image_canvas(self.pipe.config, open_image(data), budget)
        with torch.inference_mode():
            [rows] = self.model.vision([torch.from_numpy(canvas.copy())])
        first = self.pipe.config.decoder.vocab_size + sum(map(len, self.pictures))
        self.ids += range(first, first + len(rows))
        self.pictures.append(rows)
        self.begin_part()
        return self

    @torch.inference_mode()
    def answer(self, max_tokens: int = 12) -> str:
        self.add(self.tokens.start_of_turn, "assistant\n")
        ids, pictures = list(self.ids), torch.cat(self.pictures) if self.pictures else None
        for _ in range(max_tokens):
            hidden = self.model(torch.tensor(ids), [len(ids)], pictures)
            best = int(self.model.decoder.logits(hidden[-1:]).argmax())
            if best in self.pipe.config.stop_token_ids:
                break
            ids.append(best)
        return self.pipe.tokenizer.decode(ids[len(self.ids) :])


@pytest.fixture
def dense(load, tiny) -> Callable[[Variant], Dense]:
    def of(variant: Variant) -> Dense:
        reference = Dense(load(variant), tiny(variant))
        if text := load(variant).config.family.system_text:
            reference.turn("system", text)
        return reference

    return of


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_greedy_answer_is_the_dense_models(variant, load, dense):
    expected = dense(variant).turn("user", "Once upon a time").answer()
    assert expected
    assert load(variant).chat("Once upon a time", **EXACT)[0] == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_greedy_answer_about_a_picture_is_the_dense_models(variant, load, dense, red):
    question = f"Look: <img>{red}</img>what is it?"
    expected = dense(variant).turn("user", "Look: ", red.read_bytes(), "what is it?").answer()
    assert expected
    assert load(variant).chat(question, **EXACT)[0] == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversation_with_pictures_is_the_dense_models(variant, load, dense, red, blue):
    pipe = load(variant)
    history = [(f"<img>{red}</img>What is it?", "A dot."), ("Sure?", "Yes.")]
    answer, _ = pipe.chat(f"And <img>{blue}</img>?", history, max_tiles=2, **EXACT)
    reference = dense(variant)
    reference.add(reference.tokens.start_of_turn, "user\n").see(red.read_bytes(), 2)
    reference.add("What is it?", reference.tokens.end_of_turn, "\n").turn("assistant", "A dot.")
    reference.turn("user", "Sure?").turn("assistant", "Yes.")
    reference.add(reference.tokens.start_of_turn, "user\n", "And ").see(blue.read_bytes(), 2)
    reference.add("?", reference.tokens.end_of_turn, "\n")
    assert answer == reference.answer()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_streams_what_it_says_about_several_pictures(variant, load, red, blue):
    pipe = load(variant)
    query = f"<img>{red}</img> and <img>{blue}</img>: compare"
    pieces = list(pipe.stream(query, **GREEDY))
    whole, history = pipe.chat(query, **GREEDY)
    assert "".join(piece for piece, _ in pieces) == whole
    assert history == pieces[-1][1] == [(query, whole)]


def test_pieces_come_one_by_one_with_the_history_so_far(pipe):
    before = [("hi", "hello")]
    pieces = list(pipe.stream("Once upon a time", before, **GREEDY))
    assert len([piece for piece, _ in pieces if piece]) > 3
    answer = ""
    for piece, history in pieces:
        answer += piece
        assert history == [("hi", "hello"), ("Once upon a time", answer)]
    assert before == [("hi", "hello")]


def test_a_history_may_be_lists_as_json_has_them(pipe):
    one = pipe.chat("and then?", [["hi", "hello"]], **GREEDY)
    assert one == pipe.chat("and then?", [("hi", "hello")], **GREEDY)
    assert one[1][0] == ("hi", "hello")
    assert one[0] != pipe.chat("and then?", **GREEDY)[0]


@pytest.mark.parametrize(
    "history",
    [[("a",)], [("a", "b", "c")], [("a", None)], [{"role": "user", "content": "a"}], ["ab"]],
)
def test_a_history_that_is_no_list_of_pairs_is_refused(history, pipe):
    with pytest.raises(InvalidRequest, match=r"history is a list of pairs of texts"):
        pipe.chat("x", history, **GREEDY)


# ---------------------------------------------------------------- pictures


def test_a_picture_in_an_earlier_turn_is_seen_again(pipe, red, blue):
    answers = [
        pipe.chat("What was it?", [(f"<img>{path}</img>Look", "Yes.")], **GREEDY)
        for path in (red, blue)
    ]
    assert answers[0][0] != answers[1][0]
    assert answers[0][1][0] == (f"<img>{red}</img>Look", "Yes.")


def test_marks_are_filled_by_images_in_order_over_all_turns(pipe, red, blue):
    tagged, _ = pipe.chat(f"and <img>{blue}</img>?", [(f"a <img>{red}</img>", "b")], **WILD)
    history = [("a <ImageHere>", "b")]
    marked, after = pipe.chat("and <ImageHere>?", history, [red, blue.read_bytes()], **WILD)
    swapped, _ = pipe.chat("and <ImageHere>?", history, [str(blue), red], **WILD)
    assert marked == tagged != swapped
    assert after == [*history, ("and <ImageHere>?", marked)]


def test_tags_and_marks_stand_in_one_text(pipe, red, blue):
    mixed, _ = pipe.chat(f"<ImageHere> <img>{blue}</img> <ImageHere>", None, [red, red], **WILD)
    tags = f"<img>{red}</img> <img>{blue}</img> <img>{red}</img>"
    assert mixed == pipe.chat(tags, **WILD)[0]


def test_one_picture_without_a_mark_goes_before_the_whole_prompt_of_2_5(pipe, dense, red):
    # 2.5 begins with the picture, and with the BOS behind it.
    reference = dense("2.5")
    first = pipe.config.decoder.vocab_size
    rows = len(reference.see(red.read_bytes()).ids)
    assert reference.ids == list(range(first, first + rows))
    reference.part_begins = False
    reference.turn("user", "What is it?")
    answer, history = pipe.chat("What is it?", images=[red], **EXACT)
    assert answer == reference.answer()
    assert history == [("What is it?", answer)]
    assert answer != pipe.chat("<ImageHere>What is it?", images=[red], **EXACT)[0]


@pytest.mark.parametrize("variant", ["2.0", "2.0-VL", "2.0-4KHD"])
def test_one_picture_without_a_mark_goes_before_the_question_elsewhere(variant, load, red):
    unmarked, _ = load(variant).chat("What is it?", images=[red], **GREEDY)
    assert unmarked == load(variant).chat(f"<img>{red}</img>What is it?", **GREEDY)[0]


def test_several_pictures_without_marks_go_before_the_question(pipe, red, blue):
    unmarked, _ = pipe.chat("Compare", [("hi", "hello")], [red, blue], **WILD)
    tags = f"<img>{red}</img><img>{blue}</img>Compare"
    assert unmarked == pipe.chat(tags, [("hi", "hello")], **WILD)[0]


def test_one_source_needs_no_list(pipe, red):
    expected = pipe.chat("<ImageHere>?", images=[red], **WILD)
    assert pipe.chat("<ImageHere>?", images=str(red), **WILD) == expected
    assert pipe.chat("<ImageHere>?", images=red.read_bytes(), **WILD) == expected


def test_a_mark_without_images_is_plain_text(pipe):
    answer, history = pipe.chat("what is <ImageHere>?", **GREEDY)
    assert history == [("what is <ImageHere>?", answer)]


@pytest.mark.parametrize(("marks", "pictures"), [(1, 2), (2, 1), (3, 2)])
def test_marks_and_pictures_that_differ_in_number_are_refused(marks, pictures, pipe, red):
    message = f"the text has {marks} <ImageHere> marks for {pictures} pictures"
    with pytest.raises(InvalidRequest, match=message):
        pipe.chat("<ImageHere>" * marks, images=[red] * pictures, **GREEDY)


def test_max_tiles_bounds_each_picture(pipe, blue):
    query = f"<img>{blue}</img>What is it?"
    answers = {pipe.chat(query, max_tiles=n, **WILD)[0] for n in (1, 2, None)}
    assert len(answers) > 1
    with pytest.raises(InvalidRequest, match=r"max_tiles is 0, the least is 1"):
        pipe.chat(query, max_tiles=0, **WILD)


def test_a_picture_is_encoded_once_for_all_its_turns(load, red, blue, monkeypatch):
    pipe = load("2.5")
    encoded: list[int] = []
    forward = pipe.encoder.forward

    def counted(canvases: Any, **options: Any) -> Any:
        encoded.append(len(canvases))
        return forward(canvases, **options)

    monkeypatch.setattr(pipe.encoder, "forward", counted)
    monkeypatch.setattr(pipe, "_embeddings", type(pipe._embeddings)())
    monkeypatch.setattr(pipeline, "CACHED_PICTURES", 1)
    _, history = pipe.chat(f"<img>{red}</img>What?", max_tiles=1, **GREEDY)
    pipe.chat("And?", history, max_tiles=1, **GREEDY)
    assert encoded == [1]
    pipe.chat(f"<img>{blue}</img>What?", max_tiles=1, **GREEDY)
    assert len(pipe._embeddings) == 1
    pipe.chat(f"<img>{red}</img>What?", max_tiles=1, **GREEDY)
    assert encoded == [1, 1, 1]


# ---------------------------------------------------------------- where pictures come from


def test_a_picture_may_be_a_url(pipe, red):
    def answer(asked: Asked) -> Reply:
        if asked.path == "/moved":
            return Reply(b"", 302, {"location": "/red.png?x=1"})
        return Reply(red.read_bytes() if asked.path == "/red.png?x=1" else b"no", 200)

    expected, _ = pipe.chat(f"<img>{red}</img>What?", **WILD)
    with serving(answer) as host:
        for url in (f"{host.url}/red.png?x=1", f"{host.url}/moved", f"HTTP{host.url[4:]}/moved"):
            assert pipe.chat(f"<img> {url} </img>What?", **WILD)[0] == expected
        assert pipe.chat("<ImageHere>What?", images=[f"{host.url}/moved"], **WILD)[0] == expected


def test_a_picture_may_be_a_data_url(pipe, red):
    expected, _ = pipe.chat(f"<img>{red}</img>What?", **WILD)
    url = f"data:image/png;base64,{base64.b64encode(red.read_bytes()).decode()}"
    assert pipe.chat(f"<img>{url}</img>What?", **WILD)[0] == expected


def test_a_picture_may_be_in_the_home_folder(pipe, red, monkeypatch):
    monkeypatch.setenv("HOME", str(red.parent))
    expected, _ = pipe.chat(f"<img>{red}</img>What?", **WILD)
    assert pipe.chat("<img>~/red.png</img>What?", **WILD)[0] == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such.png", "'/no/such.png': No such file or directory"),
        (".", "'.': Is a directory"),
        ("~nobody-of-this-name/a.png", "home directory"),
        ("a\0b.png", "null byte"),
        ("x" * 5000, "'xxx.*…': File name too long"),
        ("data:image/png;base64,????", "the data URL is not valid base64"),
        ("data:image/png;base64,é", "the data URL is not valid base64"),
        ("data:image/png", "the data URL has no comma"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(source, message, pipe):
    with pytest.raises(MediaError, match=message) as caught:
        pipe.chat(f"<img>{source}</img>What?", **GREEDY)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["[::1", "127.0.0.1:9", "a" * 300 + ".example"])
def test_a_dead_url_is_one_line(host, pipe):
    with pytest.raises(MediaError, match=r"cannot fetch the picture 'http://.+': .+"):
        pipe.chat(f"<img>http://{host}/x.png</img>What?", **GREEDY)


def test_a_url_without_a_picture_is_told(pipe, red, monkeypatch):
    def cut() -> Iterator[bytes]:
        yield b"abc"
        raise CutOff

    replies = {
        "/missing": Reply(b"gone", 404),
        "/cut": Reply(cut()),
        "/page": Reply(b"<html>"),
        "/big": Reply(b"x" * 2000),
    }
    monkeypatch.setattr(source, "MAX_DOWNLOAD_BYTES", 1000)
    with serving(lambda asked: replies[asked.path]) as host:
        for path, message in (
            ("/missing", "cannot fetch the picture 'http://.*/missing': HTTP 404$"),
            ("/cut", "cannot fetch the picture 'http://.*/cut': .+"),
            ("/page", "the 6 bytes are not an image of a known format"),
            ("/big", "the picture at 'http://.*/big' is larger than 1,000 bytes"),
        ):
            with pytest.raises(MediaError, match=message):
                pipe.chat(f"<img>{host.url}{path}</img>What?", **GREEDY)


def png_header(width: int, height: int) -> bytes:
    """A PNG that is nothing but its claim of a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_damaged_data_is_refused_and_the_next_question_answered(pipe, picture, red):
    jpeg = picture(300, 200, file_format="JPEG")
    before, _ = pipe.chat(f"<img>{red}</img>What?", **GREEDY)
    for data, message in (
        (b"", "the image is empty"),
        (b"no picture at all", "the 17 bytes are not an image of a known format"),
        (jpeg[: len(jpeg) // 2], "is damaged or cut short"),
        (png_header(30_000, 30_000), "pixels, the limit is 89,478,485"),
    ):
        with pytest.raises(MediaError, match=message):
            pipe.chat("<ImageHere>What?", images=[data], **GREEDY)
    assert pipe.chat(f"<img>{red}</img>What?", **GREEDY)[0] == before


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1)])
def test_a_picture_of_one_pixel_in_width_is_answered(size, pipe):
    out = io.BytesIO()
    Image.new("RGB", size, "green").save(out, "PNG")
    answer, _ = pipe.chat("<ImageHere>What?", images=[out.getvalue()], **GREEDY)
    assert answer


# ---------------------------------------------------------------- limits


def test_a_text_that_is_too_long_says_how_long_it_is(tiny):
    short = Pipeline.load(tiny("2.5"), device="cpu", max_model_len=64)
    with pytest.raises(PromptTooLong) as caught:
        short.chat("word " * 200)
    match = re.search(r"the prompt takes (\d+) tokens, the model holds 64", str(caught.value))
    assert match
    assert int(match[1]) > 200
    with pytest.raises(PromptTooLong, match=r"with max_tokens 60 .*lower max_tokens to (\d+)") as e:
        short.chat("hi", max_tokens=60)
    room = re.search(r"lower max_tokens to (\d+)", str(e.value))
    assert room
    short.chat("hi", temperature=0, max_tokens=int(room[1]))
    with pytest.raises(PromptTooLong):
        short.chat("hi", temperature=0, max_tokens=int(room[1]) + 1)


def test_pictures_that_are_too_many_say_what_each_costs(tiny, red, blue):
    short = Pipeline.load(tiny("2.5"), device="cpu", max_model_len=64)
    message = (
        r"the prompt takes \d+ tokens \(\d+ for images; image 1: \d+ in \d tiles, "
        r"image 2: \d+ in \d tiles\), .* send fewer images or lower max_tiles"
    )
    with pytest.raises(PromptTooLong, match=message):
        short.chat(f"<img>{red}</img><img>{blue}</img>" + "word " * 20)


def test_without_max_tokens_an_answer_may_fill_the_model(tiny, monkeypatch):
    short = Pipeline.load(tiny("2.5"), device="cpu", max_model_len=40)
    counted: list[int] = []
    add = short.engine.add

    def remember(request: str, ids: list[int], params: SamplingParams, pictures: Any) -> None:
        counted.append(len(ids) + params.max_tokens)
        add(request, ids, params, pictures)

    monkeypatch.setattr(short.engine, "add", remember)
    short.chat("Describe it", temperature=0)
    assert counted == [40]


# ---------------------------------------------------------------- options


def test_an_unknown_option_is_refused_with_the_known_ones(pipe):
    with pytest.raises(
        InvalidRequest, match=r"unknown option 'temprature'; known are .*temperature"
    ):
        pipe.chat("hi", temprature=0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected a number of at least 0"),
        ({"top_p": 0}, "top_p is 0, expected more than 0"),
        ({"max_tokens": 0}, "max_tokens is 0, expected at least 1"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
    ],
)
def test_a_bad_value_is_refused_before_a_picture_is_read(option, message, pipe):
    with pytest.raises(InvalidRequest, match=message):
        pipe.chat("<img>/no/such.png</img>", **option)


def test_none_is_what_is_not_given(pipe):
    plain = pipe.chat("hi", **GREEDY)
    assert pipe.chat("hi", top_p=None, system=None, repetition_penalty=None, **GREEDY) == plain


def test_the_same_seed_gives_the_same_answer_and_another_one_another(pipe):
    answers = [pipe.chat("hi", max_tokens=12, seed=seed)[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_without_a_seed_answers_differ(pipe):
    assert len({pipe.chat("hi", max_tokens=12)[0] for _ in range(4)}) > 1


def test_the_answer_ends_before_a_stop_text(pipe):
    whole, _ = pipe.chat("Once upon a time", **GREEDY)
    stop = whole[4:7]
    for given in (stop, [stop], ("never said", stop)):
        answer, history = pipe.chat("Once upon a time", stop=given, **GREEDY)
        assert answer == whole[: whole.index(stop)]
        assert history == [("Once upon a time", answer)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_system_text_replaces_the_familys_and_an_empty_one_removes_it(variant, load, tiny):
    pipe = load(variant)
    for system in ("Be rude.", ""):
        reference = Dense(pipe, tiny(variant))
        if system:
            reference.turn("system", system)
        expected = reference.turn("user", "Once upon a time").answer()
        assert pipe.chat("Once upon a time", system=system, **EXACT)[0] == expected


# ---------------------------------------------------------------- the engine behind it


def test_a_closed_stream_frees_the_engine(pipe):
    before, _ = pipe.chat("Once upon a time", **GREEDY)
    stream = pipe.stream("Describe it", temperature=0, max_tokens=500)
    next(stream)
    assert pipe.engine.kv_usage > 0
    stream.close()
    assert pipe.engine.kv_usage == 0
    assert pipe.chat("Once upon a time", **GREEDY)[0] == before


def test_a_stream_that_is_left_early_frees_the_engine(pipe):
    for _ in pipe.stream("Describe it", temperature=0, max_tokens=500):
        break
    assert pipe.engine.kv_usage == 0


def test_a_second_answer_never_mixes_with_one_that_is_still_open(pipe):
    alone, _ = pipe.chat("Once upon a time", **GREEDY)
    stream = pipe.stream("Describe it", **GREEDY)
    piece, _ = next(stream)
    with pytest.raises(InvalidRequest, match=r"another answer .* read it to its end or close it"):
        pipe.chat("Once upon a time", **GREEDY)
    rest = "".join(piece for piece, _ in stream)
    assert piece + rest == pipe.chat("Describe it", **GREEDY)[0]
    assert pipe.chat("Once upon a time", **GREEDY)[0] == alone


# ---------------------------------------------------------------- loading


def test_load_takes_a_folder_and_the_name_of_the_demo_model(tiny):
    for demo in (Pipeline.load(device="cpu"), Pipeline.load("demo", device="cpu")):
        assert demo.config.vision.image_size == 224
        answer, history = demo.chat("What is it?", images=[shapes("red circle")], **GREEDY)
        assert answer == "A red circle."
        assert demo.chat("12 + 30 = ", **GREEDY)[0] == "12 + 30 = 42"
        assert history == [("What is it?", answer)]
    assert Pipeline.load(str(tiny("2.0")), device="cpu").config.variant == "2.0"


def test_load_refuses_what_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither 'demo', nor an existing folder, nor a hub"):
        Pipeline.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Pipeline.load(tmp_path)


def test_dtype_and_length_are_as_asked(tiny):
    pipe = Pipeline.load(tiny("2.5"), device="cpu", dtype=torch.bfloat16, max_model_len=100)
    assert pipe.engine.decoder.dtype == pipe.encoder.dtype == torch.bfloat16
    assert pipe.engine.config.max_model_len == 100
    assert pipe.chat("hi", **GREEDY)[0]
    plain = Pipeline.load(tiny("2.5"), device="cpu")
    assert plain.engine.decoder.dtype == torch.float32
    assert plain.engine.config.max_model_len == plain.config.decoder.max_length
