"""What stands around the integration: the demo's features, the prefill benchmark, calibration."""

from __future__ import annotations

import csv
import pathlib
import re

import pytest
import torch
from saved_vlm import photo, save_llava
from tiny_vlm import make_config, make_model, transformers

from script_kernels.transformers import prune_inputs
from script_kernels.transformers.demo import demo_features


@pytest.fixture(scope="module")
def saved_llava(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


def test_demo_features_are_the_models(saved_llava: pathlib.Path) -> None:
    features = demo_features(str(saved_llava), photo(120, 90), "what colour is the car ?")
    assert features.tokens.shape == (36, 64)
    assert features.picture.size == (90, 90)
    model = make_model("llava")
    processor = transformers.AutoProcessor.from_pretrained(saved_llava)
    pixels = processor.image_processor(photo(120, 90).crop((15, 0, 105, 90)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(features.tokens, model.model.get_image_features(pixels).pooler_output[0])
        words = model.get_input_embeddings()(torch.tensor([15, 16, 17, 18, 19, 20]))
    assert torch.equal(features.query, words)
    with pytest.raises(ValueError, match="text: expected at least one word"):
        demo_features(str(saved_llava), photo(90, 90), "")


def test_the_demo_command_draws_a_models_features(
    saved_llava: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("skimage")
    from PIL import Image

    from script_kernels import cli

    photo(120, 90).save(tmp_path / "photo.png")
    output = tmp_path / "demo.png"
    arguments = ["demo", "--model", str(saved_llava), "--image", str(tmp_path / "photo.png"), "--output", str(output)]
    assert cli.main([*arguments, "--keep", "7", "--text", "what is the car ?"]) == 0
    said = capsys.readouterr().out
    assert '"what is the car ?": 5 text tokens' in said
    assert re.search(r"^tokens +36 \(6 x 6\) of 64 numbers$", said, re.MULTILINE)
    assert re.search(r"^kept +7$", said, re.MULTILINE)
    with Image.open(output) as picture:
        assert min(picture.size) > 500
    for extra, message in (
        (["--keep", "37"], "--keep: expected 1 to 36"),
        (["--keep", "7", "--box", "0,0,9,9"], "--box: expected none with --model"),
        (["--keep", "7", "--text", ""], "--model: text: expected at least one word"),
        (["--keep", "7", "--model", str(tmp_path / "none")], "--model: "),
    ):
        with pytest.raises(SystemExit):
            cli.main([*arguments, *extra])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl"])
def test_prefill_runs_any_supported_config(
    family: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import prefill

    folder = tmp_path / family
    config = make_config(family)
    config.get_text_config().vocab_size = 200
    config.save_pretrained(folder)
    arguments = ["--config", str(folder), "--keep", "8", "--rounds", "1", "--out", str(tmp_path), "--device", "cpu"]
    assert prefill.main(arguments) == 0
    said = capsys.readouterr().out
    with (tmp_path / f"prefill-{family}.csv").open() as file:
        full, pruned = csv.DictReader(file)
    assert (full["keep"], pruned["keep"], pruned["visual"]) == ("all", "8", "8")
    assert int(full["prompt"]) - int(pruned["prompt"]) == int(full["visual"]) - 8
    assert float(full["gflops"]) > float(pruned["gflops"]) > 0
    assert float(full["kv_mib"]) > float(pruned["kv_mib"]) > 0
    assert float(full["prune_ms"]) == 0 < float(pruned["select_ms"]) < float(pruned["prune_ms"])
    for row in (full, pruned):
        parts = [float(row[f"{part}_ms"]) for part in ("tower", "projector", "prune", "llm")]
        assert min(parts[:2]) > 0
        assert sum(parts) <= float(row["first_token_ms"])
    assert family in said


def test_presets_without_their_device_are_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import prefill

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prefill.main(["--preset", "llava-next-7b", "--preset", "qwen2.5-vl-7b"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all("skipped, needs a CUDA device" in line for line in said)


def test_targets_are_judged_by_the_rows() -> None:
    from bench import prefill

    common = {"preset": "p", "prompt": 1, "tower_ms": 1.0, "projector_ms": 1.0, "select_ms": 1.0, "kv_mib": 1.0}
    common |= {"first_token_ms": 1.0, "peak_mib": None, "total_speedup": 1.0, "rounds": 1}
    full = prefill.Row(keep="all", visual=100, prune_ms=0.0, llm_ms=100.0, gflops=50.0, llm_speedup=1.0, **common)
    last = prefill.Row(keep="5", visual=5, prune_ms=2.0, llm_ms=8.0, gflops=4.0, llm_speedup=10.0, **common)
    preset = prefill.Preset(prefill.llava_7b, (5,), torch.float32, False, speedup=6.8, flops=10.0, share=0.01)
    speed, flops, share = prefill.targets(preset, [full, last])
    assert (speed.measured, flops.measured, share.measured) == (10.0, 12.5, 2.0)
    assert (speed.met, flops.met, share.met) == (True, True, False)


@pytest.mark.parametrize("name", ["llava-next-7b", "llava-1.5-7b", "qwen2.5-vl-7b"])
def test_presets_of_seven_billion_have_that_size(name: str) -> None:
    from bench import prefill

    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(prefill.PRESETS[name].config())
    assert 6.7e9 < sum(p.numel() for p in model.parameters()) < 8.5e9


def test_calibrate_a_folder_of_pictures(
    saved_llava: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from script_kernels import cli
    from script_kernels.calibrate import Calibration, candidates

    for n in range(2):
        photo(90 + 30 * n, 90).save(tmp_path / f"{n}.png")
    questions = tmp_path / "questions.tsv"
    questions.write_text("0.png\twhat is the car ?\n\n1.png\twhat colour is the car ?\n")
    given = ["calibrate", "--model", str(saved_llava), "--images", str(tmp_path), "--questions", str(questions)]
    output = tmp_path / "found.json"
    budget = ["--budget", str(len(candidates()) + 6), "--tokens", "2"]
    assert (
        cli.main([*given, "--keep", "5", "--output", str(output), "--plot", str(tmp_path / "found.png"), *budget]) == 0
    )
    found = Calibration.load(output)
    out, err = capsys.readouterr()
    assert not list(tmp_path.glob("*.seen"))  # it went through: nothing to go on from
    assert found.table() in out
    assert found.best.name in out
    assert "pruned runs" in err
    assert (tmp_path / "found.png").stat().st_size > 1000
    assert {row.inputs for row in found.rows} == {1, 2}
    model, processor = make_model("llava"), transformers.AutoProcessor.from_pretrained(saved_llava)
    inputs = processor(images=photo(90, 90), text="USER : <image> what is the car ? ASSISTANT :", return_tensors="pt")
    assert len(prune_inputs(model, inputs, calibration=output, tokenizer=processor).keep_indices[0]) == 5

    for text, message in [
        ("0.png what is it\n", "expected a file name, a tab and a question"),
        ("2.png\twhat is the car ?\n", "expected a picture in"),
        ("\n", "got none"),
    ]:
        questions.write_text(text)
        with pytest.raises(SystemExit) as stop:
            cli.main(given)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
