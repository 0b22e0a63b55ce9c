"""The installed command: one name for every script, from any folder.

    yolov5-attention train --data coco128.yaml --epochs 3
    yolov5-attention detect --weights runs/train/exp/weights/best.pt --source photos

Each command takes the flags of its script, and writes into the working directory.
"""

from __future__ import annotations

import importlib.util
import sys

from utils.config import closest
from utils.runtime import run_script

COMMANDS = {  # name: (module, what it does)
    "train": ("train", "train a network"),
    "val": ("val", "judge a network on a dataset"),
    "detect": ("detect", "find objects in images, videos and streams"),
    "export": ("export", "write a network in another format"),
    "ablate": ("ablate", "compare arms of one recipe with the same seeds"),
    "insert": ("models.insert", "put an attention gate into a network YAML"),
    "transfer": ("models.transfer", "start a network from another's checkpoint"),
    "inspect": ("models.inspect_gates", "show what the gates of a network do"),
}


def main() -> None:
    """Run the command that `sys.argv` names; exit code 2 where there is none of this name."""
    commands = {name: about for name, about in COMMANDS.items() if importlib.util.find_spec(about[0])}
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {name:10}{text}" for name, (_, text) in commands.items()]
        print("usage: yolov5-attention COMMAND [flags]\n", *lines, sep="\n", end="\n\n")
        print("`yolov5-attention COMMAND --help` lists the flags of a command.")
    elif name not in commands:
        message = f"error: there is no command {name!r}.{closest(name, commands)} See `yolov5-attention --help`."
        print(message, file=sys.stderr)
        raise SystemExit(2)
    else:
        module = importlib.import_module(commands[name][0])
        run_script(lambda: module.main(arguments))


if __name__ == "__main__":
    main()
