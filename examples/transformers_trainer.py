"""Adversarial training with the Trainer of transformers: python examples/transformers_trainer.py [EPOCHS]"""

import sys

import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import clead
from clead.callbacks.transformers import RobustValidation

digits = load_digits()
images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
samples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, digits.target, strict=True)]


class RobustTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        return clead.robust_loss(model, inputs["pixel_values"], inputs["labels"], "trades", eps=0.15, steps=5).loss


size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **size))
arguments = TrainingArguments(
    output_dir="runs/transformers",
    num_train_epochs=int(sys.argv[1]) if sys.argv[1:] else 10,
    **{"per_device_train_batch_size": 64, "learning_rate": 2e-3, "max_grad_norm": 1.0, "use_cpu": True},
    **{"eval_strategy": "epoch", "save_strategy": "no", "report_to": "none", "logging_steps": 10},
)
trainer = RobustTrainer(model, arguments, train_dataset=samples[:1400], eval_dataset=samples[1400:])
trainer.add_callback(RobustValidation(trainer, eps=0.15))
trainer.train()
