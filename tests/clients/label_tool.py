"""Writes a YOLO label file beside every image of a folder, as labelling tools of v6's time do.

python label_tool.py WEIGHTS FOLDER OUT
"""

import os
import sys

import cv2
import numpy as np
import torch

from models.experimental import attempt_load
from utils.datasets import LoadImages, letterbox
from utils.general import check_img_size, non_max_suppression, scale_coords, set_logging, xyxy2xywh
from utils.plots import colors, plot_one_box
from utils.torch_utils import select_device, time_synchronized


class Labeller:
    def __init__(self, weights, img_size=640, conf_thres=0.25, iou_thres=0.45, classes=None, agnostic_nms=False):
        set_logging()
        self.device = select_device("cpu")
        self.half = self.device.type != "cpu"
        self.model = attempt_load(weights, map_location=self.device)
        self.stride = int(self.model.stride.max())
        self.img_size = check_img_size(img_size, s=self.stride)
        if self.half:
            self.model.half()
        self.names = self.model.module.names if hasattr(self.model, "module") else self.model.names
        self.conf_thres, self.iou_thres, self.classes, self.agnostic_nms = conf_thres, iou_thres, classes, agnostic_nms

    def predict(self, img):
        img = torch.from_numpy(img).to(self.device)
        img = img.half() if self.half else img.float()
        img /= 255.0
        if img.ndimension() == 3:
            img = img.unsqueeze(0)
        with torch.no_grad():
            pred = self.model(img, augment=False)[0]
        return img, non_max_suppression(pred, self.conf_thres, self.iou_thres, self.classes, self.agnostic_nms)

    def label(self, folder, out):
        dataset = LoadImages(folder, img_size=self.img_size, stride=self.stride)
        for path, img, im0s, vid_cap, *_ in dataset:
            assert vid_cap is None
            started = time_synchronized()
            img, pred = self.predict(img)
            lines = []
            for det in pred:
                gn = torch.tensor(im0s.shape)[[1, 0, 1, 0]]
                if len(det):
                    det[:, :4] = scale_coords(img.shape[2:], det[:, :4], im0s.shape).round()
                    for *xyxy, conf, cls in reversed(det):
                        xywh = (xyxy2xywh(torch.tensor(xyxy).view(1, 4)) / gn).view(-1).tolist()
                        lines.append(("%g " * 5).rstrip() % (cls, *xywh) + "\n")
                        label = f"{self.names[int(cls)]} {conf:.2f}"
                        plot_one_box(xyxy, im0s, label=label, color=colors(int(cls), True), line_thickness=2)
            stem = os.path.splitext(os.path.basename(path))[0]
            with open(os.path.join(out, stem + ".txt"), "w") as file:
                file.writelines(lines)
            cv2.imwrite(os.path.join(out, stem + "_drawn.png"), im0s)
            print(f"{stem}: {len(lines)} labels in {time_synchronized() - started:.2f}s")

    def label_by_hand(self, image_file):
        """The same without LoadImages, from an image that OpenCV read."""
        im0 = cv2.imread(image_file)
        img = letterbox(im0, self.img_size, stride=self.stride)[0]
        img = np.ascontiguousarray(img[:, :, ::-1].transpose(2, 0, 1))
        img, pred = self.predict(img)
        pred[0][:, :4] = scale_coords(img.shape[2:], pred[0][:, :4], im0.shape)
        return pred[0].tolist()


if __name__ == "__main__":
    tool = Labeller(sys.argv[1])
    os.makedirs(sys.argv[3], exist_ok=True)
    first = sorted(os.listdir(sys.argv[2]))[0]
    print("by hand:", len(tool.label_by_hand(os.path.join(sys.argv[2], first))))
    tool.label(sys.argv[2], sys.argv[3])
