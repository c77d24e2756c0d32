#!/bin/sh
# One environment a peer, outside the tree: benchmarks/peers/setup.sh FOLDER [PEER...]. Then: make bench-compress ARGS="--venvs FOLDER".
# PyTorch is pinned, since a peer's metadata would else move it.
set -eu
folder=${1:?usage: benchmarks/peers/setup.sh FOLDER [PEER...]}
shift
python=${PYTHON:-python3.11}
every="onnxruntime openvino torch neural keras rechub fuxictr recbole torchrec mosec litserve bento rayserve triton"

packages() {
  case $1 in
    onnxruntime) echo onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 numpy==2.4.6 sympy ;;
    openvino) echo openvino==2026.4.1 nncf==3.4.0 onnx==1.23.2 ;;
    torch) echo torch==2.13.0 torchao==0.18.0 torch-pruning==1.6.1 numpy==2.4.6 safetensors==0.8.0 ;;
    neural) echo torch==2.13.0 neural-compressor-pt==3.10 accelerate safetensors==0.8.0 ;;
    keras) echo torch==2.13.0 keras==3.15.1 numpy==2.4.6 safetensors==0.8.0 ;;
    rechub) echo torch==2.13.0 torch-rechub==0.9.0 ;;
    fuxictr) echo torch==2.13.0 fuxictr==2.3.10 ;;
    recbole) echo torch==2.13.0 recbole==1.2.1 numpy==1.26.4 "pandas<2.3" "scipy<1.14" "setuptools<81" ;;
    torchrec) echo torch==2.13.0 numpy==2.4.6 cloudpickle packaging pyyaml tqdm ;;
    mosec) echo mosec==0.9.8 ;;
    litserve) echo litserve==0.2.19 ;;
    bento) echo bentoml==1.4.40 ;;
    rayserve) echo "ray[serve]==2.60.0" ;;
    triton) echo nvidia-pytriton==0.7.0 ;;
    *) echo "no peer $1; there are: $every" >&2; exit 1 ;;
  esac
}

# What goes in without what its metadata asks for: TorchRec's names FBGEMM's CUDA build.
alone() {
  case $1 in
    torchrec)
      echo torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0 torchmetrics==1.0.3 lightning-utilities iopath tensordict pyvers orjson \
        pyre-extensions typing_inspect mypy_extensions ;;
  esac
}

for peer in ${@:-$every}; do
  wanted=$(packages "$peer")
  # Triton carries an interpreter that fits Debian's library alone.
  [ "$peer" = triton ] && made=${TRITON_PYTHON:-/usr/bin/python3} || made=$python
  [ -d "$folder/$peer" ] || "$made" -m venv "$folder/$peer"
  # shellcheck disable=SC2086  # several packages
  "$folder/$peer/bin/python" -m pip install --quiet $wanted
  # shellcheck disable=SC2046
  [ -z "$(alone "$peer")" ] || "$folder/$peer/bin/python" -m pip install --quiet --no-deps $(alone "$peer")
  echo "$peer: $wanted $(alone "$peer")"
done
