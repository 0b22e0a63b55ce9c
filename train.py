"""Train a detection network: from a checkpoint, from nothing, or from where an interrupted run stopped.

    python train.py --cfg yolov5s-se-last.yaml --weights yolov5s.pt --data coco128.yaml --img 640 --epochs 100
    python train.py --resume
    torchrun --nproc_per_node 2 train.py --device 0,1 --batch 32 ...

From Python: `train.run(data="coco128.yaml", epochs=3)`; the keywords are the flags with underscores.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config import (
    ROOT,
    WORK,
    ArgumentParser,
    UserError,
    check_hyp,
    check_minimum,
    command_of,
    display_path,
    options_from,
    read_hyp,
)
from utils.distributed import rank, rank_zero_first, world_size
from utils.files import make_run_dir, remove_leftovers
from utils.runtime import LOGGER, init_seeds, keep_freed_memory, run_script, select_device, setup_logging

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from models.checkpoints.files import Checkpoint
    from models.gates.transfer import Report
    from utils.dataloaders import Batch
    from utils.engine import EvalResult, OnTrainBatch, Trainer
    from utils.optim import EarlyStopping
    from utils.recorder import Recorder

PLOTTED_BATCHES = 3


def build_parser() -> ArgumentParser:
    """YOLOv5's flags of train.py, and those of inserting gates and keeping weights."""
    parser = ArgumentParser(prog="train.py", description="Train a detection network.")
    add = parser.add_argument
    add("--weights", default="yolov5s.pt", help="start checkpoint; '' trains from nothing and needs --cfg")
    add("--cfg", default="", help="network YAML; without it the one stored in the checkpoint is used")
    add("--data", default=str(ROOT / "data/coco128.yaml"), help="dataset YAML")
    add("--hyp", default=str(ROOT / "data/hyps/hyp.scratch-low.yaml"), help="hyper-parameter YAML")
    add("--epochs", type=int, default=100, help="total epochs")
    add("--batch-size", type=int, default=16, help="images per batch over all devices; -1 fills the GPU")
    add("--imgsz", "--img", "--img-size", type=int, default=640, help="train and val image size in pixels")
    add("--insert", nargs="+", default=[], help="put gates into --cfg: SE@after:SPPF, SE:16@before:C3:2, SE@inside:C3")
    add("--transfer", default="aligned", choices=("aligned", "index", "none"), help="how --weights are copied")
    add("--gate", choices=("absorbed", "gain", "random"), help="how gates that --weights do not have start")
    add("--gate-lr", type=float, default=1.0, help="learning rate of gates that --weights do not have, as a factor")
    add("--min-transfer", type=float, default=0.0, help="fail where fewer %% of the parameters come from --weights")
    add("--rect", action="store_true", help="rectangular batches, sorted by aspect ratio")
    add("--resume", nargs="?", const=True, default=False, help="continue the newest run, or the given last.pt")
    add("--nosave", action="store_true", help="write a checkpoint after the last epoch only")
    add("--noval", action="store_true", help="validate after the last epoch only")
    add("--autoanchor", action="store_true", help="look for better anchors even where the head has --weights")
    add("--noautoanchor", action="store_true", help="do not check the anchors")
    add("--noplots", action="store_true", help="no pictures")
    add(
        "--cache",
        nargs="?",
        const="ram",
        help="ram, disk, device (augments on the GPU; slow on cpu), val (val's in ram), none; unset: ram if small",
    )
    add("--device", default="", help="cpu, mps, a CUDA number, or several under torchrun")
    add("--multi-scale", action="store_true", help="another size for every batch, up to 50%% smaller or larger")
    add("--single-cls", action="store_true", help="train as if all classes were one")
    add("--optimizer", default="SGD", choices=("SGD", "Adam", "AdamW"), help="optimizer")
    add("--sync-bn", action="store_true", help="batch norm over all devices (torchrun with CUDA)")
    add("--compile", action="store_true", help="torch.compile: minutes before the first batch, and no gain on a CPU")
    add("--workers", type=int, help="most loader processes per device; default 8, and on a CPU 0: threads")
    add("--project", default=str(WORK / "runs/train"), help="folder of the runs")
    add("--name", default="exp", help="name of this run; cfg: that of the network YAML")
    add("--exist-ok", action="store_true", help="write into an existing run folder")
    add("--cos-lr", action="store_true", help="cosine learning rate instead of linear")
    add("--label-smoothing", type=float, default=0.0, help="label smoothing epsilon")
    add("--patience", type=int, default=100, help="stop after this many epochs without improvement; 0: never")
    add("--freeze", nargs="+", type=int, default=[0], help="N: layers 0 to N-1; several numbers: exactly these")
    add("--save-period", type=int, default=-1, help="also keep every n-th epoch's checkpoint")
    add("--seed", type=int, default=0, help="seed of everything random")
    add("--init-seed", type=int, help="another seed for the weights that do not come from --weights")
    add("--skip-bad", action="store_true", help="leave out images that cannot be used even if more than a tenth are")
    add("--max-megapixels", type=int, default=100, help="image files with more are left out; 100 take up to 1 GB")
    add("--local_rank", "--local-rank", type=int, default=-1, help="set by old launchers; not needed")
    group = parser.add_argument_group("understood, but not offered (the answer says what to use instead)")
    for flag, settings, _ in NOT_OFFERED:
        group.add_argument(flag, **settings)
    return parser


