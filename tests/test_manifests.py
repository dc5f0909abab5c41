"""k8s/: every overlay renders, fits the schemas of Kubernetes and KubeRay, and the rules of ours.

No cluster is needed; `kubectl kustomize` renders. tests/data/kuberay holds KubeRay's schemas.
"""

import functools
import gzip
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from tests.manifests import (
    KUBECTL,
    ROOT,
    Document,
    amounts,
    application,
    cluster,
    groups,
    of_kind,
    pods,
    rendered,
    serve_file,
)
from tests.serve.exported import exported
from xc_ray.cli import main
from xc_ray.config import TrainConfig

OVERLAYS = sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
SERVING = ("gpu-autoscaled", "gpu-single-node", "kind-cpu")
TRAINING = ("kind-cpu-training", "training")
KUBERNETES = "1.37"
KUBERAY = {"RayService": "rayservices", "RayJob": "rayjobs"}
ELSEWHERE = {"PodMonitor", "PrometheusRule"}  # Prometheus operator's: no schemas of it here
PROMTOOL = shutil.which("promtool")

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed, which renders")


def containers(overlay: str) -> Iterator[tuple[str, Document]]:
    for name, template in pods(overlay).items():
        for container in template["spec"]["containers"]:
            yield f"{overlay}: {name}: {container['name']}", container


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


# ---------------------------------------------------------------- schemas


