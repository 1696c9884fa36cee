"""The shared battery: every op on every backend, case and dtype, outputs and every gradient, judged by plain torch's own error.

A backend is tested from the moment ``dispatch.BACKENDS`` names it. What it objects to is skipped with its own words; a backend that never
runs fails.
"""

import contextlib
import functools
import itertools
import zlib

import plain_ops
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vatt_fast.kernels import (
    attention,
    contrastive_lse,
    dispatch,
    drop_token,
    patch_embed,
    sample_keep,
    tiles,
    use_backend,
)
from vatt_fast.kernels.cases import CASES, DIFFERENTIABLE, AttentionCase, make, tag

OPS = {
    "attention": attention,
    "drop_token": drop_token,
    "contrastive_lse": contrastive_lse,
    "patch_embed": patch_embed,
}
PLAIN = {
    "attention": plain_ops.attention,
    "drop_token": plain_ops.drop_token,
    "contrastive_lse": plain_ops.contrastive_lse,
    "patch_embed": plain_ops.patch_embed,
}
OUTPUTS = {
    "attention": ("out", "lse"),
    "drop_token": ("kept",),
    "contrastive_lse": ("row", "col", "pos"),
    "patch_embed": ("tokens",),
}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

PARITY = {
    op: [case for case in cases.values() if tag(case) == "parity"] for op, cases in CASES.items()
}
BACKENDS = [(op, backend) for op in dispatch.OPS for backend in dispatch.BACKENDS[op]]


def battery(ops=tuple(OPS), cases=PARITY):
    """Parameters (op, backend, case, device), ids op-backend-case."""
    return pytest.mark.parametrize(
        ("op", "backend", "case", "device"),
        [
            pytest.param(
                op,
                backend,
                case,
                device,
                id="-".join((op, backend, case.name, *(() if device == "cpu" else (device,)))),
            )
            for op, backend in BACKENDS
            if op in ops
            for case in cases[op]
            for device in DEVICES
        ],
    )


@contextlib.contextmanager
def on_backend(op, backend):
    """Force the backend; its objection skips the test, in its own words."""
    try:
        with use_backend(f"{op}={backend}"):
            yield
    except ValueError as error:
        if "cannot run this" in str(error):
            pytest.skip(str(error))
        raise


class OwnMemory(TorchDispatchMode):
    """Results of our operators share memory with no input and no other result: torch may write into any of them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **kwargs or {})
        if function.namespace == "vatt_fast":
            self.check(function, args, results if isinstance(results, tuple | list) else (results,))
        return results

    def check(self, function, args, results):
        taken = {_memory(each) for each in args if isinstance(each, torch.Tensor)}
        for i, each in enumerate(results):
            if each.numel():
                assert _memory(each) not in taken, (
                    f"result {i} of {function} lies in memory that is not its own"
                )
                taken.add(_memory(each))


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


def promote(inputs, dtype):
    """The same values with every float in ``dtype``."""
    return {
        name: value.to(dtype)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def cast_like(seeds, outputs):
    return [
        seed.to(output.dtype).to(output.device) for seed, output in zip(seeds, outputs, strict=True)
    ]


def draw_seeds(outputs, dtype, seed=7):
    """Gradients of the outputs, values of ``dtype``."""
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(output.shape, generator=generator).to(dtype) for output in outputs]


def run(function, op, inputs, seeds=None, *, dtype=None, without=()):
    """{output: value, d_input: gradient} of one forward and backward; outputs named in ``without`` receive no gradient."""
    inputs = dict(inputs)
    leaves = {}
    for name in DIFFERENTIABLE[op]:
        value = inputs[name]
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            inputs[name] = leaves[name] = value.detach().requires_grad_()
    outputs = function(**inputs)
    seeds = draw_seeds(outputs, dtype or torch.float64) if seeds is None else seeds
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(
        zip(OUTPUTS[op], zip(outputs, cast_like(seeds, outputs), strict=True), strict=True)
    )
    used = [pair for name, pair in named.items() if name not in without]
    torch.autograd.backward(*zip(*used, strict=True))
    result = {name: output.detach() for name, (output, _) in named.items()}
    return result | {
        f"d_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }


def cancelled_rows(op, inputs):
    """Masks of gradients that are zero in exact arithmetic by cancellation, where an exact zero cannot be asked for."""
    if op != "attention":
        return {}
    B, S = inputs["k"].shape[:2]
    visible = torch.full((B,), S) if inputs["key_mask"] is None else inputs["key_mask"].sum(1).cpu()
    alone = (visible == 1)[:, None, None, None]  # the softmax of one score is constant
    masks = {"d_q": alone.expand(inputs["q"].shape), "d_k": alone.expand(inputs["k"].shape)}
    if inputs["bias"] is not None:
        masks["d_bias"] = (visible <= 1).all().expand(inputs["bias"].shape)
    return masks


def score_roundings(op, inputs, dtype, *, handed_over=False):
    """In eps of dtype: the rounding of a usual score, which exp passes on to gradients: a backward computes the scores anew, and may sum in
    another order. ``handed_over``: of the score with the largest terms, where the forward, and so lse, was another backend's."""
    if op not in ("attention", "contrastive_lse") or dtype == torch.float64:
        return 0.0
    left, right, axes = (
        ("q", "k", "bthd,bshd->bhts") if op == "attention" else ("x", "y", "md,nd->mn")
    )
    left, right = (inputs[name].double() for name in (left, right))
    size = (
        torch.einsum(axes, left.abs(), right.abs()).max()
        if handed_over
        else torch.einsum(axes, left, right).square().mean().sqrt()
    )
    eps = 0.5 * torch.finfo(torch.float32).eps * float(inputs["scale"]) * float(size)
    return eps / torch.finfo(dtype).eps  # scores are fp32, whatever the dtype


