import gc
import sys
import threading
import weakref

import pytest
import torch
from torch import nn

import anyup_fast
from anyup_fast import encoders
from anyup_fast.encoders import Encoder, load_encoder, wrap_encoder
from anyup_fast.encoders.base import IMAGENET_MEAN, IMAGENET_STD
from anyup_fast.encoders.layout import Layout


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(dim), nn.MultiheadAttention(dim, 2, batch_first=True)

    def forward(self, x):
        y = self.norm(x)
        return (x + self.attention(y, y, y, need_weights=False)[0],)


class Vit(nn.Module):
    """A small network of one's own, with a class token and registers in front."""

    def __init__(self, patch=16, dim=8, prefix=3, bands=3, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.patch = patch
        self.embed = nn.Conv2d(bands, dim, patch, patch)
        self.prefix = nn.Parameter(torch.randn(1, prefix, dim))
        self.blocks = nn.ModuleList([Block(dim) for _ in range(depth)])
        self.eval()

    def tokens(self, image):
        assert image.shape[2] % self.patch == 0 == image.shape[3] % self.patch, f"sides must be times {self.patch}"
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            (x,) = block(x)
        return x

    def forward(self, image):
        return self.tokens(image)

    def maps(self, image):
        size = [n // self.patch for n in image.shape[2:]]
        return self.tokens(image)[:, self.prefix.shape[1] :].transpose(1, 2).unflatten(2, size)

    def as_dict(self, image):
        x = self.tokens(image)
        return {"pooled": x.mean(1), "patches": x[:, self.prefix.shape[1] :], "loss": None}

    def like_dinov2(self, image):
        x, count = self.tokens(image), self.prefix.shape[1]
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, count:], "x_prenorm": x}

    def like_radio(self, image):
        x, count = self.tokens(image), self.prefix.shape[1]
        return x[:, :count].flatten(1), x[:, count:]

    def pyramid(self, image):
        maps = self.maps(image)
        return [nn.functional.interpolate(maps, scale_factor=2.0), maps]


class Output(dict):
    """What transformers give: a dict that is indexed by numbers and read by attributes, too."""

    def __getitem__(self, key):
        return list(self.values())[key] if isinstance(key, int) else super().__getitem__(key)


VIT = Vit()
TAKEN = {
    "module": (VIT, {}),
    "function": (lambda x: VIT(x), {}),
    "method": (VIT.tokens, {}),
    "maps": (VIT.maps, {}),
    "channels last": (lambda x: VIT.maps(x).permute(0, 2, 3, 1), {}),
    "dict": (VIT.as_dict, {}),
    "a known key": (VIT.like_dinov2, {}),
    "a key": (VIT.like_dinov2, {"output": "x_prenorm"}),
    "tuple": (VIT.like_radio, {}),
    "list, by index": (VIT.pyramid, {"output": -1}),
    "list, by a function": (VIT.pyramid, {"output": lambda found: found[1]}),
    "model output": (lambda x: Output(last_hidden_state=VIT(x), pooler_output=VIT(x)[:, 0]), {}),
    "model output, by index": (lambda x: Output(last_hidden_state=VIT(x), pooler_output=VIT(x)[:, 0]), {"output": 0}),
    "layer": (VIT, {"layer": "blocks.2"}),
    "patch given": (VIT, {"patch_size": 16}),
    "a multiple given": (VIT, {"patch_size": 32}),
    "prefix given": (VIT, {"prefix_tokens": 3}),
    "a tuple of one": (lambda x: (VIT(x),), {}),
}


def expected(image):
    """What all of these give for an image of this package."""
    return VIT.maps(image * 1.0).detach()


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_taken(case):
    given, options = TAKEN[case]
    encoder = wrap_encoder(given, **options)
    assert isinstance(encoder, Encoder) and encoder.patch_size == options.get("patch_size", 16)
    assert (encoder.dim, encoder.num_layers) == (8, 1)
    image = noise(2, 3, 64, 96)
    features = encoder(image)
    assert features.shape == (2, 8, 4, 6) and not features.requires_grad and features.is_contiguous()
    torch.testing.assert_close(features, expected(image))
    change(encoder, image[:1])


