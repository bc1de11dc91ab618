"""The rooms of ``src/clead``, in order: a room may import itself and the rooms before it.

``tests/contract/test_architecture.py`` checks the imports against this order; ``docs/generate.py`` writes it into CONTRIBUTING.md.
"""

ROOMS = {
    "errors": "`UserError`: what the user gave, the rule, the remedy, on one line",
    "signature": "signs files with a key of the user, and checks the signature",
    "output": "standard output and error that cannot stop work",
    "renamed": "old names that work for one release, and say once what to write instead",
    "atomic_io": "reads and writes every file; a file is written whole or not at all",
    "registry": "name → class; a folder is searched, so there is no list to edit",
    "settings": "frozen settings: type, default, unit, range and documentation of a key in one place",
    "interfaces": "batches, step outputs, and the protocols of threats, attacks, methods and datasets",
    "distributed": "several processes that train one model",
    "devices": "the device that a name means, and keeping its memory from step to step",
    "progress": "a progress bar on a terminal, a line now and then in a log",
    "threats": "what an attacker may change: random start, gradient step, exact projection",
    "losses": "pure functions of tensors",
    "tasks": "what a model's outputs and an image's target mean, and when an image is right",
    "models": "networks: pixels in [0, 1] go in, logits come out; normalisation is the first layer",
    "attacks": "an attack maximises an objective inside a threat set",
    "methods": "a method turns a batch into a loss",
    "data": "reads datasets, decodes images, puts batches on the device, augments each image",
    "config": "the configuration of a run: one frozen tree, YAML in and out",
    "weights": "files of weights: written whole, read without running code, matched by name",
    "results": "the schema of records, statistics, and how numbers are written and drawn",
    "runs": "run directories: what is in them, how a stopped training is taken up, and what is evaluated",
    "evaluation": "clean and robust accuracy, the worst case per image, intervals, paired tests, masking checks",
    "measurements": "what else is measured: certified radii, corruptions, detection, distances …; one file or folder each",
    "training": "the only place that calls backward and steps the optimiser",
    "report": "draws records: one self-contained HTML page, and its figures",
    "export": "models as files for others: ONNX, safetensors, a model card",
    "api": "what users call from Python",
    "callbacks": "validation under attack for the trainers of Lightning and transformers",
    "tuning": "the search for a recipe: trials on validation images, shared by processes",
    "hardening": "`clead harden`: plan, baseline, robust training, evaluation, export and verdict within given minutes",
    "inference": "runs that answer: models with detectors, limits, requests read into images",
    "serving": "the HTTP server",
    "playground": "the page on which images are attacked by hand; it and serving do not import each other",
    "demo": "`make demo`",
    "cli": "the command line, one file per command",
}
"""Room → what it does, in one line. A room is a folder or file of ``src/clead``; one with a dot is a file of a folder."""

TASK_FILES = {
    "binary": ["models/threshold"],
    "multilabel": ["models/one_label", "data/datasets/multilabel"],
    "segmentation": [
        *("data/masks", "data/mask_layouts", "data/datasets/masks", "data/datasets/digit_scenes", "losses/pixels"),
        *(
            "models/segmentation",
            "models/unet",
            "models/deeplab",
            "methods/clead_pixels",
            "attacks/masks",
            "attacks/mask_patch",
        ),
        *("evaluation/mask_checks", "evaluation/mask_record", "evaluation/objects", "measurements/mask_patch"),
        *("results/masks", "report/sections/masks"),
    ],
    "retrieval": ["models/nearest", "runs/gallery"],
}
"""What is there for one task alone, beside its files in ``tasks`` and ``evaluation/tasks``."""
