#!/usr/bin/env bash
# Runs opd_ray as a job of a running Ray cluster (`ray job submit`), shows its log until it ends, and ends with exit
# code 0 if it came to its end, 1 otherwise. Ctrl-C stops the watching, not the job.
#   bash launch/submit.sh [Hydra overrides]                     default: +experiment=lsm_block64
#   RAY_API_SERVER_ADDRESS=http://HEAD:8265 OPD_SCALE=qwen3_1p7b bash launch/submit.sh +experiment=lsm_newline seed=1
#
# RAY_API_SERVER_ADDRESS  the cluster's dashboard; default: a cluster on this machine
# OPD_SCALE               scale of the run; default: the cluster's own OPD_SCALE, else tiny
# RUNS_DIR                absolute folder for run folders, seen by all nodes; default: runs in this checkout
# PYTHON                  interpreter here; default: the .venv that launch/environment.sh makes
# CLUSTER_PYTHON          interpreter on the cluster's nodes; default: the same path
# A cluster with token authentication (Ray's default) asks for the token that `ray get-auth-token` prints on its head:
# put it in RAY_AUTH_TOKEN here. The checkout is sent along, so nodes need its packages only, not opd_ray itself.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
python=${PYTHON:-$root/.venv/bin/python}
cluster_python=${CLUSTER_PYTHON:-$python}
runs_dir=${RUNS_DIR:-$root/runs}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

command -v -- "$python" >/dev/null ||
  fail "$python is not there: run launch/environment.sh, or set PYTHON=/path/to/python"
[[ $runs_dir == /* ]] || fail "RUNS_DIR=$runs_dir is not absolute: the job runs in another folder"
case " $* " in
  *[\ +]experiment=* | *[\ +]sweep=*) ;;
  *) set -- +experiment=lsm_block64 "$@" ;;
esac

# DeepSpeed and Ray look for helper programs (ninja, ray) on the PATH. runs_dir stands before the arguments, which may
# name another.
runtime_env=$("$python" - "$cluster_python" <<'PYTHON'
import json, os, sys
env = {"RAY_USAGE_STATS_ENABLED": "0", "VLLM_NO_USAGE_STATS": "1"}
if os.environ.get("OPD_SCALE"):
    env["OPD_SCALE"] = os.environ["OPD_SCALE"]
if "/" in sys.argv[1]:
    env["PATH"] = os.path.dirname(sys.argv[1]) + ":${PATH}"
top = [".git", ".venv*", "runs", "models", "outputs", "multirun", "wandb", "build", "tests", "benchmarks"]
excludes = ["/" + name for name in top] + ["__pycache__", "*.egg-info", ".*_cache"]
print(json.dumps({"env_vars": env, "excludes": excludes}))
PYTHON
)
exec "$python" -m ray.scripts.scripts job submit --working-dir "$root" --runtime-env-json "$runtime_env" -- \
  "$cluster_python" -m opd_ray.main "runs_dir=$runs_dir" "$@"
