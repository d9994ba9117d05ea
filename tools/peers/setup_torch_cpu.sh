#!/usr/bin/env bash
# Makes .venv-torch-cpu: PyTorch for paired CPU timings, from pinned packages, about 1 GB and a minute.
#
#   tools/peers/setup_torch_cpu.sh [FOLDER]
#
# Where the package index serves only the CUDA build, its GPU libraries (several GB) are left out, and
# stub_libraries.py puts empty ones in their place, so that the CPU part loads.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/../../.venv-torch-cpu}
torch=torch==2.11.0
plain=(typing_extensions==4.15.0 sympy==1.14.0 mpmath==1.3.0 networkx==3.6 filelock==3.20.0 fsspec==2025.10.0
  jinja2==3.1.6 markupsafe==3.0.3 numpy==2.3.5 setuptools==80.9.0)
# Small, and loaded before anything else: the real ones spare us their stubs.
cuda=(nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)

python3 -m venv "$folder"
install=("$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps)
echo "installing $torch into $folder"
"${install[@]}" "$torch" "${plain[@]}"
if ! "$folder/bin/python" -c 'import torch' 2>/dev/null; then
  echo "a CUDA build: replacing its GPU libraries by stubs (needs cc and readelf)"
  "${install[@]}" "${cuda[@]}"
  "$folder/bin/python" "$here/stub_libraries.py"
fi
"$folder/bin/python" -c 'import torch; print("PyTorch", torch.__version__, "with", torch.get_num_threads(), "threads")'
