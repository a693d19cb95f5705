#!/usr/bin/env bash
# Train on a Cloud TPU slice through a queued resource. Not run on a pod.
#
#   PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket scripts/launch/queued-resource.sh [OPTION...]
#
# The bucket holds the expert's folder, its text and the wheel of composable, and is mounted with gcsfuse
# on every host, so that all processes see one folder. jax finds the group on a Cloud TPU by itself.
# OPTIONs are added to the command; of two of a kind the last counts.
#
# A run that was asked to stop (75) or lost a process (76) is started again, and resumes. A slice that
# was taken away is asked for again. Any other failure ends this script and leaves the slice; delete it:
#   gcloud compute tpus queued-resources delete composable --project my-project --zone us-west4-a --force
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}"
NAME=${NAME:-composable}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
RESTARTS=${RESTARTS:-20}
POLL_SECONDS=${POLL_SECONDS:-30}
PLACE=(--project "$PROJECT" --zone "$ZONE")

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${PLACE[@]}" --format 'value(state.state)'
}

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker all --command "$1"
}

create_slice() {
  gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" \
    --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
  until [ "$(state)" = ACTIVE ]; do
    sleep "$POLL_SECONDS"
  done
  on_all_hosts "mkdir -p ~/work && gcsfuse --implicit-dirs $BUCKET ~/work && pip install 'jax[tpu]' ~/work/composable-*.whl"
}

COMMAND="composable train ~/work/expert --data ~/work/text --mesh data=1,fsdp=-1 --rows 16 --window 2048"
[ $# -eq 0 ] || COMMAND+=$(printf ' %q' "$@")
create_slice
for ((restart = 0; restart <= RESTARTS; restart++)); do
  code=0
  on_all_hosts "$COMMAND" || code=$?
  [ "$code" -ne 0 ] || exit 0
  if [ "$(state)" != ACTIVE ]; then
    gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
    create_slice
  elif [ "$code" -ne 75 ] && [ "$code" -ne 76 ]; then
    break
  fi
done
exit "$code"
