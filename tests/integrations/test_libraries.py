"""Our ops inside other libraries, on small random weights, against the libraries' own paths."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import integration_cases, integrations
from vatt_fast import kernels

CASES = [
    pytest.param(case, id=f"{case.library}-{case.name.replace(' ', '_')}")
    for case in integration_cases.CASES
]


def need(library: str):
    """Import it, or skip with the reason."""
    if reason := integration_cases.missing(library):
        pytest.skip(reason)
    return __import__(library)


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """How often an op of ours runs."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function.namespace == "vatt_fast"
        return function(*args, **kwargs or {})


def integrations_warning():
    from vatt_fast.integrations.fallback import RunsTheOriginal

    return RunsTheOriginal


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_librarys(case):
    if reason := case.absent():
        pytest.skip(reason)
    with warnings.catch_warnings(), Counted() as counted:
        warnings.simplefilter("error", integrations_warning())
        assert max(integrations.errors(case, torch.float32)) < 3e-6
    assert counted.calls or case.library in ("jax", "flax")  # whose calls torch does not see
    value, gradient, _ = integrations.errors(case, torch.bfloat16)
    own_value, own_gradient = integrations.rounding(case)
    eps = torch.finfo(torch.bfloat16).eps
    assert value <= 2 * own_value + eps / 2
    assert gradient <= 2 * own_gradient + eps / 2


def test_the_ops_refusal_of_grouped_heads_names_the_remedy():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 6, 2, 8)
    remedy = (
        r"no grouped heads, and q has 4, k and v 2; repeat k and v, k.repeat_interleave\(2, 2\)"
    )
    with pytest.raises(ValueError, match=remedy):
        kernels.attention(q, k, k, scale=1.0)
    k = k.repeat_interleave(2, 2)
    assert kernels.attention(q, k, k, scale=1.0)[0].shape == q.shape


# -- transformers --------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch):
    """Forget what was said."""
    from vatt_fast.integrations import fallback

    monkeypatch.setattr(fallback, "_said", set())


def vit(**options):
    transformers = need("transformers")
    from vatt_fast.integrations import transformers as integration

    integration.register()
    torch.manual_seed(0)
    config = transformers.ViTConfig(**integration_cases.VISION, **options)
    return transformers.ViTModel._from_config(config, attn_implementation="vatt_fast")


def test_dropout_runs_sdpa_and_is_said_once(said):
    model = vit(attention_probs_dropout_prob=0.5).train()
    images = torch.randn(1, 3, 32, 32)
    with pytest.warns(integrations_warning(), match="no dropout"), Counted() as counted:
        model(images)
    with warnings.catch_warnings(), counted:
        warnings.simplefilter("error", integrations_warning())
        model(images)
    assert not counted.calls


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()), "one of keys"),
        (dict(heads=2), "grouped heads"),
        (dict(softcap=3.0), "softcap"),
        (dict(attention_mask=torch.ones(2, 5, dtype=torch.bool), position_bias=1), "position_bias"),
    ],
)
def test_what_the_op_does_not_take_goes_to_sdpa(said, monkeypatch, changed, reason):
    need("transformers")
    from vatt_fast.integrations import transformers as integration

    seen = []

    def sdpa(module, query, key, value, attention_mask, **options):
        seen.append((attention_mask, options))
        return query.transpose(1, 2), None

    monkeypatch.setattr(integration, "sdpa_attention_forward", sdpa)
    q, heads = torch.randn(2, 4, 5, 8), changed.pop("heads", 4)
    k = torch.randn(2, heads, 5, 8)
    given = {"attention_mask": None, "is_causal": False} | changed
    with pytest.warns(integrations_warning(), match=reason):
        integration.attend(nn.Identity(), q, k, k, given.pop("attention_mask"), **given)
    mask, _ = seen[0]
    assert mask is None or mask.ndim == 4


