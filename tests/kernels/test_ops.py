"""The shared battery: every op on every backend, case and dtype, judged by plain torch's own error.

Outputs and every gradient. A backend is tested from the moment ``backends.BACKENDS`` names it. What
it cannot run is skipped, with its reason; a backend that never runs fails.
"""

import functools
import itertools

import pytest
import torch
from op_battery import BACKENDS, DEVICES, DTYPES, PARITY, battery, judged, on_backend

from vatt_fast.kernels import (
    attention,
    backends,
    contrastive_lse,
    dispatch,
    drop_token,
    patch_embed,
    sample_keep,
    use_backend,
)
from vatt_fast.kernels.cases import CASES, AttentionCase, make
from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.parity import (
    assert_as_good_as_plain,
    cancelled_rows,
    cast_like,
    draw_seeds,
    expected,
    promote,
    run,
    score_roundings,
)
from vatt_fast.kernels.settings import force_tiles

# -- parity ----------------------------------------------------------------------------------------


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
        for (_, device), rows in backends.PREFERENCE.items()
        if any(row[:2] == (op, backend) for row in rows)
    }
    ran, objections = 0, set()
    for case, dtype, device in itertools.product(PARITY[op], ("fp32", "bf16", "fp16"), DEVICES):
        try:
            with use_backend(**{op: backend}):
                OPS[op].function(**make(case, DTYPES[dtype], device))
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
        first = run(OPS[op].function, op, inputs, dtype=torch.float32)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # makes torch.empty give nan
        try:
            second = run(OPS[op].function, op, inputs, dtype=torch.float32)
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
    """fp32 weights and activations under bf16 autocast: outputs in bf16 (statistics fp32).

    Gradients in fp32, no worse than plain's.
    """

    def autocast():
        return torch.autocast(device, torch.bfloat16)

    inputs = make(case, seed=3)
    plain = OPS[op].plain
    truth = run(plain, op, promote(inputs, torch.float64), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        yardstick = run(plain, op, inputs, dtype=torch.bfloat16)
    with on_backend(op, backend), autocast():
        result = run(OPS[op].function, op, make(case, device=device, seed=3), dtype=torch.bfloat16)
    assert_as_good_as_plain(result, yardstick, truth, torch.bfloat16, cancelled_rows(op, inputs))
    half = {"out", "tokens"}
    for name, value in result.items():
        assert value.dtype == (torch.bfloat16 if name in half else torch.float32), (
            f"{name} is {value.dtype}"
        )


# -- properties ------------------------------------------------------------------------------------


def strided(tensor):
    """The same values as every second row and column-slice of a larger array.

    Its rest is nan, 77 or the opposite of the mask; the last axis of a matrix stays contiguous,
    that of a vector does not.
    """
    if tensor.dtype == torch.bool:
        return torch.stack((tensor, ~tensor), -1)[..., 0]
    filler = torch.nan if tensor.is_floating_point() else 77
    every_second = tensor.shape if tensor.ndim == 1 else tensor.shape[:-1]
    shape = tuple(2 * size for size in every_second)
    index = tuple(slice(1, None, 2) for _ in every_second)
    if tensor.ndim > 1:
        shape += (tensor.shape[-1] + 3,)
        index += (slice(2, 2 + tensor.shape[-1]),)
    base = torch.full(shape, filler, dtype=tensor.dtype, device=tensor.device)
    base[index] = tensor
    return base[index]


@battery()
def test_strided_equals_contiguous(op, backend, case, device):
    def changed(inputs, change):
        return {
            name: change(value) if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in inputs.items()
        }

    inputs = changed(make(case, device=device), torch.Tensor.contiguous)
    views = changed(inputs, strided)
    with on_backend(op, backend):
        contiguous, other = (
            run(OPS[op].function, op, version, dtype=torch.float32) for version in (inputs, views)
        )
    for name, value in contiguous.items():
        torch.testing.assert_close(
            other[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("op", "backend", "name", "mask"),
    [
        (op, backend, name, mask)
        for op, name, mask in (
            ("attention", "keyless", "key_mask"),
            ("contrastive_lse", "masked", "x_valid"),
            ("contrastive_lse", "masked", "y_valid"),
        )
        for backend in backends.BACKENDS[op]
    ],
)
@pytest.mark.parametrize("value", [True, False])
def test_a_mask_may_be_one_value_expanded(op, backend, name, mask, value):
    """It lies in one byte: what reads it as if it were contiguous reads beyond."""
    inputs = make(CASES[op][name])
    full = torch.full_like(inputs[mask], value)
    one = torch.tensor(value).expand(full.shape)
    with on_backend(op, backend):
        expected, found = (
            run(OPS[op].function, op, inputs | {mask: each}, dtype=torch.float32)
            for each in (full, one)
        )
    for key, each in expected.items():
        assert torch.equal(found[key], each), key


@pytest.mark.parametrize("backend", backends.BACKENDS["attention"])
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
@pytest.mark.parametrize("backend", backends.BACKENDS["attention"])
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


@pytest.mark.parametrize("backend", backends.BACKENDS["attention"])
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
        *(("attention", backend, "keyless") for backend in backends.BACKENDS["attention"]),
        *(
            ("contrastive_lse", backend, name)
            for backend in backends.BACKENDS["contrastive_lse"]
            for name in ("shard_masked", "nothing_valid")
        ),
    ],
)
def test_an_empty_set_passes_no_gradient_whatever_comes_in(op, backend, name):
    """Joining two log-sums of -inf, as devices and streamed chunks do, sends nan back.

    Nothing of it may reach an input.
    """
    inputs = make(CASES[op][name])
    with on_backend(op, backend):
        clean = run(OPS[op].function, op, inputs, dtype=torch.float32)
        outputs = [clean[output] for output in OPS[op].outputs]
        seeds = [
            torch.where(o == -torch.inf, torch.nan, s)
            for o, s in zip(outputs, draw_seeds(outputs, torch.float32), strict=True)
        ]
        assert any(seed.isnan().any() for seed in seeds)
        spoilt = run(OPS[op].function, op, inputs, seeds)
    for gradient in (key for key in clean if key.startswith("d_")):
        assert torch.equal(spoilt[gradient], clean[gradient]), gradient


