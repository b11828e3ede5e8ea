#!/usr/bin/env bash
# Measures what benchmarks/README.md calls open on one GPU, in less than 9 minutes:
#
#     benchmarks/run_gpu.sh [--dry-run] [--python PYTHON] [OUT]        # OUT: build/gpu
#
# Writes a JSON file and a log for each step into OUT and goes on when one fails or takes too long; summary.tsv and the
# last lines say which did. --dry-run prints the commands. The most important steps come first; steps that no time is
# left for are named. Needs no network and no account.
set -u
cd "$(dirname "$0")/.."

budget=530 # seconds for everything
python=.venv/bin/python
dry_run=
out=build/gpu
while (($#)); do
  case $1 in
    --dry-run) dry_run=yes ;;
    --python) python=$2; shift ;;
    -*) echo "error: unknown option $1; the options are --dry-run and --python PYTHON" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done

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
    printf '%s\tskipped\t0\n' "$name" >>"$out/summary.tsv"
    return
  fi
  began=$SECONDS
  timeout --kill-after=5 $((limit < left ? limit : left)) "$python" "$@" >"$out/$name.log" 2>&1
  status=$?
  printf '%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) >>"$out/summary.tsv"
  if ((status)); then failed+=("$name: exit status $status, see $out/$name.log"); fi
  echo "$name: $((SECONDS - began)) s, exit status $status"
}

if [[ ! $dry_run ]]; then
  mkdir -p "$out"
  printf 'step\tstatus\tseconds\n' >"$out/summary.tsv"
fi

gpu=(--seq-len 2048 --precision bf16)

step data 60 scripts/prepare.py
step train_osp_1b 170 benchmarks/train_step.py --model osp_1b --rows 8 "${gpu[@]}" --rounds 1 --steps 6 --profile --out "$out/train_osp_1b.json"
step train_osp_1b_fp8 60 benchmarks/train_step.py --model osp_1b --rows 8 --seq-len 2048 --precision fp8 --rounds 1 --steps 6 --contenders "osp muon" --out "$out/train_osp_1b_fp8.json"
step muon_osp_1b 60 benchmarks/muon_step.py --layers 12 --out "$out/muon_osp_1b.json"
step overhead_osp_1b 90 benchmarks/overhead.py --model osp_1b --tokens-per-step 16384 --seq-len 2048 --out "$out/overhead_osp_1b.json"
step train_374m 90 benchmarks/train_step.py --model 374m --rows 16 "${gpu[@]}" --rounds 1 --steps 6 --profile --contenders "osp muon" --out "$out/train_374m.json"
step train_60m 90 benchmarks/train_step.py --model 60m --rows 32 "${gpu[@]}" --rounds 1 --steps 8 --out "$out/train_60m.json"
step norms 60 benchmarks/norms.py --hidden 2048 --repeats 20 --out "$out/norms.json"
step generate 60 benchmarks/generate.py --model osp_1b --dtype bf16 --batch 1 --norms rmsnorm bhyt --rounds 3 --out "$out/generate.json"
step quant_eval 60 benchmarks/quant_eval.py --hidden 2048 --ffn 5504 --layers 24 --heads 16 --dtype bf16 --presets none strict osp_paper hadamard --out "$out/quant_eval.json"
step verify_resume_60m 120 scripts/verify_resume.py model=60m logger.wandb=disabled train.seq_len=512 verify.rows=8 verify.stages=[1,3] monitor.enabled=false verify.out="$out/verify_resume_60m.json" run.dir="$out/verify_resume_60m"
step monitor_osp_1b 90 benchmarks/monitor.py --model osp_1b --rows 8 "${gpu[@]}" --rounds 1 --modes off light --out "$out/monitor_osp_1b.json"
step growth 90 benchmarks/growth.py --scale 4 --curves layers width seq_len micro_batch --out "$out/growth.json"

if [[ $dry_run ]]; then exit 0; fi
echo "took $SECONDS s; figures and logs in $out"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
