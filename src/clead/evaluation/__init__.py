"""Evaluation: clean and robust accuracy with intervals, the worst case per image over attacks, paired comparisons."""
