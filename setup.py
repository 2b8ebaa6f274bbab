"""The root folder `kernels/` is installed as `nanovlm_fast.kernels`, by the link `nanovlm_fast/kernels`.

Hugging Face has a package named `kernels` that `transformers` imports. Our folder has no `__init__.py` on purpose:
where the repository root is on `sys.path` (`python train.py`, `python -m bench`), a plain folder gives way to an
installed package of the same name, and is not taken for one where none is installed.
"""

from setuptools import setup

setup(packages=["nanovlm_fast", "nanovlm_fast.data", "nanovlm_fast.kernels"])
