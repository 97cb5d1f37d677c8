#!/usr/bin/env bash
# Installs what the tests of this folder need, from Debian: an image builder, compose's checker, Prometheus with promtool,
# and what makes the stand-in for the base images. As root.
set -euo pipefail
missing=()
for pair in buildah:buildah docker-compose:docker-compose prometheus:prometheus promtool:prometheus \
  debootstrap:debootstrap ip:iproute2 unshare:util-linux; do
  command -v "${pair%:*}" > /dev/null || missing+=("${pair#*:}")
done
if ((${#missing[@]} == 0)); then exit; fi
if ((EUID != 0)); then echo "tests/docker/setup.sh: as root: apt-get install ${missing[*]}" >&2; exit 3; fi
# The services are started by the tests alone, on loopback: none at installation, where an init system would.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  printf '#!/bin/sh\nexit 101\n' > "$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${missing[@]}" > /dev/null
