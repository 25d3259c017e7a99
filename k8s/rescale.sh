#!/usr/bin/env bash
# Start the cluster with another number of processes, and the state that it has.
#
#     k8s/rescale.sh OVERLAY
#
# First say the new number in OVERLAY (replicas, PROCESSES, hosts: overlays/cluster); this script makes
# the cluster so: it scales to 0, which drains all; lets a Job that mounts all recovery volumes move the
# parts of the store to the volumes of their new processes; and applies OVERLAY.
#
# Needs kubectl and jq. Every step may be repeated, so whenever this is interrupted or fails, run it
# again; to go back, put the old number into OVERLAY and run it again.
set -euo pipefail

name=fraud-scoring
flow=app.kubernetes.io/name=$name,app.kubernetes.io/component=flow
job=$name-rescale
timeout=${RESCALE_TIMEOUT:-1800} # seconds, for the drain and for the move

fail() {
    printf 'rescale: %s\n' "$1" >&2
    exit 1
}

[[ $# -eq 1 && -d $1 ]] || fail "usage: $0 OVERLAY (a directory with a kustomization.yaml)"
overlay=$1
for command in kubectl jq; do
    command -v "$command" >/dev/null || fail "$command is needed, and was not found"
done

# What is wanted. Nothing is changed before all of it is known to be consistent.
wanted=$(kubectl kustomize "$overlay" | kubectl create --dry-run=client --output=json -f - |
    jq --slurp 'map(.items? // [.]) | add')
set=$(jq --arg name "$name" '.[] | select(.kind == "StatefulSet" and .metadata.name == $name)' <<<"$wanted")
[[ -n $set ]] || fail "$overlay has no StatefulSet $name"
namespace=$(jq -r .metadata.namespace <<<"$set")
processes=$(jq .spec.replicas <<<"$set")
config=$(jq '.[] | select(.kind == "ConfigMap" and .data.PROCESSES and .data.hosts) | .data' <<<"$wanted")
[[ -n $config ]] || fail "$overlay is not a cluster: no ConfigMap of it has PROCESSES and hosts"
said=$(jq -r .PROCESSES <<<"$config")
hosts=$(jq -r '.hosts | split("\n") | map(select(. != "")) | join(" ")' <<<"$config")
service=$(jq -r .spec.serviceName <<<"$set")
expected=$(for ((n = 0; n < processes; n++)); do printf '%s ' "$name-$n.$service:9999"; done)
parts=$(jq -r '.spec.template.spec.initContainers[] | select(.name == "recovery-parts").args[]
    | select(startswith("--parts=")) | ltrimstr("--parts=")' <<<"$set")
((processes > 0)) || fail "replicas is $processes in $overlay: say how many processes there shall be"
[[ $said == "$processes" && $hosts == "${expected% }" ]] ||
    fail "$overlay contradicts itself: replicas $processes, PROCESSES $said, hosts $hosts"
((processes <= parts)) ||
    fail "a store of $parts parts is for $parts processes at most, and $overlay wants $processes"

k() { kubectl --namespace "$namespace" "$@"; }

k get statefulset "$name" --output=name >/dev/null ||
    fail "there is no StatefulSet $name in the namespace $namespace; a first start needs only kubectl apply -k $overlay"
kubectl apply -k "$overlay" --dry-run=server >/dev/null ||
    fail "the API server does not take $overlay. Nothing has been changed"

# Drain. Pods that are gone already stay gone.
echo "scaling $namespace/$name to 0"
k scale statefulset "$name" --replicas=0
k wait --for=delete pod --selector="$flow" --timeout="${timeout}s" ||
    fail "not all processes have ended within $timeout s; replicas stay 0. Look at the pods, then run this again"

# A claim for each process that was or will be. The StatefulSet would make those of new processes too,
# but only with their pods, whose init container would make new parts in them.
claims=$(k get persistentvolumeclaims --output=json | jq --arg name "recovery-$name-" \
    '[.items[].metadata.name | select(startswith($name)) | ltrimstr($name) | select(test("^[0-9]+$")) | tonumber]')
every=$(jq --argjson processes "$processes" '[max // -1] | .[0] + 1 | if . < $processes then $processes else . end' <<<"$claims")
for ((n = 0; n < every; n++)); do
    jq --exit-status --argjson n "$n" 'index($n)' <<<"$claims" >/dev/null && continue
    echo "making the claim recovery-$name-$n"
    jq --arg claim "recovery-$name-$n" '{
        apiVersion: "v1", kind: "PersistentVolumeClaim",
        metadata: {name: $claim, labels: .spec.selector.matchLabels},
        spec: (.spec.volumeClaimTemplates[] | select(.metadata.name == "recovery") | .spec)
    }' <<<"$set" | k apply -f -
done

# Move. A part is deleted only where it came from, and only when its copy is whole; a move that was cut
# short goes on. The Job of an earlier try is of no use any more.
k delete job "$job" --ignore-not-found --cascade=foreground
echo "moving the parts of the recovery store to $processes of $every volumes"
jq --arg job "$job" --argjson processes "$processes" --argjson every "$every" --arg name "$name" '
    .spec.template.spec as $pod
    | ($pod.initContainers[] | select(.name == "recovery-parts")) as $parts
    | {
        apiVersion: "batch/v1", kind: "Job",
        metadata: {name: $job},
        spec: {backoffLimit: 0, template: {
            metadata: {labels: {"app.kubernetes.io/name": $name, "app.kubernetes.io/component": "rescale"}},
            spec: ({
                restartPolicy: "Never",
                containers: [{
                    name: "move", image: $parts.image, imagePullPolicy: $parts.imagePullPolicy,
                    command: ["python", "-m", "dataflows.parts", "move"],
                    args: ([range($every) | "/var/lib/fraud/\(.)/recovery"] + ["--processes=\($processes)"]),
                    resources: $parts.resources, securityContext: $parts.securityContext,
                    volumeMounts: ([range($every) | {name: "recovery-\(.)", mountPath: "/var/lib/fraud/\(.)"}]
                        + [{name: "tmp", mountPath: "/tmp"}])
                }],
                volumes: ([range($every) | {
                    name: "recovery-\(.)",
                    persistentVolumeClaim: {claimName: "recovery-\($name)-\(.)"}
                }] + [{name: "tmp", emptyDir: {sizeLimit: "64Mi"}}])
            } + ($pod | with_entries(select(.key | IN(
                "serviceAccountName", "automountServiceAccountToken", "enableServiceLinks",
                "securityContext", "imagePullSecrets", "nodeSelector", "tolerations", "affinity"
            )))))
        }}
    }' <<<"$set" | k apply -f -

state=
for ((waited = 0; waited < timeout; waited += 2)); do
    state=$(k get job "$job" --output=json |
        jq -r '[.status.conditions[]? | select(.status == "True") | .type] | map(select(IN("Complete", "Failed"))) | first // ""')
    [[ -z $state ]] || break
    sleep 2
done
k logs "job/$job" || true
[[ $state == Complete ]] || fail "the parts were not moved (${state:-no end within $timeout s}). Nothing runs, replicas stay 0, \
and no part with state is lost: kubectl -n $namespace describe job $job says more. Mend that and run this again"
k delete job "$job" --cascade=foreground

kubectl apply -k "$overlay"
echo "$namespace/$name starts with $processes processes"
if ((every > processes)); then
    echo "the claims recovery-$name-$processes and up hold no part of the store now; they may be deleted"
fi
