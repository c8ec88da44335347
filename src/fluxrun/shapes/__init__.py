"""The little world of the bundled model: coloured shapes on a flat background.

Light on purpose (numpy, Pillow, SciPy; never torch): the words (`vocabulary`), the scenes and their drawing (`scenes`),
sentences and back (`captions`), a pixel checker that knows nothing of any model (`checker`), and the accuracy harness
built from them (`evaluate`).
"""