def run(**options: Any) -> argparse.Namespace:
    """Train; keywords are the flags with underscores (`hyp` may also be a mapping).

    Returns:
        The options, with `save_dir`, `best` (paths of the run and of its best checkpoint) and `results` (precision,
        recall, mAP50, mAP50-95, box, obj and cls loss of that checkpoint on the validation split).

    Raises:
        UserError: an unknown keyword, or anything wrong with the files named.
    """
    setup_logging()
    return _run(options)


def main(argv: list[str] | None = None) -> None:
    """Command line; a user's mistake raises UserError."""
    _run(build_parser().given(argv))


def _run(given: Mapping[str, Any]) -> argparse.Namespace:
    options = options_from(build_parser(), given)
    check(options)
    from utils.distributed import process_group  # only now: mistakes above are answered at once

    resumed = None
    if options.resume:
        options, resumed = _resumed(options, given)
    LOGGER.info(_listed("train", _offered(options)))
    device = select_device(options.device, options.batch_size)
    keep_freed_memory(device)
    with process_group(device, options.batch_size):
        return Training(options, device, resumed).run()


def _listed(title: str, values: Mapping[str, Any]) -> str:
    return f"{title}: {', '.join(f'{key}={value}' for key, value in values.items())}"


# ------------------------------------------------------------------------------------------------------------- the run


