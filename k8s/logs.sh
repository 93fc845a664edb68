#!/usr/bin/env bash
# Follow the logs of a Job's Pods until the Job has ended, also of Pods that replace others:
#
#     KUBECTL="kubectl --namespace=team" k8s/logs.sh cifar10
set -euo pipefail
job=${1:?usage: k8s/logs.sh JOB}
read -ra kubectl <<< "${KUBECTL:-kubectl}"

declare -A followed
announced=
while true; do
  # Before the Pods are listed, so that none that began before the end is missed.
  ended=$("${kubectl[@]}" get job "$job" \
    --output=jsonpath='{.status.conditions[?(@.status=="True")].type}')
  # A Pod has no logs before its container runs.
  pods=$("${kubectl[@]}" get pods --selector "batch.kubernetes.io/job-name=$job" \
    --field-selector status.phase!=Pending --sort-by=.metadata.creationTimestamp --output=name)
  for pod in $pods; do
    [[ -z ${followed[$pod]:-} ]] || continue
    followed[$pod]=yes announced=
    "${kubectl[@]}" logs --follow --prefix "$pod" &
  done
  if [[ " $ended " =~ \ (Complete|Failed)\  ]]; then
    wait
    echo "job $job: $ended" >&2
    break
  fi
  if [[ -z $(jobs -rp) && -z $announced ]]; then
    echo "waiting for a Pod of job $job to start; 'kubectl describe job $job' tells more" >&2
    announced=yes
  fi
  sleep "${POLL_SECONDS:-5}"
done
