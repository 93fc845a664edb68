#!/usr/bin/env bash
# Follow the logs of a Job's Pods until the Job has ended, also of Pods that replace others:
#
#     KUBECTL="kubectl --namespace=team" k8s/logs.sh cifar10
set -euo pipefail
if (($# != 1)); then
  echo "usage: k8s/logs.sh JOB" >&2
  exit 2
fi
job=$1
read -ra kubectl <<< "${KUBECTL:-kubectl}"
selector="batch.kubernetes.io/job-name=$job"

follow() {
  local since=()
  # The stream breaks off where the API server restarts or a log is rotated.
  until "${kubectl[@]}" logs --follow --prefix "${since[@]}" "$1"; do
    "${kubectl[@]}" get "$1" > /dev/null || break
    sleep "$pause"
    since=(--since=10s)
  done
}

pause=${POLL_SECONDS:-5}
declare -A followed
failures=0 announced=
trap 'kill $(jobs -rp) 2> /dev/null || true' EXIT
while true; do
  # The Job before the Pods, so that none that began before the end is missed. A Pod has no logs before
  # its container runs.
  if ended=$("${kubectl[@]}" get job "$job" \
      --output=jsonpath='{.status.conditions[?(@.status=="True")].type}') \
    && pods=$("${kubectl[@]}" get pods --selector "$selector" \
      --field-selector status.phase!=Pending --sort-by=.metadata.creationTimestamp --output=name)
  then
    failures=0
  else
    ((++failures < 3)) || exit 1
    sleep "$pause"
    continue
  fi
  for pod in $pods; do
    [[ -z ${followed[$pod]:-} ]] || continue
    followed[$pod]=yes announced=
    follow "$pod" &
  done
  if [[ " $ended " =~ \ (Complete|Failed)\  ]]; then
    wait
    echo "job $job: $ended" >&2
    break
  fi
  if [[ -z $(jobs -rp) && -z $announced ]]; then
    echo "waiting for a Pod of job $job to start; why it does not, tells" \
      "'${kubectl[*]} describe pods --selector $selector'" >&2
    announced=yes
  fi
  sleep "$pause"
done
