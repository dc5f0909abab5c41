import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from xc_ray.config import (
    AUTO_DECODER_SHARE,
    AUTO_ENCODER_SHARE,
    AutoscalingOptions,
    PolicyOptions,
    ServeConfig,
    ServeFile,
)
from xc_ray.errors import ConfigError

ROOT = Path(__file__).parents[1]


def serve_yaml(args: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    application = {"name": "xc_ray", "import_path": "xc_ray.serve.app:build", "args": args or {}}
    return {"applications": [application], **more}


def read(tmp_path: Path, values: Any) -> ServeFile:
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ServeFile.read(path)


def refusal(tmp_path: Path, values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, values)
    assert "\n" not in caught.value.message
    return caught.value.message.removeprefix(f"{tmp_path / 'serve.yaml'}: ")


def test_the_serve_config_at_the_root_is_a_valid_serve_file() -> None:
    file = ServeFile.read(ROOT / "serve_config.yaml")
    (application,) = file.applications
    assert application.args == ServeConfig(model="demo")
    assert file.http_options.host == "127.0.0.1"


def test_its_lines_for_logs_and_spans_are_valid_once_they_count(tmp_path: Path) -> None:
    text = (ROOT / "serve_config.yaml").read_text()
    text, uncommented = re.subn(r"(?m)^# (?=(?:logging|tracing)_config: )", "", text)
    assert uncommented == 2
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    file, theirs = ServeFile.read(path), ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert file.logging_config == {"encoding": "JSON"}
    assert file.tracing_config == {"enabled": True, "sampling_ratio": 0.01}
    assert theirs.logging_config is not None
    assert theirs.logging_config.encoding == "JSON"
    assert theirs.tracing_config is not None
    assert theirs.tracing_config.sampling_ratio == 0.01


def test_a_file_needs_nothing_but_a_name_and_the_import_path(tmp_path: Path) -> None:
    (application,) = read(tmp_path, serve_yaml()).applications
    assert application.args == ServeConfig()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"encoder": {"num_gpu": 1}}, "encoder: unknown key 'num_gpu'; did you mean 'num_gpus'?"),
        ({"modle": "demo"}, "unknown key 'modle'; did you mean 'model'?"),
        (
            {"decoder": {"max_seqs": 4}},
            "decoder: unknown key 'max_seqs'; did you mean 'max_num_seqs'?",
        ),
        (
            {"ingress": {"zzz": 1}},
            "ingress: unknown key 'zzz'; known are num_cpus",
        ),
        ({5: 1}, "unknown key '5'; known are model, "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_name(
    tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    refused = refusal(tmp_path, serve_yaml(args))
    assert refused.startswith("applications.0.args")
    assert message in refused


def test_an_unknown_deployment_key_is_refused_which_serve_itself_would_drop(tmp_path: Path) -> None:
    values = serve_yaml()
    values["applications"][0]["deployments"] = [{"name": "Decoder", "num_replica": 2}]
    assert refusal(tmp_path, values) == (
        "applications.0.deployments.0: unknown key 'num_replica'; did you mean 'num_replicas'?"
    )


def scaled(name: str = "Decoder", number: Any = None, **autoscaling: Any) -> dict[str, Any]:
    values = serve_yaml()
    entry = {"name": name, "autoscaling_config": autoscaling}
    if number is not None:
        entry["num_replicas"] = number
    values["applications"][0]["deployments"] = [entry]
    return values


class TestAutoscaling:
    def test_the_blocks_in_the_shipped_file_are_valid_once_they_count(self, tmp_path: Path) -> None:
        text = (ROOT / "serve_config.yaml").read_text()
        text, uncommented = re.subn(r"(?m)^        # (?=autoscaling_config:|  )", " " * 8, text)
        text, removed = re.subn(r"(?m)^        num_replicas: 1\n", "", text)
        assert (uncommented > 20, removed) == (True, 3)
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        (application,) = ServeFile.read(path).applications
        found = {str(d.name): d.autoscaling_config for d in application.deployments}
        assert all(found.values())
        assert found["VisionEncoder"] is not None
        assert found["VisionEncoder"].min_replicas == 0
        (theirs,) = ServeDeploySchema.model_validate(yaml.safe_load(text)).applications
        for deployment in theirs.deployments:
            ours = found[deployment.name]
            made = deployment.autoscaling_config
            if not isinstance(made, AutoscalingConfig):
                made = AutoscalingConfig.model_validate(made)
            assert ours is not None
            for key, value in ours.model_dump(exclude_none=True, exclude={"policy"}).items():
                assert getattr(made, key) == value
            if ours.policy is not None:
                assert made.policy.policy_function == ours.policy.policy_function
                assert made.policy.policy_kwargs == ours.policy.policy_kwargs

    def test_every_key_is_one_of_serves_and_none_is_deprecated(self) -> None:
        theirs = AutoscalingConfig.model_fields
        for key, field in AutoscalingOptions.model_fields.items():
            assert key in theirs
            assert "DEPRECATED" not in (theirs[key].description or "")
            if field.default is not None:
                assert field.default == theirs[key].default
        assert PolicyOptions.model_fields.keys() == AutoscalingPolicy.model_fields.keys()

    @pytest.mark.parametrize("number", [1, "auto"])
    def test_one_size_or_bounds_not_both(self, tmp_path: Path, number: Any) -> None:
        assert refusal(tmp_path, scaled(number=number, max_replicas=4)) == (
            f"applications.0.deployments.0: Decoder has num_replicas ({number}) and "
            "autoscaling_config; give one of the two"
        )

    @pytest.mark.parametrize(
        ("autoscaling", "message"),
        [
            ({"max_replica": 2}, "unknown key 'max_replica'; did you mean 'max_replicas'?"),
            ({"smoothing_factor": 1.0}, "unknown key 'smoothing_factor'"),
            ({"min_replicas": 3, "max_replicas": 2}, "min_replicas is 3, initial_replicas None, "),
            ({"initial_replicas": 5, "max_replicas": 2}, "initial_replicas 5, max_replicas 2"),
            ({"upscale_delay_s": -1}, "upscale_delay_s: "),
            ({"aggregation_function": "sum"}, "aggregation_function: "),
            ({"policy": {"policy_function": "scale"}}, "policy.policy_function: "),
            (
                {"policy": {"policy_function": "xc_ray.serve.scale:Policy"}},
                "no policy 'Policy' in xc_ray.serve.scale; known are ",
            ),
            (
                {
                    "policy": {
                        "policy_function": "xc_ray.serve.scale:DecoderPolicy",
                        "policy_kwargs": {"target_usage": 0.5},
                    }
                },
                "policy_kwargs: unknown key 'target_usage'; did you mean 'target_use'?",
            ),
            (
                {
                    "policy": {
                        "policy_function": "xc_ray.serve.scale:EncoderPolicy",
                        "policy_kwargs": {"target_use": 2},
                    }
                },
                "policy_kwargs: target_use: Input should be less than or equal to 1 (found 2)",
            ),
        ],
    )
    def test_what_serve_would_drop_or_fail_on_late_is_refused(
        self, tmp_path: Path, autoscaling: dict[str, Any], message: str
    ) -> None:
        refused = refusal(tmp_path, scaled(**autoscaling))
        assert refused.startswith("applications.0.deployments.0.autoscaling_config")
        assert message in refused

    def test_a_policy_of_ones_own_is_taken_as_it_is(self, tmp_path: Path) -> None:
        policy = {"policy_function": "mine.scale:policy", "policy_kwargs": {"any": [1]}}
        (application,) = read(tmp_path, scaled(policy=policy)).applications
        found = application.deployments[0].autoscaling_config
        assert found is not None
        assert found.policy == PolicyOptions(**policy)


def test_an_unknown_deployment_is_refused_with_the_three_there_are(tmp_path: Path) -> None:
    values = serve_yaml()
    values["applications"][0]["deployments"] = [{"name": "Encoder"}]
    assert refusal(tmp_path, values) == (
        "applications.0.deployments.0.name: Input should be 'Ingress', 'Decoder' or "
        "'VisionEncoder' (found 'Encoder')"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"model": 5}, "args.model: Input should be a valid string (found 5)"),
        (
            {"max_model_len": 4},
            "args.max_model_len: Input should be greater than or equal to 16 (found 4)",
        ),
        ({"decoder": {"max_num_seqs": 1.5}}, "got a number with a fractional part (found 1.5)"),
        ({"decoder": {"max_num_seqs": 0}}, "greater than or equal to 1 (found 0)"),
        ({"dtype": "int8"}, "'auto', 'bfloat16', 'float16' or 'float32' (found 'int8')"),
        ({"encoder": []}, "args.encoder: Input should be a valid dictionary"),
        ({"limits": {"max_image_bytes": -1}}, "limits.max_image_bytes: "),
        (
            {"limits": {"max_request_bytes": 4096, "max_held_bytes": 8191}},
            "args.limits: max_held_bytes is 8,191 and max_request_bytes 4,096: one request may "
            "hold twice as much as that, its pictures included; raise the one or lower the other",
        ),
        ({"media": {"timeout_s": 0}}, "media.timeout_s: Input should be greater than 0 (found 0)"),
        ({"keys": "keys.yaml"}, "keys is a path from the root, such as /etc/xc_ray/keys.yaml: "),
        (
            {"keys": "/keys.yaml", "insecure": True},
            "keys is /keys.yaml and insecure is true, which is for a server without keys; give one",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_itself(
    tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    assert message in refusal(tmp_path, serve_yaml(args))


@pytest.mark.parametrize("share", [-1, "all", 65, float("nan"), True])
def test_a_wrong_share_is_told_what_a_share_may_be(tmp_path: Path, share: Any) -> None:
    refused = refusal(tmp_path, serve_yaml({"decoder": {"num_gpus": share}}))
    assert refused.startswith("applications.0.args.decoder.num_gpus: ")
    for word in ("auto", "0", "64", str(share)):
        assert word in refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "Input should be a valid dictionary"),
        ([1], "Input should be a valid dictionary"),
        ({"applications": []}, "applications: Tuple should have at least 1 item"),
        ({"applications": [{"name": "x"}]}, "applications.0.import_path: Field required"),
        (
            {"applications": [{"name": "x", "import_path": "other:app"}]},
            "applications.0.import_path: Input should be 'xc_ray.serve.app:build' "
            "(found 'other:app')",
        ),
        (serve_yaml(http_options={"port": 70000}), "http_options.port: "),
        (serve_yaml(proxy_location="Everywhere"), "proxy_location: "),
    ],
)
def test_a_file_that_is_no_serve_file_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    assert refusal(tmp_path, values).startswith(message)


