"""build(): what is refused before anything runs, what is asked of Ray, and the models running."""

import base64
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus
from safetensors.torch import load_file, save_file

from tests.adapters import write_adapter
from tests.serve import breakable
from tests.serve.conftest import Cluster
from xc_ray.config import AUTO_DECODER_SHARE, AUTO_ENCODER_SHARE, DecoderOptions, ServeConfig
from xc_ray.demo import make
from xc_ray.demo.make import save_random, tiny_config
from xc_ray.errors import CheckpointError, ConfigError
from xc_ray.hub import cache_folder
from xc_ray.model.config import Variant
from xc_ray.model.layout import read_layout
from xc_ray.pipeline import Pipeline
from xc_ray.prompt.tokenizer import load_tokenizer
from xc_ray.publish import import_checkpoint, push_adapter
from xc_ray.registry.registry import Registry
from xc_ray.serve.app import _deployment, _pinned, build
from xc_ray.serve.encoder import VisionEncoder

Draw = Callable[..., bytes]
Tiny = Callable[..., Path]
REFUSED = (CheckpointError, ConfigError, RayServeException)
ON_CPU: dict[str, Any] = {"encoder": {"num_gpus": 0}, "decoder": {"num_gpus": 0}}


def without_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    save_random(folder, tiny_config("2.5"), max_shard_bytes=100_000)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_a_wrong_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.attention.wo.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def without_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def with_a_wrong_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1000}))


def with_another_tokenizer(folder: Path) -> None:
    with mock.patch.object(make, "VOCAB_SIZE", 900):
        (folder / "tokenizer.model").write_bytes(make.train_tokenizer())


def without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN = [
    (without_a_shard, r"lacks 1 of \d+ shards: model-00002-of-.*download them again"),
    (with_a_wrong_shape, r"wo\.weight is \[31, 32\], config\.json asks for \[32, 32\]"),
    (without_a_tensor, r"1 missing: model\.norm\.weight"),
    (with_a_wrong_vocabulary, r"1,024 pieces.*vocabulary of 1,000|\[1024, 32\].*\[1000, 32\]"),
    (with_another_tokenizer, r"tokenizer\.model has 900 pieces.*vocabulary of 1,024"),
    (without_a_tokenizer, r"tokenizer\.model is missing"),
    (cut_short, r"model\.safetensors is damaged or cut short"),
]


@pytest.fixture
def broken(tiny: Tiny, tmp_path: Path) -> Callable[[Callable[[Path], None]], Path]:
    """A function that copies the tiny model and breaks it."""

    def copy(damage: Callable[[Path], None]) -> Path:
        folder = tmp_path / damage.__name__
        shutil.copytree(tiny(), folder)
        damage(folder)
        return folder

    return copy


@pytest.fixture
def registry(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The tiny model as `base`, and an adapter `cats`; with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry = Registry.open(str(tmp_path / "registry"))
    import_checkpoint(tiny(), registry, "base")
    registry.promote("base", [(1, 1.0)], "prod")
    push_adapter(
        write_adapter(tmp_path / "a", read_layout(tiny()).config), registry, "cats", "base"
    )
    return registry


class TestRefusedBeforeAnythingRuns:
    @pytest.fixture(autouse=True)
    def no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})

    @pytest.mark.parametrize(
        ("damage", "message"), BROKEN, ids=lambda v: getattr(v, "__name__", "")
    )
    def test_a_bad_folder(
        self, broken: Callable[..., Path], damage: Callable[[Path], None], message: str
    ) -> None:
        with pytest.raises(REFUSED, match=message) as caught:
            build(ServeConfig(model=str(broken(damage))))
        assert "\n" not in str(caught.value)

    def test_a_folder_that_is_not_there(self) -> None:
        with pytest.raises(REFUSED, match=r"'\./no-such-model' is neither 'demo', nor"):
            build(ServeConfig(model="./no-such-model"))

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"model": "base@7"}, r"'base@7' .*'base' has no version 7; it has 1"),
            ({"model": "cats"}, r"'cats' is an adapter .* serve its base"),
            ({"model": "other"}, r"'other' is not in the registry"),
            ({"registry": "ftp://host/x"}, r"ftp"),
            ({"registry": "s3://bucket?regoin=x"}, r"regoin.*region"),
            ({"keys": "/none/keys.yaml"}, r"cannot read the key file /none/keys.yaml: No such"),
        ],
    )
    def test_a_base_or_a_registry_that_is_not_there(
        self, registry: Registry, args: dict[str, Any], message: str
    ) -> None:
        whole = {"model": "base", "registry": registry.store.url} | args
        with pytest.raises(RayServeException, match=message) as caught:
            build(ServeConfig.model_validate(whole))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("part", ["encoder", "decoder"])
    def test_a_share_of_a_gpu_that_is_not_there(self, part: str) -> None:
        config = ServeConfig.model_validate({part: {"num_gpus": 0.5}})
        with pytest.raises(REFUSED, match="the cluster has no GPU; set them to auto or 0") as e:
            build(config)
        assert f"{part}.num_gpus is 0.5" in str(e.value)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({"modle": "demo"}, "unknown key 'modle'; did you mean 'model'?"),
            ({"decoder": {"max_seqs": 2}}, "unknown key 'max_seqs'; did you mean 'max_num_seqs'?"),
            ({"limits": {"max_image": 2}}, "did you mean 'max_images'?"),
            ({"encoder": {"zzz": 2}}, "known are num_gpus, num_cpus, resources"),
        ],
    )
    def test_an_unknown_key_by_its_nearest_name(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError) as caught:
            ServeConfig.model_validate(args)
        assert message in str(caught.value)


