#!/usr/bin/env bash
# Measures what benchmarks/README.md calls open on one GPU, in two parts of less than 4 and 8 minutes:
#
#     benchmarks/run_gpu.sh part1 [--dry-run] [--python PYTHON] [OUT]        # OUT: build/gpu
#     benchmarks/run_gpu.sh part2 [--dry-run] [--python PYTHON] [OUT]
#
# Part 1 says whether training works on this GPU, and how fast OSP trains osp_1b. Part 2 has the contenders and the
# other benchmarks. It adds the contenders to the figures of part 1 if it finds them in OUT, which makes one table.
#
# Writes a JSON file and a log for each step into OUT and goes on when one fails or takes too long; part1.tsv, part2.tsv
# and the last lines say which did. --dry-run prints the commands with their limits in seconds. The limits of a part add
# up to no more than its budget; steps that no time is left for are named. The PYTHON, by default .venv/bin/python or
# else python3, needs the dependencies of osp, but not osp itself. Needs no network and no account.
set -u
cd "$(dirname "$0")/.."

part=
python=python3
[[ -x .venv/bin/python ]] && python=.venv/bin/python
dry_run=
out=
while (($#)); do
  case $1 in
    --dry-run) dry_run=yes ;;
    --python) python=${2:-}; shift ;;
    -*) echo "error: unknown option $1; the options are --dry-run and --python PYTHON" >&2; exit 2 ;;
    *) if [[ ! $part ]]; then part=$1; else out=$1; fi ;;
  esac
  shift
done
out=${out:-build/gpu}
type "$python" >/dev/null 2>&1 || { echo "error: --python $python is no program" >&2; exit 2; }
case $part in
  part1) budget=224 ;; # seconds; killing a step that does not end takes 5 more
  part2) budget=464 ;;
  *) echo "error: '$part' is no part; the first argument is part1 or part2" >&2; exit 2 ;;
esac

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export WANDB_MODE=disabled HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

failed=()

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 status began left
  shift 2
  if [[ $dry_run ]]; then
    printf '%s\t%s\t' "$name" "$limit"
    printf '%q ' "$@"
    printf '\n'
    return
  fi
  left=$((budget - SECONDS))
  if ((left < 15)); then
    failed+=("$name: no time left")
    printf '%s\tskipped\t0\n' "$name" >>"$out/$part.tsv"
    return
  fi
  began=$SECONDS
  timeout --kill-after=5 $((limit < left ? limit : left)) "$python" "$@" >"$out/$name.log" 2>&1 </dev/null
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) >>"$out/$part.tsv"
  echo "$name: $((SECONDS - began)) s, exit status $status"
  grep '^|' "$out/$name.log" # its tables
  if ((status)); then failed+=("$name: exit status $status, see $out/$name.log"); fi
}

if [[ ! $dry_run ]]; then
  mkdir -p "$out"
  printf 'step\tstatus\tseconds\n' >"$out/$part.tsv"
fi

gpu=(--seq-len 2048 --precision bf16 --rounds 1)

train_osp_1b() { # NAME SECONDS OPTION...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" benchmarks/train_step.py --model osp_1b --rows 8 --accumulate 4 "${gpu[@]}" --warmup 2 --steps 4 --profile --out "$out/train_osp_1b.json" "$@"
}

if [[ $part == part1 ]]; then
  marked=$(grep -rl 'mark\.gpu' tests --include='test_*.py') # other files may need packages that are not there
  step data 25 scripts/prepare.py logger.progress=false
  step start 44 benchmarks/train_step.py --model nano --rows 8 --accumulate 2 --rounds 1 --warmup 1 --steps 2 --no-compile --contenders "osp muon" --out "$out/start.json"
  train_osp_1b train_osp_1b_muon 100 --contenders "osp muon"
  step tests 55 -m pytest -q -p no:cacheprovider -m gpu ${marked:-tests}
else
  train_osp_1b train_osp_1b_adamw 80 --keep --contenders "osp adamw"
  train_osp_1b train_osp_1b_transformers 70 --keep --contenders transformers
  step train_374m 55 benchmarks/train_step.py --model 374m --rows 16 --accumulate 2 "${gpu[@]}" --warmup 2 --steps 4 --profile --contenders "osp muon" --out "$out/train_374m.json"
  step train_60m 75 benchmarks/train_step.py --model 60m --rows 32 "${gpu[@]}" --steps 8 --contenders "osp muon" "osp adamw" transformers --out "$out/train_60m.json"
  step norms 35 benchmarks/norms.py --hidden 2048 --repeats 20 --out "$out/norms.json"
  step muon_step 30 benchmarks/muon_step.py --layers 6 --out "$out/muon_step.json"
  step quant_eval 30 benchmarks/quant_eval.py --hidden 2048 --ffn 5504 --layers 24 --heads 16 --dtype bf16 --presets none strict osp_paper hadamard --out "$out/quant_eval.json"
  step overhead_60m 49 benchmarks/overhead.py --model 60m --tokens-per-step 65536 --seq-len 2048 --out "$out/overhead_60m.json"
  step generate 40 benchmarks/generate.py --model 60m --dtype bf16 --batch 1 --norms rmsnorm bhyt --rounds 3 --no-compile --out "$out/generate.json"
fi

if [[ $dry_run ]]; then exit 0; fi
echo "$part took $SECONDS s; figures and logs in $out"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