def test_padding_stays_two_axes_and_nothing_is_copied(monkeypatch):
    need("transformers")
    from vatt_fast.integrations import transformers as integration

    seen = {}

    def spy(q, k, v, **options):
        seen.update(q=q, **options)
        return kernels.attention(q, k, v, **options)

    monkeypatch.setattr(integration, "attention", spy)
    rows = torch.randn(2, 6, 4, 8)  # what a projection gives
    q = rows.transpose(1, 2)
    keys = torch.arange(6) < torch.tensor([[6], [2]])
    sizes = dict(batch_size=2, q_length=6, kv_length=6, allow_is_bidirectional_skip=True)
    for causal in (False, True):
        function = (
            integration.causal_mask_function if causal else integration.bidirectional_mask_function
        )
        mask = integration.mask(**sizes, mask_function=function, attention_mask=keys)
        out, _ = integration.attend(nn.Identity(), q, q, q, mask, is_causal=not causal)
        assert seen["q"].data_ptr() == rows.data_ptr() and seen["q"].is_contiguous()
        assert torch.equal(seen["key_mask"], keys) and seen["causal"] is causal
        assert out.shape == rows.shape


def test_a_compiled_model_is_one_graph():
    model = vit().eval()
    images = torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(images).last_hidden_state, model(images).last_hidden_state
        )


# -- patch ---------------------------------------------------------------------------------------


def timm_vit():
    need("timm")
    import timm

    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10)
    return timm.create_model("vit_base_patch16_224", **sizes), torch.randn(2, 3, 32, 32)


def open_clip_model():
    need("open_clip")
    from open_clip.model import CLIP

    vision = dict(layers=2, width=64, head_width=16, patch_size=8, image_size=32)
    text = dict(context_length=12, vocab_size=99, width=64, heads=4, layers=2)
    model = CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text)
    return model, torch.randn(2, 3, 32, 32), torch.randint(3, 99, (2, 12))


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 7, 32)


def transformers_vit():
    model = vit()
    model.set_attn_implementation("sdpa")
    return model, torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [timm_vit, open_clip_model, encoder, transformers_vit])
def test_patch_swaps_says_so_and_is_undone(make, dtype, capsys):
    from vatt_fast.integrations.patch import patch

    torch.manual_seed(0)
    model, *inputs = make()
    model.train().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]

    def run():
        model.zero_grad()
        with Counted() as counted:
            out = model(*inputs)
            out = out if isinstance(out, tuple) else (getattr(out, "last_hidden_state", out),)
            sum(x.square().sum() for x in out if isinstance(x, torch.Tensor)).backward()
        return (
            out[0].detach(),
            model.state_dict().keys(),
            counted.calls,
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        )

    before, names, calls, gradient = run()
    assert not calls
    undo = patch(model)
    assert "vatt_fast: " in capsys.readouterr().out
    after, same_names, calls, same_gradient = run()
    assert calls and names == same_names
    allowed = 1e-5 if dtype == torch.float32 else 2e-2  # of bf16 itself: bench integrations
    assert integrations.relative(after, before) < allowed
    assert integrations.relative(same_gradient, gradient) < allowed
    undo()
    again, _, calls, _ = run()
    assert not calls and torch.equal(again, before)


def test_patch_refuses_what_it_does_not_know():
    from vatt_fast.integrations.patch import patch

    with pytest.raises(ValueError, match="no attention"):
        patch(nn.Linear(2, 2))