def change(encoder, image, layer=-1):
    """The oracle: the pixels of one cell changed, its features change most; for some cells off the diagonal."""
    with torch.no_grad():
        before = encoder(image, layer=layer)
        rows, columns = before.shape[2:]
        sides = image.shape[2] // rows, image.shape[3] // columns
        assert sides[0] == sides[1] and rows != columns
        for row, column in ((0, columns - 1), (rows - 1, 1), (1, 2)):
            other = image.clone()
            other[..., row * sides[0] : (row + 1) * sides[0], column * sides[1] : (column + 1) * sides[1]] += 2
            found = (encoder(other, layer=layer) - before).norm(dim=1)[0]
            assert divmod(int(found.argmax()), columns) == (row, column)


def test_layouts_are_told():
    assert wrap_encoder(VIT).layouts == [Layout("tokens", 16, 8, 3)]
    assert wrap_encoder(VIT.maps).layouts == [Layout("channels first", 16, 8)]
    assert "Vit" in wrap_encoder(VIT).source and wrap_encoder(VIT.maps).name == "Vit.maps"


def test_several_layers():
    encoder = wrap_encoder(VIT, layer=("embed", "blocks.0", "blocks.1", "blocks.2"))
    assert encoder.num_layers == 4 and [layout.prefix for layout in encoder.layouts] == [0, 3, 3, 3]
    image = noise(1, 3, 48, 80)
    torch.testing.assert_close(encoder(image), expected(image))
    torch.testing.assert_close(encoder(image, layer=1), VIT.embed(image).detach())
    assert not torch.equal(encoder(image, layer=2), encoder(image, layer=3))
    assert torch.equal(encoder.of_layers(image, (-1, 2))[1], encoder(image, layer=2))
    for layer in range(1, 5):
        change(encoder, image, layer)


def test_a_network_of_its_own_stride_and_multiple():
    """Features of every 4 pixels, sides that are multiples of 32."""

    def halved(x):
        assert x.shape[2] % 32 == 0 == x.shape[3] % 32
        return nn.functional.avg_pool2d(x, 4)

    encoder = wrap_encoder(halved)
    assert encoder.patch_size == 32 and encoder(noise(1, 3, 32, 64)).shape == (1, 3, 8, 16)
    with pytest.raises(ValueError, match="multiples of 32"):
        encoder(noise(1, 3, 48, 64))


@pytest.mark.parametrize("patch", [8, 14, 16, 20, 32])
def test_patch_size_is_found(patch):
    assert wrap_encoder(Vit(patch)).patch_size == patch
    unchecked = nn.Conv2d(3, 4, patch, patch).eval()  # drops what is left over at the edges
    assert wrap_encoder(unchecked).patch_size == patch


def test_normalisation_is_the_encoders_own():
    seen = []

    def spy(x):
        seen.append(x)
        return nn.functional.avg_pool2d(x, 8)

    encoder = wrap_encoder(spy, 8, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1))
    unit = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    encoder((unit - mean) / std)
    torch.testing.assert_close(seen[-1], (unit - 0.5) / torch.tensor([0.25, 0.5, 1]).view(3, 1, 1))


def test_verbs_take_it():
    encoder = wrap_encoder(VIT)
    image = noise(3, 64, 96)
    features = anyup_fast.extract_features(image, encoder)
    assert features.shape == (8, 4, 6)
    torch.testing.assert_close(features, expected(image[None])[0])
    model = anyup_fast.AnyUp(qk_dim=32)
    assert anyup_fast.upsample_features_with_anyup(image, features, weights=model).shape == (8, 64, 96)


