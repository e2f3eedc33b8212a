#!/usr/bin/env bash
# The fast tests with the oldest torch, torchvision and timm that pyproject.toml declares; all else as in constraints.txt.
#
#     tests/oldest.sh [FOLDER] [torch==2.11 torchvision==0.26]
#
# uv builds the environment in FOLDER, or in a temporary one that is removed at the end. Versions may be named instead. It takes
# some 7 GB; UV_TORCH_BACKEND=cpu gets torch without CUDA from PyTorch's own index.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -gt 0 ]; then
  folder=$1
  shift
else
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
fi
mapfile -t oldest < <(sed -nE 's/^ *"(torch|torchvision|timm)>=([0-9.]+)".*/\1==\2/p' pyproject.toml)
[ ${#oldest[@]} -eq 3 ] || { echo "pyproject.toml must say torch>=, torchvision>= and timm>= (found: ${oldest[*]})" >&2; exit 1; }
[ $# -gt 0 ] || set -- "${oldest[@]}"

"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install -q --disable-pip-version-check uv
grep -vE '^(torch|torchvision|timm|triton|setuptools|(nvidia|cuda)-[a-z0-9-]+)==' constraints.txt > "$folder/constraints.txt"
"$folder/bin/uv" pip install -q --python "$folder/bin/python" -c "$folder/constraints.txt" -e ".[study,weights,export,test]" "$@"
"$folder/bin/uv" pip list --python "$folder/bin/python" | grep -E '^(torch|torchvision|timm|numpy) '

export PATH=$folder/bin:$PATH TQDM_DISABLE=1 OMP_NUM_THREADS=1
pytest -n "${CORES:-2}" --dist loadfile -m "not slow" tests
