#!/usr/bin/env bash
# All of docs/benchmarks.md: workloads in groups of few engines, then one report and its plots.
#
#   benchmarks/full_run.sh FOLDER [GROUP ...]
#
# FOLDER gets one folder a group with its results.jsonl, and results.jsonl, report.md and plots of all
# groups that are there. With GROUPs only these are measured: lengths, tenants, beam, many, lora, longer,
# 10000, serving, compiled. PYTHON chooses the interpreter, TRACE a trace file (the first requests of it are
# replayed by the servers), BENCH further options of every group, such as "--model FOLDER". Where LoRA
# is in a group, MODE says how all engines of it run: eager, or compiled, which takes a GPU.
# About 110 minutes on two cores with SmolLM2-135M; nothing else should run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=${1:?"usage: benchmarks/full_run.sh FOLDER [GROUP ...]"}
shift
groups=("$@")
((${#groups[@]})) || groups=(lengths tenants beam many lora longer 10000 serving compiled)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
read -ra more <<<"${BENCH:-}"
mkdir -p "$folder"

bench() { # GROUP COMMAND OPTION ...
    local name=$1 command=$2
    shift 2
    "$PYTHON" -m vllm_pedro.cli bench "$command" --output "$folder/$name" --no-plots "$@" "${more[@]}"
}

mode=${MODE:-eager}
three=("base-$mode" "pedro-$mode" "lora-$mode")
compiled=(base-compiled pedro-compiled)
failed=()
for group in "${groups[@]}"; do
    echo "== $group" >&2
    case $group in
    lengths)
        bench "$group" offline --rows 8 --static --minutes 40 \
            --workloads decode prefill mixed paper concurrency break-even
        ;;
    tenants)
        bench "$group" offline --rows 8 --engines "${three[@]}" --minutes 20 \
            --workloads tenants mixes --tenants 1 8 32 128
        ;;
    beam)
        bench "$group" offline --rows 8 --engines "${three[@]}" --static --workloads beam
        ;;
    many)
        bench "$group" offline --rows 8 --engines "${compiled[@]}" --workloads tenants --tenants 1000
        ;;
    lora)
        bench "$group" offline --rows 8 --engines "lora-$mode" --repeats 1 \
            --workloads tenants --tenants 1000
        ;;
    longer)
        bench "$group" offline --rows 8 --engines pedro-compiled --repeats 1 \
            --workloads tenants --tenants 1000 --tenant-tokens 64 32
        ;;
    10000)
        bench "$group" offline --rows 8 --engines pedro-compiled --repeats 1 \
            --workloads tenants --tenants 10000
        ;;
    serving)
        options=(--servers "${three[@]}" --tenants 8 --requests 24 --concurrency 8 --rate 1)
        if [[ -n ${TRACE:-} ]]; then
            options+=(--trace "$TRACE" --trace-speed 0.2 --trace-shrink 8)
        fi
        bench "$group" serving "${options[@]}"
        ;;
    compiled)
        bench "$group" serving --servers "${compiled[@]}" --tenants 8 --requests 24 --concurrency 8 --rate 1
        ;;
    *)
        echo "unknown group $group" >&2
        false
        ;;
    esac || failed+=("$group")
done

# All groups that are there, in this order whatever order they were measured in.
for group in lengths beam serving compiled tenants many lora longer 10000; do
    [[ -f "$folder/$group/results.jsonl" ]] && cat "$folder/$group/results.jsonl"
done >"$folder/results.jsonl"
if [[ -s "$folder/results.jsonl" ]]; then
    "$PYTHON" -m vllm_pedro.cli bench report "$folder/results.jsonl" --output "$folder" || failed+=(report)
fi
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
