"""Every op that has kernels, interpreted on the CPU against its reference in fp64. The list of ops is kernels.OPS."""

import warnings

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DTYPES, check_parity, differentiated, doubled, layouts, leaves, relative_error, run
from torch import Tensor

import kernels

OPS = [op for op in kernels.OPS.values() if op.triton is not None]
WITH_CPU = [op for op in kernels.OPS.values() if op.cpu is not None]
interpreted = kernels.load("interpret", **{o.name: "reference" for o in kernels.OPS.values() if o.triton is None})

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_differentiable_op = pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def kernel_of(op):
    return getattr(interpreted, op.name)


def a_case(op, dtype=torch.float32):
    """Small arguments of more than one row and an odd length."""
    return op.inputs(**op.parity[-1], dtype=dtype)


@each_dtype
@pytest.mark.parametrize("op, dims", [pytest.param(op, d, id=f"{op.name}-{d}") for op in OPS for d in op.parity])
def test_parity(op, dims, dtype):
    torch.manual_seed(0)
    check_parity(op, kernel_of(op), op.inputs(**dims, dtype=dtype), str(dims))


@each_dtype
@pytest.mark.parametrize("op, dims", [pytest.param(op, d, id=f"{op.name}-{d}") for op in WITH_CPU for d in op.parity])
def test_parity_of_the_path_for_cpus(op, dims, dtype):
    """Also with the parameters in fp32, as training in 16 bits has them."""
    torch.manual_seed(0)
    arguments = op.inputs(**dims, dtype=dtype)
    check_parity(op, op.cpu, arguments, str(dims))
    if dtype != torch.float32:
        widened = [a.float() if isinstance(a, Tensor) and a.dim() == 1 else a for a in arguments]
        check_parity(op, op.cpu, widened, f"{dims}, parameters in fp32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("op", [op for op in OPS if "M" in op.domain and op.differentiable], ids=lambda op: op.name)
def test_gradients_of_parameters_are_summed_in_fp32(op, path, dtype):
    """Thousands of rows that add up in one direction, beside parameters in fp32: sums in 16 bits would stand still."""
    function = getattr(op, path) or op.reference
    torch.manual_seed(0)
    dims = {name: 8192 if name == "M" else 40 for name in op.domain if name.isupper()}
    arguments = [a.float() if isinstance(a, Tensor) and a.dim() == 1 and a.is_floating_point() else a
                 for a in op.inputs(**dims, dtype=dtype)]  # fmt: skip
    outputs = function(*differentiated(arguments))
    ones = [torch.full_like(o, 1 if o.dim() else 8192) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    for f, t in zip(run(function, arguments, ones), run(op.reference, doubled(arguments), ones), strict=True):
        assert relative_error(f, t) <= torch.finfo(dtype).eps


@each_op
def test_fuzz(op, fuzz_examples):
    """Random dims of the op's domain, dtypes, layouts and magnitudes."""

    @settings(max_examples=fuzz_examples, suppress_health_check=list(HealthCheck))
    @given(
        st.fixed_dictionaries({name: st.sampled_from(list(values)) for name, values in op.domain.items()}),
        st.sampled_from(DTYPES), st.integers(0, 2**31), st.integers(0, 4), st.floats(1e-2, 1e2),
    )  # fmt: skip
    def fuzz(dims, dtype, seed, layout, magnitude):
        torch.manual_seed(seed)
        arguments = list(op.inputs(**dims, dtype=dtype))
        for i, a in enumerate(arguments):
            if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
                a = a * magnitude if i == 0 else a
                choices = [a, *layouts(a).values()]
                arguments[i] = choices[(layout + i) % len(choices)]
        check_parity(op, kernel_of(op), arguments, f"{dims} {dtype} seed {seed} layout {layout} x {magnitude}")

    fuzz()


@each_op
def test_output_memory_may_hold_anything(op):
    """Every output element is written: torch fills new memory with NaN, and the results do not change."""
    arguments = a_case(op)
    clean = run(kernel_of(op), arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.use_deterministic_algorithms(True, warn_only=True)
            assert torch.empty(3).isnan().all()
            poisoned = run(kernel_of(op), arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


@each_op
def test_two_runs_are_bitwise_equal(op):
    arguments = a_case(op, torch.bfloat16)
    for a, b in zip(run(kernel_of(op), arguments), run(kernel_of(op), arguments), strict=True):
        assert torch.equal(a, b)


@each_op
def test_layouts(op):
    """Each argument in turn lies awkwardly in memory; so do the gradients of the outputs."""
    arguments = a_case(op)
    plain = run(kernel_of(op), arguments)
    for i, a in enumerate(arguments):
        for name, laid in layouts(a).items() if isinstance(a, Tensor) and a.is_floating_point() else ():
            found = run(kernel_of(op), (*arguments[:i], laid, *arguments[i + 1 :]))
            for f, p in zip(found, plain, strict=True):
                torch.testing.assert_close(
                    f, p, rtol=2e-6, atol=2e-6, msg=lambda m, n=name, i=i: f"argument {i} {n}: {m}"
                )
    outputs = kernel_of(op)(*arguments)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    ones = [torch.ones_like(o) for o in outputs]
    plain = run(kernel_of(op), arguments, ones)
    expanded = run(kernel_of(op), arguments, [o.new_ones(()).expand(o.shape) for o in outputs])
    for f, p in zip(expanded, plain, strict=True):
        torch.testing.assert_close(f, p, rtol=2e-6, atol=2e-6)


@each_op
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_and_inf_spread_as_in_the_reference(op, value):
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in a_case(op)]
    arguments[0].view(-1)[arguments[0].numel() // 2] = value
    for i, (found, expected) in enumerate(
        zip(run(kernel_of(op), arguments), run(op.reference, arguments), strict=True)
    ):
        assert torch.equal(found.isfinite(), expected.isfinite()), f"result {i}"


@each_op
def test_compiled_without_graph_break_equals_eager(op):
    function, arguments = kernel_of(op), a_case(op)
    torch._dynamo.reset()

    def both(*args):
        outputs = function(*args)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, arguments), run(both, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@each_op
def test_one_compilation_serves_many_sizes(op):
    """The first axis may change without compiling anew each time."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(kernel_of(op), fullgraph=True, backend=counter, dynamic=True)
    axis = next(iter(op.domain))
    dims = {name: list(values)[-1] for name, values in op.domain.items()}
    for size in list(op.domain[axis])[:1:-3]:  # sizes 0 and 1 are special to the compiler
        compiled(*op.inputs(**{**dims, axis: size}, dtype=torch.float32))
    assert counter.frame_count <= 2


@each_op
def test_opcheck(op, monkeypatch):
    """torch's own checks of the custom op: schema, shape function, autograd registration, ahead-of-time dispatch."""
    calls = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "namespace", None) == "gptfast":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    arguments = differentiated(a_case(op))
    with Recorder(), monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # the path of the compiler, taken eagerly
        kernel_of(op)(*arguments)
    assert calls, "the op does not go through a custom op when compiled"
    for function, args in calls:
        torch.library.opcheck(
            function, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


@each_op
def test_activation_checkpointing(op):
    arguments = differentiated(a_case(op))

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(kernel_of(op), *args, use_reentrant=False)

    for a, b in zip(run(checkpointed, arguments), run(kernel_of(op), arguments), strict=True):
        assert torch.equal(a, b)


@each_differentiable_op
def test_gradients_only_where_asked(op):
    """With one argument frozen the others' gradients stay what they were."""
    arguments = differentiated(a_case(op))
    full = run(kernel_of(op), arguments)
    n = len(full) - len(leaves(arguments))
    for i, leaf in enumerate(leaves(arguments)):
        frozen = [a.detach() if a is not leaf and isinstance(a, Tensor) else a for a in arguments]
        outputs = kernel_of(op)(*frozen)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
        (gradient,) = torch.autograd.grad([o for o, _ in pairs], [leaf], [s for _, s in pairs])
        torch.testing.assert_close(gradient, full[n + i], rtol=2e-6, atol=2e-6)


@each_differentiable_op
def test_reference_gradients(op):
    """The oracle itself: the reference's gradients against finite differences in fp64."""
    smallest = min(
        (d for d in op.parity if all(d.values())), key=lambda d: sum(v for v in d.values() if type(v) is int)
    )
    arguments = differentiated(doubled(op.inputs(**smallest, dtype=torch.float64)))
    assert torch.autograd.gradcheck(op.reference, arguments, fast_mode=True)


@each_op
def test_on_meta_tensors_the_interpreter_has_shapes_alone(op):
    arguments = op.inputs(**op.parity[-1], dtype=torch.float16, device="meta")
    plain = run(op.reference, a_case(op, torch.float16))
    for f, p in zip(run(kernel_of(op), arguments), plain, strict=True):
        assert (f.device.type, f.shape, f.dtype) == ("meta", p.shape, p.dtype)


@each_op
def test_cpu_tensors_are_refused_outside_the_interpreter(op):
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        op.triton(*a_case(op))


@pytest.mark.gpu
@each_dtype
@pytest.mark.parametrize(
    "op, dims", [pytest.param(op, d, id=f"{op.name}-{d}") for op in OPS for d in (*op.parity, op.bench[0])]
)
def test_parity_on_the_gpu(op, dims, dtype):
    torch.manual_seed(0)
    arguments = op.inputs(**dims, dtype=dtype, device="cuda")
    check_parity(op, op.triton, arguments, str(dims))
