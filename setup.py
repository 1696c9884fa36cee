"""The package map; everything static stands in pyproject.toml.

``kernels`` is installed as ``vatt_fast.kernels``: another published package owns the top-level name.
"""

from setuptools import find_packages, setup

kernels = ["vatt_fast.kernels", *(f"vatt_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["vatt_fast", "vatt_fast.*"]), *kernels],
    package_dir={"vatt_fast.kernels": "kernels"},
    package_data={"vatt_fast.kernels": ["tiles/*.json"]},
)