def relative_positions(kind):
    transformers = need("transformers")
    sizes = dict(num_heads=4, num_layers=1, vocab_size=50, d_model=32, d_kv=8, d_ff=32)
    if kind == "T5":
        return transformers.T5EncoderModel(transformers.T5Config(**sizes))
    if kind == "Swin":
        sizes = dict(patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        return transformers.SwinModel(transformers.SwinConfig(image_size=32, **sizes))
    sizes = dict(integration_cases.VISION, use_relative_position_bias=True)
    return transformers.BeitModel(transformers.BeitConfig(**sizes))


@pytest.mark.parametrize(
    ("kind", "left"), [("T5", "1 x T5Att"), ("Swin", "2 x SwinAtt"), ("BEiT", "2 x BeitAtt")]
)
def test_patch_does_not_claim_models_of_relative_positions(kind, left):
    from vatt_fast.integrations.patch import patch

    model = relative_positions(kind)
    with pytest.raises(ValueError, match=f"left {left}.* adds relative positions to the scores"):
        patch(model)
    assert model.config._attn_implementation == "sdpa"


def test_patch_names_what_it_leaves(capsys):
    need("timm")
    from timm.layers import AttentionPoolLatent

    from vatt_fast.integrations.patch import patch

    vit, _ = timm_vit()
    model = nn.ModuleList(
        [
            nn.MultiheadAttention(8, 2),
            nn.MultiheadAttention(8, 2, add_bias_kv=True),
            nn.MultiheadAttention(8, 2, kdim=4),
            AttentionPoolLatent(8, num_heads=2),
            vit,
        ]
    )
    patch(model)
    said = capsys.readouterr().out.splitlines()
    torchs = "torch MultiheadAttention (2 heads)"
    assert said == [
        f"vatt_fast: 1 x {torchs}",
        "vatt_fast: 2 x timm Attention (4 heads)",
        f"vatt_fast: left 1 x {torchs}: it adds keys of its own (add_bias_kv, add_zero_attn)",
        f"vatt_fast: left 1 x {torchs}: keys or values have another width (kdim, vdim)",
        "vatt_fast: left 1 x AttentionPoolLatent (timm.layers.attention_pool): its forward is not"
        " known here",
    ]
    with pytest.raises(ValueError, match=r"left 2 x Attention .*: it is ours already"):
        patch(vit)


def test_undo_gives_every_tower_its_own_implementation_back(capsys):
    transformers = need("transformers")
    from vatt_fast.integrations.patch import patch

    each = integration_cases.MODELS["CLIP"]
    model = transformers.CLIPModel(transformers.CLIPConfig(**each.arguments))
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    configs = (model.config, model.config.text_config, model.config.vision_config)
    before = [config._attn_implementation for config in configs]
    assert before[1] == "eager"
    undo = patch(model)
    assert [config._attn_implementation for config in configs] == ["vatt_fast"] * 3
    assert "2 x CLIPAttention: attn_implementation 'eager' ->" in capsys.readouterr().out
    undo()
    assert [config._attn_implementation for config in configs] == before


def test_patch_does_not_claim_what_transformers_refuses(monkeypatch):
    from vatt_fast.integrations.patch import patch

    model, _ = transformers_vit()
    # of a class that was written at a prompt
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
    with pytest.raises(ValueError, match=r"left 2 x ViTAttention .*: transformers sets no other"):
        patch(model)


def test_a_causal_hint_without_a_mask_is_torchs_to_refuse():
    from vatt_fast.integrations.patch import patch

    layer, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 5, 16)
    given = dict(need_weights=False, is_causal=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            layer(x, x, x, **given)
        if type(layer) is nn.MultiheadAttention:
            patch(layer, quiet=True)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    expected = nn.MultiheadAttention.forward(layer, x, x, x, attn_mask=causal, **given)[0]
    torch.testing.assert_close(layer(x, x, x, attn_mask=causal, **given)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_encoder_is_ours(said, dtype):
    from vatt_fast.integrations.patch import patch

    torch.manual_seed(0)
    model, x = encoder()
    model, x = model.to(dtype), x.to(dtype).requires_grad_()
    padding = torch.arange(7) >= torch.tensor([[7], [3]])
    weights = torch.randn(2, 7, 32) * ~padding[..., None]

    def run():
        out = model(x, src_key_padding_mask=padding)
        return out.detach() * ~padding[..., None], *torch.autograd.grad((out * weights).sum(), x)

    expected = run()
    undo = patch(model, quiet=True)
    with warnings.catch_warnings(), Counted() as counted:
        warnings.simplefilter("error", integrations_warning())
        found = run()
    assert counted.calls == 4  # forward and backward of two layers
    for ours, theirs in zip(found, expected, strict=True):
        assert integrations.relative(ours, theirs) < (3e-6 if dtype == torch.float32 else 2e-2)
    undo()
    layer = model.layers[0].self_attn
    patch(layer, quiet=True)
    slope = torch.zeros(2, 7).masked_fill(padding, -2.0).to(dtype)
    with pytest.warns(integrations_warning(), match="key_padding_mask of bool"), counted:
        layer(x, x, x, key_padding_mask=slope, need_weights=False)
    assert counted.calls == 4


def test_compiled_fallbacks_are_said_as_they_are_traced(said):
    from vatt_fast.integrations.patch import patch

    model = vit(attention_probs_dropout_prob=0.5).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(integrations_warning(), match="no dropout"):
        compiled(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error", integrations_warning())
        compiled(images[:1])  # traced anew, said already
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    patch(layer, quiet=True)
    masked = torch.compile(
        lambda x, mask: layer(x, x, x, key_padding_mask=mask, need_weights=False)[0],
        fullgraph=True, backend="aot_eager", dynamic=True,
    )  # fmt: skip
    with pytest.warns(integrations_warning(), match="key_padding_mask of bool"):
        masked(torch.randn(2, 5, 16), torch.zeros(2, 5))


# -- timm ----------------------------------------------------------------------------------------


def test_timms_masks(said):
    need("timm")
    from timm.layers.attention import Attention

    from vatt_fast.integrations.patch import patch

    layer = Attention(32, num_heads=4, qkv_bias=True)
    x, keys = torch.randn(2, 7, 32), torch.arange(7) < torch.tensor([[7], [3]])
    over_queries = torch.ones(7, 7, dtype=torch.bool).tril()
    options = (
        dict(attn_mask=keys[:, None, None]),
        dict(is_causal=True),
        dict(attn_mask=over_queries),
    )
    expected = [layer(x, **given) for given in options]
    patch(layer, quiet=True)
    found = [layer(x, **given) for given in options[:2]]
    with pytest.warns(integrations_warning(), match="a mask of keys"):
        found.append(layer(x, **options[2]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_drop_token_in_timm_repeats_and_keeps_the_prefix():
    model, images = timm_vit()
    from vatt_fast.integrations.timm import DropToken

    x = torch.arange(17.0)[None, :, None].repeat(2, 1, 3)
    drop = DropToken(0.5)
    first, second = drop(x), drop(x)
    assert first.shape == (2, 9, 3) and torch.equal(first[0], first[1])
    assert (first[:, 0] == 0).all() and not torch.equal(first, second)
    assert torch.equal(DropToken(0.5)(x), first)
    assert torch.equal(DropToken(0.5, step=1)(x), second)
    assert torch.equal(drop.eval()(x), x)
    model.patch_drop = DropToken(0.5, num_prefix_tokens=model.num_prefix_tokens)
    model.train()(images).sum().backward()
    with pytest.raises(ValueError, match="prob is 1"):
        DropToken(1.0)


TIMM_EMBEDDINGS = {
    "class token": {},
    "none": dict(class_token=False, global_pool="avg"),
    "registers, not embedded": dict(no_embed_class=True, reg_tokens=2),
    "no position": dict(pos_embed="none"),
    "pre-norm, no bias": dict(pre_norm=True),
    "oblong, grey": dict(img_size=(32, 48), in_chans=1),
}


def timm_dropped(options, dtype, before: bool, autocast=False):
    """Output and gradients, images' included, of a step with half of the patches."""
    import timm

    from vatt_fast.integrations.timm import DropToken, drop_before_embedding

    torch.manual_seed(0)
    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=10)
    model = timm.create_model("vit_base_patch16_224", **sizes | options).to(dtype).train()
    for token in (model.cls_token, model.reg_token, model.pos_embed):
        if token is not None:
            nn.init.normal_(token)
    images = torch.randn(2, model.in_chans, *model.patch_embed.img_size)
    images = images.to(dtype).requires_grad_()
    if before:
        drop_before_embedding(model, 0.5, seed=3, step=7)
    else:
        model.patch_drop = DropToken(0.5, model.num_prefix_tokens, seed=3, step=7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Counted() as counted:
        tokens = model.forward_features(images)
        out = model.forward_head(tokens)
    assert counted.calls == 1  # patch_embed, or drop_token
    kept = model.patch_embed.num_patches // 2
    assert tokens.shape[1] == model.num_prefix_tokens + kept and model.patch_drop.step == 8
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    leaves = (*model.parameters(), images)
    return out.detach(), torch.cat([x.grad.float().flatten() for x in leaves])


@pytest.mark.parametrize("options", TIMM_EMBEDDINGS.values(), ids=TIMM_EMBEDDINGS)
def test_dropping_before_the_embedding_is_dropping_after_it(options):
    need("timm")
    exact = timm_dropped(options, torch.float32, before=False)
    for ours, theirs in zip(timm_dropped(options, torch.float32, before=True), exact, strict=True):
        assert integrations.relative(ours, theirs) < 3e-6
    for half, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        after, before = (timm_dropped(options, half, there, autocast) for there in (False, True))
        for ours, theirs, full in zip(before, after, exact, strict=True):
            allowed = 2 * integrations.relative(theirs, full) + torch.finfo(torch.bfloat16).eps / 2
            assert ours.dtype == theirs.dtype and integrations.relative(ours, theirs) < allowed


def test_dropping_before_the_embedding_is_undone_and_copied():
    import copy
    import pickle

    model, images = timm_vit()
    from vatt_fast.integrations.timm import drop_before_embedding

    kinds, names = list(map(type, model.modules())), list(model.state_dict())
    whole = model.eval()(images)
    undo = drop_before_embedding(model.train(), 0.5)
    first, second = model(images), model(images)
    assert not torch.equal(first, second) and list(model.state_dict()) == names
    model.patch_drop.step = 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), first)
    compiled = torch.compile(model, backend="aot_eager")
    for expected in (first, second):
        torch.testing.assert_close(compiled(images), expected)
    assert torch.equal(model.eval()(images), whole)
    with pytest.raises(ValueError, match="stands there already"):
        drop_before_embedding(model, 0.5)
    with pytest.raises(ValueError, match=r"images are \(24, 32\)"):
        model.train()(images[:, :, :24])
    undo()
    assert list(map(type, model.modules())) == kinds
    assert torch.equal(model(images), whole)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(dynamic_img_size=True), "images of any size"),
        (dict(dynamic_img_pad=True), "images of any size"),
        (dict(embed_norm_layer="layernorm"), "a LayerNorm between"),
        (None, "Eva is not timm's VisionTransformer"),
    ],
    ids=["size", "padding", "norm", "rotary"],
)
def test_embeddings_that_cannot_be_dropped_before_are_refused(options, reason):
    need("timm")
    import timm

    from vatt_fast.integrations.timm import drop_before_embedding

    sizes = dict(img_size=32, patch_size=8, embed_dim=64, depth=1, num_heads=4, num_classes=2)
    if options is None:
        model = timm.create_model("eva02_tiny_patch14_224", **sizes)
    else:
        model = timm.create_model("vit_base_patch16_224", **sizes, **options)
    kinds = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=reason):
        drop_before_embedding(model, 0.5)
    assert list(map(type, model.modules())) == kinds


