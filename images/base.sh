#!/usr/bin/env bash
# Where no registry can be reached: a base image of Debian's own packages under the name that the Dockerfile asks for. Needs debootstrap and buildah, as root.
#   images/base.sh [NAME]       MIRROR and KEYRING as debootstrap takes them
set -euo pipefail
name=${1:-docker.io/library/python:3.11-slim-bookworm}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder" ${MIRROR:+"$MIRROR"}
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/*
container=$(buildah from scratch)
buildah add --quiet "$container" "$folder" /
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
buildah commit --quiet --rm "$container" "$name"
