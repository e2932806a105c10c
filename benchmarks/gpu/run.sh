#!/usr/bin/env bash
# The GPU suite on a machine with one GPU, Python 3.12, torch with CUDA, Triton and transformers, in ten minutes:
#
#     benchmarks/gpu/run.sh          runs it; each of its four stages writes benchmarks/results/gpu-NUMBER-STAGE.json
#     benchmarks/gpu/run.sh wheels   fetches what such a machine may lack into benchmarks/gpu/wheels, with a network
#
# Set PYTHON to choose an interpreter, OUT for another folder of results. Options go to run.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
wheels=benchmarks/gpu/wheels
if [ "${1-}" = wheels ]; then
    fetch=("$python" -m pip download --quiet --dest "$wheels" --only-binary=:all: --python-version 3.12
        --implementation cp --abi cp312 --abi abi3 --abi none --platform manylinux_2_28_x86_64
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
    "${fetch[@]}" --no-deps megatron-core==0.19.2
    "${fetch[@]}" 'pydantic>=2.12'
    ls "$wheels"
    exit
fi
packages=$PWD/build/gpu-packages
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' \
    megatron.core pydantic 2>/dev/null; then
    # Without them run.py goes on, and says which parts need them.
    if compgen -G "$wheels/*.whl" >/dev/null; then
        "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$packages" "$wheels"/*.whl || true
        export PYTHONPATH=$PYTHONPATH:$packages
    else
        echo "megatron-core or pydantic is missing here: run benchmarks/gpu/run.sh wheels where there is a network," \
            "and bring the folder $wheels along." >&2
    fi
fi
exec "$python" benchmarks/gpu/run.py --out "${OUT:-benchmarks/results}" "$@"