def shares_of(app: Application) -> dict[str, tuple[float, float]]:
    """(num_gpus, num_cpus) of each deployment; an application holds the one that it calls."""
    found: dict[str, tuple[float, float]] = {}
    apps = [app]
    while apps:
        deployment = apps.pop()._bound_deployment
        options = deployment.ray_actor_options or {}
        found[deployment.name] = (options["num_gpus"], options["num_cpus"])
        apps += [arg for arg in deployment.init_args if isinstance(arg, Application)]
    return found


def test_replicas_ask_for_the_resources_that_their_part_names() -> None:
    part = DecoderOptions(num_gpus=1, resources={"large": 1})
    large = _deployment(VisionEncoder, part, 8).ray_actor_options
    plain = _deployment(VisionEncoder, DecoderOptions(num_gpus=0), 8).ray_actor_options
    assert large is not None
    assert plain is not None
    assert (large["num_gpus"], large["resources"]) == (1, {"large": 1})
    assert not plain.get("resources")


class TestPinned:
    def test_all_replicas_are_told_the_same_bytes(self, registry: Registry, tiny: Tiny) -> None:
        digest = registry.manifest("base", 1).digest
        for model in ("base", "base@prod", "base@1"):
            config = ServeConfig(model=model, registry=registry.store.url)
            pinned, found, tokenizer = _pinned(config)
            assert pinned.model == f"base@{digest}"
            assert pinned.public_name == "base"
            assert found == read_layout(tiny()).config
            assert tokenizer.encode("What?") == load_tokenizer(tiny(), 1024).encode("What?")

    def test_the_weights_stay_where_they_are(self, registry: Registry) -> None:
        _pinned(ServeConfig(model="base", registry=registry.store.url))
        fetched = {path.name for path in (cache_folder() / "registry" / "models").rglob("*")}
        assert "tokenizer.model" in fetched
        assert not any(name.endswith(".safetensors") for name in fetched)

    def test_a_name_of_ones_own_stays(self, registry: Registry) -> None:
        url = registry.store.url
        config = ServeConfig(model="base", registry=url, served_model_name="Mine")
        assert _pinned(config)[0].public_name == "Mine"

    def test_a_folder_is_left_as_it_is(self, tiny: Tiny) -> None:
        config = ServeConfig(model=str(tiny()))
        assert _pinned(config)[0] == config


