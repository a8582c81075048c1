"""Packages, their places and the compiled modules; the rest is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

import build_native  # noqa: E402

# kernels/ is installed as fastproj.kernels; a top-level `kernels` is another package's name.
packages = find_packages(str(ROOT), include=["fastproj", "fastproj.*"])
package_dir = {}
if (ROOT / "kernels" / "__init__.py").is_file():
    packages.append("fastproj.kernels")
    packages += [f"fastproj.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))]
    package_dir["fastproj.kernels"] = "kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    ext_modules=build_native.native_extensions(),
    cmdclass={"build_ext": build_native.NinjaBuild},
)
