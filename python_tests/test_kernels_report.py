"""`epi-kernels kernels`: every kernel compiles for every architecture and passes; bad ones do not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version as version_of
from pathlib import Path

import pytest

from bench import exactness as bench_exactness
from bench import results
from epi_kernels import cli
from epi_kernels.kernels_report import cuda_kernels, exactness, sass
from epi_kernels.kernels_report.command import ARCHITECTURES
from epi_kernels.kernels_report.rows import Expectation, describe, make_row
from python_tests.harness import need_triton

need_triton()

ROOT = Path(__file__).resolve().parents[1]


def compiling(*arguments: str) -> subprocess.CompletedProcess:
    """Runs python with Triton's compiler in place of its interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_passes_the_check(arch):
    result = compiling("-m", "epi_kernels", "kernels", "--check", "--json", "--jobs=1", f"--arch=sm_{arch}")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    steps = [row for row in rows if row["kernel"].startswith("step ") and "bounded" not in row["kernel"]]
    # the check looked at something: twelve combinations of dtypes and the switches on top
    assert len(steps) >= 12
    for row in steps:
        assert row["arch"] == f"sm_{arch}" and row["registers"] > 0
        scales = {"8"} if "int8" in row["kernel"] else set()  # a byte a block
        nibbles = {"64", "16"} if "int4" in row["kernel"] else set()  # sixteen codes, and a scale of bfloat16
        assert (
            set(row["loads"]) == {"128", "8"} | nibbles and set(row["stores"]) == {"128"} | scales | nibbles
        )
        # sixteen elements' weight at least; but for 4-bit codes, whose two stores have 64 bits, the moments too
        assert row["loads"]["128"] >= 4 and row["stores"]["128"] >= (2 if nibbles else 3)
        assert not nibbles or row["stores"]["64"] >= 2
        assert row["instructions_per_element"] > 20
    bounded = next(row for row in rows if "bounded" in row["kernel"])
    assert set(bounded["loads"]) == {"32", "8"}
    record = record_of_this_triton()
    if record is not None and arch == bench_exactness.ARCH:
        each = {row["kernel"]: row["instructions_per_element"] for row in rows}
        for row in record["rows"]:
            if not row["given_up"]:
                nearest = " nearest" if row["rounding"] == "nearest" else ""
                found = each[f"step bf16/{row['states']}/shared{nearest}"]
                assert found == row["instructions_per_element"], "kernels changed: make exactness tables"


def record_of_this_triton() -> dict | None:
    """The README's prices of exactness, where this Triton counted them."""
    record = results.newest_record(results.RESULTS, bench_exactness.PREFIX)
    assert record is not None
    return record if record["versions"]["triton"] == version_of("triton") else None


def test_many_kernels_disassembled_together_are_what_each_is_alone():
    """A step whose divisions and roots are calls, at another place than the beginning."""
    result = compiling("-m", "python_tests.kernels_together")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["together"] == facts["alone"] and min(facts["alone"]) > 100
    assert facts["same"] and facts["calls"] > 0


def test_bad_kernels_are_found():
    result = compiling("-m", "python_tests.bad_kernels")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    problems = {name: "; ".join(row["problems"]) for name, row in rows.items()}
    assert problems["good"] == "" and problems["good step"] == ""
    assert re.search(r"narrow loads: \d+x32; .*narrow stores: \d+x32", problems["narrow"])
    assert "contraction: fma" in problems["fused"]
    assert re.search(
        r"8 loads of 128 bits, 6 expected; 8 stores of 128 bits, 4 expected", problems["too few"]
    )
    assert "instructions an element, more than 100" in problems["too long"]
    assert "spills" in problems["spilling step"] and rows["spilling step"]["spill_bytes"] > 0


