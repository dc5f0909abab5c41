"""Adapters of a registry through `serve run`: names, moves while streams run, and broken versions.

Two decoders over one registry in a folder; the demo model comes from there too and is the base.
The adapters are random: none says what the base says, and whatever they do, it stays right.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.adapters import peft_model
from tests.e2e.serve_run import (
    RED_CIRCLE,
    ServeRun,
    assert_right,
    body,
    image,
    serve_run,
    text_of,
    until,
)
from xc_ray.hub import resolve_model
from xc_ray.model.adapter import load_adapter, merge_adapter
from xc_ray.pipeline import Pipeline
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.keys import blob_key
from xc_ray.registry.manifest import BaseRef, Manifest
from xc_ray.registry.registry import Registry

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),  # the first test waits for the server, too
    # peft asks a model for what transformers 5.23 calls otherwise; goes with peft's next release.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

BASE = resolve_model("demo")
NUM_DECODERS = 2
NUM_SLOTS = 2
POLL_S = 0.5
SWITCH_LIMIT_S = 15.0  # the aim at the default interval, 5 s; of a loaded machine here
GREEDY: dict[str, Any] = {"ignore_eos": True, "max_tokens": 24}
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 300}


@dataclass
class House:
    """A server, its registry, and the folders of the adapters by name and version."""

    server: ServeRun
    registry: Registry
    home: Path
    folders: dict[str, Path]
    answers: dict[str, str] = field(default_factory=dict)

    def ask(self, model: str, text: str = "What?", **fields: Any) -> httpx.Response:
        url = f"{self.server.url}/v1/chat/completions"
        headers = fields.pop("headers", {})
        content = body(text, **(GREEDY | {"model": f"demo{model}"} | fields))
        return httpx.post(url, json=content, headers=headers, timeout=120, trust_env=False)

    def said_by(self, version: str, **fields: Any) -> str:
        """What a version answers when it is asked for by its number."""
        key = f"{version} {sorted(fields.items())}"
        if key not in self.answers:
            self.answers[key] = text_of(self.ask(f":{version}", **fields))
        return self.answers[key]

    def served(self, name: str) -> str:
        """The version that a name means now, checked by what it says."""
        response = self.ask(f":{name}")
        version = str(response.json()["model"]).removeprefix("demo:")
        assert text_of(response) == self.said_by(version)
        return version

    def move(self, name: str, *targets: tuple[int, float], alias: str = "prod") -> None:
        """Points an alias elsewhere, and waits until all decoders have followed."""
        self.registry.promote(name, targets, alias)
        self.wait_until_moved(name, alias, dict(targets))

    def wait_until_moved(self, name: str, alias: str, targets: dict[int, float]) -> None:
        def moved() -> bool:
            card = self.card(f":{name}@{alias}")
            serving = [
                {t["version"]: t["weight"] for t in s} for s in card.get("serving", {}).values()
            ]
            return bool(serving) and all(s == targets for s in serving)

        until(moved, SWITCH_LIMIT_S, self.server)

    def use_everywhere(self, name: str) -> None:
        """Returns once every decoder has the adapter's alias in use.

        They prefer the one that has it: streams are opened until that has too much to do.
        """
        url = f"{self.server.url}/v1/chat/completions"
        request = body("What?", model=f"demo:{name}", stream=True, **(LONG | {"max_tokens": 8000}))
        with ExitStack() as streams:

            def used() -> bool:
                if len(self.card(f":{name}@prod").get("serving", {})) == NUM_DECODERS:
                    return True
                one = httpx.stream("POST", url, json=request, timeout=60, trust_env=False)
                assert streams.enter_context(one).status_code == 200
                return False

            until(used, SWITCH_LIMIT_S, self.server)

    def get(self, path: str) -> Any:
        return httpx.get(self.server.url + path, timeout=30, trust_env=False).json()

    def card(self, name: str) -> Any:
        return self.get(f"/v1/models/demo{name}")

    def push(self, name: str, seed: int, **options: Any) -> Manifest:
        """A new version, made by peft, unlike all others."""
        folder = self.home / f"{name}-{seed}"
        peft_model(BASE, seed=seed, lora_alpha=16, **options).save_pretrained(folder)
        manifest = push_adapter(folder, self.registry, name, "base")
        self.folders[f"{name}@{manifest.version}"] = folder
        return manifest

    def damage(self, manifest: Manifest) -> None:
        """Flips a bit of the largest file in the store."""
        file = max(manifest.files, key=lambda f: f.size)
        path = Path(self.registry.store.location.prefix, blob_key(file.sha256))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def metric(self, name: str, **tags: str) -> float:
        """The sum of a metric over all replicas."""
        found = list(self.server.log.parent.rglob("prom_metrics_service_discovery.json"))
        total = 0.0
        for target in json.loads(found[0].read_text())[0]["targets"]:
            text = httpx.get(f"http://{target}/metrics", timeout=30, trust_env=False).text
            for line in text.splitlines():
                if line.startswith(f"ray_{name}{{") and all(
                    f'{tag}="{value}"' in line for tag, value in tags.items()
                ):
                    total += float(line.rsplit(" ", 1)[1])
        return total


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The demo model, imported as `base`, and `cats` in two versions of which prod is the first."""
    home = tmp_path_factory.mktemp("adapters")
    registry = Registry.open(str(home / "registry"))
    import_checkpoint(BASE, registry, "base")
    registry.promote("base", [(1, 1.0)], "prod")
    args = {
        "model": "base@prod",
        "served_model_name": "demo",
        "registry": registry.store.url,
        "adapters": {"poll_s": POLL_S, "slots": NUM_SLOTS},
    }
    reports = {"RAY_metrics_report_interval_ms": "500"}
    with serve_run(args, num_decoders=NUM_DECODERS, **reports) as server:
        assert_right(server)  # with no adapter there
        house = House(server, registry, home, {})
        for seed in (1, 2):
            house.push("cats", seed)
        registry.promote("cats", [(1, 1.0)], "prod")
        yield house


