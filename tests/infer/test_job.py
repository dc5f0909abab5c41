"""A data set through a real engine with a tiny model, in float64: no two paths differ."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import write_adapter
from tests.local_http import Asked, Reply, serving
from xc_ray.demo.make import make_model, tiny_config
from xc_ray.engine.engine import Engine
from xc_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EngineError,
    InvalidRequest,
    NotFound,
)
from xc_ray.fingerprint import fingerprint
from xc_ray.infer import engine
from xc_ray.infer import pictures as pictures_module
from xc_ray.infer.engine import Options, engine_limits
from xc_ray.infer.job import Job, Summary, infer
from xc_ray.infer.output import Output
from xc_ray.model.adapter import load_adapter, merge_adapter
from xc_ray.model.config import Variant, preset
from xc_ray.model.xcomposer import ImageEncoder
from xc_ray.pipeline import Pipeline
from xc_ray.prompt.chat import ImageSlot, Message
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.registry import Registry
from xc_ray.train.question import as_question
from xc_ray.train.rows import Conversation

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12}
SHORT = Options(max_tokens=12)
Rows = Sequence[dict[str, Any] | str]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory) -> None:
    """A cache of the tests' own, the same for all: what was hashed is hashed once."""
    folder = tmp_path_factory.getbasetemp() / "infer-home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(scope="module")
def pipeline(tiny) -> Callable[..., Pipeline]:
    """A function that gives the pipeline over a variant, which answers one by one."""
    loaded: dict[Variant, Pipeline] = {}

    def of(variant: Variant = "2.5") -> Pipeline:
        if variant not in loaded:
            loaded[variant] = Pipeline.load(tiny(variant), device="cpu", dtype=torch.float64)
        return loaded[variant]

    return of


@pytest.fixture
def job(tiny, tmp_path: Path) -> Callable[..., Job]:
    """A function that writes rows to a file, and gives the job over it."""

    def make(rows: Rows = (), **changes: Any) -> Job:
        dataset = tmp_path / "rows.jsonl"
        if rows:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            dataset.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        plain = Job(
            str(tiny("2.5")),
            tmp_path / "out.jsonl",
            str(dataset),
            options=SHORT,
            batch_size=3,
            device="cpu",
            dtype=torch.float64,
        )
        return replace(plain, **changes)

    return make


@pytest.fixture
def pictures(picture, tmp_path: Path) -> tuple[str, str]:
    """The names of two pictures that lie beside the data set."""
    (tmp_path / "red.png").write_bytes(picture(90, 60, "red"))
    (tmp_path / "blue.png").write_bytes(picture(60, 200, "blue"))
    return "red.png", "blue.png"


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def responses(job: Job) -> list[str]:
    """The answers, in the order of the data set, none of them an error."""
    infer(job)
    return [line["response"] for line in lines(job.output)]


def ask(question: str, answer: str | None = None, **more: Any) -> dict[str, Any]:
    given = {} if answer is None else {"response": answer}
    return {"query": question, **given, **more}


TEXTS = [ask(f"Once upon a time, {'very ' * n}long ago", f"answer {n}") for n in range(8)]