def assert_as_good_as_plain(
    result, yardstick, truth, dtype, cancelled=None, *, slack_eps=0.5, score_eps=0.0
):
    """The tolerance rule (CONTRIBUTING.md): twice plain torch's error plus the slack, of gradients ``score_roundings`` too, 8 times in the
    worst row, exact where the truth is 0 or -inf."""
    eps = torch.finfo(dtype).eps
    largest = max(tensor.norm() for name, tensor in truth.items() if name.startswith("d_"))
    assert set(result) == set(truth)
    for name, exact in truth.items():
        ours, plain = result[name].double().cpu(), yardstick[name].double().cpu()
        assert ours.shape == exact.shape, (
            f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
        )
        special = (exact == 0) | (exact == -torch.inf)
        by_cancellation = (cancelled or {}).get(name, torch.tensor(False))
        special &= ~by_cancellation
        _assert_none(name, special & (ours != exact), ours, exact, "must be exact")
        finite = exact.isfinite()
        _assert_none(name, finite & ~ours.isfinite(), ours, exact, "must be finite")
        leftover = torch.where(
            by_cancellation, ours - exact, 0.0
        ).norm()  # d_p - delta leaves its roundings there
        assert leftover <= 4 * eps * largest, (
            f"{name}: {leftover:.2e} where exact arithmetic gives 0, largest gradient {largest:.2e}"
        )
        judged = finite & ~by_cancellation
        ours, plain, exact = (torch.where(judged, tensor, 0.0) for tensor in (ours, plain, exact))
        unit = exact.norm()
        if unit == 0:
            continue  # the comparisons above have covered all of it
        error, plain_error = ((tensor - exact).norm() / unit for tensor in (ours, plain))
        rows, plain_rows, exact_rows = (
            _rows(tensor).norm(dim=1) for tensor in (ours - exact, plain - exact, exact)
        )
        worst = rows.argmax()
        where = f"{name}: error {error:.2e}, plain torch {plain_error:.2e}, worst in row {int(worst)} of {len(rows)} ({rows[worst]:.2e})"
        if dtype == torch.float64:  # the truth's own precision
            assert error <= max(1e-12, torch.finfo(result[name].dtype).eps), where
            continue
        of_scores = score_eps if name.startswith("d_") else 0.0
        # of one number plain's error is one draw, and may be luck
        slack = eps * (slack_eps + of_scores if exact.numel() > 1 else 8 + 2 * of_scores)
        assert error <= 2 * plain_error + slack, where
        bound = 8 * plain_rows.max() + slack * exact_rows.max()
        assert rows[worst] <= bound, f"{where}; plain's worst row {plain_rows.max():.2e}"


