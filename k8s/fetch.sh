#!/usr/bin/env bash
# Copy the artifacts out of the volume that a Pod holds, and remove the Pod:
#
#     KUBECTL="kubectl --namespace=team" k8s/fetch.sh KUSTOMIZATION POD FOLDER
#
# KUSTOMIZATION is a folder whose rendering has that Pod, labelled as component fetch.
set -euo pipefail
usage="usage: k8s/fetch.sh KUSTOMIZATION POD FOLDER"
kustomization=${1:?$usage} pod=${2:?$usage} folder=${3:?$usage}
read -ra kubectl <<< "${KUBECTL:-kubectl}"

remove() { "${kubectl[@]}" delete pod "$pod" --ignore-not-found; }
trap remove EXIT
trap 'exit 130' INT TERM
# One that was left over has ended and would never be ready.
remove
"${kubectl[@]}" apply -k "$kustomization" --selector app.kubernetes.io/component=fetch
"${kubectl[@]}" wait --for=condition=Ready "pod/$pod" --timeout=900s
# Through a file, so that nothing is taken out of a copy that broke off. With 1 tar tells that a file was
# replaced while it was read; it has a whole one all the same.
# shellcheck disable=SC2016 # the Pod's shell expands it
"${kubectl[@]}" exec "$pod" -- sh -c \
  'tar --create --directory=/output --exclude=checkpoints --exclude=".[!/]*" . || test $? -eq 1' \
  > "$kustomization/artifacts.tar"
mkdir -p "$folder"
tar --extract --file="$kustomization/artifacts.tar" --directory="$folder" --no-same-owner
ls -l "$folder"