@pytest.mark.parametrize("data", [b"applications: [", b"a:\t- b", b"\xff\xfe\x00\x80", b"\x00"])
def test_a_file_that_is_not_yaml_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "serve.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is not YAML: ") as caught:
        ServeFile.read(path)
    assert "\n" not in caught.value.message


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        ServeFile.read(path)
    assert caught.value.message == f"cannot read {path}: No such file or directory"


def test_auto_is_a_share_of_one_gpu_where_there_is_one() -> None:
    config = ServeConfig().resolve(num_gpus=1)
    assert config.encoder.num_gpus == AUTO_ENCODER_SHARE
    assert config.decoder.num_gpus == AUTO_DECODER_SHARE
    assert AUTO_ENCODER_SHARE + AUTO_DECODER_SHARE <= 1


def test_auto_is_no_gpu_where_there_is_none() -> None:
    config = ServeConfig().resolve(num_gpus=0)
    assert (config.encoder.num_gpus, config.decoder.num_gpus) == (0, 0)


def test_a_share_that_is_given_stays() -> None:
    config = ServeConfig.model_validate({"encoder": {"num_gpus": 0.2}, "decoder": {"num_gpus": 2}})
    resolved = config.resolve(num_gpus=4)
    assert (resolved.encoder.num_gpus, resolved.decoder.num_gpus) == (0.2, 2)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_share_of_a_gpu_that_is_not_there_is_refused(part: str) -> None:
    config = ServeConfig.model_validate({part: {"num_gpus": 0.5}})
    with pytest.raises(ConfigError) as caught:
        config.resolve(num_gpus=0)
    assert f"{part}.num_gpus is 0.5" in caught.value.message
    assert caught.value.message.endswith(
        "the cluster has no GPU; set them to auto or 0 to run on CPU"
    )
    assert caught.value.param == "num_gpus"