class Training:
    """One run: its parts, made in the order they depend on each other, and the loop over epochs."""

    def __init__(self, options: argparse.Namespace, device: torch.device, resumed: Checkpoint | None) -> None:
        from utils.data import prepare
        from utils.distributed import is_main
        from utils.downloads import find_weights
        from utils.optim import EarlyStopping, describe
        from utils.progress import EpochLog
        from utils.training import HYP_OWNERS, build_loaders, build_trainer, fit_anchors_, freeze_, restore_

        self.options, self.device, self.resumed, self.main = options, device, resumed, is_main()
        self.hyp = check_hyp(read_hyp(options.hyp), HYP_OWNERS)
        if options.label_smoothing:
            self.hyp["label_smoothing"] = options.label_smoothing
        LOGGER.info(_listed("hyperparameters", self.hyp))
        init_seeds(options.seed + max(rank(), 0))
        with rank_zero_first():  # what is missing here and cannot be fetched is said before anything is built
            self.weights = find_weights(options.weights) if options.weights and resumed is None else None
            spec = prepare(options.data, task="train")
        self.names = {0: "item"} if options.single_cls and spec.num_classes != 1 else dict(spec.names)
        self.report: Report | None = None
        self.scratch: tempfile.TemporaryDirectory[str] | None = None
        self.model = self._build_model()
        frozen = freeze_(self.model.model, options.freeze)
        self.new_gates = self._new_gates()
        stride = max(int(self.model.stride.max()), 32)
        self._fix_sizes(stride)
        if self.main:
            self.model.info(options.imgsz)
        self.save_dir = self._make_save_dir()
        self.loader, self.dataset, self.val_loader = build_loaders(spec, options, self.hyp, stride, device)
        if not options.noautoanchor and resumed is None:
            keep = self.report is not None and self.report.head and not options.autoanchor
            fit_anchors_(self.model.head, self.dataset, options, self.hyp, keep=keep)
        faster = [gate for row in self.new_gates for gate in self.model.gates()[row]]
        self.trainer: Trainer = build_trainer(
            self.model, self.loader, options, self.hyp, frozen, faster, options.gate_lr
        )
        LOGGER.info(describe(self.trainer.optimizer))
        self.stopping: EarlyStopping = EarlyStopping(options.patience)
        self.log, self.finished = EpochLog(LOGGER.info), False
        self.start_epoch = 0
        if resumed is not None:
            restore_(self.trainer, self.stopping, resumed.training)
            self.start_epoch = resumed.epoch + 1

    def run(self) -> argparse.Namespace:
        """All remaining epochs and the final validation; the options with `save_dir`, `best` and `results`.

        Raises:
            KeyboardInterrupt: Ctrl-C, with the command that goes on from the last checkpoint, where there is one.
        """
        try:
            self._announce()
            begun, done = time.monotonic(), 0
            for epoch in self._epochs():
                self.loader.set_epoch(epoch)
                self.log.begin()
                losses = self._train(epoch)
                done += 1
                if self._finish_epoch(epoch, losses):
                    break
            self.loader.close()
            if done:
                LOGGER.info(f"\n{done} epochs completed in {(time.monotonic() - begun) / 3600:.3f} hours.")
            self.options.save_dir = self.save_dir
            if self.main:
                self._finish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*self._how_to_go_on()) from None
        return self.options

    def _epochs(self) -> range:
        """Those left to train: none for a run that was killed after its last one, or after its early stop."""
        return range(self.start_epoch, self.options.epochs if not self.stopping.stop else 0)

    def _train(self, epoch: int) -> Iterable[float]:
        """One epoch of training; its mean box, objectness and class losses."""
        from utils.engine import NonFiniteLoss, train_one_epoch

        try:
            losses = train_one_epoch(self.trainer, self.loader, epoch, on_batch=self._plot_batch(epoch))
        except NonFiniteLoss as error:
            last = self.save_dir / "weights/last.pt"
            kept = f" The last good checkpoint is {display_path(last)}." if last.exists() else ""
            raise NonFiniteLoss(f"epoch {epoch}: {error}{kept}") from None
        self.log.trained(self.trainer.row, len(self.loader))
        return losses

    def _finish_epoch(self, epoch: int, losses: Iterable[float]) -> bool:
        """Validate, record and save one epoch; whether training ends with it."""
        from utils.distributed import agreed
        from utils.engine import TABLE_HEADER, table_rows

        options, stop = self.options, False
        if self.main:
            last = epoch == options.epochs - 1
            summary, improved, table = (0.0,) * 7, False, []
            if judged := last or not options.noval:
                model = copy.deepcopy(self.trainer.ema.ema).fuse()
                result = self._judge(model, pictures=False)
                summary, improved = result.summary, self.stopping.update(epoch, result.fitness)
                stop = self.stopping.stop
                table = [TABLE_HEADER, *table_rows(result, self.names, per_class=False)]
            self.log.finished(self.trainer.row, summary[:4] if judged else (), table)
            rates = [group["lr"] for group in self.trainer.optimizer.param_groups[:3]]  # results.csv has three
            self.recorder.log(epoch, [*losses, *summary, *rates])
            if last or stop or not options.nosave:
                self._save(epoch, improved=improved)
            if stop:
                LOGGER.info(
                    f"Stopped: no improvement for {options.patience} epochs; the best is epoch "
                    f"{self.stopping.best_epoch}. --patience 0 trains to the end."
                )
        return agreed(stop, self.device)

    def _judge(self, model: nn.Module, *, pictures: bool) -> EvalResult:
        """Judge a fused model on the validation split."""
        from utils.engine import EvalOptions, evaluate

        half = self.device.type == "cuda"
        return evaluate(
            model.half() if half else model,
            self.val_loader,
            EvalOptions(
                len(self.names),
                single_cls=self.options.single_cls,
                confusion=pictures,
            ),
            compute_loss=self.trainer.compute_loss,
            on_batch=self._draw_validation if pictures else None,
        )

    def _save(self, epoch: int, *, improved: bool) -> None:
        """Write best.pt, then last.pt: a run killed in between repeats the epoch and writes the same best again."""
        from models.checkpoints.files import save
        from utils.training import training_state

        content = {
            "epoch": epoch,
            "best_fitness": self.stopping.best_fitness,
            "yaml": self.model.yaml,
            "names": self.names,
            "stride": self.model.stride.tolist(),
            "opt": self._plain_options(),
            "hyp": dict(self.hyp),
            "new_gates": self.new_gates,
            **training_state(self.trainer, self.model, self.stopping),
        }
        period = self.options.save_period
        wanted = {"best.pt": improved, f"epoch{epoch}.pt": period > 0 and epoch % period == 0, "last.pt": True}
        for name in (name for name, write in wanted.items() if write):
            save(self.save_dir / "weights" / name, content)

    def _finish(self) -> None:
        """Strip best.pt, judge it, draw, and strip last.pt at the very end: until then `--resume` finishes the rest."""
        import torch

        from models.checkpoints.files import load_model
        from utils.engine import TABLE_HEADER, table_rows
        from utils.progress import fit_table, terminal_width

        options, weights, pictures = self.options, self.save_dir / "weights", not self.options.noplots
        options.best = weights / "best.pt" if (weights / "best.pt").exists() else weights / "last.pt"
        self._strip(weights / "best.pt")
        LOGGER.info(f"\nValidating {display_path(options.best)}...")
        model = load_model(options.best, self.device).to(memory_format=torch.channels_last)
        result = self._judge(model, pictures=pictures)
        table = [TABLE_HEADER, *table_rows(result, self.names, per_class=len(self.names) > 1)]
        LOGGER.info("\n".join(fit_table(table, terminal_width())))
        self.val_loader.close()
        options.results = result.summary
        if pictures:
            from utils import plots

            plots.plot_evaluation(result, self.names, self.save_dir)
            plots.plot_results(self.save_dir / "results.csv")
            names = ("results", "confusion_matrix", "F1_curve", "PR_curve", "P_curve", "R_curve")
            self.recorder.show_images([self.save_dir / f"{name}.png" for name in names], options.epochs - 1)
        self.recorder.close()
        self._strip(weights / "last.pt")
        self.finished = True
        LOGGER.info(f"Results saved to {display_path(self.save_dir)}")

    def _strip(self, file: Path) -> None:
        from models.checkpoints.files import strip

        if not file.exists():
            return
        strip(file)
        LOGGER.info(f"Optimizer stripped from {display_path(file)}, {file.stat().st_size / 1e6:.1f}MB")

    def _how_to_go_on(self) -> tuple[str, ...]:
        """The command that resumes this run, as the one argument of an exception; empty where nothing is to resume."""
        last = self.save_dir / "weights/last.pt"
        if not self.main or self.finished or not last.exists():
            return ()
        many = f"torchrun --nproc_per_node {world_size()} train.py"
        start = command_of("train.py") if world_size() == 1 else many
        return (f"Go on with: {start} --resume {shlex.quote(display_path(last))}",)

    # ------------------------------------------------------------------------------------------------- its parts

    def _build_model(self) -> nn.Module:
        """The network with the wanted weights, on the device."""
        import torch

        from models.gates.insert import write_arguments
        from models.gates.transfer import start_network
        from models.yolo import build_model
        from utils.tasks import task_of

        options, nc = self.options, len(self.names)
        settings: dict[str, Any] = {
            "anchors": self.hyp.get("anchors") or None,
            "verbose": self.main,
            "seed": options.seed if options.init_seed is None else options.init_seed,
        }
        cfg = self._inserted() if options.insert and not self.resumed else options.cfg
        if self.resumed is not None:
            model = build_model(self.resumed.yaml, nc=nc)
            model.load_state_dict(self.resumed.training["model"])
        elif self.weights is None:
            model = build_model(cfg, nc=nc, **settings)
            LOGGER.info(f"Training {options.cfg} from nothing (--weights '').")
        else:
            start = {"mode": options.transfer, "gate": options.gate, "min_transfer": options.min_transfer}
            model, self.report = start_network(cfg, self.weights, self.names, **start, **settings)
            if self.report is not None:
                LOGGER.info(self.report.summary())
            if options.insert:
                write_arguments(cfg, model.graph)
        task_of(model)  # refuses a network that cannot be trained here, before anything is written
        model.names = self.names
        if options.sync_bn and world_size() > 1 and self.device.type == "cuda":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif options.sync_bn:
            LOGGER.warning("--sync-bn needs several CUDA devices, one process each (torchrun): ignored.")
        return model.to(self.device, memory_format=torch.channels_last)

    def _new_gates(self) -> list[int]:
        """The rows with gates that did not come from --weights, which --gate-lr is for."""
        found: dict[int, list[nn.Module]] = self.model.gates()
        if self.resumed is not None and self.resumed.training is not None:
            return list(self.resumed.training.get("new_gates", []))
        rows = [row for row in found if self.report is None or row in self.report.gates]
        trained = any(p.requires_grad for row in rows for gate in found[row] for p in gate.parameters())
        if self.options.gate_lr != 1 and not trained:
            raise UserError(
                f"--gate-lr {self.options.gate_lr:g}: the network has no gate to train that is new. Put one in with"
                " --insert, or leave out --gate-lr."
            )
        return rows

    def _inserted(self) -> Path:
        """The YAML of --cfg with the gates of --insert: in a temporary folder, then beside the run's options."""
        from models.gates.insert import parse, write

        self.scratch = tempfile.TemporaryDirectory(prefix="yolov5-")
        file = Path(self.scratch.name) / f"{Path(self.options.cfg).stem}-inserted.yaml"
        return write(self.options.cfg, [parse(spec) for spec in self.options.insert], file)

    def _fix_sizes(self, stride: int) -> None:
        from utils.inference import round_up
        from utils.training import fit_batch_size

        options = self.options
        options.imgsz = round_up(options.imgsz, stride, floor=2 * stride)
        if options.batch_size == -1:
            cuda = self.device.type == "cuda"
            options.batch_size = fit_batch_size(self.model, options.imgsz, self.device) if cuda else 16
            why = "fits the GPU's memory" if cuda else "only CUDA memory is measured"
            LOGGER.info(f"--batch-size -1: using {options.batch_size} ({why})")

    def _make_save_dir(self) -> Path:
        """The run folder with `weights/`, `hyp.yaml` and `opt.yaml`."""
        from utils.distributed import agreed_path
        from utils.files import write_yaml

        options = self.options
        if self.resumed is not None:
            save_dir = self.resumed.path.resolve().parent.parent
            if self.main:
                remove_leftovers(save_dir, save_dir / "weights")
            return save_dir
        options.name = (Path(options.cfg).stem or "exp") if options.name == "cfg" else options.name
        save_dir = agreed_path(make_run_dir(options, "weights") if self.main else None, self.device)
        options.save_dir = str(save_dir)
        if self.main:
            write_yaml(save_dir / "hyp.yaml", self.hyp)
            write_yaml(save_dir / "opt.yaml", self._plain_options())
            if self.scratch:
                shutil.copytree(self.scratch.name, save_dir, dirs_exist_ok=True)
        return save_dir

    def _plain_options(self) -> dict[str, Any]:
        return {**vars(self.options), "device": str(self.options.device), "hyp": dict(self.hyp)}

    def _announce(self) -> None:
        from utils.recorder import Recorder

        options, loader = self.options, self.loader
        if not self.main:
            return
        self.recorder: Recorder = Recorder(self.save_dir, start_epoch=self.start_epoch)
        if not options.noplots and self.resumed is None:
            from utils import plots

            plots.plot_labels(self.dataset.samples.labels.flat, self.names, self.save_dir)
        lower = f", autocast to {str(self.trainer.dtype).removeprefix('torch.')}" if self.trainer.dtype else ""
        LOGGER.info(
            f"Image sizes {options.imgsz} train, {options.imgsz} val\n"
            f"Using {loader.num_workers} loader process{'es' * (loader.num_workers != 1)}{lower}\n"
            f"Logging results to {display_path(self.save_dir)}\n{self.recorder.tensorboard}\n"
            + (
                f"Training epochs {self.start_epoch} to {options.epochs - 1}..."
                if self._epochs()
                else "All epochs done."
            )
        )

    def _plot_batch(self, epoch: int) -> OnTrainBatch | None:
        """What draws the first batches of the run."""
        first = epoch * len(self.loader)
        if self.options.noplots or not self.main or first >= PLOTTED_BATCHES:
            return None

        def draw(index: int, batch: Batch) -> None:
            if first + index < PLOTTED_BATCHES:
                from utils import plots
                from utils.engine import labels_to_draw

                file = self.save_dir / f"train_batch{first + index}.jpg"
                plots.plot_batch(batch.images, labels_to_draw(batch), batch.paths, self.names, file)

        return draw

    def _draw_validation(self, index: int, batch: Batch, detections: list[Tensor]) -> None:
        from utils import plots

        if index < PLOTTED_BATCHES:
            plots.plot_evaluation_batch(index, batch, detections, self.names, self.save_dir)