# ---------------------------------------------------------------- the answers


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_batched_answers_are_those_of_the_pipeline_one_by_one(
    temperature, job, pipeline, pictures, tmp_path
):
    red, blue = (str(tmp_path / name) for name in pictures)
    cases: list[tuple[dict[str, Any], tuple[Any, ...], dict[str, Any]]] = [
        (ask("Once upon a time", "x"), ("Once upon a time",), {}),
        (ask("<image>What?", "x", images=["red.png"]), (f"<img>{red}</img>What?",), {}),
        (ask("And <img>blue.png</img>?"), (f"And <img>{blue}</img>?",), {}),
        (ask("What?", images=["red.png"]), ("What?",), {"images": [red]}),
        (ask("Hi", system="Be rude."), ("Hi",), {"system": "Be rude."}),
        (ask("Hi", system=""), ("Hi",), {"system": ""}),
        (
            ask("And <image>?", history=[["A <image>", "b"]], images=[*pictures]),
            (f"And <img>{blue}</img>?", [(f"A <img>{red}</img>", "b")]),
            {},
        ),
        (ask("Compare", "x", images=[*pictures]), ("Compare",), {"images": [red, blue]}),
        (ask("<image>Where?", "x", images=["red.png"]), (f"<img>{red}</img>Where?",), {}),
    ]
    sampling = {"temperature": temperature, "top_p": 1.0, "max_tokens": 12}
    expected = [
        pipeline().chat(*args, **options, **sampling, seed=7 + i)[0]
        for i, (_, args, options) in enumerate(cases)
    ]
    options = Options(**sampling, seed=7)
    assert responses(job([row for row, _, _ in cases], options=options)) == expected
    # Greedy, what a random model says of a picture comes down to a few words.
    assert len(set(expected)) == len(cases) or not temperature


@pytest.mark.parametrize("variant", ["2.0", "2.0-VL", "2.0-4KHD"])
def test_other_variants_answer_as_their_pipelines_do(
    variant, job, pipeline, pictures, tmp_path, tiny
):
    red = str(tmp_path / "red.png")
    rows = [ask("Hi"), ask("What?", images=["red.png"]), ask("<image>?", images=["red.png"])]
    pipe = pipeline(variant)
    expected = [
        pipe.chat("Hi", **GREEDY)[0],
        pipe.chat("What?", images=[red], **GREEDY)[0],
        pipe.chat(f"<img>{red}</img>?", **GREEDY)[0],
    ]
    assert responses(job(rows, model=str(tiny(variant)))) == expected


def test_a_line_says_what_was_asked_and_how_near_the_answer_is(job, pipeline, pictures, tmp_path):
    answer, _ = pipeline().chat("Hi", **GREEDY)
    picture = str(tmp_path / "red.png")
    rows = [
        ask("Hi", f" {answer}\n", system="", history=[["a", "b"]]),
        ask("Hi", f"{answer}"),
        ask("<image>Hi", "", images=["red.png"]),
        ask("Hi"),
    ]
    done = infer(job(rows))
    first, second, third, fourth = lines(tmp_path / "out.jsonl")
    assert first["index"] == 0
    assert first["place"] == f"{tmp_path}/rows.jsonl:1"
    assert [(m["role"], m["content"]) for m in first["messages"]] == [
        ("system", ""),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Hi"),
    ]
    assert first["reference"] == f" {answer}\n"
    assert first["exact_match"] is False
    assert second["response"] == second["reference"] == answer
    assert second["exact_match"] is True
    assert second["rouge_l"] == 1.0
    assert second["finish_reason"] == "length"
    assert third["messages"] == [{"role": "user", "content": "<ImageHere>Hi"}]
    assert third["images"] == [picture]
    assert fourth["reference"] is fourth["exact_match"] is fourth["rouge_l"] is None
    assert (done.rows, done.answered, done.failed, done.compared) == (4, 4, 0, 3)
    assert done.exact_match == pytest.approx(1 / 3, abs=1e-6)
    assert done.rouge_l == pytest.approx(
        sum(line["rouge_l"] for line in (first, second, third)) / 3, abs=1e-5
    )
    assert done.new_tokens == 48
    assert done.tokens_per_s is not None
    told = json.loads((tmp_path / "out.summary.json").read_text())
    assert told["summary"]["exact_match"] == done.exact_match
    assert told["settings"]["max_tokens"] == 12