# -- losses --------------------------------------------------------------------------------------


def unit(rows=12, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)


VALID = torch.arange(12) % 4 != 1


def losses():
    need("lightly")
    need("sentence_transformers")
    from vatt_fast.integrations import lightly, open_clip, sentence_transformers

    model = nn.Sequential(nn.Identity())
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    ranking = sentence_transformers.MultipleNegativesRankingLoss(model, directions=every)
    return {
        "clip": lambda *z, **o: open_clip.ClipLoss()(z[0], z[1], 14.0, **o),
        "nt_xent": lambda *z, **o: lightly.NTXentLoss(0.2)(z[0], z[1], **o),
        "ranking": lambda *z, **o: ranking.compute_loss_from_embeddings(list(z), None, **o),
    }


@pytest.mark.parametrize("name", ["clip", "nt_xent", "ranking"])
def test_invalid_pairs_are_as_if_they_were_not_there(name):
    loss = losses()[name]
    given = [unit(seed=seed).requires_grad_() for seed in range(3)]
    kept = [z.detach()[VALID].requires_grad_() for z in given]
    masked, expected = loss(*given, valid=VALID), loss(*kept)
    torch.testing.assert_close(masked, expected)
    masked.backward()
    expected.backward()
    for z, part in zip(given, kept, strict=True):
        if part.grad is not None:
            torch.testing.assert_close(z.grad[VALID], part.grad)
            assert not z.grad[~VALID].any()