def test_giving_exactness_up_saves_instructions_and_leaves_the_shipped_kernel_alone():
    result = compiling("-m", "python_tests.exact_and_not")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    shipped, approximate, again = facts["costs"]
    assert again == shipped and shipped["inexact"] == []
    assert any(said.startswith("approximation") for said in approximate["inexact"])
    for count in ("instructions_per_element", "common_instructions_per_element"):
        assert shipped[count] > approximate[count] > 20
    assert shipped["instructions_per_element"] > shipped["common_instructions_per_element"]
    assert facts["untouched"] and facts["keys_differ"] and facts["left_behind"] == []

    record = record_of_this_triton()
    if record is not None:  # the README's figures are this tree's
        for cost in (shipped, approximate):
            assert cost in record["rows"], "kernels changed: make exactness tables"


def test_only_a_call_that_is_there_once_is_replaced(tmp_path):
    source = tmp_path / "step.py"
    source.write_text("x = tl.div_rn(a, b) + tl.div_rn(c, d)\n")
    for calls in ((exactness.DIVISION,), (exactness.ROOT,)):
        with pytest.raises(RuntimeError, match=r"step.py has tl\..*\) [02] times; 1 was expected"):
            exactness.rewritten(source, calls, tmp_path)


def test_the_table_of_costs_has_a_line_a_form_and_the_differences():
    facts = {"arch": "sm_90", "states": "int8", "rounding": "nearest"}
    counts = ("instructions_per_element", "common_instructions_per_element")
    rows = [
        facts | {"given_up": form} | dict(zip(counts, both, strict=True))
        for form, both in (("", (87.0, 77.0)), ("rounded root", (80.5, 75.25)))
    ]
    assert exactness.markdown(rows).splitlines()[2:] == [
        "| nothing, as shipped | **87.0** |",
        "| rounded root | 80.5 (-6.5) |",
        "| nothing, slow cases left out | 77.0 |",
        "| rounded root, slow cases left out | 75.2 |",
    ]


@pytest.mark.parametrize("option", ["--cuda", "--check"])
def test_the_cost_of_exactness_goes_without_options_of_the_other_table(option):
    with pytest.raises(SystemExit, match=f"--cost-of-exactness goes without {option}"):
        cli.main(["kernels", "--cost-of-exactness", option])


LISTING = """
Resource usage:
 Common:
  GLOBAL:0
 Function stream:
  REG:24 STACK:8 SHARED:512 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0

\tcode for sm_90
\t\tFunction : stream
\t.headerflags    @"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDG.E R9, desc[UR10][R2.64] ;    /* 0x0 */
                                                                    /* 0x1 */
        /*0010*/                   STL.64 [R1], R4 ;
        /*0020*/              @!P1 LDG.E.128 R24, desc[UR10][R70.64] ;
        /*0030*/                   LDG.E.U8.CONSTANT R3, desc[UR10][R70.64] ;
        /*0040*/              @P0  BRA 0x60 ;
        /*0050*/                   STG.E.U16 desc[UR10][R2.64], R3 ;
        /*0060*/                   STG.E.EF.128 desc[UR10][R2.64], R24 ;
        /*0070*/              @!P0 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
"""


def test_reading_a_listing():
    (kernel,) = sass.parse(LISTING)
    assert (kernel.name, kernel.registers, kernel.shared_bytes, kernel.spill_bytes) == ("stream", 24, 512, 8)
    loop = kernel.hot_loop
    assert [i.address for i in loop] == [0x20, 0x30, 0x40, 0x50, 0x60, 0x70]
    row = make_row("triton", "stream", "sm_90", kernel, Expectation(4, full_width=True, loads=1, stores=1))
    assert row.instructions_per_element == 1.5
    assert row.loads == {128: 1, 8: 1} and row.stores == {128: 1, 16: 1}
    assert row.problems == ("spills 8 bytes", "narrow stores: 1x16")
    assert describe(row.loads) == "1x128 1x8"


SLOW_CASE = """
        /*0000*/                   MUFU.RSQ R4, R2 ;
        /*0010*/              @!P0 BRA 0x60 ;
        /*0020*/                   MOV R4, 0x40 ;
        /*0030*/                   CALL.REL.NOINC 0x100 ;
        /*0040*/                   IMAD.MOV.U32 R5, RZ, RZ, R4 ;
        /*0050*/                   BRA 0x70 ;
        /*0060*/                   FFMA R5, R4, R4, R2 ;
        /*0070*/                   CALL.REL.NOINC 0x200 ;
        /*0080*/              @!P1 BRA 0x0 ;
"""