def test_options_change_the_answers(job, pipeline, pictures, tmp_path):
    rows = [ask("<image>What?", images=["blue.png"]), ask("Hi", system="Be rude.")]
    query, blue = "<img>{}</img>What?", str(tmp_path / "blue.png")
    pipe = pipeline()

    def with_options(**changes: Any) -> list[str]:
        return responses(job(rows, options=replace(SHORT, **changes), overwrite=True))

    rude = with_options(system="Be kind.")
    expected = pipe.chat(query.format(blue), system="Be kind.", **GREEDY)[0]
    assert rude == [expected, pipe.chat("Hi", system="Be rude.", **GREEDY)[0]]
    one_tile = pipe.chat(query.format(blue), max_tiles=1, **GREEDY)[0]
    assert with_options(max_tiles=1)[0] == one_tile
    short, long = (with_options(max_tokens=n)[1] for n in (1, 12))
    assert len(short) < len(long)
    assert long.startswith(short)
    wild = with_options(temperature=2.0, top_p=1.0, seed=3)
    drawn = [
        pipe.chat(query.format(blue), temperature=2.0, top_p=1.0, seed=3, max_tokens=12)[0],
        pipe.chat("Hi", system="Be rude.", temperature=2.0, top_p=1.0, seed=4, max_tokens=12)[0],
    ]
    assert wild == drawn


def test_a_bad_option_is_refused_before_anything_is_read(job, tmp_path):
    with pytest.raises(InvalidRequest, match=r"top_p is 0, expected more than 0"):
        infer(job(TEXTS, options=Options(top_p=0)))
    assert not (tmp_path / "out.jsonl").exists()


def test_of_max_samples_the_first_rows_are_answered(job, tmp_path):
    assert infer(job(TEXTS, max_samples=3)).rows == 3
    assert [line["index"] for line in lines(tmp_path / "out.jsonl")] == [0, 1, 2]
    more = infer(job(max_samples=5))
    assert (more.rows, more.new_rows) == (5, 2)


def test_rows_wait_their_turn_where_the_cache_is_small(tmp_path, job, pictures, monkeypatch):
    """Four of the longest requests fit: many rows with pictures are preempted and asked again."""
    plain = tiny_config("2.5")
    config = replace(plain, decoder=replace(plain.decoder, max_length=192))
    folder = make_model(tmp_path / "short", config=config)
    rows = [ask(f"<image>{'so ' * n}", images=["red.png"]) for n in range(7)]
    options = Options(max_tokens=300, max_tiles=1)
    engines: list[Engine] = []
    step = Engine.step

    def seen(engine: Engine) -> Any:
        engines.append(engine)
        return step(engine)

    monkeypatch.setattr(Engine, "step", seen)
    found = job(rows, model=str(folder), batch_size=12, options=options)
    assert infer(found).failed == 0
    assert engines[0].num_preemptions > 0
    pipe = Pipeline.load(folder, device="cpu", dtype=torch.float64)
    for line, row in zip(lines(found.output), rows, strict=True):
        query = row["query"].replace("<image>", f"<img>{tmp_path}/red.png</img>")
        expected, _ = pipe.chat(query, temperature=0.0, max_tiles=1)
        assert line["response"] == expected
        assert line["finish_reason"] == "length"  # of the room that the model has
    too_long = replace(found, output=tmp_path / "b.jsonl", dataset=str(tmp_path / "long.jsonl"))
    Path(str(too_long.dataset)).write_text(json.dumps(ask("word " * 300)) + "\n")
    assert infer(too_long).failed == 1
    (line,) = lines(too_long.output)
    assert "tokens, the model holds 192 with the answer" in line["error"]


