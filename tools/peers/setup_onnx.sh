#!/usr/bin/env bash
# Makes .venv-onnx: ONNX Runtime for paired CPU timings, from pinned packages, about 150 MB.
#
#   tools/peers/setup_onnx.sh [FOLDER]
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${1:-$here/../../.venv-onnx}
packages=(onnxruntime==1.32.0 onnx==1.23.2 numpy==2.3.5 protobuf==7.36.2 flatbuffers==25.12.19 ml_dtypes==0.6.0
  packaging==26.4 typing_extensions==4.15.0)

python3 -m venv "$folder"
echo "installing ${packages[0]} into $folder"
"$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps "${packages[@]}"
"$folder/bin/python" -c 'import onnx, onnxruntime; print("ONNX Runtime", onnxruntime.__version__)'
