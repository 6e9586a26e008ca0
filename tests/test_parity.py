"""Every op that has kernels, interpreted on the CPU against its reference in fp64, with the options that it declares.

The list of ops is kernels.OPS; which options meet is drawn from their declarations by kernels.proof.options.
"""

import functools
import inspect
import math
import warnings

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import DTYPES, check_parity, differentiated, doubled, is_number, layouts, leaves, relative_error, run
from torch import Tensor

import kernels
from kernels.proof.options import combined, farthest_options, option_sets, sized

OPS = [op for op in kernels.OPS.values() if op.triton is not None]
WITH_CPU = [op for op in kernels.OPS.values() if op.cpu is not None]
interpreted = kernels.load("interpret", **{o.name: "reference" for o in kernels.OPS.values() if o.triton is None})

each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
each_differentiable_op = pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)


def named(case):
    """A case as the id of a test: 'attention B=2 T=1 window=5'."""
    op, values = case
    return " ".join([op.name, *(f"{k}={str(v).removeprefix('torch.')}" for k, v in values.items())])


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=named)


def sizes(dims):
    return {letter: size for letter, size in dims.items() if letter.isupper()}


each_option_set = each([(op, options) for op in OPS for options in option_sets(op)])


def kernel_of(op, **keywords):
    return functools.partial(getattr(interpreted, op.name), **keywords)


def a_case(op, dtype=torch.float32, options=None, device="cpu"):
    """Small arguments of more than one row and an odd length, and the keyword arguments of these options."""
    options = farthest_options(op) if options is None else options
    return op.inputs(**op.parity[-1], **options, dtype=dtype, device=device)


@each([(op, case) for op in OPS for case in combined(op, op.parity, dtype=DTYPES)])
def test_parity(case):
    """Any two of: the sizes, the dtypes, the values of any two options."""
    op, values = case
    torch.manual_seed(0)
    arguments, keywords = op.inputs(**values)
    check_parity(op, kernel_of(op), arguments, named(case), **keywords)


@each([(op, case) for op in WITH_CPU for case in combined(op, op.parity, dtype=DTYPES)])
def test_parity_of_the_path_for_cpus(case):
    """Also with the parameters in fp32, as training in 16 bits has them."""
    op, values = case
    torch.manual_seed(0)
    arguments, keywords = op.inputs(**values)
    check_parity(op, op.cpu, arguments, named(case), **keywords)
    if values["dtype"] != torch.float32:
        widened = [a.float() if isinstance(a, Tensor) and a.dim() == 1 else a for a in arguments]
        check_parity(op, op.cpu, widened, f"{named(case)}, parameters in fp32", **keywords)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("op", [op for op in OPS if "M" in op.domain and op.differentiable], ids=lambda op: op.name)
