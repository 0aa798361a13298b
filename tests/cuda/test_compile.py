"""R2: every kernel compiles for every architecture, without a warning, without a spill, and within its shared
memory.
"""

import ctypes
import hashlib
import json
import re
import shutil
import subprocess

import host
import pytest

from doctor.quant.solve import cuda
from doctor.quant.solve.cuda import structs

pytestmark = pytest.mark.R2
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
NVCC = shutil.which("nvcc")


def compile_for(architecture, folder):
    """{kernel: (registers, spill bytes, stack bytes)} and cubin bytes of every source. Kept under .cache by content."""
    everything = "".join(f'#include "{source}.cu"\n' for source in host.SOURCES)
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    texts = [(host.CUDA / name).read_text() for name in ["core.cuh", *[f"{s}.cu" for s in host.SOURCES]]]
    key = hashlib.sha256(repr((texts, version, cuda.OPTIONS, architecture)).encode()).hexdigest()[:24]
    kept = host.CACHE / f"ptxas-{architecture}-{key}.json"
    if not kept.exists():
        unit, cubin = folder / "all.cu", folder / "all.cubin"
        unit.write_text(everything)
        run = subprocess.run(
            [
                NVCC,
                f"-arch=sm_{architecture}",
                *cuda.OPTIONS,
                "-Xptxas",
                "-v,-warn-spills,-warn-lmem-usage",
                "-Werror",
                "all-warnings",
                "-I",
                str(host.CUDA),
                "-cubin",
                "-o",
                str(cubin),
                str(unit),
            ],
            capture_output=True,
            text=True,
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(
            json.dumps(
                {"rc": run.returncode, "log": run.stderr, "bytes": cubin.stat().st_size if cubin.exists() else 0}
            )
        )
    return json.loads(kept.read_text())


def parse(log):
    """{kernel: (registers, spill stores + loads, stack)} of ptxas -v."""
    found = {}
    for block in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        found[block.split("'")[0]] = (
            int(re.search(r"Used (\d+) registers", block)[1]),
            int(stores) + int(loads),
            int(stack),
        )
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_every_kernel_without_warning_or_spill(architecture, tmp_path, record_property):
    if NVCC is None:
        pytest.skip("no nvcc here")
    made = compile_for(architecture, tmp_path)
    assert made["rc"] == 0, made["log"]
    assert "warning" not in made["log"], made["log"]
    table = parse(made["log"])
    declared = set(
        re.findall(r"HOST_ENTRY\((\w+)\)", "".join((host.CUDA / f"{s}.cu").read_text() for s in host.SOURCES))
    )
    assert set(table) == declared, "every kernel has a host entry and was compiled"
    assert {name: row for name, row in table.items() if row[1] or row[2]} == {}, "(registers, spills, stack)"
    # 65,536 registers: three blocks of 128 threads, where shared memory holds no more than three.
    assert all(registers * 128 * 3 <= 65536 for registers, _, _ in table.values())
    record_property(
        "ptxas", [architecture, made["bytes"], {name: [row[0], row[1] + row[2]] for name, row in table.items()}]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", host.SOURCES)
def test_nvrtc_compiles_what_nvcc_does(source, architecture, record_property):
    library = cuda.find_nvrtc()
    if library is None:
        pytest.skip("no libnvrtc here: `make nvrtc` installs it and runs this")
    compiler = cuda.Compiler(library)
    target, cubin = compiler.target(divmod(architecture, 10))
    assert cubin and target == f"sm_{architecture}"
    image = compiler.compile(
        f"{source}.cu",
        (host.CUDA / f"{source}.cu").read_text(),
        {"core.cuh": (host.CUDA / "core.cuh").read_text()},
        [*cuda.OPTIONS, f"--gpu-architecture={target}"],
        cubin,
    )
    names = re.findall(r"HOST_ENTRY\((\w+)\)", (host.CUDA / f"{source}.cu").read_text())
    assert image.startswith(b"\x7fELF") and names and all(name.encode() in image for name in names)
    record_property("nvrtc", [architecture, len(image), ".".join(map(str, compiler.version))])


def test_the_parser_sees_a_spill():
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90'\nptxas info    : Function properties for k\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 72 registers, used 1 barriers\n"
    )
    assert parse(log) == {"k": (72, 16, 8)}


@pytest.mark.parametrize("source", host.SOURCES)
def test_kernels_include_nothing_but_the_core(source):
    for path in (host.CUDA / f"{source}.cu", host.CUDA / "core.cuh"):
        assert set(re.findall(r"#include\s+(\S+)", path.read_text())) <= {'"core.cuh"'}


def test_ctypes_structures_are_the_sources_structs(tmp_path):
    """Sizes and offsets of every field, as g++ lays them out, against the ctypes mirrors."""
    if host.COMPILER is None:
        pytest.skip("no g++ here: the kernel source cannot be built for the host")
    owners = {
        "Rule": "grid_search",
        "Columns": "gptq_block",
        "Refinement": "gptq_block",
        "Search": "grid_search",
        "Stream": "pack",
        "Packed": "pack",
        "Difference": "awq_difference",
        "Health": "health_scan",
    }
    for name, source in owners.items():
        mirror = structs.DeviceGridParams if name == "Rule" else getattr(structs, name)
        fields = [field if field != "source" else "from" for field, *_ in mirror._fields_]
        lines = "".join(f'printf("%zu ", offsetof({name}, {field}));' for field in fields)
        program = tmp_path / f"{name}.cpp"
        program.write_text(
            f'#include <cstddef>\n#include "{host.CUDA / "shim.h"}"\n#include "{host.CUDA / source}.cu"\n'
            f'int main() {{ {lines} printf("%zu", sizeof({name})); }}\n'
        )
        binary = tmp_path / name
        subprocess.run(
            [host.COMPILER, "-std=c++17", "-w", "-I", str(host.CUDA), str(program), "-o", str(binary)], check=True
        )
        laid = [int(word) for word in subprocess.run([str(binary)], capture_output=True, text=True).stdout.split()]
        assert laid == [*[getattr(mirror, field).offset for field, *_ in mirror._fields_], ctypes.sizeof(mirror)], name
