"""Exports a checkpoint with torch's own tools, as deployment scripts do: fused, traced, and to ONNX.

python export_script.py WEIGHTS OUT_STEM [SIZE]
"""

import json
import sys

import torch
import torch.nn as nn

from models.common import Conv
from models.experimental import attempt_load
from models.yolo import Detect
from utils.activations import SiLU
from utils.general import check_img_size, check_requirements, colorstr, file_size
from utils.torch_utils import select_device


def export_torchscript(model, im, file):
    ts = torch.jit.trace(model, im, strict=False)
    d = {"shape": im.shape, "stride": int(max(model.stride)), "names": model.names}
    ts.save(file, _extra_files={"config.txt": json.dumps(d)})
    print(f"{colorstr('TorchScript:')} {file} ({file_size(file):.1f} MB)")


def export_onnx(model, im, file):
    import onnx

    torch.onnx.export(model, im, file, opset_version=17, input_names=["images"], output_names=["output0"], dynamo=False)
    onnx.checker.check_model(onnx.load(file))
    print(f"{colorstr('ONNX:')} {file} ({file_size(file):.1f} MB)")


if __name__ == "__main__":
    weights, stem = sys.argv[1:3]
    device = select_device("cpu")
    model = attempt_load(weights, device=device, inplace=True, fuse=True)
    gs = int(max(model.stride))
    size = [check_img_size(x, gs) for x in [int(sys.argv[3]) if len(sys.argv) > 3 else 640] * 2]
    im = torch.zeros(1, 3, *size).to(device)
    model.eval()
    for _, m in model.named_modules():
        if isinstance(m, Conv):
            if isinstance(m.act, nn.SiLU):
                m.act = SiLU()
        elif isinstance(m, Detect):
            m.inplace = False
            m.dynamic = False
            m.export = True
    for _ in range(2):
        y = model(im)
    shape = tuple((y[0] if isinstance(y, tuple) else y).shape)
    print(f"{weights}: output shape {shape}")
    export_torchscript(model, im, stem + ".torchscript")
    if check_requirements("onnx>=1.12.0"):
        export_onnx(model, im, stem + ".onnx")