def test_gpus_that_are_expected_count_as_there() -> None:
    assert ServeConfig(expect_gpus=True).resolve(num_gpus=0).decoder.num_gpus == 0.85
    config = ServeConfig.model_validate({"decoder": {"num_gpus": 1}, "expect_gpus": True})
    assert config.resolve(num_gpus=0).decoder.num_gpus == 1
    assert config.resolve(num_gpus=1).encoder.num_gpus == 0.15


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_resource_has_an_amount(part: str) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        ServeConfig.model_validate({part: {"resources": {"large": 0}}})
    assert getattr(ServeConfig(), part).resources == {}


def test_resolving_changes_nothing_but_the_shares() -> None:
    config = ServeConfig.model_validate(
        {"model": "org/name", "max_model_len": 512, "decoder": {"max_num_seqs": 3}}
    )
    before = config.model_dump()
    after = config.resolve(num_gpus=1).model_dump()
    assert config.model_dump() == before
    after["encoder"]["num_gpus"] = after["decoder"]["num_gpus"] = "auto"
    assert after == before


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "demo"),
        ("folder/of/model", "model"),
        ("folder/of/model/", "model"),
        ("internlm/internlm-xcomposer2d5-7b", "internlm-xcomposer2d5-7b"),
        ("internlm/internlm-xcomposer2d5-7b@main", "internlm-xcomposer2d5-7b"),
    ],
)
def test_a_models_public_name_is_the_last_part_of_where_it_lies(model: str, name: str) -> None:
    assert ServeConfig(model=model).public_name == name