def test_images_of_other_bands():
    """Ten bands as a satellite has them: the guide is made of three of them."""
    encoder = wrap_encoder(Vit(bands=10), mean=[1000.0] * 10, std=[500.0] * 10)
    assert encoder.bands == 10
    counts = torch.randint(0, 4000, (10, 64, 96), generator=torch.Generator().manual_seed(0))
    features = anyup_fast.extract_features(counts.float(), encoder)
    direct = Vit(bands=10).maps((counts[None].float() - 1000) / 500)[0]
    torch.testing.assert_close(features, direct.detach())
    change(encoder, counts[None].float() - 1000)
    guide = anyup_fast.load_image(counts[[3, 2, 1]].to(torch.int32), value_range=(0, 4000))
    model = anyup_fast.AnyUp(qk_dim=32)
    assert anyup_fast.upsample_features_with_anyup(guide, features, weights=model).shape == (8, 64, 96)
    unit = wrap_encoder(Vit(bands=10), mean=[0.25] * 10, std=[0.125] * 10)
    scaled = anyup_fast.extract_features(counts, unit, value_range=(0, 4000))
    torch.testing.assert_close(scaled, features)


def test_other_bands_are_refused_where_they_do_not_fit():
    encoder = wrap_encoder(Vit(bands=10), mean=[0.0] * 10, std=[1.0] * 10)
    with pytest.raises(ValueError, match=r"need the shape \(10, H, W\)"):
        anyup_fast.extract_features(noise(3, 64, 96), encoder)
    with pytest.raises(ValueError, match=r"image must have the shape \(B, 10, H, W\)"):
        encoder(noise(1, 3, 64, 96))
    with pytest.raises(ValueError, match="NaN or infinite"):
        anyup_fast.extract_features(torch.full((10, 64, 96), torch.nan), encoder)


def test_gradients_reach_the_image_and_else_none_are_recorded():
    vit = Vit()
    encoder = wrap_encoder(vit)
    assert all(p.requires_grad for p in vit.parameters())
    assert not encoder(noise(1, 3, 32, 48)).requires_grad
    image = noise(1, 3, 32, 48).requires_grad_()
    encoder(image).sum().backward()
    assert image.grad.abs().sum() > 0


def test_the_module_stays_the_callers():
    vit = Vit()
    encoder = wrap_encoder(vit)
    vit.embed.weight.data.mul_(2)
    image = noise(1, 3, 32, 48)
    torch.testing.assert_close(encoder(image), vit.maps(image).detach())
    encoder.to(torch.float64)
    assert vit.embed.weight.dtype == torch.float64 and encoder(image).dtype == torch.float64
    assert not any(module._forward_hooks for module in vit.modules())


def test_half_precision_modules():
    encoder = wrap_encoder(Vit().to(torch.bfloat16))
    image = noise(1, 3, 32, 48)
    assert encoder(image).dtype == torch.bfloat16
    torch.testing.assert_close(encoder(image).float(), expected(image), rtol=0.05, atol=0.05)


