"""Everything that is done with a run trained on masks, on the command line: evaluated, attacked, measured, compared."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

import clead
from clead.api.results import read_record
from clead.attacks.masks import MaskAPGD
from clead.cli.app import Stopped, app
from clead.errors import UserError
from clead.inference.models import open_models
from clead.inference.png import png_uri
from clead.losses.pixels import VOID
from clead.measurements.base import Measured, MeasurementRecord
from clead.playground import masks
from clead.playground.choices import AttackSettings
from clead.playground.comparison import open_comparison
from clead.report.sections.masks import colours
from clead.results.format import percent
from clead.results.masks import Counts, counts_of, mean_iou, pixel_accuracy
from clead.runs.loading import open_run
from clead.serving import ServeSettings, create_app
from clead.serving.schemas import PredictAnswer
from clead.settings import Ratio
from clead.tasks.segmentation import SEGMENTATION
from support import encoded, generator

SHORT = [
    *("--task", "segmentation", "--model.name", "unet", "--model.width", "4", "--model.levels", "2"),
    *("--data.name", "masks", "--data.batch_size", "4", "--train.budget", "null", "--train.epochs", "12"),
    *("--train.validate_every", "12", "--optim.lr", "0.03"),
    *("--attack.steps", "1", "--threat.eps", "8/255", "--train.device", "cpu"),
]
QUICK = ["--eval.steps", "3", "--eval.check_images", "0", "--eval.curve_points", "0"]
N, K = 6, 3


def command(*arguments: object) -> None:
    app([str(each) for each in arguments], standalone_mode=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 16×16 pixels whose colour says the class of each pixel, in train/ and test/, and a corner of void."""
    folder, draw = tmp_path_factory.mktemp("data"), generator(5)
    for split, count in (("train", 16), ("test", N)):
        for each in range(count):
            mask = torch.randint(K, (4, 4), generator=draw).repeat_interleave(4, 0).repeat_interleave(4, 1)
            noise = torch.randint(60, (16, 16, 3), generator=draw)
            pixels = noise + 150 * torch.nn.functional.one_hot(mask, K)
            mask[:2, :2] = VOID
            for kind, array in (("images", pixels), ("masks", mask)):
                path = folder / split / kind / f"{each}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.numpy().astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A trained and evaluated run, which no test changes."""
    path = tmp_path_factory.mktemp("run") / "scenes"
    command("train", "digits-pgd-at", *SHORT, "--data.path", data, "--out", path)
    command("evaluate", path, "--suite", "sea-quick", *QUICK)
    return path


