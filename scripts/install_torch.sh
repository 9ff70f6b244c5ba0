#!/bin/sh
# Installs the CPU build of PyTorch (test oracle, optional accelerator backend): never the one with gigabytes of CUDA.
# Usage: install_torch.sh PYTHON
set -eu
python=$1
version=2.13.0
"$python" -c "import torch, sys; sys.exit(not torch.__version__.startswith('$version'))" 2>/dev/null && exit 0
pip="$python -m pip --disable-pip-version-check"
# A wheel named +cpu that pip already knows (a mirror, a local folder) comes first; then PyTorch's own index of CPU builds.
$pip install --quiet "torch==$version+cpu" 2>/dev/null ||
    $pip install --quiet "torch==$version" --index-url https://download.pytorch.org/whl/cpu ||
    {
        echo "No CPU build of PyTorch $version could be installed: the tests that compare with it will be skipped." >&2
    }
