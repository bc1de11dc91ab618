"""Trained models as files that others can use: ONNX, safetensors, and a card that says what was measured."""
