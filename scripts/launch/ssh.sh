#!/usr/bin/env bash
# Train on machines that ssh reaches, with one process on each. Not run on a pod.
#
#   scripts/launch/ssh.sh HOST...
#
# The first host is the coordinator. All of them see the folder WORK, for example over NFS.
set -euo pipefail
WORK=${WORK:-work}
PORT=${PORT:-8476}
hosts=("$@")
[ "${#hosts[@]}" -gt 0 ] || { echo "usage: $0 HOST..." >&2; exit 2; }

pids=()
for index in "${!hosts[@]}"; do
  ssh "${hosts[$index]}" composable train "$WORK/expert" --data "$WORK/text" \
    --mesh data=-1 --rows 16 --window 2048 \
    --coordinator "${hosts[0]}:$PORT" --num-processes "${#hosts[@]}" --process-id "$index" &
  pids+=("$!")
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
exit "$code"
