"""Builds the two C++ libraries of epi-kernels; everything else is in pyproject.toml.

    epi_kernels/_C        CPU kernels and schemas, always built: without it the install fails
    epi_kernels/_C_cuda   CUDA kernels, where torch has CUDA and an nvcc of the same major version

Both use torch's stable ABI and Python's limited API, so one build serves torch >= 2.10 and
Python >= 3.10. Nothing is downloaded. What was decided is written to epi_kernels/_build_info.json,
which `epi-kernels env` prints.
"""

import json
import os
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import build_support as support  # noqa: E402

os.chdir(ROOT)

# Commands that only read metadata must work before torch is there: pip runs egg_info first.
METADATA_ONLY = {"egg_info", "dist_info", "sdist", "--version", "--name", "clean", "--help"}


def device_archs() -> list[str]:
    import torch

    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return [f"{major}{minor}" for major, minor in capabilities]


def extensions() -> tuple[list, dict, dict]:
    """(ext_modules, cmdclass, build info)"""
    nvcc = support.find_nvcc()
    if nvcc is not None:
        # Before torch looks for it: torch takes the folder above `which nvcc`, wrapper or not.
        os.environ["CUDA_HOME"] = nvcc.home
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        sys.exit(f"{support.MISSING_TORCH}\nThe import failed with: {error}")
    torch_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if torch_version < support.MIN_TORCH:
        sys.exit(f"epi-kernels needs torch >= 2.10 and found {torch.__version__}")

    if "CXX" not in os.environ:
        os.environ["CXX"] = support.choose_cxx(os.environ, sysconfig.get_config_var("CXX"))
    cuda = support.choose_cuda(
        torch.version.cuda,
        nvcc,
        bool(support.cuda_sources(ROOT)),
        device_archs=device_archs,
    )
    info = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cxx": os.environ["CXX"],
        "cxx_version": support.cxx_version(os.environ["CXX"]),
        "cxx_flags": list(support.CXX_FLAGS),
        "cuda": {
            "built": cuda.build,
            "reason": cuda.reason,
            "nvcc": nvcc.version if nvcc else None,
            "archs": list(cuda.archs),
        },
    }
    include_dirs = [str(ROOT / "csrc")]
    cpu_sources, cuda_sources = support.cpu_sources(ROOT), support.cuda_sources(ROOT)
    support.check_objects(cpu_sources)
    support.check_objects(cuda_sources)
    modules = [
        CppExtension(
            "epi_kernels._C",
            cpu_sources,
            include_dirs=list(include_dirs),
            depends=support.headers(ROOT),
            extra_compile_args={"cxx": list(support.CXX_FLAGS)},
            py_limited_api=True,
        )
    ]
    if cuda.build:
        modules.append(
            CUDAExtension(
                "epi_kernels._C_cuda",
                cuda_sources,
                include_dirs=list(include_dirs),
                depends=support.headers(ROOT),
                extra_compile_args=support.cuda_flags(cuda.archs),
                py_limited_api=True,
            )
        )

    class BuildKernels(BuildExtension):
        """BuildExtension that keeps its objects, records what it did and fails in plain words."""

        def run(self) -> None:
            # An editable install would build in a throw-away folder; keep one, so that the next
            # build compiles only what changed.
            self.build_temp = str(ROOT / "build" / f"temp-{sys.implementation.cache_tag}")
            print(f"epi-kernels: C++ with {info['cxx']}; cuda {cuda.reason}", file=sys.stderr)
            try:
                super().run()
            except Exception as error:
                sys.exit(
                    f"\nepi-kernels: the C++ extension could not be built ({error}).\n"
                    f"Compiler: {info['cxx']}; torch {torch.__version__}; cuda {cuda.reason}.\n"
                    "The compiler's own message stands above. `sh tools/preflight.sh` names what "
                    "this machine lacks.\nTo leave the CUDA part out: EPI_KERNELS_BUILD_CUDA=0."
                )
            library = Path(self.get_ext_fullpath("epi_kernels._C"))
            library.with_name("_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
            if not cuda.build:
                # What an earlier build left was made for another torch: loading it could crash.
                library.with_name(library.name.replace("_C", "_C_cuda", 1)).unlink(missing_ok=True)

    return modules, {"build_ext": BuildKernels}, info


def main() -> None:
    commands = set(sys.argv[1:])
    if commands & METADATA_ONLY and not commands & {"build_ext", "bdist_wheel", "editable_wheel"}:
        setup()
        return
    try:
        modules, cmdclass, _ = extensions()
    except support.BuildError as error:
        sys.exit(f"\nepi-kernels: {error}")
    setup(
        ext_modules=modules,
        cmdclass=cmdclass,
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