# -------------------------------------------------------------------------------------------------------------- resume


def _resumed(options: argparse.Namespace, given: Mapping[str, Any]) -> tuple[argparse.Namespace, Checkpoint]:
    """The options of an interrupted run and its last checkpoint; of those `given`, only --device and --workers count.

    A warning names the others where they differ.
    """
    from models.checkpoints.files import read
    from utils.recorder import newest_checkpoint

    file = newest_checkpoint([Path("runs"), WORK / "runs"]) if options.resume is True else Path(options.resume)
    if not file.is_file():
        raise UserError(f"--resume {file}: no such file. Give the path of a run's weights/last.pt.")
    checkpoint = read(file)
    if not checkpoint.ours:
        raise UserError(f"{file}: not written by this program, so not resumable. Start from it with --weights {file}.")
    if checkpoint.training is None:
        raise UserError(f"{file}: a finished run (stripped). Train further with --weights {file} --epochs ...")
    defaults = build_parser().parse_args([])
    stored = {key: value for key, value in checkpoint.opt.items() if hasattr(defaults, key)}
    merged = argparse.Namespace(**{**vars(defaults), **stored})
    for name in given.keys() & {"device", "workers"}:
        setattr(merged, name, getattr(options, name))
    merged.resume, merged.hyp = str(file), checkpoint.hyp
    ignored = [f"--{name.replace('_', '-')}" for name in given if _differs(options, merged, name)]
    if ignored:
        LOGGER.warning(
            f"--resume goes on as the run was started: {', '.join(ignored)} {'is' if len(ignored) == 1 else 'are'} "
            f"ignored. To train with other settings, start a new run from its weights: --weights {file} --epochs N."
        )
    LOGGER.info(f"Resuming {display_path(file)} after epoch {checkpoint.epoch}")
    return merged, checkpoint


