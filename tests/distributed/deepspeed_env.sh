#!/usr/bin/env bash
# Build an environment for DeepSpeed on top of the one whose Python is given (default: `python`), and print the
# path of its interpreter. DeepSpeed stays out of the main environment: transformers and accelerate change what
# they do wherever it can be imported. No kernel is compiled; a second call finds what the first has built.
#
#   bash tests/distributed/deepspeed_env.sh [PYTHON]
set -euo pipefail

base=${1:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${HF_RESET_DEEPSPEED_ENV:-$root/.cache/deepspeed}
python=$folder/bin/python
sites=$("$base" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

if [[ ! -f $folder/built || $(<"$folder/built") != "$sites" ]]; then
    rm -rf "$folder"
    "$base" -m venv --without-pip "$folder" >&2
    # Everything in the main environment is seen, editable installs too, and nothing in it is changed.
    "$python" -c 'import sys, sysconfig, pathlib
line = f"import site; site.addsitedir({sys.argv[1]!r})\n"
pathlib.Path(sysconfig.get_path("purelib"), "main.pth").write_text(line)' "$sites"
    DS_BUILD_OPS=0 "$python" -m pip install --quiet --no-build-isolation --no-deps \
        setuptools wheel py-cpuinfo hjson msgpack ninja >&2
    DS_BUILD_OPS=0 "$python" -m pip install --quiet --no-build-isolation "deepspeed==0.19.8" >&2
    "$python" -c 'import deepspeed' >&2
    echo "$sites" > "$folder/built"
fi
echo "$python"
