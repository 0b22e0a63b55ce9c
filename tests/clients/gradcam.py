"""Where in the image a detection comes from: Grad-CAM by hooks on one layer, as notebooks on YOLOv5 do it.

python gradcam.py WEIGHTS IMAGE LAYER OUT
"""

import json
import sys

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from models.experimental import attempt_load
from utils.augmentations import letterbox
from utils.general import non_max_suppression, scale_boxes


class GradCAM:
    def __init__(self, model, target_layer):
        self.model = model
        self.gradients, self.activations = {}, {}

        def backward_hook(module, grad_input, grad_output):
            self.gradients["value"] = grad_output[0]

        def forward_hook(module, inputs, output):
            self.activations["value"] = output

        target_layer.register_forward_hook(forward_hook)
        target_layer.register_full_backward_hook(backward_hook)

    def __call__(self, img):
        b, _, h, w = img.shape
        predictions = self.model(img)[0]
        scores = predictions[..., 4:5] * predictions[..., 5:]
        best = scores[0].flatten().argmax()
        score = scores[0].flatten()[best]
        self.model.zero_grad()
        score.backward()
        gradients, activations = self.gradients["value"], self.activations["value"]
        k = gradients.size(1)
        weights = gradients.view(b, k, -1).mean(2).view(b, k, 1, 1)
        saliency = F.relu((weights * activations).sum(1, keepdim=True))
        saliency = F.interpolate(saliency, size=(h, w), mode="bilinear", align_corners=False)
        low, high = saliency.min(), saliency.max()
        row = predictions[0, best // scores.shape[2]]
        return ((saliency - low) / (high - low + 1e-9)).detach(), score.item(), row.detach(), predictions.detach()


if __name__ == "__main__":
    weights, image, layer, out = sys.argv[1:]
    model = attempt_load(weights, device="cpu")
    model.requires_grad_(True)
    model.eval()
    device = next(model.parameters()).device
    im0 = cv2.imread(image)
    im = letterbox(im0, 640, stride=int(model.stride.max()))[0]
    im = np.ascontiguousarray(im.transpose((2, 0, 1))[::-1])
    im = torch.from_numpy(im).to(device).float().div(255)[None]
    cam = GradCAM(model, model.model[int(layer)])
    mask, score, row, predictions = cam(im)
    boxes = non_max_suppression(predictions, 0.25, 0.45)[0]
    boxes[:, :4] = scale_boxes(im.shape[2:], boxes[:, :4], im0.shape)
    heat = cv2.applyColorMap((mask[0, 0].numpy() * 255).astype(np.uint8), cv2.COLORMAP_JET)
    cv2.imwrite(out, heat)
    x, y, w, h = row[:4].tolist()
    inside = mask[0, 0, max(int(y - h / 2), 0) : int(y + h / 2) + 1, max(int(x - w / 2), 0) : int(x + w / 2) + 1]
    facts = {"score": score, "inside": inside.mean().item(), "all": mask.mean().item(), "boxes": len(boxes)}
    facts["names"] = [model.names[int(c)] for c in boxes[:, 5]]
    print(json.dumps(facts))