def strict(schema: Any) -> Any:
    """A CRD's structural schema as JSON Schema that refuses what the API server would drop."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        key: {name: strict(one) for name, one in value.items()}
        if key == "properties"
        else strict(value)
        for key, value in schema.items()
    }
    if result.get("x-kubernetes-int-or-string"):
        result["type"] = ["integer", "string"]
    properties = result.get("properties")
    if properties:
        if not result.get("x-kubernetes-preserve-unknown-fields"):
            result.setdefault("additionalProperties", False)
        required = [n for n in result.get("required", ()) if "default" not in properties[n]]
        result["required"] = required
    if result.get("nullable") and isinstance(result.get("type"), str):
        result["type"] = [result["type"], "null"]
    return result


@functools.cache
def kuberay(kind: str) -> jsonschema.Draft202012Validator:
    path = ROOT / f"tests/data/kuberay/ray.io_{KUBERAY[kind]}.yaml.gz"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte: the C one where there is
    definition = yaml.load(gzip.decompress(path.read_bytes()), Loader=loader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def complaints(document: Document) -> list[str]:
    return [
        f"{'.'.join(map(str, error.path))}: {error.message:.200}"
        for error in kuberay(document["kind"]).iter_errors(document)
    ]


def check_schema(document: Document) -> None:
    if document["kind"] in KUBERAY:
        assert document["apiVersion"] == "ray.io/v1"
        assert complaints(document) == []
    elif document["kind"] not in ELSEWHERE:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_fits_the_schemas(overlay: str) -> None:
    for document in rendered(overlay):
        check_schema(document)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_of_ray_fit_kubernetes_own_schema_too(overlay: str) -> None:
    for name, template in pods(overlay).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        assert kubernetes_validate.validate(pod, KUBERNETES, strict=True), name


def test_a_misspelt_key_is_refused_by_either_schema() -> None:
    (service,) = of_kind("kind-cpu", "RayService")
    group = {**service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0], "maxReplica": 2}
    spec = {**service["spec"]["rayClusterConfig"], "workerGroupSpecs": [group]}
    wrong = {**service, "spec": {**service["spec"], "rayClusterConfig": spec}}
    (complaint,) = complaints(wrong)
    assert "maxReplica" in complaint
    (account,) = of_kind("kind-cpu", "ServiceAccount")
    with pytest.raises(kubernetes_validate.ValidationError, match="automountToken"):
        check_schema({**account, "automountToken": False})


# ---------------------------------------------------------------- what is in an overlay


def test_the_overlays_are_these() -> None:
    assert sorted((*SERVING, *TRAINING)) == OVERLAYS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_is_in_one_namespace_that_admits_only_restricted_pods(overlay: str) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    labels = namespace["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    others = [d for d in rendered(overlay) if d is not namespace]
    assert {d["metadata"]["namespace"] for d in others} == {namespace["metadata"]["name"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_has_a_value_here(overlay: str) -> None:
    assert of_kind(overlay, "Secret") == []
    for where, container in containers(overlay):
        for variable in container.get("env", ()):
            if re.search("KEY|PASSWORD|SECRET|TOKEN", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], f"{where}: {variable['name']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_secrets_that_are_asked_for_are_those_of_the_docs(overlay: str) -> None:
    told = (ROOT / "docs/operations.md").read_text()
    text = yaml.safe_dump_all(rendered(overlay))
    named = set(re.findall(r"secretName: (\S+)", text))
    named |= set(re.findall(r"secret(?:Key)?Ref:\n(?:\s+\w+: \S+\n)*?\s+name: (\S+)", text))
    assert "xc-ray-storage" in named
    for name in named:
        assert f"create secret generic {name} " in told, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_volumes_names_and_service_accounts_are_there(overlay: str) -> None:
    accounts = {d["metadata"]["name"] for d in of_kind(overlay, "ServiceAccount")}
    maps = {d["metadata"]["name"] for d in of_kind(overlay, "ConfigMap")}
    for name, template in pods(overlay).items():
        spec = template["spec"]
        volumes = {v["name"] for v in spec.get("volumes", ())}
        if name == "xc-ray-redis":
            volumes.add("data")  # a claim of its own
        mounted = {m["name"] for c in spec["containers"] for m in c["volumeMounts"]}
        assert mounted == volumes, name
        assert {v["configMap"]["name"] for v in spec.get("volumes", ()) if "configMap" in v} <= maps
        if "serviceAccountName" in spec:
            assert spec["serviceAccountName"] in accounts


# ---------------------------------------------------------------- rules for every pod


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_pinned(overlay: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for where, container in containers(overlay):
        name, _, tag = container["image"].partition(":")
        assert re.search(r"\d+[.-]\d+", tag), f"{where}: {container['image']}"
        assert "." not in name, f"{where}: a registry of its own in {container['image']}"
        if name == "xc-ray":
            on_gpu = overlay in ("gpu-autoscaled", "gpu-single-node", "training")
            assert tag == (f"{version}-cuda" if on_gpu else version), where
            assert container["imagePullPolicy"] == "IfNotPresent"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_rays_version_is_the_pinned_one(overlay: str) -> None:
    assert cluster(overlay)["rayVersion"] == pinned("ray")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_have_probes_requests_and_limits(overlay: str) -> None:
    for where, container in containers(overlay):
        resources = container["resources"]
        for asked in (resources["requests"], resources["limits"]):
            assert {"cpu", "memory"} <= asked.keys(), where
        gpus = {a.get("nvidia.com/gpu") for a in (resources["requests"], resources["limits"])}
        assert len(gpus) == 1, where
        if "submitter" not in where:
            assert {"readinessProbe", "livenessProbe"} <= container.keys(), where
            patience = {
                probe: container[probe].get("periodSeconds", 10)
                * container[probe].get("failureThreshold", 3)
                for probe in ("readinessProbe", "livenessProbe")
            }
            assert patience["livenessProbe"] >= 30, where
            assert patience["livenessProbe"] > patience["readinessProbe"], where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_have_no_rights(overlay: str) -> None:
    for name, template in pods(overlay).items():
        pod = template["spec"]["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in template["spec"]["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
        assert not any("hostPath" in v for v in template["spec"].get("volumes", ())), name
        assert not any(template["spec"].get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_a_head_that_starts_pods_has_a_token_of_kubernetes(overlay: str) -> None:
    assert of_kind(overlay, "RoleBinding") == of_kind(overlay, "ClusterRoleBinding") == []
    (account,) = of_kind(overlay, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    scaled = cluster(overlay)["enableInTreeAutoscaling"]
    for name, template in pods(overlay).items():
        if name == "head" and scaled:
            assert "serviceAccountName" not in template["spec"]  # KubeRay makes one for it
        else:
            assert template["spec"]["serviceAccountName"] == account["metadata"]["name"], name
            assert template["spec"]["automountServiceAccountToken"] is False, name


# ---------------------------------------------------------------- rules for Ray


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_asks_for_a_token(overlay: str) -> None:
    assert cluster(overlay)["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_replica_runs_on_the_head(overlay: str) -> None:
    assert cluster(overlay)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    if overlay in SERVING:
        args = application(overlay).args
        assert min(args.ingress.num_cpus, args.encoder.num_cpus, args.decoder.num_cpus) > 0
        (service,) = of_kind(overlay, "RayService")
        assert service["spec"]["excludeHeadPodFromServeSvc"] is True


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_groups_have_sizes_in_order_and_names_of_their_own(overlay: str) -> None:
    names = [group["groupName"] for group in groups(overlay)]
    assert len(set(names)) == len(names)
    for group in groups(overlay):
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        if not cluster(overlay)["enableInTreeAutoscaling"]:
            assert group["replicas"] == group["maxReplicas"], "nobody would start them"


@pytest.mark.parametrize("overlay", SERVING)
def test_what_the_head_knows_is_kept_in_redis(overlay: str) -> None:
    options = cluster(overlay)["gcsFaultToleranceOptions"]
    host, _, port = options["redisAddress"].partition(":")
    (redis,) = [d for d in of_kind(overlay, "Service") if d["metadata"]["name"] == host]
    assert [p["port"] for p in redis["spec"]["ports"]] == [int(port)]
    (store,) = of_kind(overlay, "StatefulSet")
    assert store["spec"]["template"]["metadata"]["labels"] == redis["spec"]["selector"]
    assert "valueFrom" in options["redisPassword"]


def test_redis_gets_its_password_by_standard_input(tmp_path: Path) -> None:
    (container,) = pods("kind-cpu")["xc-ray-redis"]["spec"]["containers"]
    fake = tmp_path / "redis-server"
    fake.write_text('#!/bin/sh\necho "arguments: $*"\ncat\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "REDIS_PASSWORD": "0123abcd"}
    done = subprocess.run(
        container["command"], env=environment, check=True, capture_output=True, text=True
    )
    arguments, *lines = done.stdout.splitlines()
    assert arguments == "arguments: -"  # what a list of processes shows
    assert "requirepass 0123abcd" in lines
    assert "dir /data" in lines


@pytest.mark.parametrize("overlay", SERVING)
def test_pods_end_later_than_what_they_have_begun(overlay: str) -> None:
    app = application(overlay)
    drain = max(d.graceful_shutdown_timeout_s or 0 for d in app.deployments)
    assert drain > app.args.limits.max_request_s
    for group in groups(overlay):
        spec = group["template"]["spec"]
        hook = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[0] == "/usr/local/bin/drain-node"
        assert drain < int(hook[1]) < spec["terminationGracePeriodSeconds"]
    (service,) = of_kind(overlay, "RayService")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > drain


# ---------------------------------------------------------------- serving


@pytest.mark.parametrize("overlay", SERVING)
def test_the_serve_file_is_public_with_keys_that_are_mounted(overlay: str) -> None:
    file, args = serve_file(overlay), application(overlay).args
    assert (file.http_options.host, file.proxy_location) == ("0.0.0.0", "EveryNode")
    assert args.keys is not None
    templates = pods(overlay)
    for name in ("head", *(n for n in templates if n.startswith("worker"))):
        spec = templates[name]["spec"]
        (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "keys"]
        assert "subPath" not in mount  # which never changes
        assert Path(args.keys).parent == Path(mount["mountPath"])


@pytest.mark.parametrize("overlay", SERVING)
def test_serve_itself_reads_the_file(overlay: str) -> None:
    (service,) = of_kind(overlay, "RayService")
    values = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert ServeDeploySchema.model_validate(values).applications[0].name == "xc_ray"


@pytest.mark.parametrize("overlay", SERVING)
def test_entry_points_exist(overlay: str) -> None:
    module, _, name = application(overlay).import_path.partition(":")
    assert re.search(rf"^def {name}\(", (ROOT / f"{module.replace('.', '/')}.py").read_text(), re.M)
    for deployment in application(overlay).deployments:
        scaling = deployment.autoscaling_config
        if scaling and scaling.policy:
            module, _, name = scaling.policy.policy_function.partition(":")
            source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
            assert re.search(rf"^class {name}\b", source, re.MULTILINE)


def replicas_of(overlay: str) -> dict[str, tuple[dict[str, float], int]]:
    """What a replica of each deployment asks for, and the most replicas of it."""
    app = application(overlay)
    args = app.args.resolve(0)
    asked: dict[str, dict[str, Any]] = {
        "Ingress": {"CPU": args.ingress.num_cpus},
        "Decoder": {"CPU": args.decoder.num_cpus, "GPU": args.decoder.num_gpus},
        "VisionEncoder": {"CPU": args.encoder.num_cpus, "GPU": args.encoder.num_gpus},
    }
    asked["Decoder"] |= args.decoder.resources
    asked["VisionEncoder"] |= args.encoder.resources
    return {
        str(d.name): (
            {name: float(amount) for name, amount in asked[d.name].items()},
            d.autoscaling_config.max_replicas if d.autoscaling_config else int(d.num_replicas or 1),
        )
        for d in app.deployments
    }


def fits(asked: dict[str, float], left: dict[str, float]) -> bool:
    return all(left.get(name, 0) + 1e-9 >= amount for name, amount in asked.items())


def packed(overlay: str) -> dict[str, list[str]]:
    """Replicas at their most, put on workers at their most; by group. Fails if one has no place."""
    nodes = [(g["groupName"], amounts(g)) for g in groups(overlay) for _ in range(g["maxReplicas"])]
    nodes.sort(key=lambda node: node[1]["GPU"])  # as Ray does: what needs no GPU avoids them
    placed: dict[str, list[str]] = {}
    largest_first = sorted(replicas_of(overlay).items(), key=lambda d: -d[1][0].get("GPU", 0))
    for name, (asked, most) in largest_first:
        for _ in range(most):
            at = next((node for node in nodes if fits(asked, node[1])), None)
            assert at is not None, f"{overlay}: no worker has {asked} left for {name}"
            for resource, amount in asked.items():
                at[1][resource] = at[1].get(resource, 0) - amount
            placed.setdefault(at[0], []).append(name)
    return placed


@pytest.mark.parametrize("overlay", SERVING)
def test_shares_add_up_on_the_workers_that_there_are(overlay: str) -> None:
    assert packed(overlay)


def test_one_gpu_holds_a_decoder_and_an_encoder_and_no_more() -> None:
    asked = replicas_of("gpu-single-node")
    assert asked["Decoder"][0]["GPU"] + asked["VisionEncoder"][0]["GPU"] == pytest.approx(1)
    assert sorted(packed("gpu-single-node")["gpu"]) == ["Decoder", "Ingress", "VisionEncoder"]


def test_encoders_and_decoders_scale_apart() -> None:
    placed = packed("gpu-autoscaled")
    assert {group: set(names) for group, names in placed.items()} == {
        "cpu": {"Ingress"},
        "decoder": {"Decoder"},
        "encoder": {"VisionEncoder"},
    }
    asked = replicas_of("gpu-autoscaled")
    by_name = {g["groupName"]: amounts(g) for g in groups("gpu-autoscaled")}
    for deployment, group in (("Decoder", "encoder"), ("VisionEncoder", "decoder")):
        assert not fits(asked[deployment][0], by_name[group]), f"{deployment} fits on {group}"
    options = {d.name: d for d in application("gpu-autoscaled").deployments}
    assert all(d.autoscaling_config is not None for d in options.values())


@pytest.mark.parametrize("overlay", SERVING)
def test_decoders_are_placed_first_where_shares_of_a_gpu_are_mixed(overlay: str) -> None:
    asked = replicas_of(overlay)
    mixed = any(
        fits(asked["Decoder"][0], amounts(group))
        and fits(asked["VisionEncoder"][0], amounts(group))
        for group in groups(overlay)
        if amounts(group)["GPU"]
    )
    options = serve_file(overlay).controller_options
    variables = options.runtime_env.env_vars if options else {}
    assert (variables.get("RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY") == "1") is mixed


@pytest.mark.parametrize("overlay", SERVING)
def test_host_memory_holds_what_is_kept_there(overlay: str) -> None:
    args = application(overlay).args
    kept_gb = {"Decoder": args.adapters.host_cache_gb, "VisionEncoder": args.encoder.cache_gb}
    by_name = {group["groupName"]: group for group in groups(overlay)}
    for name, replicas in packed(overlay).items():
        group = by_name[name]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        memory_gb = int(limits["memory"].removesuffix("Gi")) * 2**30 / 1e9 * group["maxReplicas"]
        object_store = 0.3  # Ray's share, in /dev/shm, which counts as the pod's memory
        kept = sum(kept_gb.get(replica, 0) for replica in replicas)
        assert kept + object_store * memory_gb < 0.7 * memory_gb, name


@pytest.mark.parametrize("overlay", SERVING)
def test_gpus_that_join_later_are_expected(overlay: str) -> None:
    on_gpu = any(amounts(group)["GPU"] for group in groups(overlay))
    assert application(overlay).args.expect_gpus == on_gpu


@pytest.mark.parametrize("overlay", SERVING)
def test_an_autoscaler_is_there_where_groups_grow(overlay: str) -> None:
    spec = cluster(overlay)
    grows = any(g["minReplicas"] < g["maxReplicas"] for g in spec["workerGroupSpecs"])
    assert spec["enableInTreeAutoscaling"] is grows
    assert ("autoscalerOptions" in spec) is grows
    if grows:
        assert spec["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("overlay", SERVING)
def test_a_second_cluster_is_started_only_where_there_is_room(overlay: str) -> None:
    (service,) = of_kind(overlay, "RayService")
    expected = "NewCluster" if overlay == "gpu-autoscaled" else "None"
    assert service["spec"]["upgradeStrategy"]["type"] == expected


# ---------------------------------------------------------------- network and observation


def selects(selector: Document, template: Document) -> bool:
    labels = template["metadata"]["labels"]
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())


@pytest.mark.parametrize("overlay", SERVING)
def test_the_apis_port_of_workers_is_the_only_public_one(overlay: str) -> None:
    public: dict[str, set[int]] = {}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for rule in policy["spec"].get("ingress", ()):
            if "from" in rule:
                continue
            for name, template in pods(overlay).items():
                if selects(policy["spec"]["podSelector"], template):
                    public.setdefault(name, set()).update(p["port"] for p in rule["ports"])
    port = serve_file(overlay).http_options.port
    assert public == {f"worker {g['groupName']}": {port} for g in groups(overlay)}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_policy_denies_whatever_none_allows(overlay: str) -> None:
    specs = [d["spec"] for d in of_kind(overlay, "NetworkPolicy")]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in specs
    public = [
        to["ipBlock"] for s in specs for rule in s.get("egress", ()) for to in rule.get("to", ())
        if "ipBlock" in to
    ]  # fmt: skip
    for block in public:
        assert {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= set(
            block["except"]
        )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_policies_and_budgets_select_pods_that_are_there(overlay: str) -> None:
    for kind, key in (("NetworkPolicy", "podSelector"), ("PodDisruptionBudget", "selector")):
        for document in of_kind(overlay, kind):
            selector = document["spec"][key]
            found = [name for name, pod in pods(overlay).items() if selects(selector, pod)]
            assert found, document["metadata"]["name"]
    assert len(of_kind(overlay, "PodDisruptionBudget")) == (overlay in SERVING)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_have_the_same_names_and_numbers_everywhere(overlay: str) -> None:
    numbers: dict[str, set[int]] = {}
    for where, container in containers(overlay):
        if "ray-head" in where or "ray-worker" in where:
            for port in container["ports"]:
                numbers.setdefault(port["name"], set()).add(port["containerPort"])
    known = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
    if overlay in SERVING:
        known["serve"] = serve_file(overlay).http_options.port
    assert numbers == {name: {number} for name, number in known.items()}
    for service in of_kind(overlay, "Service"):
        (template,) = [
            pod for pod in pods(overlay).values()
            if selects({"matchLabels": service["spec"]["selector"]}, pod)
        ]  # fmt: skip
        ports = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_prometheus_finds_all_nodes_of_ray(overlay: str) -> None:
    monitors = of_kind(overlay, "PodMonitor")
    assert len(monitors) == (not overlay.startswith("kind-"))  # a laptop has no such operator
    for monitor in monitors:
        assert [e["port"] for e in monitor["spec"]["podMetricsEndpoints"]] == ["metrics"]
        for name, template in pods(overlay).items():
            if name == "head" or name.startswith("worker"):
                assert selects(monitor["spec"]["selector"], template), name


@pytest.mark.parametrize("overlay", SERVING)
def test_the_board_is_for_grafanas_sidecar(overlay: str) -> None:
    boards = [
        d for d in of_kind(overlay, "ConfigMap")
        if d["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
    ]  # fmt: skip
    (board,) = boards
    assert set(board["data"]) == {"xc_ray.json"}


def alerts() -> list[Document]:
    (rules,) = of_kind("gpu-autoscaled", "PrometheusRule")
    (group,) = rules["spec"]["groups"]
    found: list[Document] = group["rules"]
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_alerts_are_where_prometheus_looks_at_a_server(overlay: str) -> None:
    looked_at = overlay in SERVING and bool(of_kind(overlay, "PodMonitor"))
    assert len(of_kind(overlay, "PrometheusRule")) == looked_at


def test_alerts_ask_for_what_the_exporter_has() -> None:
    known = {*exported(), "ray_serve_deployment_replica_healthy"}
    for alert in alerts():
        asked = re.findall(r"\bray_\w+", alert["expr"])
        assert asked, alert["alert"]
        assert set(asked) <= known, alert["alert"]
        results = re.findall(r'result="(\w+)"', alert["expr"])
        assert set(results) <= {"ok", "failed"}, alert["alert"]


def test_outcomes_of_alerts_are_those_of_the_docs() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    (told,) = re.findall(r"`outcome` is (.+?)\.\n", page, re.DOTALL)
    for alert in alerts():
        for outcomes in re.findall(r'outcome=~?"([^"]+)"', alert["expr"]):
            assert set(outcomes.split("|")) <= set(re.findall(r"`(\w+)`", told))


def test_each_alert_has_a_line_of_the_docs_that_says_what_to_do() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    rows = set(re.findall(r"^\| `(XcRay\w+)` \|", page, re.MULTILINE))
    assert rows == {alert["alert"] for alert in alerts()}
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["summary"].endswith(".")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_prometheus_itself_reads_the_alerts(tmp_path: Path) -> None:
    (rules,) = of_kind("gpu-autoscaled", "PrometheusRule")
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rules["spec"]))
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(file)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


HEALTHY = 'ray_serve_deployment_replica_healthy{application="xc_ray", deployment="Decoder"}'
REQUESTS = "ray_xc_ray_requests_total"
FIRST_TOKENS = "ray_xc_ray_first_token_seconds_bucket"
# What Prometheus reads each minute for an hour: of an alert what makes it fire, and what just not.
FIRES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "XcRayNoDecoder": ({HEALTHY: "0x60"}, {HEALTHY: "1x60"}),
    "XcRayErrors": (
        {REQUESTS + '{outcome="ok"}': "0+98x60", REQUESTS + '{outcome="replica_lost"}': "0+2x60"},
        {REQUESTS + '{outcome="ok"}': "0+199x60", REQUESTS + '{outcome="error"}': "0+1x60"},
    ),
    "XcRayOverloaded": (
        {REQUESTS + '{outcome="ok"}': "0+94x60", REQUESTS + '{outcome="overloaded"}': "0+6x60"},
        {REQUESTS + '{outcome="ok"}': "0+96x60", REQUESTS + '{outcome="overloaded"}': "0+4x60"},
    ),
    "XcRayFirstTokenSlow": (
        {FIRST_TOKENS + '{le="10"}': "0+8x60", FIRST_TOKENS + '{le="20"}': "0+9x60",
         FIRST_TOKENS + '{le="+Inf"}': "0+10x60"},
        {FIRST_TOKENS + '{le="10"}': "0+9x60", FIRST_TOKENS + '{le="20"}': "0+10x60",
         FIRST_TOKENS + '{le="+Inf"}': "0+10x60"},
    ),
    "XcRayPreemptions": (
        {'ray_xc_ray_preemptions_total{replica="a"}': "0+7x60"},
        {'ray_xc_ray_preemptions_total{replica="a"}': "0+5x60"},
    ),
    "XcRayAdapterSlotsShort": (
        {'ray_xc_ray_adapter_slot_reloads_total{replica="a"}': "0+7x60"},
        {'ray_xc_ray_adapter_slot_reloads_total{replica="a"}': "0+5x60"},
    ),
    "XcRayAliasesBehind": (
        {'ray_xc_ray_adapter_aliases_behind{replica="a"}': "1x60"},
        {'ray_xc_ray_adapter_aliases_behind{replica="a"}': "0x60"},
    ),
    "XcRayRegistryUnreadable": (
        {'ray_xc_ray_registry_polls_total{result="failed"}': "0+1x60"},
        {'ray_xc_ray_registry_polls_total{result="ok"}': "0+12x60"},
    ),
}  # fmt: skip


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_where_they_should_and_not_before(tmp_path: Path) -> None:
    (rules,) = of_kind("gpu-autoscaled", "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules["spec"]))
    assert FIRES.keys() == {alert["alert"] for alert in alerts()}
    cases = []
    for name, series in FIRES.items():
        for fires, read in zip((True, False), series, strict=True):
            cases.append(
                {
                    "name": f"{name} {fires}",
                    "interval": "1m",
                    "input_series": [{"series": k, "values": v} for k, v in read.items()],
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}})',
                            "eval_time": "55m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                        }
                    ],
                }
            )
    test = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", str(tmp_path / "test.yaml")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("overlay", TRAINING)
def test_the_job_trains_what_the_mounted_file_says(
    overlay: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = of_kind(overlay, "RayJob")
    python, dash_m, package, *argv = shlex.split(job["spec"]["entrypoint"])
    assert (python, dash_m, package) == ("python", "-m", "xc_ray")
    assert argv[0] == "train"
    assert "--resume" in argv, "a job that is tried again would refuse the run's folder"
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    capsys.readouterr()
    spec = pods(overlay)["head"]["spec"]
    (mount,) = [m for m in spec["containers"][0]["volumeMounts"] if m["name"] == "train"]
    (volume,) = [v for v in spec["volumes"] if v["name"] == "train"]
    (config_map,) = of_kind(overlay, "ConfigMap")
    assert volume["configMap"]["name"] == config_map["metadata"]["name"]
    folder, _, name = argv[1].rpartition("/")
    assert folder == mount["mountPath"]
    config = TrainConfig.model_validate(yaml.safe_load(config_map["data"][name]))
    for place in (config.registry, config.storage):
        assert place is not None
        assert place.startswith("s3://"), "a folder would be gone with its pod"


@pytest.mark.parametrize("overlay", TRAINING)
def test_the_workers_have_what_training_asks_for(overlay: str) -> None:
    (config_map,) = of_kind(overlay, "ConfigMap")
    config = TrainConfig.model_validate(yaml.safe_load(config_map["data"]["train_config.yaml"]))
    assert isinstance(config.workers.num, int)
    (group,) = groups(overlay)
    there = {name: amount * group["replicas"] for name, amount in amounts(group).items()}
    assert there["CPU"] >= config.workers.num * config.workers.num_cpus
    on_gpu = config.workers.use_gpu is True
    assert there["GPU"] == (config.workers.num if on_gpu else 0)
