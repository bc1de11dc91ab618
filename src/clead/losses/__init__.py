"""Losses: pure functions of tensors, computed in float32 whatever the autocast."""