def split_of(run) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is evaluated, in its order."""
    test = open_run(run, None, None, None).images
    return test.images.float() / 255, test.labels.long()


def test_data_with_masks_is_described(data, tmp_path, capsys):
    command("data", data, "--data.name", "masks", "--show", tmp_path / "sheet.png")
    out = capsys.readouterr().out
    assert "classes (number, name, images with it: training, validation, test)" in out and "  2  2  " in out
    assert "--data.name masks --task segmentation --model.name unet" in out and "--data.name auto" not in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height >= K * 64


def test_a_run_is_evaluated_and_its_report_has_pictures(run):
    record = read_record(run)
    assert (record.suite, record.task, record.data.n) == ("sea-quick", "segmentation", N)
    pictures = re.findall(r"image (\d+): [\d.]+.% of the pixels right when clean", (run / "report.html").read_text())
    assert set(map(int, pictures)) == set(range(1, N + 1))


def test_validation_of_a_training_logs_the_miou_and_the_report_draws_it(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (validated,) = (line for line in lines if line["kind"] == "validation")
    assert 0 <= validated["robust_miou"] <= validated["clean_miou"] <= validated["clean_accuracy"] <= 1
    page = (run / "report.html").read_text()
    assert f"Robust mIoU, last: scenes {percent(validated['robust_miou'])}" in page


def test_a_stopped_evaluation_goes_on_and_its_suite_is_of_the_task(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    attack, calls = MaskAPGD.perturb, []

    def stops(self, *args, **kwargs):
        calls.append(self.loss)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attack(self, *args, **kwargs)

    monkeypatch.setattr(MaskAPGD, "perturb", stops)
    arguments = ("evaluate", tmp_path / "run", *QUICK, "--threat.eps", "4/255", "--eval.images", "2")
    with pytest.raises(Stopped):
        command(*arguments)
    command(*arguments)
    record = read_record(tmp_path / "run")
    assert len(calls) == 4 and (record.threat.eps_text, record.suite) == ("4/255", "sea")
    assert "of the pixels of 2 test images" in capsys.readouterr().out


def test_attacked_images_are_saved_with_masks_and_answers_in_order(run, tmp_path):
    out = tmp_path / "results"
    command("attack", run, "--attack.steps", "2", "--save", tmp_path / "adv.npz", "--out", out)
    saved = np.load(tmp_path / "adv.npz")
    x, y = split_of(run)
    assert set(saved) == {"x", "x_adv", "labels", "predicted", "predicted_adv"}
    assert np.array_equal(saved["x"], x.numpy()) and np.array_equal(saved["labels"], y.numpy())
    with torch.no_grad():
        answers = clead.load(run)(torch.from_numpy(saved["x_adv"])).argmax(1)
    assert np.array_equal(saved["predicted_adv"], answers.numpy())
    record = json.loads(next(out.glob("attack-*.json")).read_text())
    counts = counts_of(record["masks"]["lowest_accuracy"], K)
    right = (saved["predicted_adv"] == saved["labels"]).sum((1, 2))
    assert record["worst"]["accuracy"] == pytest.approx(pixel_accuracy(counts.total()))
    assert (counts.hit.sum(-1) <= right).all()


def test_corruptions_report_right_pixels_and_miou(run, tmp_path, capsys):
    command("corruptions", run, "--severities", "2", "--names", "contrast", "--out", tmp_path)
    result = json.loads((tmp_path / "corruptions.json").read_text())["result"]
    x, y = split_of(run)
    with torch.no_grad():
        counts = Counts(*SEGMENTATION.counts(clead.load(run)(x), y).movedim(1, 0).numpy())
    assert result["clean"]["accuracy"] == pytest.approx(pixel_accuracy(counts.total()))
    assert result["clean_miou"] == pytest.approx(mean_iou(counts.total()))
    (cell,) = result["cells"]
    assert cell["miou"] < result["clean_miou"] and cell["accuracy"]["accuracy"] == result["mean_accuracy"]
    out = capsys.readouterr().out
    assert "mean mIoU" in out and "mean share of right pixels" in out
    record = MeasurementRecord.model_validate_json((tmp_path / "corruptions.json").read_text())
    plots = record.result.section([Measured(0, "run", record)]).blocks[0]
    assert "Right are pixels; mIoU " in plots.plots[0].caption


def test_runs_are_compared_by_pixels_and_miou(run, capsys):
    command("compare", run, run)
    out = capsys.readouterr().out
    assert "Right pixels on 6 images" in out and "worst case, mIoU: +0.0 points" in out and "McNemar" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "RUN", "--suite", "quick"), "use --eval.suite sea"),
        (("evaluate", "RUN", "--save-adversarial", "OUT/a.parquet"), "use clead attack RUN --save FILE.npz"),
        (("evaluate", "RUN", "--transfer-from", "RUN"), "leave it out"),
        (("attack", "RUN", "--target", "1"), "aim at no class; leave it out"),
        (("attack", "RUN", "--attack.name", "square"), "use --attack.name pgd"),
        (("distances", "RUN"), "is of the task segmentation, and distances measures one class per image; use clead evaluate"),
    ],
)  # fmt: skip
def test_what_masks_have_no_place_for_is_refused_in_one_line(run, tmp_path, arguments, message):
    with pytest.raises(UserError) as refused:
        command(*(each.replace("RUN", str(run)).replace("OUT", str(tmp_path)) for each in arguments))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_exported_file_has_logits_of_pixels_for_any_number_of_images(run, data, tmp_path):
    command("export", run, "--out", tmp_path / "onnx")
    answer = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    x, _ = split_of(run)
    for count in (1, 5):
        (logits,) = answer.run(["logits"], {"images": x[:count].numpy()})
        with torch.no_grad():
            expected = clead.load(run)(x[:count])
        assert logits.shape == (count, K, 16, 16) and np.abs(logits - expected.numpy()).max() < 1e-4
    assert json.loads(answer.get_modelmeta().custom_metadata_map["task"]) == {"name": "segmentation"}
    card, miou = (tmp_path / "onnx" / "README.md").read_text(), read_record(run).metrics[0]
    assert f"| **mIoU, worst case** | **{miou.robust:.1%}" in card and "pipeline_tag: image-segmentation" in card
    chosen = ["--task", "segmentation", "--data.name", "masks", "--data.path", data, "--out", tmp_path / "result"]
    with pytest.raises(
        UserError, match="answers for each pixel: .* no gradient, which every attack on masks needs: give"
    ):
        command("evaluate", "--model", tmp_path / "onnx" / "model.onnx", *chosen)
    command("export", run, "--format", "safetensors", "--out", tmp_path / "weights")
    with torch.no_grad():
        assert torch.equal(clead.load(tmp_path / "weights")(x), clead.load(run)(x))


def test_the_server_answers_with_masks(run):
    app = create_app([run], ServeSettings(threads=1, max_images=4))
    x, _ = split_of(run)
    buffer = io.BytesIO()
    np.save(buffer, (x[:3] * 255).round().byte().numpy())
    with torch.no_grad():
        expected = clead.load(run)(x[:3]).softmax(1)
    with TestClient(app) as client:
        kind = {"content-type": "application/octet-stream"}
        answer = client.post("/v1/predict", content=buffer.getvalue(), headers=kind).json()
        refused = client.post("/v1/explain", content=buffer.getvalue(), headers=kind)
        np.save(buffer := io.BytesIO(), np.zeros((5, 3, 16, 16), np.uint8))
        too_many = client.post("/v1/predict", content=buffer.getvalue(), headers=kind)
        assert client.get("/openapi.json").status_code == 200
    PredictAnswer.model_validate(answer)
    for one, probabilities in zip(answer["predictions"], expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(one["mask"].partition(",")[2]))) as picture:
            mask = np.asarray(picture)
            assert picture.mode == "P" and np.array_equal(np.asarray(picture.convert("RGB")), colours(mask))
        assert np.array_equal(mask, probabilities.argmax(0).numpy())
        assert one["shares"] == pytest.approx([(mask == k).mean() for k in range(K)], abs=1e-6)
        assert one["probability"] == pytest.approx(probabilities.amax(0).mean().item(), abs=1e-5)
    assert refused.status_code == 422 and refused.json()["detail"].endswith("has no detector; ask /v1/predict")
    assert too_many.status_code == 422 and "\n" not in too_many.json()["detail"]


def test_a_server_resizes_as_the_training_did_also_to_no_square(data, tmp_path):
    short = [
        *SHORT[:-6],
        "--train.epochs",
        "1",
        "--attack.steps",
        "1",
        "--train.device",
        "cpu",
        "--data.limit_train",
        "4",
    ]
    command(
        "train", "digits-pgd-at", *short, "--data.path", data, "--data.image_size", "[8,12]", "--out", tmp_path / "r"
    )
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    small = photo.resize((12, 8), Image.Resampling.BILINEAR)
    with TestClient(create_app([tmp_path / "r"], ServeSettings(threads=1))) as client:
        kind = {"content-type": "image/png"}
        first, second = (client.post("/v1/predict", content=encoded(each), headers=kind) for each in (photo, small))
    assert first.status_code == 200 and first.json()["predictions"] == second.json()["predictions"]


def test_the_playground_paints_masks(run):
    served = open_models([run], ServeSettings(threads=1))
    comparison = open_comparison(served)
    images = comparison.images
    for attack in masks.MASK_OPTIONS:
        settings = AttackSettings(attack=attack, norm="linf", eps=Ratio("8/255"), steps=4)
        (outcome,) = masks.attack_mask(comparison.pair, images.images[0], images.labels[0], settings)
        x, y = images.images[0].float() / 255, images.labels[0].numpy()
        with torch.no_grad():
            answers = clead.load(run)(torch.stack([x, outcome.x_adv])).argmax(1).numpy()
        assert (outcome.x_adv - x).abs().max() <= 8 / 255 + 1e-6
        assert np.array_equal(answers, [outcome.clean, outcome.adversarial])
        assert outcome.right == pytest.approx([(each == y)[y != VOID].mean() for each in answers])
        assert outcome.right[1] < outcome.right[0]
    html = masks.cards([outcome], images.images[0], images.labels[0], comparison.classes)
    painted = png_uri(torch.from_numpy(colours(np.where(y == VOID, VOID, answers[1]))).permute(2, 0, 1))
    assert painted in html and "void: does not count" in html and html.count("<img") == 6
    assert f"{percent(outcome.right[1])} of the pixels right" in masks.verdict([outcome], settings)
