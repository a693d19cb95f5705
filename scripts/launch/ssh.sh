#!/usr/bin/env bash
# Train on machines that ssh reaches, with one process on each. Not run on a pod: tested on one machine.
#
#   WORK=/shared/work scripts/launch/ssh.sh HOST... [-- OPTION...]
#
# The first host is the coordinator: the others must reach it by that name. All of them see the folder
# WORK, for example over NFS. OPTIONs are added to the command; of two of a kind the last counts.
#
# Ctrl-C or SIGTERM stops the run after its step and a checkpoint, with exit code 75. Without it, a run
# that was asked to stop (75) or lost a process (76, or a signal) is started again, and resumes.
set -uo pipefail
WORK=${WORK:-work}
PORT=${PORT:-8476}
RESTARTS=${RESTARTS:-20}
COMPOSABLE=${COMPOSABLE:-composable} # on the hosts
read -ra ssh <<<"${SSH:-ssh}"         # with its options

hosts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  hosts+=("$1")
  shift
done
[ "${#hosts[@]}" -gt 0 ] || { echo "usage: $0 HOST... [-- OPTION...]" >&2; exit 2; }
[ $# -eq 0 ] || shift
options=$([ $# -eq 0 ] || printf ' %q' "$@")

is_stopped=false
# shellcheck disable=SC2317 # the trap calls it
stop() {
  is_stopped=true
  # Stopping one process stops all of them.
  "${ssh[@]}" "${hosts[0]}" "kill -TERM \$(cat $WORK/process-0.pid)"
}
trap stop INT TERM

# Whether a run that ended with this code may be started again: 255 is ssh's own, or a signal's.
is_restartable() {
  [ "$1" -eq 75 ] || [ "$1" -eq 76 ] || [ "$1" -gt 128 ]
}

# Run a process on every host; set `code` to 0 or to that of a process, a failure's before others.
run_once() {
  local pids=() index pid status
  for index in "${!hosts[@]}"; do
    # A session of its own, so that Ctrl-C does not end ssh. The remote shell becomes the program,
    # so that the file holds its number.
    setsid "${ssh[@]}" "${hosts[$index]}" "echo \$\$ >$WORK/process-$index.pid; exec $COMPOSABLE train \
      $WORK/expert --data $WORK/text --mesh data=-1 --rows 16 --window 2048 \
      --coordinator ${hosts[0]#*@}:$PORT --num-processes ${#hosts[@]} --process-id $index$options" \
      </dev/null &
    pids+=("$!")
  done
  code=0
  for pid in "${pids[@]}"; do
    # A signal interrupts the wait.
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid"
    status=$?
    if [ "$status" -ne 0 ] && { [ "$code" -eq 0 ] || ! is_restartable "$status"; }; then
      code=$status
    fi
  done
}

for ((restart = 0; restart <= RESTARTS; restart++)); do
  run_once
  if $is_stopped || ! is_restartable "$code"; then
    break
  fi
done
exit "$code"
