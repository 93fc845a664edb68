#!/usr/bin/env bash
# Installs Apptainer from Debian's unstable distribution, because Debian 12 does not package it. Its two programs load
# that distribution's libraries from a separate folder; the system's libraries are not changed.
set -euo pipefail

readonly LIBS=/opt/apptainer-libs
readonly STARTER=/usr/lib/x86_64-linux-gnu/apptainer/bin/starter
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

mirror=$(sed -n 's/^URIs: //p' /etc/apt/sources.list.d/debian.sources | head -n 1)
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > sources.list
mkdir -p lists/partial archives/partial
sid=(-qq -o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
  -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work" -o APT::Sandbox::User=root)
apt-get "${sid[@]}" update
apt-get "${sid[@]}" download apptainer libc6 libseccomp2 libsqlite3-0
apt-get install -y -qq --no-install-recommends patchelf squashfs-tools squashfuse uidmap > /dev/null

mkdir -p "$LIBS" /var/lib/apptainer/mnt/session
for package in libc6 libseccomp2 libsqlite3-0; do
  dpkg --extract "${package}"_*.deb "$package"
  find "$package" ! -type d -name '*.so*' -exec cp --dereference {} "$LIBS" \;
done
dpkg --extract apptainer_*.deb apptainer
for program in "apptainer/usr/bin/apptainer" "apptainer$STARTER"; do
  patchelf --set-interpreter "$LIBS/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$LIBS" "$program"
done
cp --archive apptainer/. /
apptainer --version
