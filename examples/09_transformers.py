"""The same model inside the Hugging Face ecosystem: Auto classes, generate(), no remote code.

    python examples/09_transformers.py [FOLDER]

FOLDER is a published checkpoint; default: the demo model.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoProcessor

import xc_ray.model.hf  # noqa: F401 - registers the family with the Auto classes
from xc_ray.hub import resolve_model

folder = sys.argv[1] if len(sys.argv) > 1 else resolve_model("demo")
model = AutoModelForCausalLM.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)

picture = str(Path(__file__).with_name("shapes.png"))
content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is in the picture?"}]
messages = [{"role": "user", "content": content}]
inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
out = model.generate(**inputs.to(model.device), max_new_tokens=32, do_sample=False, num_beams=3)
new = out[0, inputs["input_ids"].shape[1] :]
# What ends a turn is no special token in the published vocabulary.
print(processor.decode(new, skip_special_tokens=True).removesuffix("[UNUSED_TOKEN_145]"))