@pytest.mark.parametrize(
    ("free_gb", "batch", "tokens"),
    [
        (140, None, range(400_000, 900_000)),
        (30, None, range(16_384, 100_000)),
        (140, 2, range(2 * 16_384, 2 * 16_384 + 1)),
        (12, None, "cuda has 12.0 GB free, .* takes 2.* GB; free some, take another"),
    ],
)
def test_the_cache_takes_what_is_free_on_a_gpu(free_gb, batch, tokens, monkeypatch):
    config, total = preset("2.5"), int(141e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gb * 1e9), total))
    device = torch.device("cuda")
    if isinstance(tokens, str):
        with pytest.raises(ConfigError, match=tokens):
            engine_limits(config, device, torch.bfloat16, batch)
        return
    limits = engine_limits(config, device, torch.bfloat16, batch)
    assert limits.max_num_seqs == (batch or 64)
    assert limits.kv_cache_tokens in tokens
    assert limits.max_loras == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_answers_are_those_of_the_pipeline(job, pictures, tiny, adapted, tmp_path):
    """In float32: the sums of a batch differ in their last bits, and no two tokens are so near."""
    rows = [*TEXTS, ask("<image>What?", "x", images=["red.png"])]
    on_gpu = {"device": "cuda", "dtype": torch.float32, "batch_size": None}
    pipe = Pipeline.load(tiny("2.5"), device="cuda", dtype=torch.float32)
    expected = [pipe.chat(row["query"], **GREEDY)[0] for row in TEXTS]
    expected.append(pipe.chat(f"<img>{tmp_path}/red.png</img>What?", **GREEDY)[0])
    assert responses(job(rows, **on_gpu)) == expected
    found = job(TEXTS, adapter=str(adapted[0]), overwrite=True, **on_gpu)
    assert responses(found) == adapted[1]


# ---------------------------------------------------------------- pictures


def test_a_picture_is_read_and_encoded_once_for_many_rows(job, picture, monkeypatch):
    asked: list[str] = []
    squares: list[int] = []
    forward = ImageEncoder.forward

    def counted(encoder: Any, canvases: Any, **options: Any) -> Any:
        squares.extend(range(len(canvases)))
        return forward(encoder, canvases, **options)

    def reply(got: Asked) -> Reply:
        asked.append(got.path)
        return Reply(picture(90, 60, "red"))

    monkeypatch.setattr(ImageEncoder, "forward", counted)
    with serving(reply) as host:
        rows = [ask(f"{n} <image>?", images=[f"{host.url}/a.png"]) for n in range(9)]
        assert infer(job(rows)).failed == 0
    assert asked == ["/a.png"]
    assert len(squares) == 1


def test_embeddings_are_bounded_and_made_again(job, pictures, monkeypatch):
    rows = [ask(f"{n} <image>?", images=[pictures[n % 2]]) for n in range(6)]
    expected = responses(job(rows))
    monkeypatch.setattr(pictures_module, "KEPT_ROWS", 1)
    monkeypatch.setattr(engine, "AHEAD_TOKENS", 1)
    assert responses(job(rows, overwrite=True)) == expected