def test_a_slow_case_lies_between_a_branch_and_where_it_goes():
    (kernel,) = sass.parse(LISTING[: LISTING.index("        /*0000*/")] + SLOW_CASE)
    assert [i.address for i in sass.common_path(kernel.instructions)] == [0, 0x10, 0x60, 0x70, 0x80]


PTXAS = """
ptxas info    : Compiling entry function '_Z4stepILb1EEvPKlS0_' for 'sm_90'
ptxas info    : Function properties for _Z4stepILb1EEvPKlS0_
    24 bytes stack frame, 20 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 24 bytes cumulative stack size
"""


def test_reading_what_ptxas_says():
    assert cuda_kernels.spills(PTXAS) == {"_Z4stepILb1EEvPKlS0_": 36}
    assert cuda_kernels._short("void epi::(anonymous namespace)::step<true, 2>(long const*, int)") == (
        "step<true, 2>"
    )


def test_what_a_cuda_step_is_held_to():
    shared = cuda_kernels.expectation("step_kernel<float, float, SharedImportance>")
    assert (shared.elements, shared.loads, shared.stores, shared.full_width) == (4, 4, 4, True)
    own = cuda_kernels.expectation("step_stats_kernel<unsigned short, float, unsigned short>")
    assert (own.elements, own.loads, own.stores, own.full_width) == (8, 7, 7, True)
    nibbles = cuda_kernels.expectation("step_kernel<float, Nibbles, SharedImportance>")
    assert (nibbles.elements, nibbles.loads, nibbles.full_width) == (16, 9, False)
    assert cuda_kernels.expectation("count_kernel") is None


def test_cuda_sources_are_compiled_with_the_flags_of_the_build(monkeypatch):
    commands = []

    def compiler(command, **options):
        commands.append(command)
        raise KeyboardInterrupt  # seen enough

    monkeypatch.setattr(subprocess, "run", compiler)
    with pytest.raises(KeyboardInterrupt):
        cuda_kernels._compile(("nvcc", cuda_kernels.sources()[0], 90))
    flags = cuda_kernels.build_support().NVCC_FLAGS
    assert "-fmad=false" in flags and set(flags) <= set(commands[0])


def test_a_cuda_check_that_knows_no_step_fails(monkeypatch, capsys):
    kernel = sass.parse(LISTING)[0]
    for name, status in (
        ("step step_kernel<float, float, SharedImportance>", 0),
        ("step _Z11step_kernel", 1),
    ):
        row = replace(make_row("cuda", name, "sm_90", kernel, None), problems=())
        monkeypatch.setattr(cuda_kernels, "rows", lambda archs, row=row: [row])
        assert cli.main(["kernels", "--cuda", "--check", "--arch", "90"]) == status
    assert "FAILED sm_90: no step kernel was recognised" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said", [(("--arch", "42"), "'42' is none of"), (("--jobs", "-1"), "'-1' is not a number")]
)
def test_bad_arguments_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit) as refusal:
        cli.main(["kernels", *arguments])
    assert refusal.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.cuda_compile
def test_a_cuda_source_gets_the_same_table(tmp_path, monkeypatch):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "copy.cu").write_text(
        "namespace epi { __global__ void copy(float4* to, const float4* from, int n) {\n"
        "  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = from[i]; } }\n"
    )
    monkeypatch.setattr(cuda_kernels, "SOURCES", tmp_path)
    (row,) = cuda_kernels.rows([90])
    assert row.kernel == "copy copy" and row.arch == "sm_90" and row.spill_bytes == 0
    assert set(row.loads) == {128} and set(row.stores) == {128} and row.registers > 0


def test_missing_sources_and_compilers_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_kernels, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match="no CUDA sources"):
        cuda_kernels.rows([90], nvcc="nvcc")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="nvcc is not on PATH"):
        cuda_kernels.rows([90])
