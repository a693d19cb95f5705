#!/usr/bin/env bash
# Train on a Cloud TPU slice through a queued resource. Not run on a pod.
#
#   PROJECT=my-project ZONE=us-west4-a BUCKET=my-bucket scripts/launch/queued-resource.sh
#
# The bucket holds the expert's folder and its text, and is mounted with gcsfuse on every host, so that
# all processes see one folder. jax finds the group on a Cloud TPU by itself.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${BUCKET:?}"
NAME=${NAME:-composable}
TYPE=${TYPE:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
COMMON=(--project "$PROJECT" --zone "$ZONE")

gcloud compute tpus queued-resources create "$NAME" "${COMMON[@]}" \
  --node-id "$NAME" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
until gcloud compute tpus queued-resources describe "$NAME" "${COMMON[@]}" \
  --format 'value(state.state)' | grep -q ACTIVE; do
  sleep 30
done

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${COMMON[@]}" --worker all --command "$1"
}

on_all_hosts "pip install 'jax[tpu]' composable && mkdir -p ~/work && gcsfuse --implicit-dirs $BUCKET ~/work"
# Run this line again after the slice was taken away and came back: it resumes.
on_all_hosts "composable train ~/work/expert --data ~/work/text --mesh data=1,fsdp=-1 --rows 16 --window 2048"
