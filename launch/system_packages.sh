#!/usr/bin/env bash
# Installs the programs of the system that some tests drive: Chromium, Prometheus, Slurm, ShellCheck.
#   bash launch/system_packages.sh
# Only where they can be had without questions (Debian or Ubuntu, as root); elsewhere it names what is missing, and the
# tests that need it are skipped.
set -euo pipefail

# program:package
needed=(chromium:chromium chromedriver:chromium-driver prometheus:prometheus promtool:prometheus
  slurmctld:slurm-wlm munged:munge shellcheck:shellcheck)

missing() {
  local entry
  for entry in "${needed[@]}"; do
    # Daemons lie in sbin, which is not on every PATH.
    PATH=$PATH:/usr/sbin:/sbin command -v "${entry%%:*}" >/dev/null || printf '%s\n' "${entry##*:}"
  done | sort -u
}

mapfile -t packages < <(missing)
if ((${#packages[@]} == 0)); then exit 0; fi

if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  printf 'system packages: installing %s ...\n' "${packages[*]}" >&2
  log=$(mktemp)
  trap 'rm -f -- "$log"' EXIT
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then
    tail -n 5 "$log" >&2
  fi
  mapfile -t packages < <(missing)
fi
if ((${#packages[@]} > 0)); then
  printf 'system packages: not there: %s; the tests that need them are skipped\n' "${packages[*]}" >&2
fi
