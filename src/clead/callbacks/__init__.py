"""Callbacks for trainers of other libraries: validation under attack, and the best weights kept."""