def test_gradients_of_parameters_are_summed_in_fp32(op, path, dtype):
    """Thousands of rows that add up in one direction, beside parameters in fp32: sums in 16 bits would stand still."""
    function = getattr(op, path) or op.reference
    torch.manual_seed(0)
    dims = {name: 8192 if name == "M" else 40 for name in op.domain if name.isupper()}
    arguments = [a.float() if isinstance(a, Tensor) and a.dim() == 1 and a.is_floating_point() else a
                 for a in op.inputs(**dims, dtype=dtype)[0]]  # fmt: skip
    outputs = function(*differentiated(arguments))
    ones = [torch.full_like(o, 1 if o.dim() else 8192) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    for f, t in zip(run(function, arguments, ones), run(op.reference, doubled(arguments), ones), strict=True):
        assert f.dim() > 1 or relative_error(f, t) <= torch.finfo(dtype).eps  # a gradient of x may cancel to nothing


@each_op
def test_fuzz(op, fuzz_examples):
    """Random dims of the op's domain, options, dtypes, layouts and magnitudes."""
    drawn = {name: st.sampled_from(list(values)) for name, values in {**op.domain, **op.options}.items()}

    @settings(max_examples=fuzz_examples, suppress_health_check=list(HealthCheck))
    @given(
        st.fixed_dictionaries(drawn), st.sampled_from(DTYPES), st.integers(0, 2**31), st.integers(0, 4),
        st.floats(1e-2, 1e2),
    )  # fmt: skip
    def fuzz(values, dtype, seed, layout, magnitude):
        torch.manual_seed(seed)
        arguments, keywords = op.inputs(**values, dtype=dtype)
        arguments = list(arguments)
        scaled = arguments[0][:, :, : values["H"]] if values.get("projected") else arguments[0]
        if scaled.is_floating_point():
            scaled.mul_(magnitude)
        for i, a in enumerate(arguments):
            if isinstance(a, Tensor) and a.is_floating_point() and a.numel():
                choices = [a, *layouts(a).values()]
                arguments[i] = choices[(layout + i) % len(choices)]
        what = f"{values} {dtype} seed {seed} layout {layout} x {magnitude}"
        check_parity(op, kernel_of(op), arguments, what, **keywords)

    fuzz()


@each_op
def test_output_memory_may_hold_anything(op):
    """Every output element is written: torch fills new memory with NaN, and the results do not change."""
    arguments, keywords = a_case(op)
    kernel = kernel_of(op, **keywords)
    clean = run(kernel, arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.use_deterministic_algorithms(True, warn_only=True)
            assert torch.empty(3).isnan().all()
            poisoned = run(kernel, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(clean, poisoned, strict=True):
        assert torch.equal(a, b)


@each_op
def test_two_runs_are_bitwise_equal(op):
    arguments, keywords = a_case(op, torch.bfloat16)
    kernel = kernel_of(op, **keywords)
    for a, b in zip(run(kernel, arguments), run(kernel, arguments), strict=True):
        assert torch.equal(a, b)


@each_op
def test_layouts(op):
    """Each argument in turn lies awkwardly in memory; so do the gradients of the outputs."""
    arguments, keywords = a_case(op)
    kernel = kernel_of(op, **keywords)
    plain = run(kernel, arguments)
    for i, a in enumerate(arguments):
        for name, laid in layouts(a).items() if isinstance(a, Tensor) and a.is_floating_point() else ():
            found = run(kernel, (*arguments[:i], laid, *arguments[i + 1 :]))
            for f, p in zip(found, plain, strict=True):
                torch.testing.assert_close(
                    f, p, rtol=2e-6, atol=2e-6, msg=lambda m, n=name, i=i: f"argument {i} {n}: {m}"
                )
    outputs = kernel(*arguments)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    ones = [torch.ones_like(o) for o in outputs]
    plain = run(kernel, arguments, ones)
    expanded = run(kernel, arguments, [o.new_ones(()).expand(o.shape) for o in outputs])
    for f, p in zip(expanded, plain, strict=True):
        torch.testing.assert_close(f, p, rtol=2e-6, atol=2e-6)


@each_op
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_and_inf_spread_as_in_the_reference(op, value):
    arguments, keywords = a_case(op, options={})
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    arguments[0].view(-1)[arguments[0].numel() // 2] = value
    reference = functools.partial(op.reference, **keywords)
    for i, (found, expected) in enumerate(
        zip(run(kernel_of(op, **keywords), arguments), run(reference, arguments), strict=True)
    ):
        assert torch.equal(found.isfinite(), expected.isfinite()), f"result {i}"


@each_option_set
def test_compiled_without_graph_break_equals_eager(case):
    op, options = case
    arguments, keywords = a_case(op, options=options)
    function = kernel_of(op, **keywords)
    torch._dynamo.reset()

    def both(*args):
        outputs = function(*args)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, arguments), run(both, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@each_op
def test_one_compilation_serves_many_sizes(op):
    """The first axis of several sizes may change without compiling anew each time."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(kernel_of(op), fullgraph=True, backend=counter, dynamic=True)
    sizes = {name: list(values)[:1:-3] for name, values in op.domain.items()}  # 0 and 1 are special to the compiler
    axis = next(name for name, several in sizes.items() if len(several) > 1)
    dims = {name: list(values)[-1] for name, values in op.domain.items()}
    if "steps" in op.options:
        dims["steps"] = 1  # of more, which products there are depends on the sizes
    for size in sizes[axis]:
        arguments, keywords = op.inputs(**{**dims, axis: size}, dtype=torch.float32)
        compiled(*arguments, **keywords)
    assert counter.frame_count <= 2


@each([(op, options) for op in OPS for options in (option_sets(op)[0], farthest_options(op))])
def test_opcheck(case, monkeypatch):
    """torch's own checks of the custom op: schema, shape function, autograd registration, ahead-of-time dispatch."""
    calls = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if getattr(function, "namespace", None) == "gptfast":
                calls.append((function, args))
            return function(*args, **(kwargs or {}))

    op, options = case
    arguments, keywords = a_case(op, options=options)
    arguments = differentiated(arguments)
    with Recorder(), monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # the path of the compiler, taken eagerly
        kernel_of(op)(*arguments, **keywords)
    assert calls, "the op does not go through a custom op when compiled"
    for function, args in calls:
        checks = ["test_faketensor", "test_autograd_registration"]
        if not any(isinstance(a, torch.Tensor) and a.dtype == torch.float8_e4m3fn for a in args):
            checks.append("test_schema")  # which compares by allclose, and float8 has none
        torch.library.opcheck(function, args, test_utils=checks)


@each_op
def test_activation_checkpointing(op):
    arguments, keywords = a_case(op)
    arguments, kernel = differentiated(arguments), kernel_of(op, **keywords)

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(kernel, *args, use_reentrant=False)

    for a, b in zip(run(checkpointed, arguments), run(kernel, arguments), strict=True):
        assert torch.equal(a, b)


@each_differentiable_op
def test_gradients_only_where_asked(op):
    """With one argument frozen the others' gradients stay what they were."""
    arguments, keywords = a_case(op)
    arguments, kernel = differentiated(arguments), kernel_of(op, **keywords)
    full = run(kernel, arguments)
    n = len(full) - len(leaves(arguments))
    for i, leaf in enumerate(leaves(arguments)):
        frozen = [a.detach() if a is not leaf and isinstance(a, Tensor) else a for a in arguments]
        outputs = kernel(*frozen)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
        (gradient,) = torch.autograd.grad([o for o, _ in pairs], [leaf], [s for _, s in pairs])
        torch.testing.assert_close(gradient, full[n + i], rtol=2e-6, atol=2e-6)


@each([(op, options) for op in OPS if op.differentiable for options in option_sets(op)])
def test_reference_gradients(case):
    """The oracle itself: the reference's gradients against finite differences in fp64, at a size that has rows."""
    op, options = case
    arguments, keywords = op.inputs(**gradient_dims(op), **options, dtype=torch.float64)
    reference = functools.partial(op.reference, **keywords)
    assert torch.autograd.gradcheck(reference, differentiated(doubled(arguments)), fast_mode=True)


def gradient_dims(op):
    """The smallest of the parity sizes with at least three elements along two axes."""
    rows = [
        dims
        for dims in op.parity
        if sized(dims) and sum(size >= 3 for letter, size in dims.items() if letter.isupper()) >= 2
    ]
    return min(rows, key=lambda dims: sum(size for letter, size in dims.items() if letter.isupper()))


@each_op
def test_on_meta_tensors_the_interpreter_has_shapes_alone(op):
    (arguments, keywords), (real, real_keywords) = (a_case(op, torch.float16, device=d) for d in ("meta", "cpu"))
    plain = run(functools.partial(op.reference, **real_keywords), real)
    for f, p in zip(run(kernel_of(op, **keywords), arguments), plain, strict=True):
        assert (f.device.type, f.shape, f.dtype) == ("meta", p.shape, p.dtype)


@each_op
def test_an_argument_that_is_no_tensor_is_named(op):
    """None where there must be one, and a list of numbers anywhere."""
    arguments, keywords = a_case(op)
    signature = inspect.signature(op.reference).parameters
    passed = dict(zip(signature, arguments, strict=False)) | keywords
    for name in [name for name, value in passed.items() if isinstance(value, torch.Tensor)]:
        for wrong in ([1.0, 2.0], *([] if signature[name].default is None else [None])):
            for function in filter(None, (op.reference, op.cpu, kernel_of(op))):
                with pytest.raises(ValueError, match=f"^{name}: expected a tensor"):
                    function(**passed | {name: wrong})


NO_NUMBERS = {  # for what these arguments mean, in whichever op
    "eps": (math.nan, -1.0, "a"), "softcap": (math.nan, math.inf, 0.0, -2.0), "window": (1.5, True, -1),
    "ignore_index": (1.5,), "vocab_size": (8.0, 0), "z_loss": (math.nan,), "label_smoothing": (math.nan, 1.5),
    "chunk_bytes": (0, 1.5), "steps": (-1, 1.5), "dropout": (math.nan, 1.0),
}  # fmt: skip


@each_op
def test_a_number_that_means_nothing_is_named(op):
    """By every path alike: what one takes and another does not would differ between machines."""
    arguments, keywords = a_case(op)
    names = set(inspect.signature(op.reference).parameters)
    wrong = {name: values for name, values in NO_NUMBERS.items() if name in names}
    if "softcap" in names:
        wrong |= {"scale": (math.nan, math.inf, 0.0)} if "window" in names else {}
    passed = dict(zip(inspect.signature(op.reference).parameters, arguments, strict=False)) | keywords
    for name, values in wrong.items():
        for value in values:
            for function in filter(None, (op.reference, op.cpu, kernel_of(op))):
                with pytest.raises(ValueError, match=f"^{name}"):
                    function(**passed | {name: value})


@each_differentiable_op
def test_a_second_derivative_is_right_or_refused(op):
    """By the references, with each option; of cotangents that are constants, as those of a loss are: torch's
    once_differentiable lets them pass, and the second derivative is 0 in silence. Kernels refuse it."""
    for options in option_sets(op):
        arguments, keywords = op.inputs(**gradient_dims(op), **options, dtype=torch.float64)
        leaves = differentiated(doubled(arguments))
        for function in filter(None, (op.reference, op.cpu)):
            again = functools.partial(function, **keywords)
            with torch.no_grad():
                outputs = again(*leaves)
            cotangents = [torch.randn_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
            try:
                assert torch.autograd.gradgradcheck(again, leaves, cotangents, fast_mode=True, atol=1e-4)
            except RuntimeError as error:
                assert "no second derivative; give a chunk_bytes" in str(error), f"{options}: {error}"
    arguments, keywords = a_case(op)
    outputs = kernel_of(op, **keywords)(*(leaves := differentiated(arguments)))
    total = sum(o.sum() for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total, [x for x in leaves if is_number(x)], create_graph=True, allow_unused=True)


@each_op
def test_a_tangent_is_refused_and_not_lost(op):
    arguments, keywords = a_case(op)
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(x, x) if is_number(x) else x for x in arguments]
        with pytest.raises(RuntimeError, match=r"forward-mode.*reference"):
            kernel_of(op, **keywords)(*dual)
        kernel_of(op, **keywords)(*arguments)


@each_op
def test_cpu_tensors_are_refused_outside_the_interpreter(op):
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        op.triton(*a_case(op)[0])


@pytest.mark.gpu
@each([(op, case) for op in OPS for case in combined(op, (*op.parity, sizes(op.bench[0])), dtype=DTYPES)])
def test_parity_on_the_gpu(case):
    op, values = case
    torch.manual_seed(0)
    arguments, keywords = op.inputs(**values, device="cuda")
    check_parity(op, op.triton, arguments, named(case), **keywords)
