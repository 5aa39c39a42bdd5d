"""Linear attention against the float64 N x N reference: PyTorch here, Triton in a second run under its interpreter.

test_triton_in_the_interpreter runs this same file again with TRITON_INTERPRET=1, which Triton reads when a kernel is
defined; every test below that calls linear_attention then goes through the Triton kernels (check_path asserts it).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.errors import WorkbenchError
from workbench.kernels.linear_attention import (
    apply_statistics,
    attention_matrix,
    linear_attention,
    quadratic_reference,
    statistics,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = INTERPRETED or DEVICE == "cuda"
FORMS = [{}, {"eps": 1e-2}, {"normalise": False}, {"normalise": False, "count": 12}]
# relative to the largest entry; half precision is the rounding of the stored result (the interpreter truncates bf16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def tensors(B, H, N, D, Dv, dtype=torch.float32, *, seed=0, strided=False):
    """q, k > 0 and v, optionally as heads split from (B, N, H * D), which is how the layer calls."""
    g = torch.Generator().manual_seed(seed)

    def make(width):
        if strided:
            return torch.randn(B, N, H, width, generator=g).to(DEVICE, dtype).transpose(1, 2)
        return torch.randn(B, H, N, width, generator=g).to(DEVICE, dtype)

    q, k = (torch.nn.functional.elu(make(D)) + 1 for _ in range(2))
    return [x.detach().requires_grad_() for x in (q, k, make(Dv))]


def check_path(out):
    assert type(out.grad_fn).__name__.startswith("ApplyBackward") == TRITON, "the wrong implementation ran"


def error(ours, reference, scale=None):
    scale = reference.abs().max().item() if scale is None else scale
    return (ours.double() - reference).abs().max().item() / max(scale, 1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "N", "D", "Dv"),
    [(1, 1, 1, 3, 3), (2, 1, 7, 8, 8), (1, 2, 33, 40, 40), (1, 2, 100, 64, 64), (2, 1, 65, 80, 24), (1, 1, 130, 1, 5)],
)
def test_forward_and_backward_equal_the_quadratic_form(B, H, N, D, Dv, form):
    q, k, v = tensors(B, H, N, D, Dv, strided=N % 2 == 1)
    out = linear_attention(q, k, v, **form)
    check_path(out)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, (q, k, v), g)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = quadratic_reference(*exact, **form)
    wanted = torch.autograd.grad(reference, exact, g.double())
    assert error(out, reference) < TOLERANCE[torch.float32]
    # with one token dq is eps / z of the terms that cancel in it, so it is compared with those terms
    scale = max(x.abs().max().item() for x in wanted)
    assert max(error(a, b, scale) for a, b in zip(grads, wanted, strict=True)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("form", [{}, {"normalise": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_its_rounding(dtype, form):
    q, k, v = tensors(1, 2, 100, 40, 40, dtype)
    out = linear_attention(q, k, v, **form)
    check_path(out)
    g = torch.ones_like(out)
    grads = torch.autograd.grad(out, (q, k, v), g)
    assert [x.dtype for x in (out, *grads)] == [dtype] * 4
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = quadratic_reference(*exact, **form)
    wanted = torch.autograd.grad(reference, exact, g.double())
    assert max(error(a, b) for a, b in zip((out, *grads), (reference, *wanted), strict=True)) < TOLERANCE[dtype]


def test_float16_survives_sums_beyond_its_range():
    q, k, v = tensors(1, 1, 200, 16, 16, torch.float16)
    k, v = k.detach() * 40 + 200, v.detach() * 40 + 200  # sum_j k_j v_j is about 8e6, float16 ends at 65504
    out = linear_attention(q, k, v)
    assert error(out, quadratic_reference(q, k, v)) < TOLERANCE[torch.float16]


def test_mixed_precision_keeps_each_input_s_own_dtype():
    q, k, v = tensors(1, 1, 20, 8, 8)
    half = v.detach().bfloat16().requires_grad_()
    out = linear_attention(q, k, half)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and q.grad.dtype == k.grad.dtype == torch.float32
    assert half.grad.dtype == torch.bfloat16


def test_autocast_does_not_lower_the_sums():
    q, k, v = tensors(1, 1, 64, 8, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        S, _ = statistics(k, v)
        out = linear_attention(q, k, v)
    assert S.dtype == torch.float32 and error(out, quadratic_reference(q, k, v)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck_of_the_float64_path(form):
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.rand(1, 2, 5, 3, generator=g, dtype=torch.float64).add(0.1).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, **form), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: linear_attention(*x, **form), (q, k, v))


def test_rows_sum_to_one_and_permuting_tokens_permutes_outputs():
    q, k, v = tensors(1, 2, 90, 8, 8)
    ones = linear_attention(q, k, torch.ones_like(v), eps=1e-6)
    assert (ones - 1).abs().max() < 1e-5
    assert (attention_matrix(q, k, eps=1e-6).sum(-1) - 1).abs().max() < 1e-5
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    moved = linear_attention(q[:, :, order], k[:, :, order], v[:, :, order])
    assert (moved - linear_attention(q, k, v)[:, :, order]).abs().max() < 1e-6


def test_tiling_the_tokens_leaves_normalised_outputs_and_multiplies_the_others():
    q, k, v = tensors(1, 2, 48, 8, 8)
    many = (x.repeat(1, 1, 4, 1) for x in (q, k, v))
    tiled, once = linear_attention(*many), linear_attention(q, k, v)
    assert (tiled - once.repeat(1, 1, 4, 1)).abs().max() < 1e-6
    kw = {"normalise": False, "count": 48}
    tiled, once = linear_attention(q, k.repeat(1, 1, 4, 1), v.repeat(1, 1, 4, 1), **kw), linear_attention(q, k, v, **kw)
    assert error(tiled, 4 * once.double()) < 1e-6


def test_statistics_of_strips_average_to_those_of_the_whole():
    q, k, v = tensors(2, 2, 80, 8, 6)
    S, s = statistics(k, v)
    halves = [statistics(k[:, :, part], v[:, :, part]) for part in (slice(0, 40), slice(40, 80))]
    joined = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    assert torch.allclose(joined[0], S, atol=1e-6) and torch.allclose(joined[1], s, atol=1e-6)
    strip = apply_statistics(q[:, :, 40:], *joined)
    assert torch.allclose(strip, linear_attention(q, k, v)[:, :, 40:], atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes while it is active, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.nbytes)
        return out


@pytest.mark.parametrize("form", [{}, {"normalise": False}], ids=str)
def test_nothing_larger_than_the_inputs_is_ever_built(form):
    N, D = (1024, 8) if TRITON else (16384, 8)
    q, k, v = tensors(1, 1, N, D, D)
    with Largest() as seen:
        linear_attention(q, k, v, **form).sum().backward()
    assert 0 < seen.nbytes <= 4 * N * D
    small = [x[:, :, :512] for x in (q, k, v)]
    with Largest() as seen:
        quadratic_reference(*small, **form)
    assert seen.nbytes >= 8 * 512 * 512, "the recorder does not see an N x N matrix where there is one"


@pytest.mark.skipif(not INTERPRETED, reason="about the Triton kernels' pointers; runs in the interpreter")
def test_offsets_beyond_32_bits():
    # five tokens 2^29 elements apart: the last starts at 2^31. Only the touched pages of the storage become real.
    try:
        far = torch.empty(4 * 2**29 + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine does not reserve 4.3 GB of address space")
    values = torch.rand(1, 1, 5, 16, generator=torch.Generator().manual_seed(4)).half()
    k = far.as_strided((1, 1, 5, 16), (1, 1, 2**29, 1))
    k.copy_(values)
    q, v = values.flip(-1).requires_grad_(), values.float()
    assert torch.equal(linear_attention(q, k, v), linear_attention(q, values, v))
    far_v = far.as_strided((1, 1, 5, 16), (1, 1, 2**29, 1))
    assert torch.equal(linear_attention(k, values, far_v), linear_attention(values, values, values))


def test_shapes_that_do_not_fit_are_told_in_one_line():
    q, k, v = tensors(1, 2, 6, 4, 4)
    for call in (
        lambda: linear_attention(q, k, v[:, :, :5]),
        lambda: linear_attention(q, k[:, :, :0], v[:, :, :0]),
        lambda: linear_attention(q[..., :3], k, v),
        lambda: linear_attention(q[0], k[0], v[0]),
        lambda: linear_attention(q, k, v, normalise=False, count=0),
    ):
        with pytest.raises(WorkbenchError, match="^linear attention: [^\n]+$"):
            call()


@pytest.mark.skipif(INTERPRETED, reason="starts the run with the interpreter")
def test_triton_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed here (it is Linux only)")
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", str(Path(__file__))]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed and int(passed[1]) >= 40, ran.stdout[-2000:]


@pytest.mark.skipif(INTERPRETED, reason="compiles, which the interpreter does not")
@pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])
def test_kernels_compile_for_a_gpu_that_is_not_here(half):
    """Machine code for compute capability 9.0, without a driver: types, masks and shared memory fit a real GPU."""
    triton = pytest.importorskip("triton", reason="triton is not installed here (it is Linux only)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from workbench.kernels import linear_attention_triton as kernels

    def compiled(kernel, **constants):
        constants |= {"BN": 64, "PRECISION": "tf32" if half else "ieee"}
        types = {name: "fp32" if name in ("eps", "scale") else "i32" for name in kernel.arg_names}
        types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {f"{name}_ptr": "*bf16" for name in "abxyqg" if half and f"{name}_ptr" in types}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, types, {(kernel.arg_names.index(name),): x for name, x in constants.items()})
        return triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 4, "num_stages": 2})

    for code in (
        compiled(kernels._outer_sums, WEIGHTED=True, BA=64, BB=64),
        compiled(kernels._rows_times, MODE=1, BX=64, BY=64),
        compiled(kernels._rows_times, MODE=2, BX=64, BY=64),
        compiled(kernels._row_corrections, BD=64, BV=64),
    ):
        assert code.metadata.shared <= 64 * 1024  # bytes; every GPU since 2018 has that much a block
        assert ("mma" in code.asm["ptx"]) == half  # half precision on tensor cores, float32 in full float32
