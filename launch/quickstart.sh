#!/usr/bin/env bash
# Installs what is missing, then trains the embedded student for a few minutes on this machine's CPUs.
#   bash launch/quickstart.sh [Hydra overrides], e.g. gate=newline
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
bash "$root/launch/environment.sh"

# DeepSpeed and Ray look for helper programs (ninja, ray) on the PATH.
export PATH=$root/.venv/bin:$PATH
# Neither Ray nor vLLM reports usage unless asked to.
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0} VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
exec python -m opd_ray.main +experiment=lsm_block64 "$@"
