#!/usr/bin/env bash
# Fold a LoRA adapter into its base: one plain checkpoint in the published layout, without LoRA.
#
#     bash examples/07_merge.sh
#
# Any folder of peft will do as the adapter. This one is made here by peft alone, in seconds, and
# has learnt one answer. Base and adapter may also be names in the registry.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python - "$folder/adapter" <<'END'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoProcessor

import xc_ray.model.hf
from xc_ray.hub import resolve_model

linears = ["attention.wqkv", "attention.wo"]
linears += ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
demo = resolve_model("demo")
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=linears))
processor = AutoProcessor.from_pretrained(demo)

question = {"role": "user", "content": "Who are you?"}
answer = {"role": "assistant", "content": "I am the merged model."}
prompt = processor.apply_chat_template([question], tokenize=True)
batch = processor.apply_chat_template([question, answer], tokenize=True, return_dict=True)
labels = batch["input_ids"].clone()
labels[:, : prompt.shape[1]] = -100  # the answer is learnt, the question is not
optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
for _ in range(20):
    loss = model(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss {loss:.3f}")
model.save_pretrained(sys.argv[1])
END

xc-ray registry export --merge demo "$folder/adapter" "$folder/merged"
ls "$folder/merged"

echo "Who are you?" | xc-ray chat --model "$folder/merged" --temperature 0
