"""Which form of a kernel a chunk meets, and how tensors are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from epi_kernels.backends.batch import StepBatch
from epi_kernels.reference.threshold import SAMPLE_BLOCK
from python_tests.harness import need_triton
from python_tests.triton_stages import BF16, F32, Spec, make

need_triton()  # before what imports it

from epi_kernels.backends.triton.backend import LARGEST_BLOCK, TritonBackend  # noqa: E402
from epi_kernels.backends.triton.chunks import Cache, aligned_tensors, plan, sampled_elements  # noqa: E402
from epi_kernels.backends.triton.variants import (  # noqa: E402
    RefreshVariant,
    StepVariant,
    refresh_forms,
    refresh_variants,
    step_forms,
    step_variants,
)


@pytest.mark.parametrize("n_bytes", [2, 4, 8])
@pytest.mark.parametrize("column", range(5))
def test_one_address_off_by_a_few_bytes_takes_the_bounded_form(n_bytes, column):
    addresses = np.full((2, 5), 1 << 40, dtype=np.int64)
    addresses[1, column] += n_bytes
    assert aligned_tensors(addresses, np.full((2, 5), 4), 1024).tolist() == [True, False]


def test_an_absent_tensor_is_not_an_unaligned_one():
    assert aligned_tensors(np.array([[32, 0]]), np.array([[4, 2]]), 1024).all()


def test_chunks_that_start_off_alignment_are_found():
    assert not aligned_tensors(np.array([[32]]), np.array([[2]]), 4).any()


@pytest.mark.parametrize("name", ["param", "grad", "exp_avg", "exp_avg_sq", "importance"])
@pytest.mark.parametrize("n_bytes", [2, 4, 8])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_the_variant_of_views(name, n_bytes, dtype):
    if n_bytes % dtype.itemsize:
        return  # no tensor of this dtype starts there
    item = make(Spec(4096, dtype, dtype, dtype))[0]
    for each in ("param", "grad", "exp_avg", "exp_avg_sq", "importance"):
        room = torch.zeros(4096 + 16, dtype=dtype)
        behind = (-room.data_ptr() % 16 + (n_bytes if each == name else 0)) // dtype.itemsize
        setattr(item, each, room[behind : behind + 4096])
        assert getattr(item, each).data_ptr() % 16 == (n_bytes if each == name else 0)
    (variant,) = step_variants(step_forms(StepBatch([item]).table(writes_grad=False).rows, 1024))
    assert variant == StepVariant(dtype == BF16, dtype == BF16, 2 if dtype == BF16 else 1, False)
    u = np.array([item.u.data_ptr()])
    (variant,) = refresh_variants(refresh_forms(u, np.array([int(dtype == BF16)]), 1024))
    assert variant == RefreshVariant(dtype == BF16, name != "importance")


def chunks_of(cut, launch):
    return cut.chunks[launch.first : launch.first + launch.programs].tolist()


def test_how_tensors_are_cut():
    f32, bf16 = StepVariant(False, False, 0, True), StepVariant(True, True, 0, True)
    sizes, layers = [2 * 2048 + 512 + 3, 0, 511, 1024, 4096], [1, 0, 0, -1, 1]
    variants = [f32, f32, f32, bf16, f32._replace(full=False)]
    cut = plan(sizes, variants, layers, 2048)
    by_variant = {launch.variant: chunks_of(cut, launch) for launch in cut.launches}
    # tensor, start, count, slot; slots follow layer, tensor, start
    assert by_variant == {
        f32: [[0, 0, 2048, 2], [0, 2048, 2048, 3], [0, 4096, 512, 4]],
        f32._replace(full=False): [[0, 4608, 3, 5], [2, 0, 511, 1], [4, 0, 2048, 6], [4, 2048, 2048, 7]],
        bf16: [[3, 0, 1024, 0]],
    }
    assert cut.spans.tolist() == [[0, 1, 2, 0], [1, 2, 8, 0]]


def test_every_element_is_covered_once_and_full_chunks_are_whole_blocks():
    generator = np.random.default_rng(0)
    sizes = [0, 1, 1023, 1024, 1025, *generator.integers(0, 20000, 40).tolist()]
    variants = [
        StepVariant(bool(b), bool(b), 0, bool(f)) for b, f in generator.integers(0, 2, (len(sizes), 2))
    ]
    cut = plan(sizes, variants, generator.integers(-1, 5, len(sizes)).tolist(), 4096)
    covered = [np.zeros(n, dtype=int) for n in sizes]
    for launch in cut.launches:
        for tensor, start, count, _ in chunks_of(cut, launch):
            covered[tensor][start : start + count] += 1
            assert 0 < count <= 4096
            assert not launch.variant.full or (variants[tensor].full and count % launch.variant.block == 0)
            assert launch.variant._replace(full=True) == variants[tensor]._replace(full=True)
    assert all((c == 1).all() for c in covered)
    assert sorted(cut.chunks[:, 3].tolist()) == list(range(len(cut.chunks)))
    assert len(cut.launches) <= 4  # however many tensors there are


def test_nothing_to_cut():
    cut = plan([0], [RefreshVariant(False, True)], [0], 4096)
    assert len(cut.chunks) == 0 and cut.launches == () and len(cut.spans) == 0


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 640, 641, 1000])
@pytest.mark.parametrize("stride", [1, 2, 3, 11])
def test_sampled_elements(n, stride):
    assert sampled_elements(n, stride) == sum((i // SAMPLE_BLOCK) % stride == 0 for i in range(n))


def test_offsets_beyond_32_bits():
    cut = plan([(1 << 33) + 5], [RefreshVariant(True, True)], [0], 1 << 16)
    assert cut.chunks[-1].tolist() == [0, 1 << 33, 5, len(cut.chunks) - 1]


def test_chunk_sizes_are_checked():
    for wrong in (LARGEST_BLOCK // 2, 1 << 17, -LARGEST_BLOCK):
        with pytest.raises(ValueError, match="a chunk is a multiple"):
            TritonBackend(step_chunk=wrong)


def test_the_cache_forgets_the_least_recently_used():
    made = []
    cache = Cache(capacity=2)
    for key in ("a", "b", "a", "c", "a", "b"):
        cache.get(key, lambda key=key: made.append(key))
    assert made == ["a", "b", "c", "b"]
