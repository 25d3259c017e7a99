"""What kustomize makes of k8s/: resources, their pods, and what selects, names and mounts what."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
KUSTOMIZATIONS = ["base", "overlays/cluster", "overlays/redis", "overlays/dev"]
OPERATOR_KINDS = {"PodMonitor", "PrometheusRule"}


@dataclass(frozen=True)
class Container:
    """A container, with the pod template it is in."""

    spec: Resource
    pod: Resource
    owner: Resource

    def __str__(self) -> str:
        return f"{self.owner['kind']} {self.owner['metadata']['name']}, {self.spec['name']}"

    @property
    def variables(self) -> dict[str, Resource]:
        return {variable["name"]: variable for variable in self.spec.get("env", [])}

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.spec.get("ports", [])}

    @property
    def writable(self) -> list[Path]:
        mounts = self.spec.get("volumeMounts", [])
        return [Path(mount["mountPath"]) for mount in mounts if not mount.get("readOnly")]


@dataclass(frozen=True)
class Manifests:
    """All resources of one kustomization."""

    name: str
    text: str
    resources: list[Resource]

    def of(self, kind: str) -> list[Resource]:
        return [resource for resource in self.resources if resource["kind"] == kind]

    def one(self, kind: str, name: str) -> Resource:
        (found,) = [r for r in self.of(kind) if r["metadata"]["name"].startswith(name)]
        return found

    @property
    def pods(self) -> list[tuple[Resource, Resource]]:
        """Whoever makes pods, and the template."""
        found = [(owner, owner["spec"]["template"]) for owner in self.of("StatefulSet")]
        for owner in self.of("CronJob"):
            found.append((owner, owner["spec"]["jobTemplate"]["spec"]["template"]))
        return found

    @property
    def containers(self) -> Iterator[Container]:
        for owner, template in self.pods:
            for kind in ("initContainers", "containers"):
                for container in template["spec"].get(kind, []):
                    yield Container(container, template["spec"], owner)

    @property
    def flow(self) -> Container:
        (flow,) = [c for c in self.containers if c.spec["name"] == "flow"]
        return flow

    def selected(self, selector: Resource) -> list[tuple[Resource, Resource]]:
        """The pods that a label selector finds."""
        return [
            (owner, template)
            for owner, template in self.pods
            if matches(selector, template["metadata"]["labels"])
        ]

    def values(self, container: Container) -> dict[str, str]:
        """The variables of a container, as the kubelet would set those it knows beforehand."""
        values: dict[str, str] = {}
        for source in container.spec.get("envFrom", []):
            values |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        for name, variable in container.variables.items():
            if "value" in variable:
                values[name] = variable["value"]
            elif named := variable["valueFrom"].get("configMapKeyRef"):
                values[name] = self.one("ConfigMap", named["name"])["data"][named["key"]]
        return values


def build(kubectl: Path, name: str) -> Manifests:
    """Run ``kustomize build`` on a directory of k8s/."""
    run = subprocess.run(
        [kubectl, "kustomize", K8S / name], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return Manifests(name, run.stdout, list(yaml.safe_load_all(run.stdout)))


def matches(selector: Resource, labels: Mapping[str, str]) -> bool:
    """Whether a label selector finds these labels. An empty one finds everything.

    >>> matches({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {"a": "1"})
    True
    """
    expressions = [(key, [value]) for key, value in selector.get("matchLabels", {}).items()]
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", f"not known here: {expression}"
        expressions.append((expression["key"], expression["values"]))
    return all(labels.get(key) in values for key, values in expressions)
