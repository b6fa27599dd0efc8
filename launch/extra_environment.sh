#!/usr/bin/env bash
# Makes an environment with more packages than .venv has, for comparisons with other projects; prints its interpreter.
#   bash launch/extra_environment.sh oracles     TRL, verl, Liger-Kernel, SciPy: tests/oracles, benchmarks.bench_vs_trl
#   bash launch/extra_environment.sh peers       TransferQueue, TorchRL: benchmarks.bench_store
#   BASE_PYTHON=/path/to/python bash launch/extra_environment.sh NAME     on top of another environment than .venv
# Makes .venv-NAME, which adds launch/requirements/NAME.lock to the packages of .venv and leaves .venv as it is.
# Packages come from wherever pip is configured to look.
set -euo pipefail

name=${1:?give the name of a file in requirements without .lock: oracles or peers}
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv-$name
lock=$root/launch/requirements/$name.lock
log=$venv/install.log
owner=$venv/opd_ray.$name      # says that this script made the folder: only then may it be emptied
stamp=$venv/opd_ray.installed  # written last: what is installed

say() { printf '%s: %s\n' "$name" "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

fail_install() {
  tail -n 15 -- "$log" >&2
  fail "$1; all of pip's output is in $log"
}

# The folder of packages of an interpreter, and what has to stay the same for the environment to stay good.
site_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null; }

fingerprint() {
  printf '%s\n%s\n' "$root" "$site"
  "$base" -c 'import sys; print(sys.version)'
  cat -- "$lock" "${BASH_SOURCE[0]}" | sha256sum
}

find_base() {
  base=${BASE_PYTHON:-$root/.venv/bin/python}
  if [[ -z ${BASE_PYTHON:-} ]]; then bash "$root/launch/environment.sh" >&2; fi
  site=$(site_of "$base") || fail "BASE_PYTHON=$base does not run as a Python interpreter"
  "$base" -c 'import torch, transformers, pytest, ray, pyarrow' 2>/dev/null ||
    fail "$base lacks torch, transformers, pytest, ray or pyarrow: leave BASE_PYTHON out, or name a complete environment's"
}

up_to_date() { [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]] && "$venv/bin/python" -c '' 2>/dev/null; }

install() {
  local start=$SECONDS
  if [[ -d $venv && ! -f $owner && -n $(ls -A -- "$venv") ]]; then
    fail "$venv was not made by this script: move it away"
  fi
  say "installing $(grep -c == "$lock") packages into $venv ..."
  rm -rf -- "$venv"
  mkdir -p -- "$venv"
  : >"$owner"
  # Git and ruff leave the folder alone.
  printf '*\n' >"$venv/.gitignore"
  "$base" -m venv "$venv" >"$log" 2>&1 || fail_install "$base could not make a virtual environment"
  # Its own packages come first on the path; those of the base environment follow, .pth files of it included.
  printf 'import site; site.addsitedir(%s)\n' "'$site'" >"$(site_of "$venv/bin/python")/opd_ray_base.pth"
  # --no-deps: each package's own list is far longer than what is used of it here.
  PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0 \
    "$venv/bin/python" -m pip install --no-deps -r "$lock" >>"$log" 2>&1 ||
    fail_install "a package could not be installed: $(grep '^ERROR' "$log" | tail -n 1)"
  fingerprint >"$stamp"
  say "ready after $((SECONDS - start)) s"
}

[[ -f $lock ]] || fail "there is no $lock: give oracles or peers"
find_base
# This file itself is the lock, for two shells that install at once.
exec {lock_fd}<"${BASH_SOURCE[0]}"
flock "$lock_fd"
if ! up_to_date; then install; fi
printf '%s\n' "$venv/bin/python"