class TestShares:
    def test_auto_without_a_gpu_is_the_cpu(
        self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
        assert shares_of(build(ServeConfig(model=str(tiny())))) == {
            "Ingress": (0, 0.25),
            "Decoder": (0, 0.25),
            "VisionEncoder": (0, 0.25),
        }

    @pytest.mark.ray
    def test_auto_with_one_is_shares_of_it(self, cluster: Cluster, tiny: Tiny) -> None:
        shares = shares_of(build(ServeConfig(model=str(tiny()))))
        assert shares["Ingress"][0] == 0
        assert shares["Decoder"][0] == AUTO_DECODER_SHARE
        assert shares["VisionEncoder"][0] == AUTO_ENCODER_SHARE
        assert AUTO_DECODER_SHARE + AUTO_ENCODER_SHARE <= 1

    @pytest.mark.ray
    def test_what_the_file_says_counts(self, cluster: Cluster, tiny: Tiny) -> None:
        parts = {
            "encoder": {"num_gpus": 0.25, "num_cpus": 1},
            "decoder": {"num_gpus": 0, "num_cpus": 2},
            "ingress": {"num_cpus": 0.5},
        }
        config = ServeConfig.model_validate({"model": str(tiny()), **parts})
        assert shares_of(build(config)) == {
            "Ingress": (0, 0.5),
            "Decoder": (0, 2),
            "VisionEncoder": (0.25, 1),
        }


def image(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def name_of(variant: Variant) -> str:
    return f"v{variant.replace('.', '').replace('-', '').lower()}"


def running(cluster: Cluster, folder: Path, variant: Variant) -> str:
    """The name of the application with this model, deployed unless it is there."""
    name = f"v{variant.replace('.', '').replace('-', '').lower()}"
    if name not in cluster.args:
        cluster.deploy(**{name: {"model": str(folder), "served_model_name": name, **ON_CPU}})
    status = cluster.settled(name)
    assert status.status == ApplicationStatus.RUNNING, status.message
    return name


class TestRouting:
    @pytest.mark.parametrize(
        ("args", "options"),
        [
            ({}, {"load_factor": 1.5, "free_tokens": 16_384}),
            (
                {"max_model_len": 512, "decoder": {"load_factor": 2.5}},
                {"load_factor": 2.5, "free_tokens": 512},
            ),
        ],
    )
    def test_the_decoder_has_our_router_and_nobody_else(
        self,
        tiny: Tiny,
        monkeypatch: pytest.MonkeyPatch,
        args: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
        app = build(ServeConfig.model_validate({"model": str(tiny())} | args))
        routers = {}
        while True:
            deployment = app._bound_deployment
            routers[deployment.name] = deployment._deployment_config.request_router_config
            inner = [arg for arg in deployment.init_args if isinstance(arg, Application)]
            if not inner:
                break
            (app,) = inner
        config = routers.pop("Decoder")
        assert config.request_router_class == "xc_ray.serve.router.DecoderRouter"
        assert config.request_router_kwargs == options
        assert all(other.is_default_request_router() for other in routers.values())


@pytest.mark.ray
@pytest.mark.timeout(600)
class TestRunning:
    @pytest.mark.parametrize(
        "variant",
        ["2.5", *(pytest.param(v, marks=pytest.mark.slow) for v in ("2.0", "2.0-VL", "2.0-4KHD"))],
    )
    def test_each_model_answers_as_its_pipeline(
        self, cluster: Cluster, tiny: Tiny, picture: Draw, variant: Variant
    ) -> None:
        name = running(cluster, tiny(variant), variant)
        data = picture(120, 80)
        response = cluster.ask(name, image(data))
        assert response.status_code == 200, response.text
        pipe = Pipeline.load(tiny(variant), device="cpu")
        expected, _ = pipe.chat("<ImageHere>What?", images=[data], temperature=0.0, max_tokens=6)
        assert response.json()["choices"][0]["message"]["content"] == expected

    def test_a_decoder_whose_engine_failed_is_replaced_and_every_answer_hears_of_it(
        self, cluster: Cluster, tiny: Tiny
    ) -> None:
        name = "breakable"
        config = ServeConfig(model=str(tiny()), served_model_name=name)
        serve.run(breakable.application(config), name=name, route_prefix=f"/{name}")
        try:
            before = cluster.ask(name).json()["choices"]
            endless = {"max_tokens": 16_000, "ignore_eos": True}
            with ThreadPoolExecutor(2) as pool:
                open_answers = [
                    pool.submit(cluster.ask, name, stream=stream, **endless)
                    for stream in (False, True)
                ]
                time.sleep(1)  # both are being answered
                broken = cluster.ask(name, seed=breakable.BREAKING_SEED)
                whole, stream = (answer.result() for answer in open_answers)
            assert (broken.status_code, whole.status_code, stream.status_code) == (500, 500, 200)
            last = stream.text.rstrip().rpartition("data: ")[2]
            for error in (broken.json(), whole.json(), json.loads(last)):
                assert error["error"]["message"] == "the engine failed; try again later"
            deadline = time.monotonic() + 60
            while (after := cluster.ask(name)).status_code != 200:
                assert time.monotonic() < deadline, after.text
                time.sleep(0.2)
            assert after.json()["choices"] == before
        finally:
            serve.delete(name)

    def test_a_change_that_cannot_work_says_why_and_the_old_model_stays(
        self, cluster: Cluster, tiny: Tiny, broken: Callable[..., Path], picture: Draw
    ) -> None:
        name = running(cluster, tiny(), "2.5")
        before = cluster.ask(name, image(picture())).json()["choices"]
        message = failure(cluster, name, model=str(broken(without_a_shard)))
        assert "download them again" in message
        assert cluster.ask(name, image(picture())).json()["choices"] == before

    @pytest.mark.slow  # Serve tries four times
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"modle": "demo"}, "did you mean 'model'?"),
            ({"decoder": {"num_gpus": 0, "kv_cache_tokens": 100}}, "holds 100 tokens"),
        ],
    )
    def test_what_else_cannot_work_says_why(
        self, cluster: Cluster, tiny: Tiny, change: dict[str, Any], message: str
    ) -> None:
        name = running(cluster, tiny(), "2.5")
        assert message in failure(cluster, name, **change)


def failure(cluster: Cluster, name: str, **change: Any) -> str:
    """What Serve says of an application with other `args`, which cannot work; puts it back."""
    args = cluster.args[name]
    cluster.deploy(**{name: args | change})
    status = cluster.settled(name)
    cluster.deploy(**{name: args})
    assert status.status == ApplicationStatus.DEPLOY_FAILED
    return "\n".join([status.message, *(d.message for d in status.deployments.values())])
