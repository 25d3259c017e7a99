#!/bin/sh
# What the public chart runs in the image (`sh ./entrypoint.sh`) in place of our own entry point.
# exec: the shell gives its place, process 1, to Python, which gets SIGTERM and drains.
set -eu
# The chart sets these for a lone process, too; Bytewax would take it for a cluster's.
if [ "${BYTEWAX_REPLICAS:-1}" = 1 ]; then
    unset BYTEWAX_POD_NAME BYTEWAX_STATEFULSET_NAME BYTEWAX_HOSTFILE_PATH
fi
# Set to anything at all, it opens an unauthenticated port.
unset BYTEWAX_DATAFLOW_API_ENABLED BYTEWAX_DATAFLOW_API_PORT BYTEWAX_DATAFLOW_API_CACHE_PATH
# A directory of the flow's own: it makes it, and lets nobody else look into it.
export BYTEWAX_RECOVERY_DIRECTORY="${BYTEWAX_RECOVERY_DIRECTORY:-/var/recovery}/fraud"
exec python -m bytewax.run dataflows.fraud
