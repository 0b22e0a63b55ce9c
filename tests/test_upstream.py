"""Files of YOLOv5, written here and read by stand-ins of its classes; and its pickled objects, run as ours."""

from __future__ import annotations

import importlib.util
import pickle
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import graph as graphs
from models.checkpoints.files import load_model, read, save
from models.checkpoints.unpickle import Global, PickleMachine, Record
from models.checkpoints.upstream import ATTRIBUTES, PickleWriter, network_record, write_archive, write_yolov5
from models.gates.insert import Insertion, insert
from models.yolo import DetectionModel, build_model
from tests import yolov5_reader
from utils.config import UserError

SE_NETWORKS = ("yolov5s-se-last.yaml", "yolov5s-se-presppf.yaml")
GAINS = (None, 2.0, 0.25)
OTHERS = (
    *("hub/yolov5n6.yaml", "hub/yolov3-tiny.yaml", "hub/yolov3-spp.yaml", "hub/yolov5s-ghost.yaml"),
    *("hub/yolov5s-transformer.yaml", "hub/yolov5-bifpn.yaml", "segment/yolov5n-seg.yaml"),
)
TINY = {"width_multiple": 0.125, "depth_multiple": 0.33}
X = torch.rand(1, 3, 128, 64, generator=torch.Generator().manual_seed(0))


def checkpoint_of(path: Path, cfg: Any, *, nc: int = 3, **changes: Any) -> Path:
    """A checkpoint of ours with every tensor moved away from where it starts."""
    data = {**graphs.read(cfg).yaml, **TINY, **changes}
    model = build_model(data, nc=nc, seed=1)
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    names = {i: f"class {i}" for i in range(nc)}
    return save(path, {"model": model.state_dict(), "yaml": model.yaml, "names": names, "stride": model.stride})


def rounded(path: Path) -> DetectionModel:
    """The network of a checkpoint, with its weights as half precision holds them."""
    return load_model(path, fuse=False).half().float()


@torch.no_grad()
def predictions(model: Any, x: Tensor = X) -> Tensor:
    return model(x)[0]


def with_gain(cfg: str, gain: float) -> dict[str, Any]:
    data = dict(graphs.read(cfg).yaml)
    for row in (*data["backbone"], *data["head"]):
        if row[2] == "SE":
            row[3] = [row[3][0], 16, gain]
    return data


# ------------------------------------------------------------------------------------------------------------- written


@pytest.mark.parametrize("version", yolov5_reader.VERSIONS)
@pytest.mark.parametrize("cfg, gain", [("yolov5n.yaml", None), *((cfg, gain) for cfg in SE_NETWORKS for gain in GAINS)])
def test_yolov5_opens_the_file_and_computes_the_same(
    cfg: str, gain: float | None, version: str, tmp_path: Path
) -> None:
    source = checkpoint_of(tmp_path / "a.pt", with_gain(cfg, gain) if gain else cfg)
    (file,) = write_yolov5(tmp_path / "b.pt", source)
    content = yolov5_reader.load(file, version)
    model = content["model"]
    assert content["ema"] is None and content["epoch"] == -1
    assert model.names == {0: "class 0", 1: "class 1", 2: "class 2"} and model.nc == 3
    assert all(p.dtype == torch.float16 and not p.requires_grad for p in model.parameters())
    with torch.no_grad():
        theirs = model.float().eval()(X)
    torch.testing.assert_close(theirs, predictions(rounded(source)), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("cfg", SE_NETWORKS)
def test_reading_it_back_gives_the_same_bits(cfg: str, gain: float | None, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "a.pt", with_gain(cfg, gain) if gain else cfg)
    (file,) = write_yolov5(tmp_path / "b.pt", source)
    again = read(file)
    assert torch.equal(predictions(load_model(again, fuse=False)), predictions(rounded(source)))
    assert again.names == read(source).names and again.stride == read(source).stride
    rows = [row for row in (*again.yaml["backbone"], *again.yaml["head"]) if row[2] == "SE"]
    assert all(len(row[3]) <= 2 for row in rows)
    if gain is None:
        expected = rounded(source).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in again.tensors.items())