def _rows(tensor):
    return tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)


def _assert_none(name, wrong, ours, exact, rule):
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(index)} is {ours[index]:.3e}, truth {exact[index]:.3e}: {rule} ({int(wrong.sum())} of {wrong.numel()})"
        )


def judged(
    op, backend, case, device, dtype, *, without=(), function=None, context=contextlib.nullcontext
):
    """Run the op, plain torch and plain torch in fp64 on one draw, and hold the first against the others."""
    inputs = make(case, dtype, seed=zlib.crc32(case.name.encode()))
    truth = run(PLAIN[op], op, promote(inputs, torch.float64), dtype=dtype, without=without)
    yardstick = run(PLAIN[op], op, inputs, dtype=dtype, without=without)
    there = make(case, dtype, device, seed=zlib.crc32(case.name.encode()))
    with on_backend(op, backend), context(), OwnMemory():
        result = run(function or OPS[op], op, there, dtype=dtype, without=without)
    roundings = score_roundings(op, inputs, dtype)
    assert_as_good_as_plain(
        result, yardstick, truth, dtype, cancelled_rows(op, inputs), score_eps=roundings
    )
    return result


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@battery()
def test_gradients(op, backend, case, device, dtype):
    result = judged(op, backend, case, device, DTYPES[dtype])
    statistics = {"lse", "row", "col", "pos"} & set(result)
    assert all(
        result[name].dtype == torch.promote_types(DTYPES[dtype], torch.float32)
        for name in statistics
    )


@pytest.mark.parametrize("dtype", DTYPES)
@battery(ops=("attention",))
def test_gradients_without_one_of_lse(op, backend, case, device, dtype):
    """The way the model takes: a fused backward that knows no gradient of lse serves here."""
    judged(op, backend, case, device, DTYPES[dtype], without=("lse",))


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_every_backend_runs_something(op, backend):
    homes = {
        device
        for (_, device), rows in dispatch.PREFERENCE.items()
        if any(row[:2] == (op, backend) for row in rows)
    }
    ran, objections = 0, set()
    for case, dtype, device in itertools.product(PARITY[op], ("fp32", "bf16", "fp16"), DEVICES):
        try:
            with use_backend(f"{op}={backend}"):
                OPS[op](**make(case, DTYPES[dtype], device))
            ran += 1
        except ValueError as error:
            objections.add(str(error))
    absent = ("not installed", "not built", "it needs AVX-512 BF16")  # parts and machines
    if not ran and (
        not homes & set(DEVICES) or any(word in text for text in objections for word in absent)
    ):
        pytest.skip(min(objections))
    assert ran, objections


