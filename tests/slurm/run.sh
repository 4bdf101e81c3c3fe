#!/usr/bin/env bash
# The tests that need a real slurm: `make test-slurm`. Where its programs are missing root installs them from Debian
# packages; where that cannot be, a line says so and nothing fails.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

skip() {
    echo "test-slurm: skipped: $1"
    exit 0
}

missing=""
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
[ "$(id -u)" -eq 0 ] || skip "only root can start jobs of slurm here"
if [ -n "$missing" ]; then
    command -v apt-get >/dev/null || skip "no$missing, and no apt-get to install them"
    echo "test-slurm: installing munge, slurmctld and slurmd"
    export DEBIAN_FRONTEND=noninteractive
    { timeout 120 apt-get -q update &&
        timeout 240 apt-get -q install -y --no-install-recommends munge slurmctld slurmd slurm-client; } >/dev/null 2>&1 ||
        skip "no$missing, and the Debian packages munge, slurmctld and slurmd cannot be installed"
fi
exec timeout --kill-after=60 960 "${PYTHON:-.venv/bin/python}" -m pytest -q -m slurm tests/slurm
