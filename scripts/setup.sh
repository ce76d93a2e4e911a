#!/bin/sh
# Make .venv with the tested packages and an editable install of this one.
# Does nothing when pyproject.toml, the constraints, this script and the folder are those of the last set-up.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.setup-checksum
checksum=$({ pwd; cat pyproject.toml constraints/cpu.txt scripts/setup.sh; } | cksum)

is_python_312() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

# Every folder of PATH is looked at, since a pyenv shim may stand before a Python that works.
find_python_312() {
    for name in python3.12 python3; do
        old_ifs=$IFS
        IFS=:
        for folder in $PATH; do
            if [ -x "$folder/$name" ] && is_python_312 "$folder/$name"; then
                IFS=$old_ifs
                printf '%s\n' "$folder/$name"
                return
            fi
        done
        IFS=$old_ifs
    done
    return 1
}

if [ -x $venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$checksum" ]; then
    exit 0
fi

if ! { is_python_312 $venv/bin/python && $venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    if ! python=$(find_python_312); then
        echo "error: Python 3.12 is missing; install it (for example 'pyenv install 3.12') and run make again" >&2
        exit 1
    fi
    if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        echo "error: $python lacks the modules venv and ensurepip; install them (on Debian: python3.12-venv)" >&2
        exit 1
    fi
    echo "making $venv with $python"
    "$python" -m venv --clear $venv
fi

echo "installing packages into $venv (about 5.5 GB, minutes)"
rm -f $stamp
# pip first: the one that comes with Python may not know --build-constraint.
$venv/bin/python -m pip install -qq --constraint constraints/cpu.txt --upgrade pip
$venv/bin/python -m pip install -qq --constraint constraints/cpu.txt --build-constraint constraints/cpu.txt \
    --editable '.[data,dev]'
printf '%s\n' "$checksum" >$stamp
