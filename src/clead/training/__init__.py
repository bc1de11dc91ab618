"""Training: the only place that runs backward and steps the optimiser."""