class Words(nn.Module):
    """Word indices (B, L) to their mean vectors, as a sentence transformer gives."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 8, dtype=dtype)

    def forward(self, features):
        return {"sentence_embedding": self.table(features["input_ids"]).mean(1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
def test_the_ranking_losses_forward_takes_validity(cached, dtype):
    need("sentence_transformers")
    from vatt_fast.integrations import sentence_transformers as ours

    torch.manual_seed(1)
    columns = [torch.randint(50, (12, 4)) for _ in range(3)]
    results = []
    for rows, options in ((slice(None), dict(valid=VALID)), (VALID, {})):
        model = nn.Sequential(Words(dtype))
        if cached:
            loss = ours.CachedMultipleNegativesRankingLoss(model, mini_batch_size=5)
        else:
            loss = ours.MultipleNegativesRankingLoss(model)
        value = loss([{"input_ids": ids[rows]} for ids in columns], None, **options)
        value.backward()
        results.append((value.detach(), model[0].table.weight.grad))
        assert torch.equal(
            loss([{"input_ids": ids[rows]} for ids in columns], None, **options), value
        )
    for masked, expected in zip(*results, strict=True):
        assert integrations.relative(masked, expected) < (3e-6 if dtype == torch.float32 else 1e-2)
    with pytest.raises(ValueError, match=r"valid is \(3,\)"):
        loss([{"input_ids": ids} for ids in columns], None, valid=VALID[:3])
    loss.hardness_mode, loss.hardness_strength = "all_negatives", 2.0
    with pytest.raises(ValueError, match="valid needs our loss"):
        loss([{"input_ids": ids} for ids in columns], None, valid=VALID)


def test_open_clips_factory_and_its_keys(said):
    need("open_clip")
    import argparse

    import open_clip

    from vatt_fast.integrations import open_clip as ours

    args = argparse.Namespace(
        model="ViT-B-32", distill=False, siglip=False, local_loss=True, gather_with_grad=True,
        rank=0, world_size=1, horovod=False,
    )  # fmt: skip
    loss = ours.create_loss(args)
    assert type(loss) is ours.ClipLoss
    given = dict(image_features=unit(), text_features=unit(seed=1), logit_scale=torch.tensor(9.0))
    expected = open_clip.ClipLoss()(**given, output_dict=True)
    torch.testing.assert_close(loss(**given, output_dict=True), expected)
    args.siglip, args.loss_dist_impl = True, None
    with pytest.warns(integrations_warning(), match="SigLipLoss sums softplus over all pairs"):
        assert type(ours.create_loss(args)) is open_clip.loss.SigLipLoss
    args.siglip, args.horovod = False, True
    with pytest.warns(integrations_warning(), match="ClipLoss alone"):
        assert type(ours.create_loss(args)) is open_clip.ClipLoss
    with pytest.raises(ValueError, match="gather_with_grad"):
        ours.ClipLoss(local_loss=True, world_size=2)


class StubOfTask(nn.Module):
    """Calls a loss as open_clip main's ``CLIPTask(model, loss=...)`` does (035dfeb)."""

    def __init__(self, model, loss):
        super().__init__()
        self.trainable_module, self.loss = model, loss

    def forward(self, images, texts):
        given = self.trainable_module(images, texts)
        losses = self.loss(**given, output_dict=True)
        losses["loss"] = sum(v for name, v in losses.items() if name.endswith("_loss"))
        losses["logit_scale"] = given["logit_scale"]
        return losses