def test_an_official_file_keeps_every_bit(weights_dir: Path, tmp_path: Path) -> None:
    (file,) = write_yolov5(tmp_path / "n.pt", weights_dir / "yolov5n.pt")
    before, after = read(weights_dir / "yolov5n.pt"), read(file)
    assert list(before.tensors) == list(after.tensors) and before.names == after.names
    assert all(torch.equal(before.tensors[key], after.tensors[key]) for key in before.tensors)
    stood_in = yolov5_reader.load(file, "v7.0")["model"].float().eval()
    ours = predictions(load_model(weights_dir / "yolov5n.pt", fuse=False))
    with torch.no_grad():  # equal to the last bit on one thread; on several, sigmoids at the seams may differ in it
        torch.testing.assert_close(stood_in(X), ours, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", OTHERS)
def test_other_networks_come_back_as_they_went(cfg: str, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "a.pt", cfg, width_multiple=0.25)
    (file,) = write_yolov5(tmp_path / "b.pt", source)
    wanted = predictions(rounded(source))
    assert torch.equal(predictions(load_model(file, fuse=False)), wanted)
    raw = torch.load(file, weights_only=False)["model"].float().eval()
    # torch 2.11 takes another path through the transformer's attention where no parameter has a gradient
    torch.testing.assert_close(predictions(raw), wanted, rtol=1e-5, atol=1e-4)


def test_torch_can_map_the_file_into_memory(tmp_path: Path) -> None:
    (file,) = write_yolov5(tmp_path / "b.pt", checkpoint_of(tmp_path / "a.pt", "yolov5n.yaml"))
    mapped = torch.load(file, weights_only=False, mmap=True)["model"]
    assert torch.equal(predictions(mapped.float().eval()), predictions(load_model(file, fuse=False)))


def test_all_convolutions_share_one_activation(tmp_path: Path) -> None:
    (file,) = write_yolov5(tmp_path / "b.pt", checkpoint_of(tmp_path / "a.pt", "yolov5n.yaml"))
    model = yolov5_reader.load(file, "v7.0")["model"]
    assert len({id(m) for m in model.modules() if isinstance(m, torch.nn.SiLU)}) == 1


def test_names_in_the_pickle_are_only_those_of_yolov5_and_torch(tmp_path: Path) -> None:
    (file,) = write_yolov5(tmp_path / "b.pt", checkpoint_of(tmp_path / "a.pt", "yolov5s-se-last.yaml"))
    with zipfile.ZipFile(file) as archive:
        data = archive.read("archive/data.pkl")
    named = {argument for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}
    theirs = {name for name in named if not name.startswith(("torch", "collections", "__builtin__ set"))}
    parts = ("Bottleneck", "C3", "Concat", "Conv", "SE", "SPPF")
    assert theirs == {*(f"models.common {part}" for part in parts), "models.yolo Detect", "models.yolo Model"}


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("gain, more, why", [(1.5, 0, "no power of two"), (2.0, 1, "11 SE .* cannot absorb it")])
def test_a_gain_that_cannot_be_taken_away_exactly_is_refused(gain: float, more: int, why: str, tmp_path: Path) -> None:
    insertions = [Insertion("SE", (16, gain), "after", "9"), Insertion("SE", (16,), "before", "10")]
    text = insert("yolov5n.yaml", insertions[: 1 + more])
    source = checkpoint_of(tmp_path / "a.pt", yaml.safe_load(text))
    with pytest.raises(UserError, match=f"row 10 is SE with a gain.*{why}"):
        write_yolov5(tmp_path / "b.pt", source)
    assert not (tmp_path / "b.pt").exists()


def test_a_file_with_folded_batch_norms_is_refused(tmp_path: Path) -> None:
    model = load_model(checkpoint_of(tmp_path / "a.pt", "yolov5n.yaml"))
    fused = save(tmp_path / "f.pt", {"model": model.state_dict(), "yaml": model.yaml, "names": model.names})
    with pytest.raises(UserError, match="batch norms are folded"):
        write_yolov5(tmp_path / "b.pt", fused)


GATES = [name for name in graphs.gates() if name != "SE"]


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_that_yolov5_lacks_travels_with_its_code(
    gate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = insert("yolov5n.yaml", [Insertion(gate, (), "after", "9")])
    source = checkpoint_of(tmp_path / "a.pt", yaml.safe_load(text), width_multiple=0.25)
    with pytest.raises(UserError, match=f"row 10 is {gate}.*--with-code"):
        write_yolov5(tmp_path / "b.pt", source)
    assert not (tmp_path / "b.pt").exists()
    file, code = write_yolov5(tmp_path / "b.pt", source, with_code=True)
    common = type(sys)("models.common")  # all that the code may take from there
    common.Conv = yolov5_reader.BuiltConv
    monkeypatch.setitem(sys.modules, "models.common", common)
    spec = importlib.util.spec_from_file_location("pasted", code)
    pasted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pasted)
    model = yolov5_reader.load(file, "v7.0", {f"models.attention.{gate}": vars(pasted)[gate]})["model"]
    with torch.no_grad():
        theirs = model.float().eval()(X)
    torch.testing.assert_close(theirs, predictions(rounded(source)), rtol=1e-5, atol=1e-4)
    assert torch.equal(predictions(load_model(file, fuse=False)), predictions(rounded(source)))
    built = vars(pasted)[gate](64, 64)  # as YOLOv5's parse_model makes it
    assert list(built.state_dict()) == list(load_model(source, fuse=False).model[10].state_dict())


# ------------------------------------------------------------------------------------------------- the pickle's writer

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4).map(OrderedDict)
        | st.sets(st.text(max_size=4), max_size=4)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_the_writer_writes_is_what_python_and_our_reader_read(value: Any) -> None:
    data = PickleWriter().dump(value)
    assert pickle.loads(data) == value
    assert PickleMachine(data, {}).run() == value


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool]),
)
def test_tensors_come_back(tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    file = tmp_path_factory.mktemp("tensors") / "t.pt"
    with file.open("wb") as stream:
        write_archive(stream, {"a": tensor, "b": [tensor, tensor.mT if tensor.ndim > 1 else tensor]})
    content = torch.load(file, weights_only=True)
    assert torch.equal(content["a"], tensor) and content["a"].dtype == dtype
    assert content["b"][0] is content["a"]
    assert torch.equal(content["b"][1], tensor.mT if tensor.ndim > 1 else tensor)


def test_the_writer_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match=r"a (PosixPath|WindowsPath) cannot"):
        PickleWriter().dump({"a": Path("b")})


