"""Runs that answer: their models and detectors, limits, and requests that are read into images; below serving and playground."""
