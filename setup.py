"""Builds the message catalogues and the optional native library; everything else of the build is in pyproject.toml.

One plain C library, loaded with ctypes, so that one wheel (py3-none-PLATFORM) serves every Python version. Each source
in PER_LEVEL is compiled once per instruction level of LEVELS, its symbols suffixed with the level's name; the processor
picks at load (doctor/scan/native.py). Without a C compiler the package installs as a pure wheel with NumPy paths
instead. To add a source, add its name to PER_LEVEL.

doctor/locale/*/LC_MESSAGES/doctor.mo is compiled beside its .po, in the source tree, before packages are gathered: an
editable installation reads it there, a wheel takes it along.
"""

import os
import platform
import runpy
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

SOURCES = "cpu"
PER_LEVEL = {  # with flags of its own
    "scan.c": [],
    "solve.c": ["-ffp-contract=off"],
    "round.c": ["-ffp-contract=off"],
    "gguf.c": ["-ffp-contract=off", "-fno-math-errno"],
}
HEADERS = ["level.h", "lanes.h", "scan_type.h"]

# No fast-math in any of them: NaN is what the library looks for.
FLAGS = ["-O3", "-std=gnu11", "-fopenmp-simd", "-fvisibility=default", "-Wall", "-Wextra", "-Wno-psabi"]
LEVELS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [
        *LEVELS["avx2"],
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mprefer-vector-width=512",
    ]


class BuildLibrary(build_ext):
    """A plain shared library where setuptools expects a Python extension."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        objects = []
        for level, level_flags in LEVELS.items():
            for name, own_flags in PER_LEVEL.items():
                objects += self.compiler.compile(
                    [f"{SOURCES}/{name}"],
                    depends=ext.depends,
                    output_dir=os.path.join(self.build_temp, level),
                    macros=[("LEVEL", level)],
                    extra_postargs=FLAGS + level_flags + own_flags,
                )
        objects += self.compiler.compile([f"{SOURCES}/cpu.c"], output_dir=self.build_temp, extra_postargs=FLAGS)
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name))


class BuildPackages(build_py):
    """The packages with their message catalogues compiled. An editable installation runs this too."""

    def run(self):
        locale = Path(__file__).parent / "doctor" / "locale"
        runpy.run_path(str(locale / "compile.py"))["compile_all"](locale)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


def compiler_works():
    """Whether one line of C compiles with the flags used here (GCC and Clang know them, MSVC does not)."""
    compiler = new_compiler()
    customize_compiler(compiler)
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.c")
        with open(source, "w") as f:
            f.write("int probe(void) { return 0; }\n")
        try:
            for level_flags in LEVELS.values():
                compiler.compile([source], output_dir=folder, extra_postargs=FLAGS + level_flags)
        except Exception as error:  # each setuptools version has its own CompileError; the notice carries the words
            print(
                f"setup.py: no native library: the C compiler did not compile a test file ({error}). The package "
                f"works without it, but scans about ten times slower. Install gcc or clang and reinstall."
            )
            return False
    return True


library = Extension(
    "doctor.scan.libdoctor_cpu",
    [f"{SOURCES}/{name}" for name in [*PER_LEVEL, "cpu.c"]],
    depends=[f"{SOURCES}/{name}" for name in HEADERS],
)
# rules/ and cuda/ lie beside doctor/ and are installed inside it (package-dir in pyproject.toml).
packages = [*find_packages(include=["doctor", "doctor.*"]), "doctor.rules", "doctor.rules.tables", "doctor.cuda"]
setup(
    packages=packages,
    cmdclass={"build_ext": BuildLibrary, "build_py": BuildPackages, "bdist_wheel": Wheel},
    ext_modules=[library] if compiler_works() else [],
)