# ------------------------------------------------------------------------------------------------ pickles of others


def rewritten(path: Path, source: Path, change: Callable[[dict[str, Any], Record], None], name: str) -> Path:
    """The checkpoint as a file of YOLOv5 that `change` was let at: it gets the attributes and the head."""
    model = load_model(source, fuse=False).half()
    record = network_record(model)
    record.name = name
    layers = record.state["_modules"]["model"].state["_modules"]
    change(record.state, layers[list(layers)[-1]])
    with path.open("wb") as file:
        write_archive(file, {"model": record, "ema": None})
    return path


def records(value: Any) -> list[Record]:
    """Every record inside, each place of it."""
    if not isinstance(value, Record):
        return []
    return [value, *(r for child in value.state["_modules"].values() for r in records(child))]


def as_v6_0(state: dict[str, Any], head: Record) -> None:
    """Names as a list, `anchor_grid` as a buffer, cached grids without the half cell, an activation per block."""
    state["names"] = list(state["names"].values())
    del state["yaml_file"], state["nc"], state["hyp"]
    anchors, stride = head.state["_buffers"]["anchors"], head.state["stride"]
    del head.state["anchor_grid"]
    head.state["_buffers"]["anchor_grid"] = (anchors * stride.view(-1, 1, 1)).view(3, 1, 3, 1, 1, 2)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(8), indexing="ij")
    head.state["grid"][0] = torch.stack((x, y), 2).view(1, 1, 16, 8, 2).float()  # of exactly the test's images
    head.state["onnx_dynamic"] = False
    for block in records(state["_modules"]["model"]):
        if "act" in block.state["_modules"]:
            old = block.state["_modules"]["act"]
            block.state["_modules"]["act"] = Record(Global(old.module, old.name))
            block.state["_modules"]["act"].state = dict(old.state)
        if block.name == "Upsample":
            del block.state["recompute_scale_factor"]