@pytest.mark.parametrize("scalars", ["()", "(1,) as FSDP2 has them", "with a bias"])
def test_open_clips_task_calls_it_as_its_own_loss(scalars):
    need("open_clip")
    import open_clip

    from vatt_fast.integrations import open_clip as ours

    torch.manual_seed(0)
    model, images, texts = open_clip_model()
    model.output_dict = True
    if scalars.startswith("(1,)"):
        model.logit_scale = nn.Parameter(model.logit_scale.detach()[None])
    if scalars == "with a bias":
        model.logit_bias = nn.Parameter(torch.tensor(-3.0))
    results = []
    for loss in (ours.ClipLoss(), open_clip.ClipLoss()):
        model.zero_grad()
        found = StubOfTask(model, loss)(images, texts)
        assert found["loss"].ndim == 0
        found["loss"].backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((found["loss"].detach(), torch.cat(gradients)))
    for mine, theirs in zip(*results, strict=True):
        assert integrations.relative(mine, theirs) < 3e-6


def test_weighed_hardness_runs_their_loss(said):
    need("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses as theirs

    from vatt_fast.integrations import sentence_transformers as ours

    options = dict(hardness_mode="all_negatives", hardness_strength=2.0)
    model, z = nn.Sequential(nn.Identity()), [unit(), unit(seed=1)]
    loss = ours.MultipleNegativesRankingLoss(model, **options)
    with pytest.warns(integrations_warning(), match="weighs hardness"):
        found = loss.compute_loss_from_embeddings(z, None)
    expected = theirs.MultipleNegativesRankingLoss(model, **options)
    torch.testing.assert_close(found, expected.compute_loss_from_embeddings(z, None))


def test_memory_is_a_processs_own_whatever_this_one_takes(monkeypatch):
    need("open_clip")
    monkeypatch.syspath_prepend(str(Path(integrations.__file__).parents[1]))  # for the child
    case = next(case for case in integration_cases.CASES if case.name == "ClipLoss")
    taken = torch.ones(2**27)  # 512 MiB, where a child's getrusage would begin
    rows = 2048
    assert float(integrations._measured(case, False, rows)) > rows * rows * 4 / 2**20
    del taken
