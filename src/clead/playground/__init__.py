"""The playground: images are attacked while one looks on, on two models side by side; gradio's pages in the server's application.

``choices`` says what may be chosen and its limits, ``comparison`` computes, ``pictures`` makes HTML of its results, ``page`` is the
page, made of ``widgets`` and a ``canvas``; ``gradio_path_filter`` keeps gradio's paths to those that it needs.
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