def test_a_served_model_name_is_the_public_name() -> None:
    assert ServeConfig(model="some/folder", served_model_name="mine").public_name == "mine"


def test_a_config_cannot_be_changed() -> None:
    config = ServeConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.model = "other"  # type: ignore[misc]


def test_shares_that_no_cluster_of_this_size_can_hold_are_refused() -> None:
    config = ServeConfig.model_validate({"decoder": {"num_gpus": 1.0}})
    with pytest.raises(ConfigError, match=r"together 1\.15, and the cluster has 1; lower one"):
        config.resolve(1)
    assert config.resolve(2).encoder.num_gpus == 0.15


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"slots": -1}, "adapters.slots: slots are auto or a number from 0 to 256 (found -1)"),
        ({"slots": "many"}, "slots are auto or a number from 0 to 256 (found 'many')"),
        ({"slots": True}, "slots are auto or a number from 0 to 256 (found True)"),
        ({"slots": 2.5}, "slots are auto or a number from 0 to 256 (found 2.5)"),
        ({"max_rank": 65}, "adapters.max_rank: Input should be less than or equal to 64"),
        ({"poll_s": 0}, "adapters.poll_s: Input should be greater than or equal to 0.1"),
        ({"slot": 1}, "adapters: unknown key 'slot'; did you mean 'slots'?"),
    ],
)
def test_adapters_are_refused_by_key_and_value(
    tmp_path: Path, adapters: dict[str, Any], message: str
) -> None:
    assert message in refusal(tmp_path, serve_yaml({"adapters": adapters}))


@pytest.mark.parametrize("slots", ["auto", 0, 1, 256])
def test_slots_are_a_number_or_auto(tmp_path: Path, slots: Any) -> None:
    (application,) = read(tmp_path, serve_yaml({"adapters": {"slots": slots}})).applications
    assert application.args.adapters.slots == slots


@pytest.mark.parametrize("model", ["base", "base@3", "base@prod", f"base@sha256:{'0' * 64}"])
def test_a_base_of_the_registry_is_called_by_its_name(model: str) -> None:
    assert ServeConfig(model=model).public_name == "base"
