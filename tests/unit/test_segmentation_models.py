"""Networks for segmentation: shapes, the U-Net by hand, backbones that begin with a classifier's weights, users' modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from clead.api.training import train
from clead.attacks.runner import image_gradient
from clead.config.recipes import load_recipe
from clead.config.schema import build
from clead.errors import UserError
from clead.models import MODELS
from clead.models.build import build_model
from clead.models.deeplab import DeepLab
from clead.models.fold_batch_norm import folded
from clead.models.modes import attack_mode
from clead.models.partial_weights import load_matching
from clead.models.split import adapt, weights
from clead.models.unet import UNet
from support import generator

SHAPE = (3, 18, 24)


def made(settings, classes=5, shape=SHAPE, seed=0):
    return build_model(settings, shape[0], classes, [0.4] * 3, [0.2] * 3, seed=seed, sample_shape=shape).eval()


@pytest.mark.parametrize(
    "settings",
    [
        UNet(width=4, levels=3),
        DeepLab(backbone="resnet8", backbone_args={"width": 4}, width=8),
        DeepLab(backbone="resnet10", backbone_args={"width": 4, "stem": "large"}, width=8, skip=0),
        DeepLab(backbone="preact_resnet18", backbone_args={"width": 4}, width=8, skip=1),
        DeepLab(backbone="small_cnn", backbone_args={"width": 4}, width=8, skip=9),
    ],
    ids=lambda each: f"{type(each).__name__}-{getattr(each, 'backbone', '')}",
)
def test_logits_are_of_every_pixel_and_upsampled_from_the_features(settings):
    model, x = made(settings), torch.rand(2, *SHAPE, generator=generator())
    features, logits = model.features_and_logits(x)
    assert logits.shape == (2, 5, *SHAPE[1:]) and features.shape[:2] == (2, model.feature_dim)
    cells = (
        torch.einsum("bdhw,kd->bkhw", features, model.classifier.weight[:, :, 0, 0])
        + model.classifier.bias[:, None, None]
    )
    torch.testing.assert_close(logits, functional.interpolate(cells, size=SHAPE[1:], mode="bilinear"))
    assert (image_gradient(model, x).abs().flatten(2).amax(2) > 0).all()
    with attack_mode(model), torch.no_grad(), folded(model, x):
        torch.testing.assert_close(model(x), logits, atol=1e-4, rtol=1e-4)


def test_the_unet_is_the_one_of_the_paper():
    model, x = made(UNet(width=4, levels=2, normalize="none")), torch.rand(1, *SHAPE, generator=generator())
    fine, coarse = model.encoder.levels
    skip = fine(x)
    below = coarse(functional.max_pool2d(skip, 2))
    joined = torch.cat([functional.interpolate(below, scale_factor=2), skip], 1)
    torch.testing.assert_close(model(x), model.classifier(model.decoder.levels[0](joined)))
    assert sum(p.numel() for p in made(UNet(), 11).parameters()) == 488_171


@pytest.mark.parametrize("name, backbone", [("resnet8", {"width": 4}), ("preact_resnet18", {"width": 4})])
def test_a_backbone_begins_with_the_weights_of_a_classifier(name, backbone):
    classifier = made(MODELS.get(name)(**backbone), classes=7, seed=1)
    settings = DeepLab(backbone=name, backbone_args=backbone, width=64)
    model, before = made(settings, seed=2), made(settings, seed=2)
    notes = load_matching(model, weights(classifier), "runs/robust", 5)
    assert notes[0].endswith("of the weights before the head") and "the decoder is new, drawn from the seed" in notes
    x = torch.rand(2, *SHAPE, generator=generator())
    last = model.encoder.maps(model.normalize(x))[-1]
    torch.testing.assert_close(last.mean((2, 3)), classifier.features(x))
    for key, value in before.decoder.state_dict().items():
        assert torch.equal(value, model.decoder.state_dict()[key])
    with pytest.raises(UserError, match="is of another architecture"):
        load_matching(made(UNet()), weights(classifier), "runs/robust", 5)


def test_a_segmentation_model_begins_with_another_one_of_the_same_kind():
    settings = UNet(width=4, levels=2)
    source, model = made(settings, seed=3), made(settings, seed=4)
    notes = load_matching(model, weights(source), "runs/masks", 5)
    assert not any("new" in note for note in notes)
    x = torch.rand(1, *SHAPE, generator=generator())
    torch.testing.assert_close(model(x), source(x))


def test_a_unet_of_too_many_levels_names_how_many_there_can_be():
    assert made(UNet(width=2, levels=4), shape=(3, 8, 9))(torch.rand(1, 3, 8, 9)).shape == (1, 5, 8, 9)
    with pytest.raises(
        UserError, match="5 levels halve an image 4 times, got images of 9x8 pixels; give --model.levels 4"
    ):
        made(UNet(width=2, levels=5), shape=(3, 8, 9))


def test_a_backbone_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"model: .*got 'resnet9'; give --model.backbone resnet10"):
        build("model", {"name": "deeplab", "backbone": "resnet9"})
    with pytest.raises(UserError, match=r"model.backbone_args.depth: unknown key"):
        build("model", {"name": "deeplab", "backbone_args": {"depth": 3}})


class Net(nn.Module):
    """A user's network of half the resolution, in the forms in which libraries return logits."""

    def __init__(self, form="tensor", enlarge=False):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 5, 1)
        self.form, self.enlarge = form, enlarge

    def forward(self, x):
        z = self.head(self.body(x).relu())
        if self.enlarge:
            z = functional.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
        return {
            "tensor": z,
            "torchvision": {"out": z, "aux": z * 2},
            "transformers": SimpleNamespace(logits=z, loss=None),
        }[self.form]


