"""Released MAP files: the reference's key names and arithmetic, written out, against the converted folder's logits."""

import re

import pytest
import torch
import torch.nn.functional as F

import maskwise
from export.formats.test_dino_convnets import CNX, RES, body, meta, random_timm_model
from maskwise.errors import UserError
from maskwise.export import convert
from maskwise.export.formats import saved_classifier
from maskwise.nn.backbones.timm_registry import timm

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
D, WIDTH, GROUPS, TOKENS, CLASSES, EMBED = 12, 7, 2, 2, 5, 6


def randn(*shape):
    return 0.4 * torch.randn(shape)


def norm(front, width):
    return {f"{front}.weight": 1 + randn(width), f"{front}.bias": randn(width)}


def batch_norm(front, width):
    return {
        **norm(front, width),
        f"{front}.running_mean": randn(width),
        f"{front}.running_var": 0.5 + torch.rand(width),
        f"{front}.num_batches_tracked": torch.tensor(3),
    }


def linear(front, into, out):
    return {f"{front}.weight": randn(into, out), f"{front}.bias": randn(into)}


def released(
    dims,
    front="head.",
    *,
    several=True,
    head="joint",
    averages=True,
    talking=0,
    gram=True,
    tokens_heads=True,
    mlp_groups=2,
    gram_group=2,
):
    """Return a MAP head under its released names, with random tensors."""
    torch.manual_seed(1)
    length, tensors = WIDTH * (WIDTH + 1) // 2, {}
    tensors |= {
        "mmcap.multi_scale.concat_conv.0.weight" if several else "mmcap.channel_convertor.0.weight": randn(
            D, sum(dims) if several else dims[-1], 1, 1
        )
    }
    tensors |= batch_norm("mmcap.multi_scale.concat_conv.1" if several else "mmcap.channel_convertor.1", D)
    for g in range(GROUPS):
        place = f"mmcap.mmcap.{g}."
        if gram:
            first, second = place + "gram_token_extraction.ch_reduction", place + "gram_token_extraction.bp_reduction"
            upper = torch.triu_indices(WIDTH, WIDTH)
            tensors |= {place + "gram_token_extraction.bp_index": upper[0] * WIDTH + upper[1]}
            tensors |= {f"{first}.0.weight": randn(WIDTH, D, 1, 1), **batch_norm(f"{first}.1", WIDTH)}
            tensors |= {
                f"{second}.0.weight": randn(D * TOKENS, length // gram_group, 1, 1),
                **batch_norm(f"{second}.1", D * TOKENS),
            }
        else:
            tensors |= {place + "x_cls": randn(1, TOKENS, D)}
        block = place + "attention.0."
        tensors |= {**norm(block + "norm1", D), **norm(block + "norm2", D), **linear(block + "attn.proj", D, EMBED)}
        for name in "qkv":
            tensors |= linear(block + f"attn.{name}", EMBED, D)
        for name in ("w1", "w2") if talking else ():
            tensors |= linear(block + f"attn.{name}", talking, talking)
        for name, into, out in (("fc1", 4 * D, D), ("fc2", D, 4 * D)):
            tensors |= {
                f"{block}mlp.{name}.weight": randn(into, out // mlp_groups, 1, 1),
                f"{block}mlp.{name}.bias": randn(into),
            }
        if averages:
            tensors |= {**norm(f"self_dt_heads.{g}.norm", D), **linear(f"self_dt_heads.{g}.head", CLASSES, D)}
        if not tokens_heads:
            continue
        if head == "joint":
            tensors |= {**norm(f"heads.{g}.norm", D * TOKENS), **linear(f"heads.{g}.head", CLASSES, D * TOKENS)}
        elif head == "plain":
            tensors |= linear(f"heads.{g}", CLASSES, D * TOKENS)
        for t in range(TOKENS if head == "split" else 0):
            tensors |= {**norm(f"heads.{g}.norm.{t}", D), **linear(f"heads.{g}.head.{t}", CLASSES, D)}
    return {front + key: value for key, value in tensors.items()}


def resized_to(feature_map, grid):
    if feature_map.shape[-2:] == grid:
        return feature_map
    if feature_map.shape[-1] < grid[-1]:
        return F.adaptive_avg_pool2d(feature_map, grid)
    return F.interpolate(feature_map, grid, mode="bilinear")


def logits_of(
    s, maps, *, front="head.", several=True, level=3, heads=1, light=False, head="joint", mlp_groups=2, gram_group=2
):
    """Compute the mean of the groups' logits (MAP, eq. 4) from tensors under the released names."""
    s = {key.removeprefix(front): value for key, value in s.items()}

    def bn(name, x):
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, var, weight, bias = (
            s[f"{name}.{key}"].reshape(shape) for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    if several:
        grid = maps[level].shape[-2:]
        resized = [resized_to(feature_map, grid) for feature_map in maps]
        y = F.gelu(
            bn(
                "mmcap.multi_scale.concat_conv.1",
                F.conv2d(torch.cat(resized, 1), s["mmcap.multi_scale.concat_conv.0.weight"]),
            )
        )
    else:
        y = F.relu(bn("mmcap.channel_convertor.1", F.conv2d(maps[-1], s["mmcap.channel_convertor.0.weight"])))
    logits_by_group = []
    for g in range(GROUPS):
        cap = f"mmcap.mmcap.{g}."
        if cap + "x_cls" in s:
            tokens = s[cap + "x_cls"].expand(len(y), -1, -1)
        else:
            r = bn(
                cap + "gram_token_extraction.ch_reduction.1",
                F.conv2d(y, s[cap + "gram_token_extraction.ch_reduction.0.weight"]),
            )
            r = r.flatten(2) / (r.shape[-1] * r.shape[-2])
            gram = torch.einsum("bip,bjp->bij", r, r)
            entries = torch.stack([gram[:, i, j] for i in range(WIDTH) for j in range(i, WIDTH)], dim=1)
            entries = entries / entries.norm(dim=1, keepdim=True)
            order = [i for t in range(TOKENS) for i in range(t, entries.shape[1], TOKENS)]
            parts = entries[:, order].chunk(gram_group, 1)
            weights = s[cap + "gram_token_extraction.bp_reduction.0.weight"][:, :, 0, 0].chunk(gram_group, 0)
            expanded = bn(
                cap + "gram_token_extraction.bp_reduction.1",
                torch.cat([part @ w.T for part, w in zip(parts, weights)], 1),
            )
            tokens = torch.stack([expanded[:, t::TOKENS] for t in range(TOKENS)], dim=1)
        averages = f"self_dt_heads.{g}.norm.weight" in s
        if averages:
            tokens = torch.cat([tokens, tokens.mean(1, keepdim=True)], 1)
        count, block = tokens.shape[1], cap + "attention.0."
        both = F.layer_norm(
            torch.cat([tokens, y.flatten(2).transpose(1, 2)], 1),
            (D,),
            s[block + "norm1.weight"],
            s[block + "norm1.bias"],
            1e-6,
        )
        q, k, v = (
            x @ s[f"{block}attn.{n}.weight"].T + s[f"{block}attn.{n}.bias"]
            for n, x in (("q", both[:, :count]), ("k", both), ("v", both))
        )
        width = EMBED // heads
        logits = torch.stack(
            [
                q[..., h * width : (h + 1) * width] @ k[..., h * width : (h + 1) * width].transpose(1, 2) / width**0.5
                for h in range(heads)
            ],
            -1,
        )
        if block + "attn.w1.weight" in s:
            logits = logits + logits @ s[block + "attn.w1.weight"].T + s[block + "attn.w1.bias"]
        shares = logits.softmax(2)
        if block + "attn.w2.weight" in s:
            shares = shares + shares @ s[block + "attn.w2.weight"].T + s[block + "attn.w2.bias"]
        attended = torch.cat([shares[..., h] @ v[..., h * width : (h + 1) * width] for h in range(heads)], -1)
        tokens = tokens + attended @ s[block + "attn.proj.weight"].T + s[block + "attn.proj.bias"]
        z = F.layer_norm(tokens, (D,), s[block + "norm2.weight"], s[block + "norm2.bias"], 1e-6)
        hidden = torch.cat(
            [
                part @ w[:, :, 0, 0].T
                for part, w in zip(z.chunk(mlp_groups, -1), s[block + "mlp.fc1.weight"].chunk(mlp_groups))
            ],
            -1,
        )
        hidden = F.relu(hidden + s[block + "mlp.fc1.bias"])
        hidden = torch.cat([hidden[..., i::mlp_groups] for i in range(mlp_groups)], -1)
        out = torch.cat(
            [
                part @ w[:, :, 0, 0].T
                for part, w in zip(hidden.chunk(mlp_groups, -1), s[block + "mlp.fc2.weight"].chunk(mlp_groups))
            ],
            -1,
        )
        tokens = tokens + out + s[block + "mlp.fc2.bias"]

        def head_logits(x, name, norm_name):
            x = (
                x
                if norm_name is None
                else F.layer_norm(x, x.shape[-1:], s[f"{norm_name}.weight"], s[f"{norm_name}.bias"], 1e-5)
            )
            return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

        if light:
            logits_by_group.append(head_logits(tokens[:, TOKENS], f"self_dt_heads.{g}.head", f"self_dt_heads.{g}.norm"))
        elif head == "split":
            logits_by_group.append(
                sum(head_logits(tokens[:, t], f"heads.{g}.head.{t}", f"heads.{g}.norm.{t}") for t in range(TOKENS))
            )
        elif head == "plain":
            logits_by_group.append(head_logits(tokens.flatten(1), f"heads.{g}", None))
        else:
            logits_by_group.append(head_logits(tokens[:, :TOKENS].flatten(1), f"heads.{g}.head", f"heads.{g}.norm"))
    return sum(logits_by_group) / GROUPS


def stages(model, x):
    """Return the feature maps of the stem and of four stages."""
    if hasattr(model, "stem"):
        maps = [model.stem(x)]
        for stage in model.stages:
            maps.append(stage(maps[-1]))
        return maps
    x = model.act1(model.bn1(model.conv1(x)))
    maps = [x]
    x = model.maxpool(x)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        x = getattr(model, name)(x)
        maps.append(x)
    return maps


def network(family):
    """Return a timm model, its tensors in a released file (no head, no final norm), and its feature map widths."""
    if family == "resnet":
        model = random_timm_model("resnet50", **RES)
        return model, body(model.state_dict(), "fc."), [64, 32, 32, 32, 64]
    model = random_timm_model("convnext_tiny", **CNX)
    return model, body(meta(model.state_dict()), "head.", "norm."), [8, 8, 8, 16, 24]


def folder_logits(folder, x=X):
    encoder = maskwise.load(folder).eval()
    classifier = saved_classifier.read(folder).on(encoder)
    with torch.no_grad():
        return classifier(encoder(x, layers=classifier.layers)), classifier


CASES = [
    ("convnext", {}, {}),
    ("convnext", {"tokens_heads": False}, {"light": True}),
    (
        "resnet",
        {
            "front": "fc.",
            "several": False,
            "head": "plain",
            "averages": False,
            "talking": 3,
            "mlp_groups": 1,
            "gram_group": 4,
        },
        {"heads": 3},
    ),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("resnet", {"talking": 2}, {"heads": 2}),
            ("convnext", {"gram": False, "averages": False}, {}),
            ("resnet", {"head": "split"}, {}),
        )
    ),
]


@pytest.mark.parametrize("family, options, more", CASES, ids=str)
def test_a_converted_file_gives_the_logits_of_the_reference(family, options, more, tmp_path):
    model, backbone, dims = network(family)
    assert [feature_map.shape[1] for feature_map in stages(model, X)] == dims
    head = released(dims, **options)
    same = {key: options[key] for key in ("front", "several", "head", "mlp_groups", "gram_group") if key in options}
    with torch.no_grad():
        expected = logits_of(head, stages(model, X), **same, **more)
    content = {**{f"module.{key}": value for key, value in (backbone | head).items()}}
    torch.save(
        {"state_dict": content, "epoch": 3, "arch": "map"} if family == "convnext" else content,
        tmp_path / "map_x.pth.tar",
    )
    lines = convert.convert(tmp_path / "map_x.pth.tar", tmp_path / "out")
    logits, classifier = folder_logits(tmp_path / "out")
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 0.1 and classifier.light == more.get("light", False)
    text = "\n".join(lines)
    assert f"classifier {len(classifier.state_dict())}" in text and "as map" in text
    assert ("bp_index" in text) == options.get("gram", True) and ("a guess" in text) == ("talking" not in options)
    assert ("norm.weight and norm.bias" in text) == (family == "convnext")


def perturbed(model):
    """Return a timm model in eval mode with every weight and statistic changed from its initial value."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.1)
    return model.eval()


def mobilenet(x):
    """The reference's MobileNet, written out: no shortcuts, ReLU."""
    state, maps, widths = {}, [], ((32,), (64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))

    def layer(front, places, x, into, out, groups=1, size=1, stride=1):
        state[f"{front}{places[0]}.weight"] = (
            randn(out, into // groups, size, size) * 3 / (into // groups * size**2) ** 0.5
        )
        state.update(batch_norm(f"{front}{places[1]}", out))
        x = F.conv2d(x, state[f"{front}{places[0]}.weight"], None, stride, size // 2, groups=groups)
        return F.relu(
            F.batch_norm(
                x, *(state[f"{front}{places[1]}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
            )
        )

    x = layer("layers.0.0.", (0, 1), x, 3, 32, size=3, stride=2)
    before = 32
    for stage, blocks in enumerate(widths[1:]):
        for i, width in enumerate(blocks):
            front = f"layers.{stage}.{i + (stage == 0)}."
            x = layer(front, (0, 1), x, before, before, before, 3, 2 if stage and i == 0 else 1)
            x, before = layer(front, (3, 4), x, before, width), width
        maps.append(x)
    return (
        state,
        [64, 128, 256, 512, 1024],
        maps,
        {"front": "fc.", "several": False, "head": "plain", "averages": False, "talking": 3, "mlp_groups": 1},
    )


def maxvit(x):
    """timm's MaxViT with an exact GELU."""
    exact = {"conv_act_layer": "gelu", "transformer_act_layer": "gelu"}
    model = perturbed(
        timm.create_model(
            "maxvit_tiny_tf_224",
            num_classes=0,
            img_size=64,
            depths=(1, 1, 1, 1),
            embed_dim=(32, 32, 64, 64),
            stem_width=8,
            **exact,
        )
    )
    maps = [model.stem(x)]
    for stage in model.stages:
        maps.append(stage(maps[-1]))
    return body(model.state_dict(), "head.", "norm."), [8, 32, 32, 64, 64], maps, {}


@pytest.mark.slow
@pytest.mark.parametrize("made, side", [(mobilenet, 64), (maxvit, 64)])
def test_networks_released_by_map_only(made, side, tmp_path):
    torch.manual_seed(4)
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        backbone, dims, maps, more = made(x)
        head = released(dims, **more)
        same = {key: more[key] for key in ("front", "several", "head", "mlp_groups") if key in more}
        expected = logits_of(head, maps, heads=more.get("talking", 1), **same)
    torch.save(backbone | head, tmp_path / "map_x.pth.tar")
    convert.convert(tmp_path / "map_x.pth.tar", tmp_path / "out")
    torch.testing.assert_close(folder_logits(tmp_path / "out", x)[0], expected, atol=5e-5, rtol=1e-4)
    assert expected.std() > 0.05 and [feature_map.shape[1] for feature_map in maps] == dims


def test_renamed_back_it_is_the_file_bit_for_bit(tmp_path):
    """The folder's tensors, under the released names, equal those of the file."""
    from maskwise.export.formats.map_release import head_key

    _, backbone, dims = network("convnext")
    head = released(dims)
    torch.save(backbone | head, tmp_path / "map_x.pth.tar")
    convert.convert(tmp_path / "map_x.pth.tar", tmp_path / "out")
    renamed = {
        f"head.{head_key(key.removeprefix('head.'), back=True)}": value
        for key, value in saved_classifier.read(tmp_path / "out").state.items()
    }
    assert renamed.keys() == {key for key in head if "bp_index" not in key}
    assert all(torch.equal(value.flatten(), head[key].flatten()) for key, value in renamed.items())


@pytest.mark.slow
def test_pooling_heads_sets_the_number_of_attention_heads(tmp_path):
    model, backbone, dims = network("resnet")
    head = released(dims)
    torch.save(
        {
            "state_dict_ema": backbone | head,
            "state_dict": backbone | {key: value.clone() for key, value in head.items()},
        },
        tmp_path / "x.pth",
    )
    lines = convert.convert(tmp_path / "x.pth", tmp_path / "out", pooling_heads=3)
    with torch.no_grad():
        expected = logits_of(head, stages(model, X), heads=3)
    torch.testing.assert_close(folder_logits(tmp_path / "out")[0], expected, atol=2e-5, rtol=1e-5)
    assert not any("guess" in line for line in lines) and any(
        "unused   other classifiers: student.head." in line for line in lines
    )


def test_a_classifier_that_is_left_out_is_reported(tmp_path, capsys):
    _, backbone, dims = network("resnet")
    head = released(dims)
    torch.save(backbone | head, tmp_path / "x.pth")
    maskwise.load(tmp_path / "x.pth")
    count = sum("bp_index" not in key for key in head)
    assert "read as map" in capsys.readouterr().err and count > 50
    lines = convert.convert(tmp_path / "x.pth", tmp_path / "y.pth", layout="timm")
    assert any(line.startswith("left out classifier (timm has none): head.") for line in lines)


def renamed(tensors, pattern, to):
    assert any(re.search(pattern, key) for key in tensors)
    return {re.sub(pattern, to, key): value for key, value in tensors.items()}


BROKEN = {
    "a group is missing": (
        lambda h: {k: v for k, v in h.items() if "mmcap.mmcap.0." not in k},
        r"lacks head.mmcap.mmcap.0.attention.0.norm1.weight: its MAP head is incomplete",
    ),
    "a tensor is missing": (
        lambda h: {k: v for k, v in h.items() if not k.endswith("mmcap.1.attention.0.attn.k.bias")},
        r"lacks head.mmcap.mmcap.1.attention.0.attn.k.bias",
    ),
    "a head is missing": (
        lambda h: {k: v for k, v in h.items() if ".heads.1." not in k},
        r"lacks head.heads.1.norm.weight",
    ),
    "a shape": (
        lambda h: {**h, "head.heads.1.head.weight": torch.zeros(CLASSES, 3)},
        r"head.heads.1.head.weight is \[5, 3\] there and \[5, 24\] here",
    ),
    "an unknown part": (
        lambda h: {**h, "head.mmcap.mmcap.0.gram_token_extraction.gram_blk.norm.weight": torch.zeros(3)},
        r"head.mmcap.mmcap.0.gram_token_extraction.gram_blk.norm.weight has no counterpart",
    ),
    "other keys and values": (
        lambda h: {**h, "head.mmcap.mmcap.0.attention.0.attn.k1.weight": torch.zeros(3)},
        r"attention.0.attn.k1.weight has no counterpart",
    ),
    "a second layer": (
        lambda h: {**h, "head.mmcap.mmcap.0.attention.1.norm1.weight": torch.zeros(D)},
        r"attention.1.norm1.weight has no counterpart",
    ),
    "another order": (
        lambda h: {**h, "head.mmcap.mmcap.0.gram_token_extraction.bp_index": torch.arange(28)},
        r"bp_index is not the upper triangle of a matrix 7 wide",
    ),
    "another name": (
        lambda h: renamed(h, r"concat_conv\.", "join."),
        r"head.mmcap.multi_scale.join.0.weight has no counterpart in this project's MAP classifier; "
        r"if it is another name of a known part, rename it with alias=",
    ),
    "another network": (
        lambda h: {**h, "head.mmcap.multi_scale.concat_conv.0.weight": torch.zeros(D, 99, 1, 1)},
        r"concat_conv.0.weight is \[12, 99, 1, 1\] there and \[12, 64, 1, 1\] here",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_misfit_is_one_line_and_writes_nothing(fault, tmp_path):
    change, words = BROKEN[fault]
    _, backbone, dims = network("convnext")
    torch.save(backbone | change(released(dims)), tmp_path / "x.pth")
    with pytest.raises(UserError, match=words) as caught:
        convert.convert(tmp_path / "x.pth", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_early_key_is_accepted_with_an_alias(tmp_path):
    model, backbone, dims = network("convnext")
    head = released(dims)
    torch.save(backbone | renamed(head, r"concat_conv\.", "join."), tmp_path / "x.pth")
    convert.convert(
        tmp_path / "x.pth", tmp_path / "out", alias="head.mmcap.multi_scale.join.=head.mmcap.multi_scale.concat_conv."
    )
    with torch.no_grad():
        torch.testing.assert_close(
            folder_logits(tmp_path / "out")[0], logits_of(head, stages(model, X)), atol=2e-5, rtol=1e-5
        )


def test_an_unknown_network_is_refused_by_its_first_key(tmp_path):
    torch.save({"stem.0.0.weight": torch.zeros(4, 3, 3, 3), **released([8, 8, 8, 16, 24])}, tmp_path / "x.pth")
    with pytest.raises(
        UserError,
        match=r"MAP head over an unsupported network \(its first key: stem.0.0.weight\): "
        r"MAP heads are read over resnet, convnext, mobilenet, maxvit",
    ):
        maskwise.load(tmp_path / "x.pth")
