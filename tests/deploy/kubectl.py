"""A kubectl of the tests: a namespace in a directory, whose Jobs really run their command.

`KUBECTL_STATE` is the directory: ``cluster.json`` (claims, Jobs, what was called) and
``volumes/CLAIM``, the content of each claim. `KUBECTL` is the real one; it builds kustomizations.
``fail_at`` in ``cluster.json``: the number of the call, from 0, that fails before it does
anything.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HOME = Path(os.environ.get("KUBECTL_STATE", "."))  # "." when it is only imported, by doctest
STATE = HOME / "cluster.json"


def rendered(overlay: str) -> list[dict[str, Any]]:
    built = subprocess.run(
        [os.environ["KUBECTL"], "kustomize", overlay], check=True, capture_output=True, text=True
    )
    return [each for each in yaml.safe_load_all(built.stdout) if each]


def run_job(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    """Run the one container of a Job, its mounts being the directories of the claims."""
    pod = job["spec"]["template"]["spec"]
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert set(claims.values()) <= set(cluster["claims"]), "a pod would wait for its claim"
    assert cluster["replicas"] == 0, "ReadWriteOncePod: a process has the volume"
    (container,) = pod["containers"]
    line = [*container["command"], *container["args"]]
    for mount in container["volumeMounts"]:
        if mount["name"] in claims:
            volume = HOME / "volumes" / claims[mount["name"]]
            line = [part.replace(f"{mount['mountPath']}/", f"{volume}/") for part in line]
    done = subprocess.run(
        [sys.executable, *line[1:]], capture_output=True, text=True, cwd=os.environ["ROOT"]
    )
    job["status"] = {
        "conditions": [{"type": "Failed" if done.returncode else "Complete", "status": "True"}]
    }
    job["log"] = done.stdout + done.stderr


def apply(cluster: dict[str, Any], resource: dict[str, Any]) -> None:
    name = resource["metadata"]["name"]
    match resource["kind"]:
        case "PersistentVolumeClaim" if name.startswith("recovery-"):
            (HOME / "volumes" / name).mkdir(parents=True, exist_ok=True)
            cluster["claims"][name] = resource
        case "Job":
            assert name not in cluster["jobs"], "a Job's template cannot be changed"
            run_job(cluster, resource)
            cluster["jobs"][name] = resource
        case "StatefulSet":
            cluster["replicas"] = resource["spec"]["replicas"]
            for n in range(cluster["replicas"]):
                claim = HOME / "volumes" / f"recovery-{name}-{n}"
                claim.mkdir(parents=True, exist_ok=True)
                cluster["claims"].setdefault(claim.name, {"metadata": {"name": claim.name}})
        case _:
            pass


def main(arguments: list[str]) -> int:
    given = sys.stdin.read() if "-" in arguments else ""
    with STATE.with_suffix(".lock").open("w") as lock:  # those of a pipeline run together
        fcntl.flock(lock, fcntl.LOCK_EX)
        return answer(arguments, given)


def answer(arguments: list[str], given: str) -> int:
    cluster = json.loads(STATE.read_text())
    cluster["calls"].append(" ".join(arguments))
    STATE.write_text(json.dumps(cluster))
    if cluster.get("fail_at") == len(cluster["calls"]) - 1:
        print("error: connection refused", file=sys.stderr)
        return 1
    words = [each for each in arguments if not each.startswith("--")]
    if "--namespace" in arguments:
        words.remove("fraud")
    match words:
        case ["kustomize", overlay]:
            print(yaml.safe_dump_all(rendered(overlay)))
        case ["create", "-f", "-"]:
            for resource in yaml.safe_load_all(given):
                print(json.dumps(resource))
        case ["get", "statefulset", name]:
            return 0 if cluster["replicas"] is not None else 1
        case ["scale", "statefulset", _]:
            cluster["replicas"] = 0
        case ["wait", "pod"]:
            return 0 if not cluster.get("stuck") else 1
        case ["get", "persistentvolumeclaims"]:
            names = [*cluster["claims"], "fraud-data", "recovery-fraud-scoring-other"]
            print(json.dumps({"items": [{"metadata": {"name": name}} for name in names]}))
        case ["apply", "-f", "-"]:
            apply(cluster, json.loads(given))
        case ["apply", "-k", overlay] if "--dry-run=server" in arguments:
            return 1 if cluster.get("refuses") else 0
        case ["apply", "-k", overlay]:
            for resource in rendered(overlay):
                apply(cluster, resource)
        case ["delete", "job", name]:
            if name not in cluster["jobs"] and "--ignore-not-found" not in arguments:
                return 1
            cluster["jobs"].pop(name, None)
        case ["get", "job", name]:
            print(json.dumps(cluster["jobs"][name]))
        case ["logs", name]:
            print(cluster["jobs"][name.removeprefix("job/")]["log"])
        case _:
            raise NotImplementedError(arguments)
    STATE.write_text(json.dumps(cluster))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
