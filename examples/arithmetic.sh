#!/usr/bin/env bash
# The arithmetic world, end to end: a language model that thinks, a compressor of its states, its states before and
# after thinking, a recursion from the ones to the others, and what that is worth on held-out problems. Under 30
# minutes on two CPU cores. Run it again after an interruption: what is finished is kept.
#
#   bash examples/arithmetic.sh [FOLDER]    (default: runs/arithmetic)
set -euo pipefail

out=${1:-runs/arithmetic}
mkdir -p "$out"
# Operands of 1 and 2 behind the first number: what a recursion of 25,000 parameters learns in ten minutes.
pairs=(llm-trm datagen --model "$out/lm" --max-operand 2 --min-operations 1 --temperature 0
    --max-new-tokens 64 --answer-tokens 4 --batch-size 512 --shard-size 4096)

heading() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }

heading "A language model that thinks"
if [[ ! -e $out/lm/model.safetensors ]]; then
    resume=()
    compgen -G "$out/lm/checkpoint-*" >/dev/null && resume=(--resume)
    # Two thirds of the default steps are enough for problems of so few operations.
    llm-trm train lm --steps 800 -o "$out/lm" "${resume[@]}"
fi

heading "A compressor of its hidden states, from the texts of problems and their worked traces"
llm-trm data arithmetic --num-samples 20000 --min-operations 1 -o "$out/problems.jsonl"
llm-trm train phase1 --model "$out/lm" --text "$out/problems.jsonl" --traces "$out/problems.jsonl" -o "$out/phase1"

heading "Its states before and after thinking"
"${pairs[@]}" --operations 5 --num-samples 60000 -o "$out/pairs"
"${pairs[@]}" --operations 5 --num-samples 1000 --split test -o "$out/validation"
"${pairs[@]}" --operations 5 --num-samples 2500 --split test --seed 1 -o "$out/held_out"

heading "A recursion from the ones to the others"
if [[ ! -e $out/phase2/curves.png ]]; then
    resume=()
    [[ -e $out/phase2/index.json ]] && resume=(--resume)
    llm-trm train phase2 --data "$out/pairs" --val-data "$out/validation" --compressor "$out/phase1" \
        -o "$out/phase2" --latent-steps 2 --deep-recursions 1 --supervision-steps 2 --epochs 18 \
        --batch-size 128 --learning-rate 4e-3 --warmup-ratio 0.05 --clip-norm 100 --track jsonl "${resume[@]}"
fi

heading "What it is worth, by the number of operations"
llm-trm eval phase2 --checkpoint "$out/phase2" --data "$out/held_out" --by operations -o "$out/phase2.json"

heading "What the language model is worth, with and without thinking"
python - "$out/lm" "$out/lm.json" <<'PYTHON'
import sys
from pathlib import Path

from llm_trm.data.arithmetic import World
from llm_trm.evaluate.answers import accuracy
from llm_trm.files import write_json
from llm_trm.models.loading import load_thinking_model

thinker = load_thinking_model(sys.argv[1])
found = {}
for operations in range(1, 6):
    problems = list(World(operations, operations, max_operand=2).problems(400, "test"))
    found[operations] = {
        how: accuracy(
            thinker.model, thinker.tokenizer, problems, thinking=how == "thinking", max_new_tokens=64
        ).share
        for how in ("thinking", "without")
    }
    print("{} operations: {thinking:.1%} with thinking, {without:.1%} without".format(operations, **found[operations]))
write_json(Path(sys.argv[2]), found)
PYTHON
heading "Done"
