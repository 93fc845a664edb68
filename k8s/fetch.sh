#!/usr/bin/env bash
# Copies the artifacts of a Job from its volume, with a Pod that is deleted afterwards:
#
#     KUBECTL="kubectl --namespace=team" k8s/fetch.sh k8s/overlays/sweep output/k8s
#
# Both folders are relative to the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
kustomization=$1 folder=$2
read -ra kubectl <<< "${KUBECTL:-kubectl}"

remove() { "${kubectl[@]}" delete pod cifar10-fetch --ignore-not-found; }
# A Pod left by an earlier call has ended and never becomes ready.
remove
trap remove EXIT
trap 'exit 130' INT TERM
# Not in k8s/, because kustomize rejects resources that contain the kustomization itself.
work=build/k8s-fetch
mkdir -p "$work"
printf '%s\n' "resources: [../../$kustomization]" 'components: [../../k8s/fetch]' \
  > "$work/kustomization.yaml"
"${kubectl[@]}" apply -k "$work" --selector app.kubernetes.io/component=fetch
echo "waiting up to five minutes for Pod cifar10-fetch"
if ! "${kubectl[@]}" wait --for=condition=Ready pod/cifar10-fetch --timeout=300s; then
  "${kubectl[@]}" get events --field-selector involvedObject.name=cifar10-fetch || true
  exit 1
fi
# Through a file, so that an incomplete copy is not extracted. Exit code 1 of tar means that a file was replaced while
# tar read it; the archive still contains a complete version.
# shellcheck disable=SC2016 # the Pod's shell expands it
"${kubectl[@]}" exec cifar10-fetch -- sh -c \
  'tar --create --directory=/output --exclude=checkpoints --exclude=".[!/]*" . || test $? -eq 1' \
  > "$work/artifacts.tar"
mkdir -p "$folder"
tar --extract --file="$work/artifacts.tar" --directory="$folder" --no-same-owner
ls -l "$folder"
