#!/usr/bin/env bash
# The figures of docs/second_model.md, from nothing but a seed:
#
#     bash benchmarks/second_model.sh FOLDER [ROME MEMIT FINETUNE]
#
# FOLDER gets the world, its model, kit, SAE and rows; the last three are edits an editor (300, 150, 150). A step that is
# done is not made again; an interrupted one goes on where it was, but for the model's training. TOKENS is how long that
# is; a model that knows less than KNOWN (0.95) of the facts is not edited. Run it in the project's root.
set -euo pipefail
mkdir -p "$1"
FOLDER=$(cd "$1" && pwd) ROME=${2:-300} MEMIT=${3:-150} FINETUNE=${4:-150}
WORLD=$FOLDER/world MODEL=$FOLDER/world/model OUT=$FOLDER/rows
export OMP_NUM_THREADS=1 GUARDEDIT_CACHE=$FOLDER/cache
PY=.venv/bin/python
guardedit() { "$PY" -m guardedit "$@" --model "$MODEL" --home "$FOLDER/home"; }

[ -f "$WORLD/recall.json" ] || "$PY" -m benchmarks.world_model "$WORLD" --tokens "${TOKENS:-6000000}"
"$PY" -c "import json, sys; known = json.load(open(sys.argv[1]))['fact']['known']; sys.exit(
    f'the model knows {known:.2f} of its facts, ${KNOWN:-0.95} was asked for: train longer' if known < ${KNOWN:-0.95} else 0
)" "$WORLD/recall.json"

KIT=$("$PY" -c "import sys; from guardedit.pipeline.kit import kit_folder; print(kit_folder(sys.argv[1]))" "$MODEL")
if [ ! -f "$KIT/policy.toml" ]; then
    # A kit without a policy is not loaded; nothing here is judged by it.
    mkdir -p "$KIT"
    cat > "$KIT/policy.toml" <<'POLICY'
version = 1
name = "absolute"

[[rule]]
id = "far-kl"
metric = "postop/far_kl"
op = "<="
limit = 0.01
level = "hard"
sentence = "Ordinary text moved by {value} nats a token; {op} {limit} is allowed."
why = "A hundredth of a nat is about one per cent in perplexity."
source = "absolute"
POLICY
fi

if [ ! -f "$FOLDER/control.done" ]; then
    guardedit stats control --facts "$WORLD/facts.jsonl"
    touch "$FOLDER/control.done"
fi
[ -f "$FOLDER/hparams.toml" ] || guardedit tune --facts "$WORLD/facts.jsonl" --layers 0,1,2 --set learning_rate=0.5 \
    --texts "$WORLD/text/world.jsonl" --limit 12 --first 6 --state "$FOLDER/tune.jsonl" --out "$FOLDER/hparams.toml" \
    | tee "$FOLDER/tune.md"
LAYER=$(sed -n 's/^layer = //p' "$FOLDER/hparams.toml")
HOOK=blocks.$LAYER.mlp.hook_post
[ -f "$KIT/second_moments/$HOOK.safetensors" ] || guardedit stats collect "$WORLD"/text/*.jsonl --layer "$LAYER"
[ -f "$MODEL/$HOOK/digests.json" ] || guardedit sae train --layer "$LAYER" --texts "$WORLD/text" --hook "$HOOK" \
    --tokens 150000 --samples 300000 --latents 768 --active 16

tried() {
    guardedit evaluate guard --facts "$WORLD/facts.jsonl" --stratum known --out "$OUT" \
        --far "world=$WORLD/far/world.jsonl" --far "manual=$WORLD/far/manual.jsonl" "$@"
}
for job in "rome $ROME" "memit $MEMIT" "finetune $FINETUNE"; do
    tried --editor "${job% *}" --limit "${job#* }"
done

# In place of single edits, those of the same facts that end up in one model.
tried --editor memit --limit "$ROME" --batch 10 --batch 50
tried --editor rome --limit "$ROME" --sequence 50

"$PY" -m benchmarks.guard_evidence table "$OUT" --to docs/data/world_rows.parquet
guardedit calibrate docs/data/world_rows.parquet --out "$FOLDER/risk_model.json"
"$PY" -m benchmarks.world_ripple measure "$OUT" --world "$WORLD" --to docs/data/world_ripple.parquet
"$PY" -m benchmarks.world_ripple write docs/data/world_rows.parquet --ripple docs/data/world_ripple.parquet \
    --recall "$WORLD/recall.json" --to docs/second_model.md
