#!/bin/sh
# Install the programs that slow tests drive and pip can't bring. Where that is impossible, say so and go on:
# the tests then skip with a reason, or fail under CI=true.
set -eu

missing=""
command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || missing="chromium"
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "not installed: $missing (no apt-get on this machine)"
elif [ "$(id -u)" != 0 ]; then
    echo "not installed: $missing (run 'apt-get install $missing' as root)"
else
    echo "installing $missing"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi
