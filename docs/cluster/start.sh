#!/usr/bin/env bash
# python -m rl.train "$@", with secrets from files: each file of /secrets is an environment variable of the driver, and of
# no other process. What a job is submitted with, Ray shows to everybody who may look at the cluster.
set -euo pipefail
for file in "${KEEL_SECRETS:-/secrets}"/*; do
    if [ -f "$file" ]; then
        export "$(basename "$file")=$(cat "$file")"
    fi
done
cd "$(dirname "$0")/../.."
exec python -m rl.train "$@"
