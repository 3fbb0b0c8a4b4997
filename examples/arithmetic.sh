#!/usr/bin/env bash
# The arithmetic world, end to end. Trains a language model that thinks and a compressor of its hidden states, records its
# states before and after thinking, and trains a recursion that predicts one from the other. Then trains both together to
# answer, trains the recursion on rewards, and evaluates on held-out problems. About 40 minutes on two CPU cores. After an
# interruption, run it again: finished stages are kept.
#
#   bash examples/arithmetic.sh [FOLDER] [SEED]    (default: runs/arithmetic 0)
#
# SEED applies to phase 2, LoRA and phase 3. Runs with several seeds can share the earlier stages: copy or link
# FOLDER/lm, phase1, pairs, validation and held_out.
set -euo pipefail

out=${1:-runs/arithmetic}
seed=${2:-0}
mkdir -p "$out"
# Operands of 1 and 2 after the first number: a recursion of 25,000 parameters learns these in ten minutes.
pairs=(llm-trm datagen --model "$out/lm" --max-operand 2 --min-operations 1 --temperature 0
    --max-new-tokens 64 --answer-tokens 4 --batch-size 512 --shard-size 4096)

heading() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

heading "Training a language model that thinks"
if [[ ! -e $out/lm/model.safetensors ]]; then
    resume=()
    compgen -G "$out/lm/checkpoint-*" >/dev/null && resume=(--resume)
    # Two thirds of the default steps are enough for up to five operations.
    llm-trm train lm --steps 800 -o "$out/lm" "${resume[@]}"
fi

heading "Training a compressor of its hidden states on problems and their worked traces"
llm-trm data arithmetic --num-samples 20000 --min-operations 1 -o "$out/problems.jsonl" --overwrite
llm-trm train phase1 --model "$out/lm" --text "$out/problems.jsonl" --traces "$out/problems.jsonl" -o "$out/phase1"

heading "Recording its states before and after thinking"
"${pairs[@]}" --operations 5 --num-samples 60000 -o "$out/pairs"
"${pairs[@]}" --operations 5 --num-samples 1000 --split test -o "$out/validation"
"${pairs[@]}" --operations 5 --num-samples 2500 --split test --seed 1 -o "$out/held_out"

heading "Training a recursion from the states before thinking to those after"
if [[ ! -e $out/phase2/curves.png ]]; then
    resume=()
    [[ -e $out/phase2/index.json ]] && resume=(--resume)
    llm-trm train phase2 --data "$out/pairs" --val-data "$out/validation" --compressor "$out/phase1" \
        -o "$out/phase2" --latent-steps 2 --deep-recursions 1 --supervision-steps 2 --epochs 18 \
        --batch-size 128 --learning-rate 4e-3 --warmup-ratio 0.05 --clip-norm 100 --track jsonl --seed "$seed" \
        "${resume[@]}"
fi

heading "Evaluating the recursion, by number of operations"
llm-trm eval phase2 --checkpoint "$out/phase2" --data "$out/held_out" --by operations -o "$out/phase2.json" --overwrite

heading "Training language model and recursion together on problems and answers, without written thinking"
world=(--min-operations 1 --operations 5 --max-operand 2)
llm-trm data arithmetic "${world[@]}" --num-samples 100000 --seed "$seed" -o "$out/questions.jsonl" --overwrite
if [[ ! -e $out/lora/latent.json ]]; then
    resume=()
    compgen -G "$out/lora/checkpoint-*/trainer_state.json" >/dev/null && resume=(--resume)
    llm-trm train lora --model "$out/lm" --trm "$out/phase2" --data "$out/questions.jsonl" -o "$out/lora" \
        --steps 500 --batch-size 128 --learning-rate 1e-3 --lora-dropout 0 --seed "$seed" "${resume[@]}"
fi

heading "Training the recursion alone on the reward of its answers"
if [[ ! -e $out/phase3/latent.json ]]; then
    resume=()
    compgen -G "$out/phase3/checkpoint-*/trainer_state.json" >/dev/null && resume=(--resume)
    llm-trm train phase3 --checkpoint "$out/lora" --data arithmetic "${world[@]}" -o "$out/phase3" \
        --steps 100 --batch-size 256 --max-new-tokens 8 --kl 0.02 --eval-samples 500 --seed "$seed" "${resume[@]}"
fi

for stage in lora phase3; do
    heading "Evaluating direct answers, written thinking, and the recursion: after $stage"
    # --model loads the language model separately, because disabled adapters would make it about 5% slower.
    llm-trm eval lm --checkpoint "$out/$stage" --model "$out/lm" --mode no-think,think,latent "${world[@]}" \
        --num-samples 2000 --by operations -o "$out/$stage.json" --plot "$out/$stage.png" --write-card --overwrite
done
heading "Done"