def _differs(options: argparse.Namespace, merged: argparse.Namespace, name: str) -> bool:
    """Whether an option asks for something else than what the resumed run does."""
    if name == "hyp":
        return {**merged.hyp, **read_hyp(options.hyp)} != merged.hyp
    return name not in ("resume", "local_rank") and getattr(options, name) != getattr(merged, name)


# -------------------------------------------------------------------------------------------------------------- checks

# Accepted, so that an old command line is understood, and answered with what to use instead: (flag, argparse, answer).
NOT_OFFERED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("--image-weights", {"action": "store_true"}, "Repeat the rare images in a .txt list given as `train:` instead."),
    ("--quad", {"action": "store_true"}, "Use --multi-scale, or a larger --imgsz."),
    ("--evolve", {"nargs": "?", "type": int, "const": 300}, "Change one key of a copy of the --hyp file per run."),
    ("--evolve_population", {}, "It belongs to --evolve: change one key of a copy of the --hyp file per run."),
    ("--resume_evolve", {}, "It belongs to --evolve: change one key of a copy of the --hyp file per run."),
    ("--bucket", {"default": ""}, "Copy the run folder with your cloud's own tool."),
    ("--entity", {}, "It is for a remote logger: use results.csv or TensorBoard."),
    ("--upload_dataset", {"nargs": "?", "const": True, "default": False}, "Use results.csv or TensorBoard."),
    ("--bbox_interval", {"type": int, "default": -1}, "Look at the pictures in the run folder."),
    ("--artifact_alias", {"default": "latest"}, "Give --weights a path."),
)


