"""The playground: images are attacked while one looks on, on two models side by side; gradio's pages in the server's application.

``choices`` says what may be chosen and its limits, ``contest`` computes, ``pictures`` makes HTML of what was found, ``page`` is the
page, ``fence`` keeps gradio's paths to those that it needs.
"""