@pytest.fixture
def cats(house: House) -> House:
    """`cats@prod` is version 1, on both decoders."""
    house.use_everywhere("cats")
    if house.card(":cats@prod")["targets"] != [{"version": 1, "weight": 1.0}]:
        house.move("cats", (1, 1.0))
    return house


@contextmanager
def asking(house: House, model: str, num_clients: int = 3) -> Iterator[list[httpx.Response]]:
    """Clients that ask again and again while the block runs; what they got."""
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(house.ask(model))

    with ThreadPoolExecutor(num_clients) as threads:
        asked = [threads.submit(ask) for _ in range(num_clients)]
        try:
            yield answers
        finally:
            stop.set()
    for future in asked:
        future.result()


class TestNames:
    def test_a_base_of_the_registry_answers_as_its_folder(self, house: House) -> None:
        pipe = Pipeline.load(BASE, device="cpu")
        expected, _ = pipe.chat("Who are you?", temperature=0, max_tokens=60)
        said = text_of(house.ask("", "Who are you?", max_tokens=60, ignore_eos=False))
        assert said == expected
        assert said.startswith("I am xc_ray's demo model")
        assert_right(house.server)
        assert house.ask("").json()["model"] == "demo"
        assert house.card("")["digest"] == house.registry.manifest("base", 1).digest

    def test_an_adapter_answers_as_the_model_that_it_is_merged_into(self, cats: House) -> None:
        for version in ("cats@1", "cats@2"):
            pipe = Pipeline.load(BASE, device="cpu")
            decoder = pipe.engine.decoder
            adapter = load_adapter(
                cats.folders[version], pipe.config, digest=version, dtype=decoder.dtype
            )
            merge_adapter(decoder, adapter)
            options: dict[str, Any] = {"max_tokens": 16, "ignore_eos": False}
            expected, _ = pipe.chat("What?", temperature=0, max_tokens=16)
            assert text_of(cats.ask(f":{version}", **options)) == expected
            assert expected != text_of(cats.ask("", **options))
            picture = "<ImageHere>What is it?"
            expected, _ = pipe.chat(picture, images=RED_CIRCLE, temperature=0, max_tokens=16)
            content = body(image(RED_CIRCLE), "What is it?", model=f"demo:{version}")
            url = f"{cats.server.url}/v1/chat/completions"
            response = httpx.post(
                url, json=content | {"max_tokens": 16}, timeout=60, trust_env=False
            )
            assert text_of(response) == expected != "A red circle."
            assert_right(cats.server)

    def test_each_form_of_a_name_gets_its_version(self, cats: House) -> None:
        second = cats.registry.manifest("cats", 2)
        names = ["cats", "cats@prod", "cats@1", "cats@2", f"cats@{second.digest}"]
        assert [cats.served(n) for n in names] == ["cats@1"] * 3 + ["cats@2"] * 2
        assert cats.said_by("cats@1") != cats.said_by("cats@2")

    def test_what_does_not_exist_is_a_404_that_names_what_does(self, cats: House) -> None:
        for name in (":dogs", ":cats@99", ":cats@beta"):
            for stream in (False, True):
                response = cats.ask(name, stream=stream)
                assert response.status_code == 404
                error = response.json()["error"]
                assert (error["param"], error["code"]) == ("model", "model_not_found")
                assert "cats@1, cats@2" in error["message"]
                assert "cats@prod" in error["message"]
        assert cats.ask(":Cats").status_code == 400
        assert_right(cats.server)

    def test_a_version_is_served_as_soon_as_it_is_published(self, house: House) -> None:
        manifest = house.push("fresh", 50)
        response = house.ask(f":fresh@{manifest.version}")
        assert response.json()["model"] == "demo:fresh@1"
        assert house.ask(":fresh").json()["model"] == "demo:fresh@1"

    def test_openais_client_lists_and_finds_them(
        self, cats: House, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        url = f"{cats.server.url}/v1"
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            listed = {model.id: model for model in client.models.list().data}
            assert {"demo", "demo:cats@prod", "demo:cats@1", "demo:cats@2"} <= listed.keys()
            assert client.models.retrieve("demo:cats@1") == listed["demo:cats@1"]
            first = listed["demo:cats@1"].model_extra
            assert first is not None
            assert first["parent"] == "demo"
            assert first["digest"] == cats.registry.manifest("cats", 1).digest
            assert first["aliases"] == ["prod"]
            assert len(first["loaded"]) == NUM_DECODERS
            with pytest.raises(openai.NotFoundError, match="there are demo:cats@prod"):
                client.models.retrieve("demo:cats@99")


class TestMoves:
    def test_streams_that_began_on_the_old_version_end_on_it_and_none_is_lost(
        self, cats: House
    ) -> None:
        expected = {v: cats.said_by(v, **LONG) for v in ("cats@1", "cats@2")}
        pids = cats.server.replicas("Decoder")
        with ThreadPoolExecutor(4) as threads, asking(cats, ":cats", 2) as answers:
            begun = threading.Barrier(5)
            streams = [threads.submit(stream, cats, ":cats", begun) for _ in range(4)]
            begun.wait(60)
            moved = time.monotonic()
            cats.move("cats", (2, 1.0))
            switched = time.monotonic() - moved
            assert cats.served("cats") == "cats@2"
            assert_right(cats.server)
            ended = [future.result() for future in streams]
        assert any(end > moved + switched for _, _, end in ended), "they ended before the move did"
        for version, text, _ in ended:
            assert (version, text) == ("demo:cats@1", expected["cats@1"])
        assert_whole(cats, answers, {"cats@1", "cats@2"})
        assert cats.server.replicas("Decoder") == pids
        assert switched < SWITCH_LIMIT_S

    def test_a_rollback_brings_the_old_answers_back(self, cats: House) -> None:
        cats.move("cats", (2, 1.0))
        with asking(cats, ":cats") as answers:
            assert_right(cats.server)
            cats.registry.rollback("cats", "prod")
            cats.wait_until_moved("cats", "prod", {1: 1.0})
            assert_right(cats.server)
        assert cats.served("cats") == "cats@1"
        assert_right(cats.server)
        assert_whole(cats, answers, {"cats@1", "cats@2"})

    def test_many_moves_under_load_lose_nothing(self, cats: House) -> None:
        with asking(cats, ":cats") as answers:
            for version in (2, 1, 2, 1):
                cats.move("cats", (version, 1.0))
                assert_right(cats.server)
            until(lambda: len(answers) > 10, 60, cats.server)
        assert_whole(cats, answers, {"cats@1", "cats@2"})

    def test_a_canary_is_the_same_for_a_user_and_a_key_and_counted_by_version(
        self, cats: House
    ) -> None:
        cats.move("cats", (1, 0.5), (2, 0.5))

        def version(**fields: Any) -> str:
            return str(cats.ask(":cats", max_tokens=1, **fields).json()["model"])

        with ThreadPoolExecutor(4) as threads:
            users = [{"user": f"user {i}"} for i in range(24)]
            keys = [{"headers": {"Authorization": f"Bearer key-{i}"}} for i in range(12)]
            for callers in (users, keys):
                rounds = [list(threads.map(lambda c: version(**c), callers)) for _ in range(3)]
                assert rounds[0] == rounds[1] == rounds[2]
                assert set(rounds[0]) == {"demo:cats@1", "demo:cats@2"}
        for number in ("1", "2"):
            until(
                lambda n=number: (
                    cats.metric(  # type: ignore[misc]  # a default is no type
                        "xc_ray_adapter_requests_total", adapter="cats", version=n
                    )
                    > 0
                ),
                20,
                cats.server,
            )
        card = cats.card(":cats")
        assert card["targets"] == [
            {"version": 1, "weight": 0.5},
            {"version": 2, "weight": 0.5},
        ]


class TestBrokenVersions:
    @pytest.mark.parametrize("how", ["of another base", "damaged"])
    def test_the_old_one_stays_and_health_models_and_metrics_say_so(
        self, house: House, how: str
    ) -> None:
        name = how.replace(" ", "-")
        house.push(name, 60 + len(how))
        house.registry.promote(name, [(1, 1.0)], "prod")
        house.use_everywhere(name)
        before = house.said_by(f"{name}@1")
        failed = house.metric("xc_ray_adapter_alias_switches_total", result="failed")
        if how == "damaged":
            house.damage(house.push(name, 80))
            why = "cannot be loaded now"
        else:
            base = BaseRef(name="other", digest="sha256:" + "0" * 64)
            folder = house.folders[f"{name}@1"]
            house.registry.push(folder, name=name, kind="adapter", base=base)
            why = "belongs to the base 'other'"
        with asking(house, f":{name}", 2) as answers:
            house.registry.promote(name, [(2, 1.0)], "prod")
            until(lambda: why in str(problems(house, name)), 15, house.server)
            until(
                lambda: (
                    house.metric("xc_ray_adapter_alias_switches_total", result="failed")
                    >= failed + NUM_DECODERS
                ),
                20,
                house.server,
            )
        assert {a.json()["model"] for a in answers} == {f"demo:{name}@1"}
        assert {text_of(a) for a in answers} == {before}
        card = house.card(f":{name}@prod")
        assert why in card["error"]
        assert card["targets"] == [{"version": 2, "weight": 1.0}]
        assert set(map(str, card["serving"].values())) == {"[{'version': 1, 'weight': 1.0}]"}
        until(
            lambda: house.metric("xc_ray_adapter_aliases_behind") >= NUM_DECODERS, 20, house.server
        )
        assert "cannot move to version 2 and serves version 1" in house.server.log.read_text()
        house.registry.rollback(name, "prod")
        until(lambda: not problems(house, name), 15, house.server)
        assert house.get("/readyz") == {"status": "ready"}
        assert_right(house.server)

    def test_asked_for_by_its_number_it_says_what_is_wrong(self, house: House) -> None:
        house.damage(house.push("rotten", 90))
        response = house.ask(":rotten@1")
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "adapter_unavailable"
        assert str(house.home) not in response.text
        assert_right(house.server)


def test_more_adapters_than_slots_are_all_served_and_the_thrashing_is_told(house: House) -> None:
    versions = [f"many@{house.push('many', 100 + i).version}" for i in range(NUM_SLOTS * 3)]
    expected = {v: house.said_by(v) for v in versions}
    assert len(set(expected.values())) == len(versions)
    with ThreadPoolExecutor(len(versions)) as threads:
        for _ in range(3):
            answers = threads.map(lambda v: house.ask(f":{v}"), versions)
            assert {v: text_of(a) for v, a in zip(versions, answers, strict=True)} == expected
            assert_right(house.server)
    cards = {v: house.card(f":{v}") for v in versions}
    where = Counter(place for card in cards.values() for place in card["loaded"].values())
    assert where["device"] <= NUM_SLOTS * NUM_DECODERS
    assert where["host"] > 0
    until(lambda: house.metric("xc_ray_adapter_slot_reloads_total") > 0, 20, house.server)
    assert house.metric("xc_ray_adapter_slot_evictions_total") > 0
    assert "more adapters are in use than" in house.server.log.read_text()


def stream(house: House, model: str, begun: threading.Barrier) -> tuple[str, str, float]:
    """One long stream: its version, its text, and when it ended; it tells when it has begun."""
    content = body("What?", **(LONG | {"model": f"demo{model}", "stream": True}))
    url = f"{house.server.url}/v1/chat/completions"
    text, version = "", set()
    with httpx.stream("POST", url, json=content, timeout=120, trust_env=False) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        for line in lines:
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            if not text and event["choices"][0]["delta"].get("content"):
                begun.wait(60)
            version.add(event["model"])
            text += event["choices"][0]["delta"].get("content", "")
    (only,) = version
    return only, text, time.monotonic()


def assert_whole(house: House, answers: list[httpx.Response], versions: set[str]) -> None:
    """Every answer is wholly that of the version that it names."""
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        version = str(answer.json()["model"]).removeprefix("demo:")
        assert version in versions
        assert text_of(answer) == house.said_by(version)


def problems(house: House, name: str) -> list[str]:
    """What /readyz says of an adapter; it is ready all the same."""
    response = httpx.get(house.server.url + "/readyz", timeout=30, trust_env=False)
    assert response.status_code == 200
    return [p for p in response.json().get("problems", []) if f"{name}@" in p]