@battery()
def test_every_value_is_written_and_repeats(op, backend, case, device):
    """Bit-equal when run again, on fresh memory full of nan."""
    inputs = make(case, device=device)
    with on_backend(op, backend):
        first = run(OPS[op], op, inputs, dtype=torch.float32)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # makes torch.empty give nan
        try:
            second = run(OPS[op], op, inputs, dtype=torch.float32)
        finally:
            torch.use_deterministic_algorithms(before)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@battery(
    cases={
        "attention": [CASES["attention"][name] for name in ("text", "keyless_bias", "past_a_tile")],
        "drop_token": [CASES["drop_token"]["ragged_per_clip"]],
        "contrastive_lse": [CASES["contrastive_lse"][name] for name in ("texts", "shard_masked")],
        "patch_embed": [
            CASES["patch_embed"][name]
            for name in ("kept_rows", "grey", "waveform", "float_gathered")
        ],
    }
)
def test_autocast_casts_what_should_be_cast(op, backend, case, device):
    """fp32 weights and activations under bf16 autocast: outputs in bf16 (statistics fp32), gradients fp32, no worse than plain's."""

    def autocast():
        return torch.autocast(device, torch.bfloat16)

    inputs = make(case, seed=3)
    truth = run(PLAIN[op], op, promote(inputs, torch.float64), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        yardstick = run(PLAIN[op], op, inputs, dtype=torch.bfloat16)
    with on_backend(op, backend), autocast():
        result = run(OPS[op], op, make(case, device=device, seed=3), dtype=torch.bfloat16)
    assert_as_good_as_plain(result, yardstick, truth, torch.bfloat16, cancelled_rows(op, inputs))
    half = {"out", "tokens"}
    for name, value in result.items():
        assert value.dtype == (torch.bfloat16 if name in half else torch.float32), (
            f"{name} is {value.dtype}"
        )


# -- properties --------------------------------------------------------------------------------------------------------


def strided(tensor):
    """The same values as every second row and column-slice of a larger array whose rest is nan or 77; the last axis stays contiguous."""
    if tensor.ndim < 2:
        return tensor
    filler = torch.nan if tensor.is_floating_point() else 77
    shape = (*(2 * size for size in tensor.shape[:-1]), tensor.shape[-1] + 3)
    index = (*(slice(1, None, 2) for _ in tensor.shape[:-1]), slice(2, 2 + tensor.shape[-1]))
    base = torch.full(shape, filler, dtype=tensor.dtype, device=tensor.device)
    base[index] = tensor
    return base[index]


@battery()
def test_strided_equals_contiguous(op, backend, case, device):
    floats = {name for name in (*DIFFERENTIABLE[op], "patches")}
    inputs = {
        name: value.contiguous() if name in floats and value is not None else value
        for name, value in make(case, device=device).items()
    }
    views = {
        name: strided(value) if name in floats and isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }
    with on_backend(op, backend):
        contiguous, other = (
            run(OPS[op], op, version, dtype=torch.float32) for version in (inputs, views)
        )
    for name, value in contiguous.items():
        torch.testing.assert_close(
            other[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", dispatch.BACKENDS["attention"])
@pytest.mark.parametrize("name", ["ragged_37_by_70", "text", "keyless"])
def test_the_order_of_keys_does_not_matter(backend, name):
    inputs = make(CASES["attention"][name])
    order = torch.randperm(inputs["k"].shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = inputs | {"k": inputs["k"][:, order], "v": inputs["v"][:, order]}
    shuffled["bias"] = None if inputs["bias"] is None else inputs["bias"][..., order]
    shuffled["key_mask"] = None if inputs["key_mask"] is None else inputs["key_mask"][:, order]
    with on_backend("attention", backend):
        before, after = (
            run(attention, "attention", version, dtype=torch.float32)
            for version in (inputs, shuffled)
        )
    back = {"d_k": (slice(None), order), "d_v": (slice(None), order), "d_bias": (..., order)}
    for key, value in before.items():
        value = value[back[key]] if key in back else value
        torch.testing.assert_close(
            after[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("lse_gradient", [False, True])
@pytest.mark.parametrize("backend", dispatch.BACKENDS["attention"])
def test_a_masked_key_is_not_felt_and_feels_nothing(backend, lse_gradient):
    inputs = make(CASES["attention"]["keyless"])
    hidden = ~inputs["key_mask"][..., None, None]
    loud = inputs | {
        "k": inputs["k"].masked_fill(hidden, 1e3),
        "v": inputs["v"].masked_fill(hidden, -1e3),
    }
    without = () if lse_gradient else ("lse",)
    with on_backend("attention", backend):
        quiet, spoilt = (
            run(attention, "attention", version, dtype=torch.float32, without=without)
            for version in (inputs, loud)
        )
    for name in ("out", "lse", "d_q"):
        torch.testing.assert_close(spoilt[name], quiet[name], rtol=1e-6, atol=1e-7)
    for name in ("d_k", "d_v"):
        assert not spoilt[name].masked_select(hidden).any()
        assert spoilt[name].masked_select(~hidden).any()


@pytest.mark.parametrize("backend", dispatch.BACKENDS["attention"])
def test_a_bias_of_minus_infinity_excludes_a_key(backend):
    inputs = make(CASES["attention"]["ragged_17"])
    bias = torch.zeros(3, 17, 17)
    bias[:, :, 11:] = -torch.inf
    bias[:, 4] = -torch.inf  # a query without any key
    with on_backend("attention", backend):
        out, lse = attention(**inputs | {"bias": bias})
        expected, expected_lse = attention(
            **inputs | {"k": inputs["k"][:, :11], "v": inputs["v"][:, :11]}
        )
    assert not out[:, 4].any() and (lse[..., 4] == -torch.inf).all()
    others = [t for t in range(17) if t != 4]
    torch.testing.assert_close(out[:, others], expected[:, others], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[..., others], expected_lse[..., others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("op", "backend", "name"),
    [
        *(("attention", backend, "keyless") for backend in dispatch.BACKENDS["attention"]),
        *(
            ("contrastive_lse", backend, name)
            for backend in dispatch.BACKENDS["contrastive_lse"]
            for name in ("shard_masked", "nothing_valid")
        ),
    ],
)
def test_an_empty_set_passes_no_gradient_whatever_comes_in(op, backend, name):
    """Joining two log-sums of -inf, as devices and streamed chunks do, sends nan back: nothing of it may reach an input."""
    inputs = make(CASES[op][name])
    with on_backend(op, backend):
        clean = run(OPS[op], op, inputs, dtype=torch.float32)
        outputs = [clean[output] for output in OUTPUTS[op]]
        seeds = [
            torch.where(o == -torch.inf, torch.nan, s)
            for o, s in zip(outputs, draw_seeds(outputs, torch.float32), strict=True)
        ]
        assert any(seed.isnan().any() for seed in seeds)
        spoilt = run(OPS[op], op, inputs, seeds)
    for gradient in (key for key in clean if key.startswith("d_")):
        assert torch.equal(spoilt[gradient], clean[gradient]), gradient


@pytest.mark.parametrize("backend", dispatch.BACKENDS["patch_embed"])
@pytest.mark.parametrize("name", ["all_rows", "bright"])
@pytest.mark.parametrize("per", ["batch", "clip"])
def test_drop_rate_zero_equals_no_drop_token(backend, name, per):
    inputs = make(CASES["patch_embed"][name])
    B, N, _ = inputs["patches"].shape
    keep = torch.from_numpy(sample_keep(N, 0.0, seed=0, step=0, stream="video", per=per, batch=B))
    with on_backend("patch_embed", backend):
        whole, kept = (
            run(patch_embed, "patch_embed", inputs | {"keep": k}, dtype=torch.float32)
            for k in (None, keep)
        )
        tokens = torch.randn(B, N, 24, requires_grad=True)
        taken = drop_token(tokens, keep)
    for key, value in whole.items():
        torch.testing.assert_close(kept[key], value, msg=lambda text, key=key: f"{key}: {text}")
    assert torch.equal(taken, tokens)
    taken.sum().backward()
    assert torch.equal(tokens.grad, torch.ones_like(tokens))


@pytest.mark.parametrize("backend", dispatch.BACKENDS["patch_embed"])
@pytest.mark.parametrize("name", ["kept_rows", "kept_per_clip"])
def test_dropped_patches_are_not_read(backend, name):
    """Rows gathered beforehand give the same, and what was dropped may hold anything."""
    inputs = make(CASES["patch_embed"][name])
    index = inputs["keep"].long().expand(3, -1)[..., None].expand(-1, -1, 96)
    rows = inputs["patches"].gather(1, index)
    floats = torch.full((3, 37, 96), torch.nan).scatter(1, index, rows.float())
    versions = (inputs, inputs | {"patches": floats}, inputs | {"patches": rows, "gathered": True})
    with on_backend("patch_embed", backend):
        expected, *others = (
            run(patch_embed, "patch_embed", version, dtype=torch.float32) for version in versions
        )
    for other in others:
        d_patches = other.pop("d_patches", None)
        assert d_patches is None or d_patches.isfinite().all()
        for key, value in expected.items():
            torch.testing.assert_close(
                other[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "name",
    [
        "kept_rows",
        "gathered_per_clip",
        "only_projected",
        "grey",
        "odd_clip",
        "waveform",
        "fp32_rows",
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_patches_packed_before_the_product(name, dtype, device):
    """Triton's other way, which small cases do not choose: kept rows written out, multiplied by the library, finished in place."""
    packed = {kernel: {"PACKED": 1} for kernel in ("patch_embed_forward", "patch_embed_weight")}
    with contextlib.ExitStack() as stack:
        for kernel, choice in packed.items():
            stack.enter_context(tiles.force(kernel, choice))
        judged("patch_embed", "triton_gpu", CASES["patch_embed"][name], device, DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["past_a_tile", "text", "keyless", "bias"])
def test_attention_backward_in_one_pass(name, device):
    """Atomic sums into d_q, which short cases do not choose."""
    with tiles.force("attention_backward", {"ONE_PASS": 1}):
        judged("attention", "triton_gpu", CASES["attention"][name], device, torch.float32)


@pytest.mark.parametrize("backend", dispatch.BACKENDS["contrastive_lse"])
@pytest.mark.parametrize("name", ["texts", "masked"])
def test_devices_holding_a_part_each_equal_one(backend, name):
    """Partial columns joined by a logsumexp: the loss and the gradients of x, y and scale are those of one device."""
    inputs = make(CASES["contrastive_lse"][name])
    weights = torch.randn(3, inputs["y"].shape[0])

    def loss_of(parts):
        x, y, scale = (inputs[key].detach().requires_grad_() for key in ("x", "y", "scale"))
        options = dict(
            scale=scale, texts_per_clip=inputs["texts_per_clip"], y_valid=inputs["y_valid"]
        )
        rows, cols, poss = [], [], []
        for first, last in parts:
            x_valid = None if inputs["x_valid"] is None else inputs["x_valid"][first:last]
            row, col, pos = contrastive_lse(
                x[first:last], y, first=first, x_valid=x_valid, **options
            )
            rows, cols, poss = [*rows, row], [*cols, col], [*poss, pos]
        results = torch.cat(rows), torch.logsumexp(torch.stack(cols), 0), torch.cat(poss)
        loss = sum(
            (w[: len(r)] * torch.where(r == -torch.inf, 0.0, r)).sum()
            for w, r in zip(weights, results, strict=True)
        )
        loss.backward()
        return dict(loss=loss.detach(), d_x=x.grad, d_y=y.grad, d_scale=scale.grad)

    M = inputs["x"].shape[0]
    with on_backend("contrastive_lse", backend):
        one, three = loss_of([(0, M)]), loss_of([(0, 3), (3, 4), (4, M)])
    for key, value in one.items():
        torch.testing.assert_close(
            three[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("backend", dispatch.BACKENDS["contrastive_lse"])
@pytest.mark.parametrize(
    "scale",
    [14.0, torch.tensor(14.0), torch.tensor(14.0, dtype=torch.float64)],
    ids=["float", "fp32", "fp64"],
)
def test_scale_may_be_a_float_or_a_scalar_tensor(backend, scale):
    inputs = make(CASES["contrastive_lse"]["texts"]) | {"scale": scale}
    with on_backend("contrastive_lse", backend):
        row, _, _ = contrastive_lse(**inputs)
    expected, _, _ = plain_ops.contrastive_lse(**inputs)
    torch.testing.assert_close(row, expected.float())


@pytest.mark.parametrize(
    ("op", "forward_on", "backward_on"),
    [
        (op, first, second)
        for op in ("attention", "contrastive_lse")
        for first in dispatch.BACKENDS[op]
        for second in dispatch.BACKENDS[op]
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_backward_accepts_any_forwards_saved_tensors(op, forward_on, backward_on, dtype):
    dtype = DTYPES[dtype]
    for case in PARITY[op]:
        inputs = make(case, dtype, seed=5)
        truth = run(PLAIN[op], op, promote(inputs, torch.float64), dtype=dtype)
        yardstick = run(PLAIN[op], op, inputs, dtype=dtype)
        names = DIFFERENTIABLE[op][: 3 if op == "attention" else 2]
        tensors, options = (
            [inputs[name] for name in names],
            {key: value for key, value in inputs.items() if key not in names},
        )
        grads_of = {
            "attention": {"bias_grad": inputs.get("bias") is not None},
            "contrastive_lse": {},
        }[op]
        objections = [
            dispatch._objection(op, backend, *tensors, **options)
            for backend in (forward_on, backward_on)
        ]
        if any(objections):
            pytest.skip("; ".join(filter(None, objections)))
        modules = [dispatch._module(op, backend) for backend in (forward_on, backward_on)]
        outputs = modules[0].forward(*tensors, **options)
        grads_of = {
            key: value and modules[1].unsupported(*tensors, **options, **grads_of) is None
            for key, value in grads_of.items()
        }
        grads = modules[1].backward(
            *cast_like(draw_seeds(outputs, dtype), outputs),
            *tensors,
            *outputs,
            **options,
            **grads_of,
        )
        wanted = [f"d_{name}" for name in DIFFERENTIABLE[op]]
        result = {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
        assert set(wanted[:3]) <= set(result)
        yardstick, truth = (
            {name: values[name] for name in result} for values in (yardstick, truth)
        )
        roundings = score_roundings(op, inputs, dtype, handed_over=forward_on != backward_on)
        assert_as_good_as_plain(
            result, yardstick, truth, dtype, cancelled_rows(op, inputs), score_eps=roundings
        )


@pytest.mark.parametrize("shape", [(1, 785, 2, 64), (8, 129, 4, 32)], ids=["long", "wide"])
@pytest.mark.parametrize("backend", dispatch.BACKENDS["attention"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attention_at_a_real_length(backend, dtype, shape):
    B, T, H, D = shape
    judged(
        "attention",
        backend,
        AttentionCase("real", B, T, T, H, D, packed=True),
        "cpu",
        DTYPES[dtype],
        without=("lse",),
    )


# -- the references in jax.numpy ---------------------------------------------------------------------------------------

JAX_CASES = {
    "attention": ("ragged_37_by_70", "text", "keyless_bias", "all_keyless", "sharp"),
    "drop_token": ("ragged", "ragged_per_clip"),
    "contrastive_lse": ("shard", "shard_masked", "masked", "nothing_valid"),
    "patch_embed": (
        "kept_rows",
        "kept_per_clip",
        "gathered_per_clip",
        "only_projected",
        "odd_clip",
        "float_clip",
        "waveform",
        "fp32_rows",
    ),
}


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in JAX_CASES.items() for name in names]
)
def test_the_reference_is_the_same_in_jax(op, name):
    jax = pytest.importorskip(
        "jax", reason="the references run on jax.numpy too; jax is not installed"
    )
    inputs = make(CASES[op][name], seed=2)
    reference = dispatch._module(op, "reference")
    positional = {
        "attention": ("q", "k", "v"),
        "drop_token": ("tokens", "keep"),
        "contrastive_lse": ("x", "y"),
        "patch_embed": ("patches", "weight", "bias"),
    }
    tensors = [inputs.pop(key) for key in positional[op]]
    bias_grad = {"bias_grad": inputs.get("bias") is not None} if op == "attention" else {}
    d_patches = {"d_patches": tensors[0].is_floating_point()} if op == "patch_embed" else {}

    seeds = draw_seeds(
        PLAIN[op](**dict(zip(positional[op], tensors, strict=True)), **inputs), torch.float32
    )
    arrays = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    plain_options = {key: value for key, value in inputs.items() if key not in arrays}

    def both(xp, tensors, arrays, seeds):
        options = plain_options | arrays | ({"dtype": xp.float32} if op == "patch_embed" else {})
        outputs = reference.forward(*tensors, **({} if op == "drop_token" else options), xp=xp)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if op == "drop_token":
            grads = (reference.backward(*seeds, tensors[1], tensors[0].shape[1], xp=xp),)
        elif op == "patch_embed":
            grads = reference.backward(*seeds, *tensors, **options, **d_patches, xp=xp)
        else:
            grads = reference.backward(*seeds, *tensors, *outputs, **options, **bias_grad, xp=xp)
        return [*outputs, *grads]

    ours = both(torch, tensors, arrays, seeds)
    theirs = jax.jit(functools.partial(both, jax.numpy))(
        *jax.tree.map(lambda tensor: jax.numpy.asarray(tensor.numpy()), (tensors, arrays, seeds))
    )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            b = torch.tensor(jax.device_get(b))
            torch.testing.assert_close(
                b,
                a,
                rtol=2e-5,
                atol=2e-5,
                msg=lambda text, i=i: f"array {i} of outputs and gradients: {text}",
            )
