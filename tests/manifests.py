"""The overlays of k8s/, as `kubectl kustomize` renders them."""

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from xc_ray.config import ApplicationOptions, ServeFile

ROOT = Path(__file__).parents[1]
KUBECTL = shutil.which("kubectl")

Document = dict[str, Any]


@functools.cache
def rendered(overlay: str) -> list[Document]:
    assert KUBECTL is not None
    folder = ROOT / "k8s/overlays" / overlay
    done = subprocess.run(
        [KUBECTL, "kustomize", str(folder)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return list(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> list[Document]:
    return [d for d in rendered(overlay) if d["kind"] == kind]


def cluster(overlay: str) -> Document:
    """The cluster that the RayService or RayJob describes."""
    (owner,) = of_kind(overlay, "RayService") + of_kind(overlay, "RayJob")
    spec = owner["spec"]
    found: Document = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    return found


def groups(overlay: str) -> list[Document]:
    found: list[Document] = cluster(overlay)["workerGroupSpecs"]
    return found


def serve_file(overlay: str) -> ServeFile:
    (service,) = of_kind(overlay, "RayService")
    return ServeFile.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))


def application(overlay: str) -> ApplicationOptions:
    (found,) = serve_file(overlay).applications
    return found


def pods(overlay: str) -> dict[str, Document]:
    """Every pod template, by a name for messages."""
    found = {"head": cluster(overlay)["headGroupSpec"]["template"]}
    found |= {f"worker {g['groupName']}": g["template"] for g in groups(overlay)}
    for document in rendered(overlay):
        spec = document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet"):
            found[document["metadata"]["name"]] = spec["template"]
        if "submitterPodTemplate" in spec:
            found["submitter"] = spec["submitterPodTemplate"]
    return found


def amounts(group: Document) -> dict[str, float]:
    """What Ray counts on a worker of a group."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    own = {name: float(amount) for name, amount in group.get("resources", {}).items()}
    return {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))} | own
