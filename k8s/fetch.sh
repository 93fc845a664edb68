#!/usr/bin/env bash
# Copy the artifacts out of the volume that a Pod holds, and remove the Pod:
#
#     KUBECTL="kubectl --namespace=team" k8s/fetch.sh KUSTOMIZATION POD FOLDER
#
# KUSTOMIZATION is a folder whose rendering has that Pod, labelled as component fetch.
set -euo pipefail
if (($# != 3)); then
  echo "usage: k8s/fetch.sh KUSTOMIZATION POD FOLDER" >&2
  exit 2
fi
kustomization=$1 pod=$2 folder=$3
read -ra kubectl <<< "${KUBECTL:-kubectl}"

remove() { "${kubectl[@]}" delete pod "$pod" --ignore-not-found; }
# One that was left over has ended and would never be ready.
remove
trap remove EXIT
trap 'exit 130' INT TERM
"${kubectl[@]}" apply -k "$kustomization" --selector app.kubernetes.io/component=fetch
echo "waiting for Pod $pod, five minutes at most"
if ! "${kubectl[@]}" wait --for=condition=Ready "pod/$pod" --timeout=300s; then
  "${kubectl[@]}" get events --field-selector "involvedObject.name=$pod" || true
  exit 1
fi
# Through a file, so that nothing is taken out of a copy that broke off. With 1 tar tells that a file was
# replaced while it was read; it has a whole one all the same.
# shellcheck disable=SC2016 # the Pod's shell expands it
"${kubectl[@]}" exec "$pod" -- sh -c \
  'tar --create --directory=/output --exclude=checkpoints --exclude=".[!/]*" . || test $? -eq 1' \
  > "$kustomization/artifacts.tar"
mkdir -p "$folder"
tar --extract --file="$kustomization/artifacts.tar" --directory="$folder" --no-same-owner
ls -l "$folder"
