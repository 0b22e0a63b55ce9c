"""train.py from the outside: what a run leaves behind, what continues it bit for bit, and what bad input gets."""

from __future__ import annotations

import argparse
import csv
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, TinyDataset

import train
from models.checkpoints.files import load_model, read, save
from tests.test_dataloaders import spoil
from utils.config import UserError
from utils.recorder import COLUMNS

# No warm-up and a batch per step, so that a handful of images trains; no mosaics, which only cost time here.
HYP = {"lr0": 0.005, "warmup_epochs": 0.0, "nominal_batch": 4, "mosaic": 0.0}


def micro_network(folder: Path) -> Path:
    """yolov5n's YAML with 8 to 32 channels: the same rows, a tenth of the time."""
    text = (REPOSITORY / "models/yolov5n.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    data["width_multiple"] = 0.03
    file = folder / "micro.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return file


def quick(folder: Path, dataset: TinyDataset, **changes: Any) -> argparse.Namespace:
    """A run of two epochs on the tiny dataset."""
    options = dict(
        weights="",
        cfg=str(micro_network(folder)),
        data=str(dataset.yaml),
        hyp=dict(HYP),
        imgsz=64,
        batch_size=4,
        epochs=2,
        workers=0,
        noplots=True,
        project=str(folder / "runs"),
        device="cpu",
    )
    return train.run(**{**options, **changes})


def rows_of(save_dir: Path) -> list[dict[str, float]]:
    with open(save_dir / "results.csv", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    header = [name.strip() for name in rows[0]]
    return [dict(zip(header, map(float, row))) for row in rows[1:]]


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    return read(file, training=False).tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: TinyDataset) -> argparse.Namespace:
    """One finished run, looked at by several tests."""
    return quick(tmp_path_factory.mktemp("finished"), tiny_dataset, save_period=1)


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_upstreams_files(finished: argparse.Namespace) -> None:
    save_dir = finished.save_dir
    files = {file.relative_to(save_dir).as_posix() for file in save_dir.rglob("*") if file.is_file()}
    assert {"hyp.yaml", "opt.yaml", "results.csv", "weights/best.pt", "weights/last.pt"} <= files
    assert {"weights/epoch0.pt", "weights/epoch1.pt"} <= files
    opt = yaml.safe_load((save_dir / "opt.yaml").read_text(encoding="utf-8"))
    hyp = yaml.safe_load((save_dir / "hyp.yaml").read_text(encoding="utf-8"))
    assert (opt["imgsz"], opt["epochs"], opt["hyp"]) == (64, 2, hyp)
    assert hyp["lr0"] == 0.005 and hyp["box"] == 0.05  # gains as in the file, not scaled to the network


def test_results_csv_has_upstreams_columns_and_widths(finished: argparse.Namespace) -> None:
    lines = (finished.save_dir / "results.csv").read_text(encoding="utf-8").splitlines()
    cells = [line.split(",") for line in lines]
    assert [name.strip() for name in cells[0]] == ["epoch", *COLUMNS]
    assert all(len(cell) == 20 for row in cells for cell in row if cell.strip() != "metrics/mAP_0.5:0.95")
    rows = rows_of(finished.save_dir)
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[0]["x/lr0"] == pytest.approx(0.005) and rows[1]["x/lr2"] == pytest.approx(0.005 * (0.5 * 0.99 + 0.01))
    assert all(row["train/box_loss"] > 0 and row["val/obj_loss"] > 0 for row in rows)


def test_the_caller_gets_folder_best_checkpoint_and_final_metrics(finished: argparse.Namespace) -> None:
    assert finished.save_dir.name == "exp" and finished.best == finished.save_dir / "weights/best.pt"
    assert len(finished.results) == 7 and all(0 <= value <= 1 for value in finished.results[:4])


def test_the_checkpoints_are_stripped_to_half_precision_and_can_be_loaded(finished: argparse.Namespace) -> None:
    content = torch.load(finished.best, weights_only=True)
    assert content["model"]["model.0.conv.weight"].dtype == torch.float16 and "optimizer" not in content
    model = load_model(finished.best)
    assert model.names == {0: "square", 1: "disc"}
    assert model(torch.zeros(1, 3, 64, 64))[0].shape == (1, 3 * (8 * 8 + 4 * 4 + 2 * 2), 7)


def test_a_second_run_gets_a_folder_of_its_own_and_with_the_same_seed_the_same_weights(
    finished: argparse.Namespace, tiny_dataset: TinyDataset
) -> None:
    project = finished.save_dir.parent
    second = quick(project.parent, tiny_dataset, name="cfg", nosave=True, noval=True)
    assert second.save_dir == project / "micro"
    assert (second.save_dir / "weights/best.pt").exists()  # the last epoch is always judged and kept
    assert [row["val/obj_loss"] > 0 for row in rows_of(second.save_dir)] == [False, True]
    assert same(weights_of(second.best), weights_of(finished.save_dir / "weights/last.pt"))


def test_another_seed_gives_other_weights(
    finished: argparse.Namespace, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    other = quick(tmp_path, tiny_dataset, seed=1, noval=True)
    assert not same(weights_of(finished.save_dir / "weights/last.pt"), weights_of(other.best))


@pytest.mark.slow
def test_a_compiled_network_trains_to_the_same_weights(
    finished: argparse.Namespace, tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's tracing is real here; its code generator is left out, which takes minutes."""
    seen, backend = [], functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda network: seen.append(network) or backend(network))
    run = quick(tmp_path, tiny_dataset, compile=True)
    assert len(seen) == 1
    assert same(weights_of(run.save_dir / "weights/last.pt"), weights_of(finished.save_dir / "weights/last.pt"))


def test_compiling_for_a_cpu_without_a_compiler_says_so(
    tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C"):
        quick(tmp_path, tiny_dataset, compile=True)


def test_keywords_are_converted_as_on_the_command_line(
    finished: argparse.Namespace, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    words = dict(imgsz="64", batch_size="4", epochs="2", workers="0", seed="0", freeze=0, device=torch.device("cpu"))
    run = quick(tmp_path, tiny_dataset, **words, project=tmp_path / "runs", data=tiny_dataset.yaml, cache=False)
    assert same(weights_of(run.save_dir / "weights/last.pt"), weights_of(finished.save_dir / "weights/last.pt"))


@pytest.mark.slow
def test_freezing_keeps_layers_and_their_statistics(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    first = quick(tmp_path, tiny_dataset, epochs=1)
    second = quick(tmp_path, tiny_dataset, epochs=1, weights=str(first.best), freeze=[3])
    before, after = weights_of(first.best), weights_of(second.best)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "model.3.conv.weight" in changed and "model.3.bn.running_mean" in changed
    assert not {key for key in changed if int(key.split(".")[1]) < 3}


def test_training_stops_early_without_improvement(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    hyp = {**HYP, "lr0": 0.0}  # nothing moves, so nothing improves after the first epoch
    run = quick(tmp_path, tiny_dataset, epochs=50, patience=2, hyp=hyp, freeze=[24])
    assert [row["epoch"] for row in rows_of(run.save_dir)] == [0, 1, 2]


def test_options_that_change_the_data_or_the_optimizer_train(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    run = quick(
        tmp_path,
        tiny_dataset,
        epochs=1,
        single_cls=True,
        optimizer="AdamW",
        multi_scale=True,
        cos_lr=True,
        label_smoothing=0.1,
        cache="ram",
        rect=True,
    )
    assert load_model(run.best).names == {0: "item"}
    assert yaml.safe_load((run.save_dir / "hyp.yaml").read_text(encoding="utf-8"))["label_smoothing"] == 0.1


@pytest.mark.slow
def test_pictures_are_written(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    run = quick(tmp_path, tiny_dataset, noplots=False)
    names = {file.name for file in run.save_dir.iterdir()}
    curves = {f"{name}_curve.png" for name in ("PR", "F1", "P", "R")}
    batches = {f"train_batch{i}.jpg" for i in range(3)} | {"val_batch0_labels.jpg", "val_batch0_pred.jpg"}
    assert curves | batches | {"labels.jpg", "results.png", "confusion_matrix.png"} <= names


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_run_interrupted_between_epochs_goes_on_bit_for_bit(finished: argparse.Namespace, tmp_path: Path) -> None:
    check_resumed(finished.save_dir, tmp_path / "stopped")


def check_resumed(whole: Path, stopped: Path) -> None:
    """Resume in a new folder from epoch 0 of a run with --save-period 1: it must end as that run did."""
    (stopped / "weights").mkdir(parents=True)
    shutil.copy(whole / "weights/epoch0.pt", stopped / "weights/last.pt")
    shutil.copy(whole / "results.csv", stopped / "results.csv")  # has a row of epoch 1 already
    resumed = train.run(resume=str(stopped / "weights/last.pt"))
    assert resumed.save_dir == stopped
    assert same(weights_of(whole / "weights/last.pt"), weights_of(stopped / "weights/last.pt"))
    assert rows_of(stopped) == rows_of(whole)


def stopped_after_epoch_0(finished: argparse.Namespace, folder: Path) -> Path:
    """The last.pt of a run that was stopped there: the checkpoint that --save-period kept."""
    (folder / "weights").mkdir(parents=True)
    return Path(shutil.copy(finished.save_dir / "weights/epoch0.pt", folder / "weights/last.pt"))


def test_flags_that_resuming_ignores_are_named_with_what_to_do(
    finished: argparse.Namespace, tmp_path: Path, said: list[str]
) -> None:
    last = stopped_after_epoch_0(finished, tmp_path / "stopped")
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text("lr0: 0.5\n", encoding="utf-8")
    train.main(
        ["--resume", str(last), "--epochs", "100", "--batch", "4", "--workers", "0", "--hyp", str(hyp), "--cos-lr"]
    )
    (line,) = [line for line in said if "ignored" in line]
    assert "--hyp, --epochs, --cos-lr are ignored" in line and f"--weights {last} --epochs N" in line
    assert [row["epoch"] for row in rows_of(tmp_path / "stopped")] == [1]  # of two, as the run was begun


def test_resuming_with_the_flags_of_the_run_warns_of_nothing(
    finished: argparse.Namespace, tmp_path: Path, said: list[str]
) -> None:
    last = stopped_after_epoch_0(finished, tmp_path / "stopped")
    train.run(resume=last, epochs=2, hyp=dict(HYP), imgsz="64", device="cpu", workers=0)
    assert not [line for line in said if "ignored" in line]


@pytest.mark.parametrize(
    ("cache", "kept"),
    [(None, (True, False)), ("none", (False, False)), ("val", (False, True)), ("ram", (True, True))],
)
def test_small_sets_are_trained_on_from_memory_unless_told_otherwise(
    cache: str | None, kept: tuple[bool, bool], tiny_dataset: TinyDataset
) -> None:
    from utils.data import prepare
    from utils.training import build_loaders

    options = train.build_parser().parse_args(["--img", "64", "--batch", "4"])
    options.cache = cache
    loader, _, val_loader = build_loaders(prepare(tiny_dataset.yaml), options, HYP, 32, torch.device("cpu"))
    assert val_loader is not None
    assert (loader.dataset.store.in_memory, val_loader.dataset.store.in_memory) == kept
    assert loader.num_workers == val_loader.num_workers == 0


def test_the_number_of_workers_may_change_on_resuming_to_the_default_too(
    finished: argparse.Namespace, tmp_path: Path
) -> None:
    from models.checkpoints.files import read

    last = stopped_after_epoch_0(finished, tmp_path / "stopped")
    options = train.options_from(train.build_parser(), {"resume": last})
    usual = options.workers
    assert train._resumed(options, {"resume": last, "workers": usual})[0].workers == usual
    assert train._resumed(options, {"resume": last})[0].workers == read(last).opt["workers"] == 0


@pytest.mark.parametrize(
    ("place", "plots"),
    [
        ("models.checkpoints.files.load_model", False),  # after best.pt was stripped
        pytest.param("utils.plots.plot_results", True, marks=pytest.mark.slow),
        ("utils.recorder.Recorder.close", False),  # before last.pt is
    ],
)
def test_a_run_killed_in_its_ending_is_finished_by_resume(
    finished: argparse.Namespace,
    tiny_dataset: TinyDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    plots: bool,
) -> None:
    def killed(*arguments: object, **options: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, killed)
        quick(tmp_path, tiny_dataset, noplots=not plots)
    save_dir = tmp_path / "runs/exp"
    scrap = save_dir / "weights/.last.pt.01234567.partial"
    scrap.write_bytes(b"half")
    resumed = train.run(resume=str(save_dir / "weights/last.pt"))
    assert resumed.results == finished.results and resumed.best == save_dir / "weights/best.pt"
    assert rows_of(save_dir) == rows_of(finished.save_dir)
    for name in ("best.pt", "last.pt"):
        assert same(weights_of(finished.save_dir / "weights" / name), weights_of(save_dir / "weights" / name))
        assert read(save_dir / "weights" / name).training is None
    assert not scrap.exists() and (save_dir / "results.png").exists() == plots


def test_a_finished_or_foreign_file_is_not_resumed(finished: argparse.Namespace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"last\.pt: a finished run.*--weights"):
        train.run(resume=str(finished.save_dir / "weights/last.pt"))
    with pytest.raises(UserError, match="no such file"):
        train.run(resume=str(tmp_path / "none.pt"))


def test_an_upstream_file_is_not_resumed(weights_dir: Path) -> None:
    with pytest.raises(UserError, match=r"yolov5n\.pt: not written by this program.*--weights"):
        train.run(resume=str(weights_dir / "yolov5n.pt"))


def test_resume_without_a_path_needs_a_run(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "WORK", in_tmp)
    with pytest.raises(UserError, match=r"no last\.pt below runs"):
        train.run(resume=True)


def script(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(REPOSITORY / "train.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_an_epoch_ends_with_the_weights_of_an_undisturbed_one(
    own_tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    hyp = tmp_path / "hyp.yaml"
    hyp.write_text(yaml.safe_dump({"warmup_epochs": 1.0, "nominal_batch": 8}), encoding="utf-8")
    common = ["--weights", "", "--cfg", "yolov5n.yaml", "--data", own_tiny_dataset.yaml, "--hyp", hyp, "--img", 64]
    common += ["--batch", 2, "--epochs", 3, "--noplots", "--workers", 0, "--device", "cpu", "--project", tmp_path]
    whole = script(*common, "--name", "whole")
    assert whole.wait() == 0, whole.stdout.read() if whole.stdout else ""

    killed = script(*common, "--name", "killed")
    assert killed.stdout is not None
    text = ""
    while "1/2" not in text:  # the first batch of the second epoch, of four
        character = killed.stdout.read(1)
        assert character, f"the run ended before it could be killed:\n{text}"
        text += character
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    last = tmp_path / "killed/weights/last.pt"
    assert read(last).epoch == 0

    resumed = script("--resume", last)
    assert resumed.wait() == 0, resumed.stdout.read() if resumed.stdout else ""
    for name in ("last.pt", "best.pt"):
        assert same(weights_of(tmp_path / "whole/weights" / name), weights_of(tmp_path / "killed/weights" / name))
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_train_together(own_tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    """torchrun with gloo: one run folder, equal parts of the data, rank 0 validates."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    command += [str(REPOSITORY / "train.py"), "--weights", "", "--cfg", str(micro_network(tmp_path)), "--img", "64"]
    command += ["--data", str(own_tiny_dataset.yaml), "--batch", "4", "--epochs", "2", "--noplots", "--device", "cpu"]
    command += ["--workers", "0", "--project", str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == ["exp"]
    rows = rows_of(tmp_path / "runs/exp")
    assert [row["epoch"] for row in rows] == [0, 1] and rows[1]["train/box_loss"] > 0
    assert load_model(tmp_path / "runs/exp/weights/best.pt").names[1] == "disc"


@pytest.mark.slow
def test_all_processes_learn_the_run_folder_that_the_first_one_made(tmp_path: Path) -> None:
    """It may be another than the one asked for: that may have been taken a moment ago."""
    script = tmp_path / "agree.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import torch\n"
        "from pathlib import Path\n"
        "from utils.distributed import agreed_path, is_main, process_group\n"
        "device = torch.device('cpu')\n"
        "with process_group(device, 2):\n"
        "    path = agreed_path(Path('runs/exp7/é') if is_main() else None, device)\n"
        "Path(sys.argv[0]).with_name(f'{is_main()}.txt').write_text(str(path), encoding='utf-8')\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29534"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run([*command, str(script)], env=environment, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    agreed = {file.stem: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.txt")}
    assert agreed == dict.fromkeys(("True", "False"), "runs/exp7/é")


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-weights"], "--image-weights is not offered.*list"),
        (["--quad"], "--quad is not offered.*--multi-scale"),
        (["--evolve"], "--evolve is not offered"),
        (["--evolve", "10"], "--evolve is not offered"),
        (["--bucket", "gs://x"], "--bucket is not offered"),
        (["--entity", "me"], "--entity is not offered"),
        (["--upload_dataset"], "--upload_dataset is not offered"),
        (["--bbox_interval", "3"], "--bbox_interval is not offered"),
        (["--epochs", "0"], "--epochs 0: expected 1 or more"),
        (["--batch", "0"], "--batch-size 0: expected 1 or more, or -1"),
        (["--cache", "moon"], "--cache moon: expected ram, disk, device, val or none"),
        (["--img", "-5"], "--imgsz -5: expected 1 or more"),
        (["--label-smoothing", "5"], "--label-smoothing 5: expected 0 or more, and less than 1"),
        (["--workers", "-3"], "--workers -3: expected 0 or more"),
    ],
)
def test_what_is_not_offered_says_what_to_use_instead(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.main(arguments)


def test_mistakes_on_the_command_line_exit_with_2_and_one_line(tmp_path: Path) -> None:
    for arguments, expected in (
        (["--epoch", "3", "--wieghts", "x.pt"], "Did you mean '--weights'?"),
        (["--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--quad"], "error: --quad is not offered"),
    ):
        done = script(*arguments)
        output = done.communicate(timeout=120)[0]
        assert done.returncode == 2 and expected in output and len(output.strip().splitlines()) == 1, output


OFFLINE = "--data shapes.yaml --weights yolov5n-shapes.pt"


@pytest.mark.parametrize("missing", ["weights", "data"])
def test_without_a_network_the_offline_command_is_named_before_anything_is_built_or_left(
    missing: str, tiny_dataset: TinyDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for module in ("utils.config", "utils.downloads"):
        monkeypatch.setattr(f"{module}.ROOT", tmp_path / "above" / "repository")
    for variable in ("YOLOV5_WEIGHTS_DIR", "YOLOV5_DATASETS_DIR", "YOLOv5_DATASETS_DIR", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(train.Training, "_build_model", lambda self: pytest.fail("a network was built"))
    work = tmp_path / "above" / "repository"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    options = {
        "weights": dict(weights="yolov5s.pt", cfg="", data=str(tiny_dataset.yaml)),
        "data": dict(
            weights="", cfg=str(REPOSITORY / "models/yolov5n.yaml"), data=str(REPOSITORY / "data/coco128.yaml")
        ),
    }
    with pytest.raises(UserError, match=f"name resolution.*{OFFLINE}"):
        train.run(**options[missing], project=tmp_path / "runs", device="cpu", workers=0)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "above", work], "nothing is left beside or above"


def test_several_devices_need_a_launcher(tiny_dataset: TinyDataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no CUDA device|torchrun"):
        quick(tmp_path, tiny_dataset, device="0,1")


def test_an_unknown_keyword_is_named_with_the_closest_one() -> None:
    with pytest.raises(UserError, match=r"'batchsize'.*'batch_size'"):
        train.run(batchsize=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cfg": ""}, "needs a network: add --cfg"),
        ({"hyp": {"fliprl": 0.5}}, "unknown key 'fliprl'. Did you mean 'fliplr'?"),
        ({"hyp": {"momentum": 2.0}}, "'momentum' is 2, expected 0 to 0.9999"),
        ({"freeze": [99]}, "--freeze: there is no layer 25; the network has layers 0 to 24"),
        ({"freeze": [25]}, "--freeze: nothing is left to train"),
        ({"freeze": [3, 77]}, "--freeze: there is no layer 77"),
        ({"cfg": "yolov5n-seg.yaml"}, "predicts masks"),
        ({"imgsz": 100_000_000}, "--imgsz 100000000: expected at most 16384"),
        ({"max_megapixels": 0}, "--max-megapixels 0: expected 1 or more"),
    ],
)
def test_wrong_options_are_refused_before_a_folder_is_made(
    tiny_dataset: TinyDataset, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        quick(tmp_path, tiny_dataset, **changes)
    assert message in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_the_stored_network_is_used_without_cfg_and_the_log_says_so(
    finished: argparse.Namespace, tiny_dataset: TinyDataset, tmp_path: Path, said: list[str]
) -> None:
    run = quick(tmp_path, tiny_dataset, epochs=1, weights=str(finished.best), cfg="")
    text = "\n".join(said)
    assert "No --cfg: training the network stored in" in text and "Transferred 349/349" in text
    assert read(run.best).yaml["width_multiple"] == 0.03


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    finished: argparse.Namespace, tiny_dataset: TinyDataset, tmp_path: Path
) -> None:
    content = torch.load(finished.save_dir / "weights/epoch0.pt", weights_only=True)
    stopped = tmp_path / "run/weights"
    stopped.mkdir(parents=True)
    content["model"]["model.24.m.0.bias"][0] = float("nan")
    last = save(stopped / "last.pt", content)
    before = last.read_bytes()
    with pytest.raises(UserError, match=r"epoch 1: the loss is not finite.*train\d\.png.*last good checkpoint"):
        train.run(resume=str(last))
    assert last.read_bytes() == before


# ------------------------------------------------------------------------------------------------- real weights, images


@pytest.mark.slow
def test_an_se_network_is_fine_tuned_from_a_real_checkpoint(
    weights_dir: Path, datasets_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Issue 2, acceptance 6: all 349 tensors come over, and three epochs reach mAP50 above 0.30."""
    started = time.perf_counter()
    arguments = ["--cfg", "yolov5n-se-last.yaml", "--weights", weights_dir / "yolov5n.pt", "--data", "coco128.yaml"]
    arguments += ["--img", 320, "--batch", 16, "--epochs", 3, "--noplots", "--project", tmp_path]
    done = script(*arguments)
    output = done.communicate()[0]
    assert done.returncode == 0, output
    assert "Transferred 349/351 tensors" in output
    final = rows_of(tmp_path / "exp")[-1]
    assert final["metrics/mAP_0.5"] > 0.30, f"{final} after {time.perf_counter() - started:.0f} s"


# ----------------------------------------------------------------------------------------------------- damaged pictures


@pytest.mark.slow
def test_damaged_pictures_neither_end_training_nor_raise_the_map(
    own_tiny_dataset: TinyDataset, tmp_path: Path, said: list[str]
) -> None:
    spoil(own_tiny_dataset.train[1])
    spoil(own_tiny_dataset.val[0])
    options = quick(tmp_path, own_tiny_dataset, workers=2)
    assert len(rows_of(options.save_dir)) == 2 and options.best.is_file()
    train_line, val_line = (line for line in said if "cannot be decoded" in line)
    assert train_line.startswith("train: 1 of the images") and "train1.png" in train_line
    assert val_line.startswith("val: 1 of the images") and "val0.png" in val_line
    assert any(line.split()[:3] == ["all", "4", "8"] for text in said for line in text.splitlines()), (
        "all 8 objects count"
    )


@pytest.mark.slow
def test_pictures_above_max_megapixels_are_left_out_of_training(
    own_tiny_dataset: TinyDataset, tmp_path: Path, said: list[str]
) -> None:
    large = own_tiny_dataset.train[0]
    large.write_bytes(cv2.imencode(".png", np.zeros((1100, 1000, 3), np.uint8))[1].tobytes())
    quick(tmp_path, own_tiny_dataset, epochs=1, max_megapixels=1, skip_bad=True)
    assert any("train0.png: 1000 x 1100 pixels are 1.1 megapixels" in line for line in said)
    assert any("... 7 images, 0 backgrounds, 1 corrupt" in line for line in said)
    said.clear()
    quick(tmp_path, own_tiny_dataset, epochs=1)
    assert any("... 8 images, 0 backgrounds, 0 corrupt" in line for line in said), "the old scan was taken again"
