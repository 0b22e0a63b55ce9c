"""By how much each export format differs from its checkpoint: yolov5n, both SE networks and every gate.

    python benchmarks/parity.py --weights yolov5n.pt --img 320 --map

The gates stand behind SPPF of yolov5n. Their networks take over the checkpoint's weights and start neutral; then the
gates' own weights are moved at random, so that they do something and the network still finds what it found.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

CELLS: dict[str, dict[str, Any]] = {
    "torchscript": {"include": "torchscript"},
    "onnx": {"include": "onnx"},
    "onnx dynamic": {"include": "onnx", "dynamic": True},
    "onnx nms": {"include": "onnx", "nms": True},
    "openvino fp32": {"include": "openvino"},
    "openvino fp16": {"include": "openvino", "half": True},
    "openvino int8": {"include": "openvino", "int8": True},
}


def main() -> None:
    """Print a Markdown table with pixels / score, and with --map the difference of mAP50-95, in each cell."""
    from utils.config import ArgumentParser

    parser = ArgumentParser(prog="benchmarks/parity.py", description="Exports compared with their checkpoints.")
    parser.add_argument("--weights", default="yolov5n.pt", help="checkpoint of yolov5n")
    parser.add_argument("--imgsz", "--img", type=int, default=320, help="image size in pixels")
    parser.add_argument("--data", default=str(ROOT / "data/coco128.yaml"), help="dataset YAML, for int8")
    parser.add_argument("--formats", nargs="+", default=list(CELLS), choices=list(CELLS), help="which columns")
    parser.add_argument("--map", action="store_true", help="also the difference of mAP50-95 on --data, at one size")
    options = parser.parse_args()
    print("| network | " + " | ".join(options.formats) + " |")
    print("|---" * (1 + len(options.formats)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name, file in networks(options.weights, Path(folder)):
            cells = [cell(file, CELLS[format], options) for format in options.formats]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def networks(weights: str, folder: Path) -> Any:
    """(name, checkpoint) of every network in the table."""
    import torch
    import yaml

    from models.checkpoints.files import read, save
    from models.gates.insert import Insertion, insert
    from models.gates.start import gates_in
    from models.gates.transfer import transfer
    from models.graph import gates
    from models.graph import read as read_graph
    from models.yolo import build_model
    from utils.downloads import find_weights

    checkpoint = read(find_weights(weights))
    width = {key: read_graph("yolov5n.yaml").yaml[key] for key in ("width_multiple", "depth_multiple")}
    last, before = ({**read_graph(f"yolov5s-se-{place}.yaml").yaml, **width} for place in ("last", "presppf"))
    cases: dict[str, Any] = {"yolov5n": "yolov5n.yaml", "SE last": last, "SE before SPPF": before}
    for gate in gates():
        cases[gate] = yaml.safe_load(insert("yolov5n.yaml", [Insertion(gate, (), "after", "9")]))
    for name, cfg in cases.items():
        torch.manual_seed(0)
        model = build_model(cfg, nc=checkpoint.num_classes)
        transfer(model, checkpoint, gate="gain")
        for part in (part for layer in model.model for gate in gates_in(layer) for part in gate.parameters()):
            part.data.add_(0.1 * torch.randn_like(part))
        file = folder / f"{name.replace(' ', '-')}.pt"
        content = {"model": model.state_dict(), "yaml": model.yaml, "names": checkpoint.names, "stride": model.stride}
        yield name, save(file, content)


def cell(file: Path, asked: dict[str, Any], options: argparse.Namespace) -> str:
    """Largest difference of boxes in pixels and of scores."""
    import export
    from models.backends import FORMATS, load
    from utils.config import options_from

    protocol = {"conf_thres": 0.001, "iou_thres": 0.6, "topk_all": 300, "topk_per_class": 300}  # of validation
    nms = protocol if options.map and asked.get("nms") else {}
    flags = options_from(export.build_parser(), {"data": options.data, **asked, **nms})
    size_hw = (options.imgsz, options.imgsz)
    reference = load(file)
    how = export.export_options(flags, file, size_hw, reference)
    path = FORMATS[asked["include"]].export(reference.model, file.with_suffix(""), how)
    images = export.load_images(flags, size_hw, "val", export.COMPARED_IMAGES)
    network = load(path)
    box, score = export.difference(network, reference, images, how)
    said = f"{box:.2g} / {score:.1g}"
    if options.map:
        network.size_hw = reference.size_hw = size_hw  # of a dynamic one, too: the same images for both
        final = how if nms else None
        judged, wanted = export.mean_ap(network, options.data, final), export.mean_ap(reference, options.data)
        said += f" / {judged - wanted:+.4f}"
    return said


if __name__ == "__main__":
    from utils.runtime import run_script

    run_script(main)