def test_layers_in_several_threads_do_not_mix():
    encoder = wrap_encoder(VIT, layer="blocks.1")
    images = [noise(1, 3, 32, 48, seed=seed) for seed in range(6)]
    alone = [encoder(image) for image in images]
    found = [None] * len(images)

    def work(index):
        for _ in range(10):
            found[index] = encoder(images[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(alone, found, strict=True))


def test_it_goes_when_nobody_has_it():
    vit = Vit()
    gone = weakref.ref(vit)
    encoder = wrap_encoder(vit)
    del vit, encoder
    gc.collect()
    assert gone() is None


CALLS = []


def grows(x):
    CALLS.append(1)
    return VIT(x) if len(CALLS) < 7 else VIT(x)[:, 1:]


def loses_one(x):
    found = VIT.maps(x)
    return found if len(x) < 3 else found[:2]


def wants_gradients(x):
    found = VIT.maps(x)
    return found + torch.autograd.grad(found.sum(), x)[0].mean()


BAD = {
    "pooled": (lambda x: VIT(x).mean(1), {}, RuntimeError, "one vector an image"),
    "its own grid": (lambda x: nn.functional.adaptive_avg_pool2d(x, 7), {}, RuntimeError, "not follow the picture"),
    "no batch": (lambda x: VIT.maps(x)[0], {}, RuntimeError, "does not follow the batch"),
    "turned": (lambda x: VIT.maps(x).transpose(2, 3), {}, RuntimeError, "rows and columns are exchanged"),
    "by columns": (
        lambda x: VIT.maps(x).transpose(2, 3).flatten(2).transpose(1, 2), {}, RuntimeError, "by columns, not by rows"
    ),
    "class token at the end": (lambda x: VIT(x).roll(-3, 1), {}, RuntimeError, "3 tokens of no cell at the end"),
    "several": (VIT.pyramid, {}, RuntimeError, r"\[0, 1\]; say which, such as output=1"),
    "none that fits": (lambda x: {"a": VIT(x).mean(1)}, {}, RuntimeError, "nothing that .* forms a grid; .*one vector"),
    "no tensor": (lambda x: "abc", {}, RuntimeError, "gave str; need a tensor"),
    "nothing": (lambda x: None, {}, RuntimeError, "gave NoneType"),
    "numpy": (lambda x: VIT.maps(x).detach().numpy(), {}, RuntimeError, "gave ndarray"),
    "labels": (lambda x: VIT.maps(x).argmax(1, keepdim=True), {}, RuntimeError, "torch.int64"),
    "no such key": (VIT.as_dict, {"output": "x"}, RuntimeError, "gave no 'x', but .*'patches'"),
    "key of a tensor": (VIT, {"output": 0}, RuntimeError, "gave a tensor or nothing where 0 was asked for"),
    "no such layer": (VIT, {"layer": "block.2"}, ValueError, "no submodule 'block.2'; it has blocks"),
    "layer of a function": (lambda x: x, {"layer": "blocks.2"}, ValueError, "is a function; give the module"),
    "prefix": (VIT, {"prefix_tokens": 1}, RuntimeError, "3 tokens beside a grid of 16 pixels .* not prefix_tokens=1"),
    "prefix of another kind": (VIT, {"prefix_tokens": "one"}, ValueError, "need 'auto' or a number, got 'one'"),
    "patch of another kind": (VIT, {"patch_size": 0}, ValueError, "patch_size: need a positive int"),
    "output of another kind": (VIT, {"output": None}, ValueError, "output: need 'auto'"),
    "one statistic": (VIT, {"mean": (0, 0, 0)}, ValueError, "give both"),
    "unlike statistics": (VIT, {"mean": (0, 0), "std": (1, 1, 1)}, ValueError, "as many of both"),
    "no deviation": (VIT, {"mean": (0, 0, 0), "std": (1, 0, 1)}, ValueError, "std above 0"),
    "in training": (Vit().train(), {}, ValueError, r"is in training mode.*call .eval\(\)"),
    "in part in training": (nn.Sequential(nn.Conv2d(3, 4, 8, 8)), {}, ValueError, "in training mode"),
    "another device": (VIT, {"device": "meta"}, ValueError, "lies on cpu, not on meta"),
    "two devices": (
        nn.ModuleList([nn.Conv2d(3, 4, 8, 8), nn.Linear(1, 1, device="meta")]).eval(), {}, ValueError, "cpu and meta"
    ),
    "gradients": (wants_gradients, {}, RuntimeError, "wants gradients.*torch.enable_grad"),
    "a class": (Vit, {}, TypeError, "the class Vit"),
    "no function": (3, {}, TypeError, "got int"),
    "wrong patch": (VIT, {"patch_size": 10}, AssertionError, "sides must be times 16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    given, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        wrap_encoder(given, **{"patch_size": 16, **options} if kind is RuntimeError else options)


def test_that_no_patch_fits_is_told_with_a_reason():
    with pytest.raises(RuntimeError, match="patch_size: .* gives no grid for .* 16, 14, .*; of 16: .*one vector"):
        wrap_encoder(lambda x: VIT(x).mean(1) if x.shape[2] % 16 == 0 == x.shape[3] % 16 else 1 / torch.zeros(0).sum())


def test_an_encoder_is_one_already():
    with pytest.raises(TypeError, match="is an Encoder already"):
        wrap_encoder(wrap_encoder(VIT))


def test_what_goes_wrong_later():
    image = noise(3, 3, 32, 48)
    with pytest.raises(RuntimeError, match=r"loses_one gave \(2, 8, 2, 3\) for H = 32, W = 48, .*follow the batch"):
        wrap_encoder(loses_one, 16)(image)
    encoder = wrap_encoder(grows, 16)
    CALLS.clear()
    for _ in range(6):
        encoder(image)
    with pytest.raises(RuntimeError, match="follow the grid"):
        encoder(image)
    vit = Vit()
    encoder = wrap_encoder(vit)
    with pytest.raises(
        ValueError, match=r"image is on meta, encoder Vit on cpu; move the image or use encoder.to\('meta'\)"
    ):
        encoder(image.to("meta"))
    vit.train()
    with pytest.raises(ValueError, match="in training mode"):
        encoder(image)
    vit.eval().to("meta")
    with pytest.raises(ValueError, match="Vit lies on meta, its encoder on cpu; move both"):
        encoder(image)


def test_a_layer_that_runs_never_or_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 3, 8, 8), nn.Identity()
            self.same = nn.Identity()

        def forward(self, x):
            return self.same(self.same(self.conv(x)))

    with pytest.raises(RuntimeError, match="'unused' of .*Twice was run 0 times"):
        wrap_encoder(Twice().eval(), 8, layer="unused")
    with pytest.raises(RuntimeError, match="'same' of .*Twice was run 2 times"):
        wrap_encoder(Twice().eval(), 8, layer="same")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite(value):
    encoder = wrap_encoder(lambda x: nn.functional.avg_pool2d(x, 8) + (0 if x.mean() < 5 else value), 8, name="mine")
    image = noise(3, 32, 48).clamp(-2, 2)
    anyup_fast.extract_features(image, encoder)
    with pytest.raises(RuntimeError, match="mine gave NaN or infinite values for a finite image"):
        anyup_fast.extract_features(image + 10, encoder, value_range="imagenet")


def test_overflow_of_float16_is_told():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 8, 8)

        def forward(self, x):
            return self.conv(x) * 60000 * 60000

    with pytest.raises(RuntimeError, match=r"float16, whose range ends at 65504; .*bfloat16 or float32"):
        anyup_fast.extract_features(noise(3, 32, 48).clamp(-2, 2), wrap_encoder(Loud().half().eval(), 8))


# package.module:object

MODULE = """
import torch
from torch import nn
from anyup_fast import wrap_encoder

class Net(nn.Module):
    def __init__(self, dim=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, dim, 8, 8)

    def forward(self, x):
        return self.conv(x)

def encoder():
    return wrap_encoder(Net().eval(), 8, name="made")

def network(pretrained=True):
    return Net()

def features(image):
    return nn.functional.avg_pool2d(image, 8)

class Parts:
    net = Net()

number = 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(encoders, "_loaded", {})
    yield tmp_path
    sys.modules.pop("own_networks", None)


@pytest.mark.parametrize("name, dim", [("encoder", 4), ("network", 4), ("Net", 4), ("features", 3), ("Parts.net", 4)])
def test_objects_of_modules_are_loaded(own_module, name, dim):
    encoder = load_encoder(f"own_networks:{name}")
    assert (encoder.patch_size, encoder.dim) == (8, dim)
    assert load_encoder(f"own_networks:{name}") is encoder
    assert anyup_fast.extract_features(noise(3, 32, 48), f"own_networks:{name}").shape == (dim, 4, 6)


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("own_network:encoder", RuntimeError, "no module 'own_network' .* PYTHONPATH"),
        ("own_networks:encode", ValueError, "own_networks has no 'encode'; did you mean 'encoder'"),
        ("own_networks:Parts.nets", ValueError, "no 'Parts.nets'"),
        ("own_networks:number", TypeError, "got int"),
    ],
)
def test_names_of_objects_that_do_not_fit(own_module, name, kind, message):
    with pytest.raises(kind, match=message):
        load_encoder(name)


def test_weights_of_an_object(own_module):
    with pytest.raises(ValueError, match="the function says where they are"):
        load_encoder("own_networks:encoder", weights="hub")
