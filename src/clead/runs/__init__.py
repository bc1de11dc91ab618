"""Run directories: what is in them, how a stopped training is taken up, and the models in them."""