@pytest.mark.parametrize("backend", backends.BACKENDS["patch_embed"])
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


@pytest.mark.parametrize("backend", backends.BACKENDS["patch_embed"])
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
    """Triton's other way, which small cases do not choose.

    Kept rows are written out, multiplied by the library and finished in place.
    """
    packed = {kernel: {"PACKED": 1} for kernel in ("patch_embed_forward", "patch_embed_weight")}
    with force_tiles(**packed):
        judged("patch_embed", "triton_gpu", CASES["patch_embed"][name], device, DTYPES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["past_a_tile", "text", "keyless", "bias"])
def test_attention_backward_in_one_pass(name, device):
    """Atomic sums into d_q, which short cases do not choose."""
    with force_tiles(attention_backward={"ONE_PASS": 1}):
        judged("attention", "triton_gpu", CASES["attention"][name], device, torch.float32)


@pytest.mark.parametrize("backend", backends.BACKENDS["contrastive_lse"])
@pytest.mark.parametrize("name", ["texts", "masked"])
def test_devices_holding_a_part_each_equal_one(backend, name):
    """Partial columns joined by a logsumexp: loss and gradients are those of one device."""
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


@pytest.mark.parametrize("backend", backends.BACKENDS["contrastive_lse"])
def test_fp16_gradients_hold_what_a_loss_scaler_sends(backend):
    """torch.amp.GradScaler begins with 65536: of 11 clips, 6000 a log-sum. Scaled by 14 such a
    weight passes fp16's 65504, though the gradient of a unit vector does not."""
    inputs = make(CASES["contrastive_lse"]["square"], torch.float16)
    x = inputs["x"] = inputs["y"].clone()  # so that nearly all weight lies on a clip's own text
    seeds = [torch.full((len(x),), size) for size in (6000.0, 0.0, 0.0)]
    truth = run(
        OPS["contrastive_lse"].plain, "contrastive_lse", promote(inputs, torch.float64), seeds
    )
    with on_backend("contrastive_lse", backend):
        found = run(contrastive_lse, "contrastive_lse", inputs, seeds)
    for name in ("d_x", "d_y"):
        assert truth[name].abs().max() < 65504
        torch.testing.assert_close(found[name].double(), truth[name], rtol=2e-2, atol=20)


