"""Convert a model in memory, check that it equals its teacher, and distill a smaller one.

Usage: python examples/convert_and_distill.py
"""

import torch

import dmt

teacher, tokenizer = dmt.load("embedded")
token_ids = tokenizer("The birthplace of", return_tensors="pt").input_ids

# With k = all slots the student is the teacher: the slots are the teacher's neurons.
student = dmt.convert(teacher, dmt.FeaturalConfig(k=512))
with torch.no_grad():
    difference = (student(token_ids).logits - teacher(token_ids).logits).abs().max()
print(f"largest difference with all slots: {difference:.1e}")

# Read 32 of 512 slots per token, and train the student toward the teacher.
result = dmt.distill(
    teacher,
    ["biographies"],
    tokenizer=tokenizer,
    mean_k=32,
    layerwise_steps=2,
    end_to_end_steps=4,
    test_tokens=2048,
    validation_tokens=1024,
)
print(result)
print("KL, nats per token:", result.metrics["test/biographies/kl"])
