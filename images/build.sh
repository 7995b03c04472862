#!/usr/bin/env bash
# Build the images with docker, podman or buildah, whichever works here, push them, and write their digests where the overlays look.
#   images/build.sh REGISTRY TAG [WORLD...]       PUSH=no leaves them here, and writes tags instead of digests
#   BUILD_FLAGS="..." goes to the builder, e.g. "--volume /etc/ssl/certs:/etc/ssl/certs:ro --build-arg PIP_CERT=... --build-arg SSL_CERT_FILE=..."
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { echo "usage: images/build.sh REGISTRY TAG [WORLD...], e.g. images/build.sh ghcr.io/me 0.1.0" >&2; exit 2; }
registry=$1 tag=$2; shift 2
worlds=("$@"); [ ${#worlds[@]} -gt 0 ] || worlds=(core train serve laptop)
[ "$tag" != latest ] || { echo "TAG=latest cannot be told from the next one; give a version" >&2; exit 2; }

builder=
for each in docker podman buildah; do
  if command -v "$each" >/dev/null && "$each" info >/dev/null 2>&1; then builder=$each; break; fi # docker's client may be here without its daemon
done
[ -n "$builder" ] || { echo "none of docker, podman and buildah works here; install one (buildah needs no daemon)" >&2; exit 2; }

# shellcheck disable=SC2206 # flags are words
flags=(${BUILD_FLAGS:-})
for world in "${worlds[@]}"; do
  name="$registry/datadose/$world:$tag"
  "$builder" build "${flags[@]}" --build-arg "WORLD=$world" --build-arg "VERSION=$tag" --build-arg "REVISION=$(git rev-parse HEAD)" \
    --file images/Dockerfile --tag "$name" .
  if [ "${PUSH:-yes}" = no ]; then
    pinned="newTag: \"$tag\""
  elif [ "$builder" = docker ]; then
    docker push "$name"
    reference=$(docker inspect --format '{{index .RepoDigests 0}}' "$name")
    pinned="digest: ${reference##*@}"
  else
    "$builder" push --digestfile /tmp/digest.$$ "$name"
    pinned="digest: $(cat /tmp/digest.$$)"; rm -f /tmp/digest.$$
  fi
  # A line for each name that the overlays use: on a cluster without GPUs one image plays all three.
  if [ "$world" = laptop ]; then file=k8s/components/images-laptop/kustomization.yaml names=(core train serve); else file=k8s/components/images-gpu/kustomization.yaml names=("$world"); fi
  for each in "${names[@]}"; do
    sed -i "s#^  - {name: datadose/$each,.*#  - {name: datadose/$each, newName: $registry/datadose/$world, $pinned}#" "$file"
  done
  echo "$name: $pinned, in $file"
done
