#!/bin/sh
# Install the programs that slow tests drive and pip can't bring. Where that is impossible, say so and go on:
# the tests then skip with a reason, or fail under CI=true.
set -eu

missing=""

# The package is needed where none of the programs is there.
needs() {
    package=$1
    shift
    for program in "$@"; do
        if command -v "$program" >/dev/null 2>&1; then return; fi
    done
    missing="$missing $package"
}

needs chromium chromium google-chrome
needs slurm-wlm slurmctld
needs munge munged
needs shellcheck shellcheck
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "not installed:$missing (no apt-get on this machine)"
elif [ "$(id -u)" != 0 ]; then
    echo "not installed:$missing (run 'apt-get install$missing' as root)"
else
    echo "installing$missing"
    apt-get update -qq
    # The daemons that come along belong to the tests: none of them is started here.
    # shellcheck disable=SC2086 # names of packages
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