def test_a_row_that_cannot_be_used_has_its_error_and_the_others_go_on(job, picture, tmp_path):
    (tmp_path / "red.png").write_bytes(picture(90, 60))
    jpeg = picture(300, 200, file_format="JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])  # its header is whole
    (tmp_path / "text.png").write_bytes(b"no picture")
    rows: Rows = [
        ask("Hi", "x"),
        "no JSON",
        {"nothing": 1},
        {"messages": [{"role": "system", "content": "only"}]},
        ask("<image>?", images=["missing.png"]),
        ask("<image>?", images=["text.png"]),
        ask("<image><image>?", images=["red.png", "cut.jpg"]),
        ask("half \ud83d"),
        ask("<image>?", images=["red.png"]),
    ]
    done = infer(job(rows))
    assert (done.rows, done.answered, done.failed) == (9, 2, 7)
    found = lines(tmp_path / "out.jsonl")
    assert [("error" in line) for line in found] == [False, *[True] * 7, False]
    for line, message in zip(
        found[1:],
        (
            "is not JSON",
            "the row has the columns nothing",
            "the last message must be a user's",
            "missing.png': No such file or directory",
            "the 10 bytes are not an image of a known format",
            "is damaged or cut short",
            "half a surrogate pair",
        ),
        strict=False,
    ):
        assert message in line["error"]
    assert [place.rpartition(":")[2] for place, _ in done.errors] == list("2345678")


def test_rows_with_an_error_are_tried_again(job, picture, tmp_path):
    rows = [ask("Hi"), ask("<image>?", images=["late.png"])]
    assert infer(job(rows)).failed == 1
    (tmp_path / "late.png").write_bytes(picture())
    done = infer(job())
    assert (done.rows, done.failed, done.new_rows) == (2, 0, 1)
    assert [line["index"] for line in lines(tmp_path / "out.jsonl")] == [0, 1]


# ---------------------------------------------------------------- questions


def test_the_last_answer_is_the_reference_and_what_is_before_it_the_question():
    config = tiny_config("2.5")
    turns = (
        Message("user", (ImageSlot(0), "a")),
        Message("assistant", ("b",)),
        Message("user", ("c",)),
        Message("assistant", ("d", ImageSlot(1))),
    )
    question = as_question(Conversation(turns, ("1", "2")), config)
    assert question.messages == turns[:3]
    assert question.reference == "d<ImageHere>"
    assert question.pictures == ("1",)
    assert not question.unmarked
    open_end = as_question(Conversation(turns[:3], ("1",)), config)
    assert open_end.messages == turns[:3]
    assert open_end.reference is None


def test_one_picture_without_a_slot_goes_where_training_puts_it():
    turns = (Message("user", ("a",)), Message("assistant", ("b",)), Message("user", ("c",)))
    row = Conversation(turns, (b"png",))
    question = as_question(row, tiny_config("2.5"))
    assert question.unmarked
    assert question.messages == turns
    elsewhere = as_question(row, tiny_config("2.0"))
    assert not elsewhere.unmarked
    assert elsewhere.messages[0] == Message("user", (ImageSlot(0), "a"))
    assert question.as_json()["images"][0].startswith("sha256:")


@pytest.mark.parametrize(
    "turns",
    [(), (Message("assistant", ("a",)),), (Message("system", ("a",)),)],
)
def test_a_conversation_without_a_question_is_refused(turns):
    with pytest.raises(InvalidRequest):
        as_question(Conversation(turns), tiny_config("2.5"))


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapted(tiny, tmp_path: Path) -> tuple[Path, list[str]]:
    """An adapter's folder, and what base and adapter merged into one say to `TEXTS`."""
    folder = write_adapter(tmp_path / "lora", tiny_config("2.5"), rank=5)
    pipe = Pipeline.load(tiny("2.5"), device="cpu", dtype=torch.float64)
    adapter = load_adapter(folder, pipe.config, digest="", dtype=torch.float64)
    merge_adapter(pipe.engine.decoder, adapter)
    return folder, [pipe.chat(row["query"], **GREEDY)[0] for row in TEXTS]


def test_an_adapter_answers_as_one_that_is_merged(job, adapted):
    folder, expected = adapted
    assert responses(job(TEXTS)) != expected
    assert responses(job(adapter=str(folder), overwrite=True)) == expected


def test_an_adapter_of_the_registry_is_the_folder_that_was_pushed(job, adapted, tiny, tmp_path):
    folder, expected = adapted
    store = tmp_path / "store"
    registry = Registry.open(str(store))
    import_checkpoint(tiny("2.5"), registry, "xc")
    import_checkpoint(tiny("2.0"), registry, "old")
    push_adapter(folder, registry, "cats", "xc")
    found = job(TEXTS, model="xc@1", adapter="cats", registry=str(store))
    assert responses(found) == expected
    settings = json.loads((tmp_path / "out.summary.json").read_text())["settings"]
    assert settings["adapter"] == "cats@1"
    assert settings["model"] == "xc@1"
    # The folders that they came from have the same digests: nothing is left to do.
    assert infer(job(adapter=str(folder))).new_rows == 0
    for changes, error, message in (
        ({"model": "old"}, InvalidRequest, "adapter cats@1 belongs to the base xc .*model is old"),
        ({"adapter": "xc"}, InvalidRequest, "xc@1 is a base, not an adapter"),
        ({"adapter": "dogs"}, NotFound, "'dogs' is not in the registry"),
        ({"adapter": "./dogs"}, CheckpointError, "neither an existing folder nor an adapter"),
        ({"registry": str(tmp_path / "no"), "model": str(tiny("2.5"))}, NotFound, "no registry at"),
        ({"adapter": str(tiny("2.5"))}, CheckpointError, "adapter_config"),
    ):
        with pytest.raises(error, match=message):
            infer(replace(found, output=tmp_path / "b.jsonl", **changes))


@pytest.fixture
def checkpoint(tiny, adapted, tmp_path: Path) -> Path:
    """What training leaves: the adapter, its state, and its rows for validation."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(adapted[0], folder / "adapter")
    (folder / "state.json").write_text(json.dumps({"base_digest": fingerprint(tiny("2.5"))}))
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["query"]},
                {"role": "assistant", "content": row["response"]},
            ],
            "images": [],
        }
        for row in TEXTS
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (folder / "validation.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_a_training_checkpoint_answers_the_rows_of_its_validation(job, adapted, checkpoint):
    found = job(checkpoint=str(checkpoint), dataset=None)
    assert responses(found) == adapted[1]
    assert [line["reference"] for line in lines(found.output)] == [r["response"] for r in TEXTS]
    # The same adapter and rows under other names: nothing is left to do.
    rows = str(checkpoint / "validation.jsonl")
    assert infer(job(checkpoint=str(checkpoint / "adapter"), dataset=rows)).new_rows == 0
    assert infer(job(adapter=str(adapted[0]), dataset=rows)).new_rows == 0


def test_a_checkpoint_that_does_not_fit_is_refused(job, checkpoint, tiny, tmp_path):
    found = job(TEXTS, checkpoint=str(checkpoint))
    with pytest.raises(CheckpointError, match=r"was trained on the base sha256:.*give its base as"):
        infer(replace(found, model=str(tiny("2.0"))))
    with pytest.raises(CheckpointError, match=r"is no training checkpoint.*in it: checkpoint$"):
        infer(replace(found, checkpoint=str(tmp_path)))
    with pytest.raises(InvalidRequest, match=r"give one of the two"):
        infer(replace(found, adapter="cats"))
    (checkpoint / "validation.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"validation.jsonl is not there.*give a --dataset"):
        infer(replace(found, dataset=None))
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state.json cannot be read"):
        infer(found)
    assert not found.output.exists()


# ---------------------------------------------------------------- continuing


def figures(summary: Summary) -> dict[str, Any]:
    """Those of the whole output."""
    own = ("new_rows", "new_tokens", "seconds", "tokens_per_s")
    return {name: value for name, value in vars(summary).items() if name not in own}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_output_that_was_cut_anywhere_is_continued_to_the_same_bytes(
    temperature, job, pictures, tmp_path
):
    rows = [*TEXTS, ask("<image>?", "a", images=["red.png"]), "no JSON"]
    options = replace(SHORT, temperature=temperature)
    whole = infer(job(rows, options=options))
    output, beside = tmp_path / "out.jsonl", tmp_path / "out.summary.json"
    data = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    started = json.dumps({**json.loads(beside.read_text()), "summary": None})
    for cut, missing in (
        (0, 10),
        (1, 10),
        (ends[2], 7),
        (ends[2] + 1, 7),
        (ends[4] - 1, 6),
        (len(data) - 1, 1),
        (len(data), 1),  # the row with an error is tried again
    ):
        output.write_bytes(data[:cut])
        beside.write_text(started)
        done = infer(job(options=options))
        assert output.read_bytes() == data
        assert done.new_rows == missing
        assert figures(done) == figures(whole)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_lines_that_came_in_another_order_are_put_into_that_of_the_data_set(job, tmp_path):
    # The first row is the longest: the others end before it.
    rows = [ask("Tell " * 30), *TEXTS]
    infer(job(rows))
    output = tmp_path / "out.jsonl"
    data = output.read_bytes()
    assert [line["index"] for line in lines(output)] == list(range(9))
    mixed = data.splitlines(keepends=True)[::-1]
    output.write_bytes(b"".join(mixed[:5]))
    assert infer(job()).new_rows == 4
    assert output.read_bytes() == data


def test_an_output_that_is_whole_loads_no_model(job, monkeypatch):
    whole = infer(job(TEXTS))
    monkeypatch.setattr(engine.Answerer, "load", None)
    again = infer(job())
    assert figures(again) == figures(whole)
    assert (again.new_rows, again.tokens_per_s) == (0, None)


def test_an_output_of_something_else_is_refused_with_the_difference(job, adapted, tiny, tmp_path):
    plain = job(TEXTS)
    infer(plain)
    data = plain.output.read_bytes()
    other = {"model": str(tiny("2.0"))}
    warm = {"options": replace(SHORT, temperature=0.5, seed=2)}
    for changes, message in (
        (warm, r"another seed \(0, now 2\); another temperature \(0.0, now 0.5\); name another"),
        ({"adapter": str(adapted[0])}, r"another adapter \(None, now .*lora, sha256:"),
        (other, r"another model \(.*, sha256:.*…, now .*, sha256:.*…\)"),
        ({"max_samples": 3}, r"holds row 7, and of this data set 3 rows .* raise --max-samples"),
    ):
        with pytest.raises(ConfigError, match=message):
            infer(replace(plain, **changes))
    changed = [*TEXTS[:2], ask("Something else"), *TEXTS[3:]]
    with pytest.raises(ConfigError, match=r"of another data set: row 2 is not the one of .*:3;"):
        infer(job(changed))
    assert plain.output.read_bytes() == data
    # A data set that only grew is the same one.
    assert infer(job([*TEXTS, ask("One more")])).new_rows == 1
    assert infer(replace(plain, overwrite=True, **warm)).new_rows == 9


def test_a_file_that_is_no_output_is_never_touched(job, tmp_path):
    plain = job(TEXTS)
    plain.output.write_text("my notes\n")
    with pytest.raises(ConfigError, match=r"out.summary.json, which says how it was made, cannot"):
        infer(plain)
    assert plain.output.read_text() == "my notes\n"
    infer(replace(plain, overwrite=True))
    kept = plain.output.read_bytes().splitlines(keepends=True)
    damaged = b"".join([kept[0], b"{}\n", *kept[2:]])
    plain.output.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"line 2 of .* is not one of an inference"):
        infer(plain)
    assert plain.output.read_bytes() == damaged


def test_two_processes_never_write_one_output(job):
    plain = job(TEXTS)
    with (
        Output.open(plain.output, {}),
        pytest.raises(ConfigError, match=r"another process writes .*out.jsonl now"),
    ):
        infer(plain)
    assert infer(plain).rows == 8


def test_no_data_set_and_no_folder_are_told(job, tmp_path):
    with pytest.raises(DataError):
        infer(job(dataset=str(tmp_path / "none.jsonl")))
    with pytest.raises(InvalidRequest, match=r"there is no data set"):
        infer(job(dataset=None))
    with pytest.raises(OSError, match=r"No such file or directory"):
        infer(job(TEXTS, output=tmp_path / "no" / "out.jsonl"))


def test_what_ended_before_the_engine_failed_is_kept(job, monkeypatch):
    expected = responses(job(TEXTS))
    step, count = Engine.step, 0

    def failing(engine: Engine) -> Any:
        nonlocal count
        count += 1
        if count == 20:
            engine.failure = "the device is gone"
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing)
    with pytest.raises(EngineError, match=r"the engine failed: the device is gone"):
        infer(job(overwrite=True))
    monkeypatch.undo()
    done = infer(job())
    assert 0 < done.new_rows < 8
    assert [line["response"] for line in lines(job().output)] == expected


def test_progress_counts_the_rows_that_are_there_already(job, tmp_path):
    infer(job(TEXTS, max_samples=5))
    told: list[tuple[str, int, int]] = []
    infer(job(), lambda *report: told.append(report))
    assert told[0] == ("rows, loading the model", 5, 8)
    assert [done for _, done, _ in told] == [5, 6, 7, 8]
    assert "tokens/s" in told[-1][0]