@pytest.mark.parametrize("form", ["tensor", "torchvision", "transformers"])
@pytest.mark.parametrize("enlarge", [False, True])
def test_a_users_module_is_upsampled_and_its_features_are_found(form, enlarge):
    module, x = Net(form, enlarge), torch.rand(2, *SHAPE, generator=generator())
    model = adapt(module, sample_shape=SHAPE, num_classes=5).eval()
    features, logits = model.features_and_logits(x)
    cells = module.head(module.body(x).relu())
    torch.testing.assert_close(logits, functional.interpolate(cells, size=SHAPE[1:], mode="bilinear"))
    torch.testing.assert_close(features, module.body(x).relu())
    assert (model.num_classes, model.feature_dim, model.classifier_name) == (5, 6, "head")
    named = adapt(Net(form, enlarge), sample_shape=SHAPE, classifier="head")
    assert named.features(x).shape == features.shape


def test_the_last_convolution_of_a_users_module_is_replaced_for_other_classes():
    from clead.models.split import AdaptedModel

    model = AdaptedModel(Net("torchvision"), sample_shape=SHAPE, num_classes=4, new_head=True)
    assert model(torch.rand(1, *SHAPE)).shape == (1, 4, *SHAPE[1:]) and "5 → 4 classes" in model.origin[0]


@pytest.mark.parametrize("network", ["unet", "deeplab"])
def test_a_network_for_masks_is_refused_where_images_have_one_class(network, tmp_path):
    config = load_recipe("digits-standard", ["--model.name", network, "--train.device", "cpu", "--train.epochs", "1"])
    with pytest.raises(UserError, match=f"{network} answers per pixel.*task classification.*--model.name small_cnn"):
        train(config, out=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe, words", [("digits-clead", "clead_pixels"), ("digits-mart", "knows no segmentation")])
def test_a_method_that_does_not_take_masks_names_those_that_do(recipe, words, tmp_path):
    settings = ["--data.name", "digit_scenes", "--task", "segmentation", "--train.device", "cpu"]
    with pytest.raises(UserError, match=f"{words}|--method.name pgd_at.*{words}"):
        train(load_recipe(recipe, settings), out=tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()
