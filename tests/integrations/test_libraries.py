"""Our ops inside other libraries, on small random weights, against the libraries' own paths."""

import warnings

import pytest
import torch
from torch import nn

from bench import integrations
from vatt_fast import kernels

CASES = [
    pytest.param(case, id=f"{case.library}-{case.name.replace(' ', '_')}")
    for case in integrations.CASES
]


def need(library: str):
    """Import it, or skip with the reason."""
    if reason := integrations.missing(library):
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
    need(case.library)
    with warnings.catch_warnings(), Counted() as counted:
        warnings.simplefilter("error", integrations_warning())
        assert max(integrations.errors(case, torch.float32)) < 3e-6
    assert counted.calls
    value, gradient = integrations.errors(case, torch.bfloat16)
    own_value, own_gradient = integrations.rounding(case)
    eps = torch.finfo(torch.bfloat16).eps
    assert value <= 2 * own_value + eps / 2
    assert gradient <= 2 * own_gradient + eps / 2


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
    config = transformers.ViTConfig(**integrations._VISION, **options)
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


@pytest.mark.parametrize("make", [timm_vit, open_clip_model, encoder, transformers_vit])
def test_patch_swaps_says_so_and_is_undone(make, capsys):
    from vatt_fast.integrations.patch import patch

    torch.manual_seed(0)
    model, *inputs = make()
    model.train()

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
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert (gradient - same_gradient).norm() < 1e-5 * gradient.norm()
    undo()
    again, _, calls, _ = run()
    assert not calls and torch.equal(again, before)


def test_patch_refuses_what_it_does_not_know():
    from vatt_fast.integrations.patch import patch

    with pytest.raises(ValueError, match="no attention"):
        patch(nn.Linear(2, 2))


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
