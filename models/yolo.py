"""The detection, segmentation and classification networks, built from a model YAML.

python models/yolo.py --cfg yolov5s-se-last.yaml                 # the layers, parameters and GFLOPs
python models/yolo.py --cfg yolov5s.yaml --line-profile          # milliseconds per layer
python models/yolo.py --cfg yolov5s.yaml --profile --batch 8     # forward and backward
python models/yolo.py --test                                     # build every YAML under models/
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is imported: --help should not wait for it
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from utils.config import ArgumentParser
    from utils.runtime import run_script

    parser = ArgumentParser(description="Build a network from a model YAML and describe or time it.")
    parser.add_argument("--cfg", default="yolov5s.yaml", help="model YAML, by path or bare name")
    parser.add_argument("--batch-size", type=int, default=1, help="images at once when timing")
    parser.add_argument("--device", default="", help="cpu, mps, or a CUDA number")
    parser.add_argument("--profile", action="store_true", help="time forward and backward")
    parser.add_argument("--line-profile", action="store_true", help="time every layer")
    parser.add_argument("--test", action="store_true", help="build every models/**/yolo*.yaml")
    arguments = parser.parse_args()

    def main() -> None:
        """This file again under its own name, so that layers are called models.yolo.X."""
        import models.yolo

        models.yolo.run(arguments)

    run_script(main)
    raise SystemExit(0)

import torch
from torch import Tensor, nn

from models import grammar, inside, pasted
from models import graph as graphs
from models.augment import augmented
from models.base import BaseModel, Output, SegmentOutput, Visualize
from models.common import Classify, Proto, set_activation
from models.grammar import LAYER_ERRORS, first_line
from models.graph import Graph, Row
from models.measure import Size, profile_training
from utils.config import ROOT, UserError, display_path
from utils.runtime import LOGGER, select_device

MAX_MAP = 1 << 26  # elements; the largest map of yolov5x6 at 128 pixels has 2 ** 18
Anchors = Sequence[Sequence[float]]  # one list of width, height pairs per level
Config = str | Path | Mapping[str, Any] | Graph


class Detect(nn.Module):
    """Boxes, objectness and class scores from one map per level.

    `anchors` are in pixels until `DetectionModel` divides them by the strides. Training gives a list of raw tensors
    (B, na, H, W, no), no = x, y, w, h, objectness, classes. Inference: `Output` of predictions (B, sum of na*H*W, no)
    and that list, where boxes are cxcywh in pixels of the input and scores are 0..1; rows run over levels, then
    anchors, rows and columns. `export`: predictions alone, in a tuple.

    Decoding, with cell g, stride s and anchor A in pixels: centre (2 sigmoid(t) + g - 0.5) s, size (2 sigmoid(t))^2 A.
    """

    anchors: Tensor  # (nl, na, 2) in cells of each level
    inplace = True
    export = False
    dynamic = False  # rebuild the grid every time, for a traced graph

    def __init__(
        self, nc: int = 80, anchors: Anchors = (), ch: Sequence[int] = (), inplace: bool = True, *, nm: int = 0
    ) -> None:
        super().__init__()
        self.nc, self.no = nc, nc + 5 + nm
        self.nl, self.na = len(anchors), len(anchors[0]) // 2
        self.inplace = inplace
        self.stride = torch.ones(self.nl)
        self._forget_grids()
        self.register_buffer("anchors", torch.tensor(anchors).float().view(self.nl, -1, 2))
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in ch)

    def forward(self, x: list[Tensor]) -> Any:
        raw = [self._raw(conv(level)) for conv, level in zip(self.m, x)]
        if self.training:
            return raw
        predictions = self.decode(raw)
        return (predictions,) if self.export else Output(predictions, raw)

    def _raw(self, y: Tensor) -> Tensor:
        """(B, na*no, H, W) as (B, na, H, W, no): a view, which of channels-last maps has whole rows in memory."""
        b, _, h, w = y.shape
        return y.view(b, self.na, self.no, h, w).permute(0, 1, 3, 4, 2)

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Raw level tensors as predictions in pixels."""
        for i, level in enumerate(raw):
            self._refresh_grid(i, level)
        if self.inplace and not self.export and not torch.is_grad_enabled():
            return self._decode_in_place(raw)
        flat = []
        for i, level in enumerate(raw):
            xy, wh, scores, masks = level.split((2, 2, self.nc + 1, self.no - self.nc - 5), 4)
            xy = (xy.sigmoid() * 2 + self.grid[i]) * self.stride[i]
            wh = (wh.sigmoid() * 2) ** 2 * self.anchor_grid[i]
            b, na, h, w, no = level.shape
            flat.append(torch.cat((xy, wh, scores.sigmoid(), masks), 4).reshape(b, na * h * w, no))
        return torch.cat(flat, 1)

    def _decode_in_place(self, raw: Sequence[Tensor]) -> Tensor:
        """The same numbers with one tensor of predictions and no temporaries: large batches are bound by memory."""
        cells = [level.shape[1:4].numel() for level in raw]
        out = raw[0].new_empty(len(raw[0]), sum(cells), self.no)
        levels = [rows.unflatten(1, level.shape[1:4]) for level, rows in zip(raw, out.split(cells, 1))]
        for level, rows in zip(raw, levels):
            rows.copy_(level)
        (out if self.no == self.nc + 5 else out[..., : self.nc + 5]).sigmoid_()
        for i, rows in enumerate(levels):
            boxes = rows[..., :4]
            boxes.mul_(2)
            boxes[..., :2].add_(self.grid[i]).mul_(self.stride[i])
            boxes[..., 2:].square_().mul_(self.anchor_grid[i])
        return out

    def _refresh_grid(self, i: int, level: Tensor) -> None:
        """Rebuild the cached cell centres (minus 0.5) and pixel anchors, (1, na, H, W, 2), unless they fit exactly."""
        _, _, h, w, _ = level.shape
        cached = self.grid[i]
        same = not self.dynamic and cached.shape[2:4] == (h, w)
        if same and cached.dtype == level.dtype and cached.device == level.device:
            return
        columns = torch.arange(w, device=level.device, dtype=level.dtype)
        rows = torch.arange(h, device=level.device, dtype=level.dtype)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        shape = (1, self.na, h, w, 2)
        self.stride = self.stride.to(level.device)
        self.grid[i] = torch.stack((x, y), 2).expand(shape) - 0.5
        pixels = (self.anchors[i] * self.stride[i]).to(level.dtype)
        self.anchor_grid[i] = pixels.view(1, self.na, 1, 1, 2).expand(shape)

    def bias_init_(self, class_frequency: Tensor | None = None) -> None:
        """Start objectness at 8 objects per 640 px image and classes at 0.6 / nc, or at their frequencies (nc,).

        Focal loss, https://arxiv.org/abs/1708.02002, section 3.3: without it the many background cells swamp the
        first steps. Classes that never occur count as one in a million.
        """
        with torch.no_grad():
            biases: list[Any] = [conv.bias for conv in self.m]
            for bias, s in zip(biases, self.stride.tolist()):
                bias = bias.view(self.na, -1)
                bias[:, 4] += math.log(8 / (640 / s) ** 2)
                if class_frequency is None:
                    bias[:, 5 : 5 + self.nc] += math.log(0.6 / (self.nc - 0.99999))
                else:
                    share = class_frequency.float() / class_frequency.sum().clamp_min(1)
                    bias[:, 5 : 5 + self.nc] += share.clamp_min(1e-6).log().to(bias)

    def _forget_grids(self) -> None:
        """Let the next forward pass make the grids anew."""
        self.grid = [torch.empty(0) for _ in range(self.nl)]
        self.anchor_grid = [torch.empty(0) for _ in range(self.nl)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the attributes of a pickled head, YOLOv5's included, without the grids it was saved with.

        Those of v6.0 and v6.1 lie half a cell beside ours at the same size, and v6.0 has `anchor_grid` as a buffer.
        """
        super().__setstate__(state)
        self._buffers.pop("anchor_grid", None)
        self._forget_grids()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Detect:
        """Move or cast the stride, too, which is no buffer; the grids are rebuilt by the next forward pass."""
        super()._apply(fn, recurse)
        self.stride = fn(self.stride)
        self.grid = [fn(torch.empty(0)) for _ in self.grid]  # a memory format for maps would not fit five dimensions
        self.anchor_grid = [fn(torch.empty(0)) for _ in self.anchor_grid]
        return self


class Segment(Detect):
    """Detect with `nm` mask coefficients per row, and mask prototypes from the first level.

    Training: (raw list, prototypes). Inference: `SegmentOutput`; `export`: (predictions, prototypes).
    """

    def __init__(
        self,
        nc: int = 80,
        anchors: Anchors = (),
        nm: int = 32,
        npr: int = 256,
        ch: Sequence[int] = (),
        inplace: bool = True,
    ) -> None:
        super().__init__(nc, anchors, ch, inplace, nm=nm)
        self.nm, self.npr = nm, npr
        self.proto = Proto(ch[0], npr, nm)

    def forward(self, x: list[Tensor]) -> Any:
        prototypes = self.proto(x[0])
        found = super().forward(x)
        if self.training:
            return found, prototypes
        return (found[0], prototypes) if self.export else SegmentOutput(found[0], prototypes, found[1])


# ------------------------------------------------------------------------------------------------------------ building


def parse_model(
    d: Graph | Mapping[str, Any], ch: Sequence[int] = (3,), *, verbose: bool = False, seed: int | None = None
) -> tuple[nn.Sequential, list[int]]:
    """The layers of a network, each with `i`, `f`, `type` and `np`, and the indices whose outputs are kept.

    `verbose` logs a row per layer. With a `seed` the k-th C3, say, draws its weights from (seed, "C3:k"): rows of other
    modules before it do not change them, nor does a gate inside, whose weights are drawn after the block's. torch's own
    generator is left as it was. Raises UserError for a row that cannot be built, naming its line.

    There is no list of classes and no `elif m is MyAttention` here: a class pasted at the end of models/common.py or
    models/attention.py needs a row in the YAML and no edit of this file. See `models.pasted.leading`.
    """
    graph = d if isinstance(d, Graph) else graphs.read(d, ch=ch[0])
    act = graph.yaml.get("activation")
    activation = grammar.activation(act, graph.file) if act else nn.SiLU()
    classes = {**graphs.layer_classes(), "Detect": Detect, "Segment": Segment}
    if verbose:
        LOGGER.info(f"\n{'':>3}{'from':>18}{'n':>3}{'params':>10}  {'module':<40}{'arguments':<30}")
    layers: list[Any] = []
    count: Counter[str] = Counter()
    for row in graph.rows:
        m = classes[row.module]
        make = partial(pasted.build, m) if graphs.is_pasted(row.module) else m
        count[row.module] += 1
        try:
            args = _arguments(m, row, graph)
        except NameError as error:  # a branch of a tutorial, whose class this file does not import
            fix = "Remove the branch that was added for it: a class in models/common.py needs none"
            raise UserError(f"models/yolo.py: '{error.name}' is not defined. {fix}.") from None
        chained = row.repeats if "repeat" not in graphs.wiring(row.module) else 1
        try:
            with _drawing_from(seed, f"{row.module}:{count[row.module]}"):
                layer: Any = nn.Sequential(*(make(*args) for _ in range(chained))) if chained > 1 else make(*args)
        except LAYER_ERRORS as error:
            raise UserError(f"{row.where}: cannot be built from {row.args!r}: {first_line(error)}.") from None
        if row.inner:
            with _drawing_from(seed, f"{row.inner.gate} in {row.module}:{count[row.module]}"):
                inside.put_inside_(layer, row.inner, classes[row.inner.gate])
        set_activation(layer, activation)  # one object for all, as in the official files
        if graphs.is_pasted(row.module):
            layer.register_forward_pre_hook(pasted.contiguous)
        layer.i, layer.f, layer.type = row.index, row.raw_from, f"{m.__module__}.{m.__name__}"
        layer.np = Size.of(layer).parameters
        if verbose:
            shown = f"{layer.type} with {row.inner.gate} inside" if row.inner else layer.type
            LOGGER.info(f"{row.index:>3}{row.raw_from!s:>18}{row.repeats:>3}{layer.np:>10}  {shown:<40}{args!s:<30}")
        layers.append(layer)
    return nn.Sequential(*layers), graph.save


@contextlib.contextmanager
def _drawing_from(seed: int | None, name: str) -> Iterator[None]:
    """Random numbers on the CPU that depend on (seed, name) alone; without a seed, torch's own."""
    if seed is None:
        yield
        return
    before = torch.get_rng_state()
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _arguments(m: type[nn.Module], row: Row, graph: Graph) -> list[Any]:
    """What the constructor gets: the row's arguments, after what its class leaves for the builder to fill in.

    This is where tutorials add a branch for a new class. None is needed: `graphs.filled` knows what it is given.
    """
    args = list(row.args)
    if graphs.wiring(row.module):
        args[:1] = graphs.filled(row)
    elif m is nn.BatchNorm2d:
        args = [row.inputs[0]]
    elif m in (Detect, Segment):
        args += [list(row.inputs), bool(graph.yaml.get("inplace", True))]
    return args


class DetectionModel(BaseModel):
    """A network that ends in Detect (or Segment).

    `cfg` is a model YAML by path or bare name, an equal dict (left unchanged), or a graph. `nc` and `anchors` (so many
    per level) replace the YAML's. Training returns the head's raw list, inference an `Output`, whose `raw` is None with
    `augment`: see Detect. Batch-norm statistics of a new network are untouched. `seed`: see parse_model.
    """

    hyp: dict[str, Any]  # set by utils.training

    def __init__(
        self,
        cfg: Config = "yolov5s.yaml",
        ch: int = 3,
        nc: int | None = None,
        anchors: float | None = None,
        *,
        verbose: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.graph = cfg if isinstance(cfg, Graph) else graphs.read(cfg, ch=ch, nc=nc, anchors=anchors)
        if self.graph.head.module not in graphs.HEADS:
            raise UserError(f"{self.graph.head.where}: the last row must be {' or '.join(graphs.HEADS)}.")
        for warning in self.graph.warnings:
            LOGGER.warning(warning)
        self.yaml, self.yaml_file = copy.deepcopy(self.graph.yaml), self.graph.name
        self.model, self.save = parse_model(self.graph, verbose=verbose, seed=seed)
        self.names = {i: str(i) for i in range(self.head.nc)}
        self.inplace = self.head.inplace
        self._init_head()

    @property
    def head(self) -> Detect:
        """The last layer."""
        return self.model[-1]  # type: ignore[return-value]

    @property
    def num_masks(self) -> int:
        """Mask coefficients at the end of each predicted row: 0 unless the network segments."""
        return int(getattr(self.head, "nm", 0))

    def gates(self) -> dict[int, list[nn.Module]]:
        """The gates, pasted classes that keep their map among them: row -> what it is, or what is inside its blocks."""
        found: dict[int, list[nn.Module]] = {}
        for row, layer in zip(self.graph.rows, self.model):
            alone = graphs.is_pasted(row.module) and graphs.keeps_map(self.graph, row)
            if row.inner:
                found[row.index] = inside.gates_inside(layer)
            elif alone or graphs.wiring(row.module) == ("preserve",):
                found[row.index] = list(layer) if isinstance(layer, nn.Sequential) else [layer]
        return found

    def _init_head(self) -> None:
        """Measure the strides, put the anchors in their order and into cells, start the biases, set batch norms."""
        head = self.head
        self.stride = self._measure_strides()
        head.stride = self.stride if head.anchors.is_meta else self.stride.to(head.anchors.device)
        areas = [sum(w * h for w, h in zip(level[::2], level[1::2])) for level in self.graph.head.args[1]]
        with torch.no_grad():
            if (areas[-1] - areas[0]) * float(self.stride[-1] - self.stride[0]) < 0:
                head.anchors.copy_(head.anchors.flip(0))
            head.anchors /= self.stride.to(head.anchors.device).view(-1, 1, 1)
        head.bias_init_()
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps, layer.momentum = 1e-3, 0.03

    @torch.no_grad()
    def _measure_strides(self) -> Tensor:
        """Input pixels per cell of each level, on the CPU, from a forward pass in which only the head trains.

        In training mode that pass would move every batch norm's running statistics by one blank image.
        """
        rows = self.graph.rows
        modules = [name for row in rows for name in (row.module, row.inner.gate if row.inner else "")]
        usual = 256 if any(map(graphs.is_pasted, modules)) else 128  # what their authors could rely on
        size = max(usual, 2 * max(int(row.stride or 64) for row in rows))
        self.eval()
        self.head.train()
        network = self if self._is_small_at(size) else copy.deepcopy(self).to("meta")
        blank = torch.zeros(1, self.graph.ch, size, size, device=network.head.anchors.device)
        done: list[int] = []
        try:
            raw = network.run_layers(blank, visualize=lambda index, *_: done.append(index))
            levels = raw[0] if isinstance(self.head, Segment) else raw
            strides = torch.tensor([size / level.shape[2] for level in levels], device="cpu")
            if strides.min() < 1 / graphs.MAX_STRIDE:
                raise ValueError(f"its maps have {[tuple(level.shape[2:4]) for level in levels]} cells")
        except LAYER_ERRORS as error:
            row = self.graph.rows[len(done)]
            raise UserError(f"{row.where}: cannot take what it reads: {first_line(error)}.") from None
        self.train()
        return strides

    def _is_small_at(self, size: int) -> bool:
        """Whether every map of a square image is known and small; else the meta device computes sizes alone."""
        strides = [(row.channels, row.stride) for row in self.graph.rows[:-1]]
        return all(stride is not None and channels * (size / stride) ** 2 <= MAX_MAP for channels, stride in strides)

    def forward(
        self, x: Tensor, augment: bool = False, profile: bool = False, visualize: Visualize | None = None
    ) -> Any:
        """See the class; `profile` and `visualize` as in `run_layers`."""
        if not augment:
            return self.run_layers(x, profile, visualize)
        if isinstance(self.head, Segment):
            raise UserError("--augment: masks of several scales cannot be joined. Leave it out for this network.")
        views = augmented(lambda image: self.run_layers(image).predictions, x, int(self.stride.max()), self.head.nl)
        return Output(views)


Model = DetectionModel  # its name before v7.0


class SegmentationModel(DetectionModel):
    """A DetectionModel whose head is Segment."""

    def __init__(self, cfg: Config = "yolov5s-seg.yaml", *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        if not isinstance(self.head, Segment):
            raise UserError(f"{self.graph.head.where}: a segmentation network ends in Segment.")


class ClassificationModel(BaseModel):
    """Logits (B, nc): the first `cutoff` layers of a detection network, the last of them replaced by Classify.

    The layers are the given network's own objects, not copies.
    """

    def __init__(self, model: DetectionModel, nc: int = 1000, cutoff: int = 10) -> None:
        super().__init__()
        if not 1 < cutoff < len(model.model):
            raise UserError(f"cutoff={cutoff}: this network has layers to keep from 2 to {len(model.model) - 1}.")
        rows = model.graph.rows[:cutoff]
        head: Any = Classify(sum(rows[-1].inputs), nc)
        head.i, head.f, head.type = rows[-1].index, rows[-1].raw_from, "models.common.Classify"
        head.np = Size.of(head).parameters
        self.model = nn.Sequential(*model.model[: cutoff - 1], head)
        self.save = sorted(source for row in rows for source in row.sources if source != row.index - 1)
        self.yaml, self.yaml_file = copy.deepcopy(model.yaml), model.yaml_file
        self.names = {i: str(i) for i in range(nc)}
        self.stride, self.nc = model.stride, nc

    def forward(self, x: Tensor, profile: bool = False, visualize: Visualize | None = None) -> Tensor:
        """Logits of images (B, ch, H, W); `profile` and `visualize` as in `run_layers`."""
        return self.run_layers(x, profile, visualize)


def build_model(
    cfg: Config,
    ch: int = 3,
    nc: int | None = None,
    anchors: float | None = None,
    *,
    verbose: bool = False,
    seed: int | None = None,
) -> DetectionModel:
    """The network of a YAML, dict or graph; its head's row decides between detection and segmentation."""
    graph = cfg if isinstance(cfg, Graph) else graphs.read(cfg, ch=ch, nc=nc, anchors=anchors)
    kind = SegmentationModel if graph.head.module == "Segment" else DetectionModel
    return kind(graph, verbose=verbose, seed=seed)


# -------------------------------------------------------------------------------------------------------- command line


def _build_all() -> None:
    """Build every network YAML on the meta device, without memory; UserError counts those that fail."""
    failed = 0
    for path in sorted((ROOT / "models").rglob("yolo*.yaml")):
        try:
            with torch.device("meta"):
                LOGGER.info(f"{display_path(path)}: {Size.of(build_model(path)).parameters:,} parameters")
        except UserError as error:
            failed += 1
            LOGGER.error(str(error))
    if failed:
        raise UserError(f"--test: {failed} networks cannot be built; the lines above say why.")


def run(arguments: Namespace) -> None:
    """What the command line asks for."""
    if arguments.test:
        return _build_all()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: expected at least 1.")
    device = select_device(arguments.device)
    model = build_model(arguments.cfg, verbose=True).to(device)
    images = torch.rand(arguments.batch_size, model.graph.ch, 640, 640, device=device)
    model.info()
    if arguments.line_profile:
        with torch.inference_mode():
            model.eval()(images, profile=True)
    elif arguments.profile:
        profile_training(model, images)
    else:
        LOGGER.info("Fused:")
        model.fuse().info()
