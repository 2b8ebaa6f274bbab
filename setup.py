"""Installs the root folder `kernels/` as `nanovlm_fast.kernels`, through `nanovlm_fast/kernels`.

Hugging Face has a package named `kernels` that `transformers` imports. Our folder has no
`__init__.py` on purpose: where the repository root is on `sys.path` (`python train.py`,
`python -m bench`), a plain folder gives way to an installed package of the same name, and is not
mistaken for one where none is installed.
"""

from setuptools import find_packages, setup

setup(
    packages=sorted(
        find_packages(include=["nanovlm_fast", "nanovlm_fast.*"]) + ["nanovlm_fast.kernels"]
    )
)
