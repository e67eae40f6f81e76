"""Builds the extension by calling CMake, which alone describes the build."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DPEFTFAST_OUTPUT={output}",
            f"-DPEFTFAST_VERSION={VERSION}",
            f"-DPython_EXECUTABLE={sys.executable}",
            *os.environ.get("PEFTFAST_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options], check=True)
        subprocess.run(["cmake", "--build", build], check=True)

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: what was built goes to the sources, the GPU kernels too, which are no extension."""
        super().copy_extensions_to_source()
        for extension in self.extensions:
            kernels = Path(self.get_ext_fullpath(extension.name)).with_name("_cuda.so")
            built = Path(self.build_lib, *extension.name.split(".")[:-1], kernels.name)
            if built.exists():
                self.copy_file(str(built), str(kernels), level=self.verbose)


setup(ext_modules=[Extension("peftfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