def as_v6_2(state: dict[str, Any], head: Record) -> None:
    """Names as a list, and grids of another image with the half cell in them."""
    state["names"] = list(state["names"].values())
    state["class_weights"] = torch.ones(3, dtype=torch.float64)
    head.state["grid"] = [torch.full((1, 3, 16, 8, 2), 7.0).half() for _ in range(3)]
    head.state["anchor_grid"] = [torch.full((1, 3, 16, 8, 2), 7.0).half() for _ in range(3)]


def as_v7_0(state: dict[str, Any], head: Record) -> None:
    as_v6_2(state, head)
    state["names"] = dict(enumerate(state["names"]))
    state["class_weights"] = state["class_weights"].float()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Model", "DetectionModel"])
@pytest.mark.parametrize("change", [as_v6_0, as_v6_2, as_v7_0])
def test_an_object_that_yolov5_pickled_runs_as_ours(change: Any, name: str, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "a.pt", "yolov5n.yaml")

    file = rewritten(tmp_path / "b.pt", source, change, name)
    model = torch.load(file, weights_only=False)["model"]
    wanted = predictions(load_model(file, fuse=False))
    assert isinstance(model, DetectionModel)
    assert torch.equal(predictions(model.float().eval()), wanted)
    assert torch.equal(predictions(rounded(source)), wanted)
    head = model.model[-1]
    if not isinstance(head.anchor_grid, list):  # what programs do that were copied from YOLOv5
        head.anchor_grid = [torch.zeros(1)] * head.nl
    head.export = True
    torch.testing.assert_close(predictions(model), wanted)  # decoded by other operations
    head.export, head.dynamic = False, True
    assert torch.equal(predictions(model), wanted)
    torch.testing.assert_close(predictions(model.fuse()), wanted, rtol=1e-4, atol=1e-3)
    assert "GFLOPs" in model.info()


def test_an_official_file_unpickled_by_others_runs_as_ours(weights_dir: Path) -> None:
    model = torch.load(weights_dir / "yolov5n.pt", weights_only=False)["model"].float().eval()
    for size in ((704, 352), (640, 640)):  # the first fits a grid that is in the file
        x = torch.rand(1, 3, *size)
        assert torch.equal(predictions(model, x), predictions(load_model(weights_dir / "yolov5n.pt", fuse=False), x))


def test_an_object_that_yolov5_pickled_after_folding_runs(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "a.pt", "yolov5n.yaml")
    model = load_model(source)
    record = network_record(model.half())
    for block in records(record):
        if block.name == "Conv":
            del block.state["_modules"]["bn"]
            block.state["forward"] = Record(Global("__builtin__", "getattr"), (block, "forward_fuse"))
    with (tmp_path / "b.pt").open("wb") as file:
        write_archive(file, {"model": record})
    theirs = torch.load(tmp_path / "b.pt", weights_only=False)["model"].float().eval()
    assert torch.equal(predictions(theirs), predictions(model.float()))


def test_every_layer_of_yolov5_has_its_attributes_listed() -> None:
    ours = {name for name, kind in graphs.layer_classes().items() if kind.__module__ == "models.common"}
    assert ours - set(ATTRIBUTES) <= {"Classify", "DWConvTranspose2d"}
