#!/usr/bin/env bash
# Collects the wheels that a CUDA image with PyTorch needs for benchmarks/gpu.py, in a folder to copy to a machine without network.
#
#     docker run --rm IMAGE python -m pip freeze > image.txt      # or `pip list --format=freeze` on the machine
#     benchmarks/gpu_wheels.sh image.txt wheels [PYTHON_VERSION]  # 3.12; default: this Python's
#
# On the machine, with a copy of this checkout and of the folder:
#
#     python -m venv --system-site-packages venv && venv/bin/pip install --no-index --no-deps wheels/*.whl
#     PYTHONPATH=. venv/bin/python benchmarks/gpu.py
#
# Omits Ray and W&B. COMPARE=1 adds TRL, its datasets and Liger; PACKAGES="flash-attn-4 ..." adds others; WITHOUT="pyarrow ..."
# omits more. The image must contain torch and its dependencies. Versions come from constraints.txt if it lists the package.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//'
  exit 2
fi
cd "$(dirname "$0")/.."
image=$(realpath "$OLDPWD/$1" 2>/dev/null || realpath "$1")
case $2 in /*) folder=$2 ;; *) folder=$OLDPWD/$2 ;; esac
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
exec "$python" benchmarks/gpu_wheels.py "$image" "$folder" "${3:-}"