def _option_name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _offered(options: argparse.Namespace) -> dict[str, Any]:
    """The options worth a place in the log: not those that are refused, nor hyper-parameters given as a mapping."""
    left_out = {_option_name(flag) for flag, *_ in NOT_OFFERED}
    return {k: v for k, v in vars(options).items() if k not in left_out and not isinstance(v, Mapping)}


def check(options: argparse.Namespace) -> None:
    defaults = build_parser().parse_args([])
    for flag, _, answer in NOT_OFFERED:
        name = _option_name(flag)
        if getattr(options, name) != getattr(defaults, name):
            raise UserError(f"{flag} is not offered. {answer}")
    if not (options.weights or options.cfg or options.resume):
        raise UserError("--weights '' trains from nothing and needs a network: add --cfg yolov5s.yaml.")
    if options.insert and not options.cfg:
        raise UserError("--insert needs the YAML to insert into: add --cfg yolov5s.yaml.")
    if (options.gate or options.min_transfer) and (not options.weights or options.transfer == "none"):
        raise UserError("--gate and --min-transfer are about what comes from --weights, but nothing is copied here.")
    if options.autoanchor and options.noautoanchor:
        raise UserError("--autoanchor and --noautoanchor contradict each other. Give one of them.")
    check_minimum(options, epochs=1, imgsz=1, workers=0, patience=0, max_megapixels=1)
    if not 0 < options.gate_lr <= 1000:
        raise UserError(f"--gate-lr {options.gate_lr:g}: expected a factor above 0, at most 1000; 1 is the usual rate.")
    if options.batch_size < 1 and options.batch_size != -1:
        raise UserError(f"--batch-size {options.batch_size}: expected 1 or more, or -1 to fill the GPU.")
    if not 0 <= options.label_smoothing < 1:
        raise UserError(f"--label-smoothing {options.label_smoothing:g}: expected 0 or more, and less than 1.")
    if options.cache not in (None, "ram", "disk", "device", "val", "none"):
        raise UserError(f"--cache {options.cache}: expected ram, disk, device, val or none.")
    if options.cache == "device" and options.rect:
        raise UserError("--cache device makes square batches; with --rect use --cache ram.")
    if options.cache == "device" and options.batch_size == -1:
        raise UserError("--cache device: --batch-size -1 would fill the memory that the images need. Give a number.")


if __name__ == "__main__":
    run_script(main)