@pytest.mark.parametrize("backend", backends.BACKENDS["contrastive_lse"])
@pytest.mark.parametrize(
    "scale",
    [14.0, torch.tensor(14.0), torch.tensor(14.0, dtype=torch.float64)],
    ids=["float", "fp32", "fp64"],
)
def test_scale_may_be_a_float_or_a_scalar_tensor(backend, scale):
    inputs = make(CASES["contrastive_lse"]["texts"]) | {"scale": scale}
    with on_backend("contrastive_lse", backend):
        row, _, _ = contrastive_lse(**inputs)
    expected, _, _ = OPS["contrastive_lse"].plain(**inputs)
    torch.testing.assert_close(row, expected.float())


@pytest.mark.parametrize(
    ("op", "forward_on", "backward_on"),
    [
        (op, first, second)
        for op in ("attention", "contrastive_lse")
        for first in backends.BACKENDS[op]
        for second in backends.BACKENDS[op]
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_backward_accepts_any_forwards_saved_tensors(op, forward_on, backward_on, dtype):
    dtype = DTYPES[dtype]
    for case in PARITY[op]:
        inputs = make(case, dtype, seed=5)
        if inputs.get("exclude_own"):
            continue  # joined of several calls in front of the backends
        yardstick, truth = expected(op, inputs, dtype)
        names = OPS[op].tensors
        tensors, options = (
            [inputs[name] for name in names],
            {key: value for key, value in inputs.items() if key not in names},
        )
        extra = options.pop("extra_texts", 0)  # which the front alone reads
        grads_of = {
            "attention": {"bias_grad": inputs.get("bias") is not None},
            "contrastive_lse": {},
        }[op]
        objections = [
            dispatch.unsupported(op, backend, *tensors, **options)
            for backend in (forward_on, backward_on)
        ]
        if any(objections):
            pytest.skip("; ".join(filter(None, objections)))
        modules = [backends.load(op, backend) for backend in (forward_on, backward_on)]
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
        wanted = [f"d_{name}" for name in OPS[op].differentiable]
        result = {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}
        assert set(wanted[:3]) <= set(result)
        if extra:  # one number, whose terms nearly cancel here: plain torch is right by luck
            del result["d_scale"]
        yardstick, truth = (
            {name: values[name] for name in result} for values in (yardstick, truth)
        )
        roundings = score_roundings(op, inputs, dtype, handed_over=forward_on != backward_on)
        assert_as_good_as_plain(
            result, yardstick, truth, dtype, cancelled_rows(op, inputs), score_eps=roundings
        )


@pytest.mark.parametrize("shape", [(1, 785, 2, 64), (8, 129, 4, 32)], ids=["long", "wide"])
@pytest.mark.parametrize("backend", backends.BACKENDS["attention"])
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


# -- the references in jax.numpy -------------------------------------------------------------------

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
    reference = backends.load(op, "reference")
    tensors = [inputs.pop(key) for key in OPS[op].tensors]
    bias_grad = {"bias_grad": inputs.get("bias") is not None} if op == "attention" else {}
    d_patches = {"d_patches": tensors[0].is_floating_point()} if op == "patch_embed" else {}

    seeds = draw_seeds(
        OPS[op].plain(**dict(zip(OPS[op].tensors, tensors, strict=True)), **inputs), torch.float32
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
