#!/bin/sh
# Installs what some tests need besides Python: a TPM in software with its tools, FUSE, bubblewrap, strace. Without it they skip and say so.
set -eu
missing=
command -v swtpm >/dev/null || missing="$missing swtpm"
command -v swtpm_setup >/dev/null || missing="$missing swtpm-tools"
command -v strace >/dev/null || missing="$missing strace"
command -v bwrap >/dev/null || missing="$missing bubblewrap"
command -v fusermount3 >/dev/null || missing="$missing fuse3"
ldconfig -p 2>/dev/null | grep -q libfuse.so.2 || missing="$missing libfuse2"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || true
    for package in $missing; do # one by one: names differ between releases
        apt-get install -y -qq "$package" >/dev/null 2>&1 || apt-get install -y -qq "${package}t64" >/dev/null 2>&1 ||
            echo "$package could not be installed: the tests that need it are skipped." >&2
    done
else
    echo "Not installed:$missing. The tests that need them are skipped; sudo apt-get install$missing brings them." >&2
fi
