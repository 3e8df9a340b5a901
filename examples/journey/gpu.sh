#!/usr/bin/env bash
# The journey at the sizes one would use on a GPU: more text, longer training, more calibration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec python examples/journey/run.py --device cuda --scale 16 --out "${OUT:-out}/journey-gpu" "$@"
