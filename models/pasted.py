"""Attention classes from elsewhere, pasted into a layer file as they stand: how they are built, what they give.

A class there that has no `wiring` (models/common.py) is such a class. `leading` reads from its constructor's parameter
names what the builder gives it; `output_shape` runs it once on a small map, without memory where torch can.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.grammar import LAYER_ERRORS, first_line
from utils.config import UserError, display_path

try:
    from models import attention, common
except (NameError, ModuleNotFoundError) as error:  # in a pasted class: this file is the first to import it
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    spot = f"{display_path(Path(frames[-1].filename))}:{frames[-1].lineno}"
    fix = "Write its import at the top of that file" if isinstance(error, NameError) else "Install it"
    raise UserError(f"{spot}: {first_line(error)}. {fix}, or paste another class.") from None

FILES = (common, attention)  # where classes are pasted
# parameter names in lower case, without underscores
INPUTS = (
    "c1 cin inc inch chin inchannel inchannels inchan channelin channelsin inp input inputs inputchannel inputchannels "
    "inputdim indim indims dimin inplane inplanes infeatures nin numinchannels"
)
OUTPUTS = (
    "c2 cout outc ouc outch chout outchannel outchannels outchan channelout channelsout oup output outputs "
    "outputchannel outputchannels outputdim outdim outdims dimout outplane outplanes planes outfeatures nout"
)
SINGLE = (
    "c ch chs chan channel channels nchannel nchannels numchannel numchannels channelnum dim dims ndim ndims embeddim "
    "embeddims embedding planes feature features numfeatures dmodel"
)
ERRORS = (*LAYER_ERRORS, NameError, ImportError)
# what code written for other files takes for granted
IMPORTS = {
    "np": "import numpy as np",
    "F": "import torch.nn.functional as F",
    "rearrange": "from einops import rearrange",
    "Parameter": "from torch.nn import Parameter",
    "init": "from torch.nn import init",
    "partial": "from functools import partial",
    "OrderedDict": "from collections import OrderedDict",
    "DropPath": "from timm.layers import DropPath",
    **{name: f"import {name}" for name in ("torch", "math", "warnings", "copy", "einops", "timm", "numpy", "random")},
}
PROBE_CHANNELS, PROBE_SIZE = 256, 16  # a map on which a class is tried that no row describes
MAX_PROBE = 1 << 24  # elements of a map, and channels squared, that are tried with real memory
MAX_NUMBER = 4096  # any other argument of a class that is tried so


def is_pasted(layer: type[nn.Module]) -> bool:
    """Whether a class says nothing about its row, and is not torch's."""
    return not hasattr(layer, "wiring") and layer.__module__.split(".")[0] != "torch"


def leading(layer: type[nn.Module]) -> tuple[str, ...] | None:
    """What a constructor's first parameters get from the builder; a row's arguments after its channels follow them.

    Told by the parameters' names, in this order:

    - `(c1, c2, ...)`: an input and an output, such as in_channels, out_channels, or inp, oup: ("c1", "c2"), and
      ("c1", "c2", "n") where the third is called n, as in C3;
    - `(channels, ...)`: one of them, such as channel, dim, in_planes, c1, and no output later: ("c1",);
    - no channels, and a default for each: ().

    None: none of these, so that what it would get is a guess.
    """
    if layer.__init__ is nn.Module.__init__:
        return ()
    parameters = list(inspect.signature(layer).parameters.values())
    given = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return None
    names = [p.name.lower().replace("_", "") for p in given]
    outputs, channels = set(OUTPUTS.split()), {*INPUTS.split(), *SINGLE.split()}
    if len(names) > 1 and names[0] in channels and names[1] in outputs:
        return ("c1", "c2", "n") if names[2:3] == ["n"] else ("c1", "c2")
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    if names and names[0] in channels and not outputs & set(names[1:]):
        return ("c1",)
    unclear = any(name in channels | outputs for name in names) or any(p.default is p.empty for p in given)
    return None if unclear else ()


def signature(layer: type[nn.Module]) -> str:
    """`MyAttention(c1, c2, r=16)`."""
    parameters = inspect.signature(layer).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return f"{layer.__name__}{inspect.Signature(bare)}"


def output_shape(layer: type[nn.Module], args: list[Any], shape: tuple[int, ...], where: str) -> tuple[int, ...] | None:
    """The shape of what a class makes of a map of this shape, (1, c, H, W), in eval mode.

    First on the meta device, which computes shapes alone; a class that needs values there is run on the CPU. None where
    that would take too much memory. Random numbers drawn elsewhere stay what they were.

    Raises:
        UserError: it cannot be built, fails, or gives something else than a map; the message starts with `where`.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return _run(layer, args, shape, "meta", where)
        except UserError:
            if torch.Size(shape).numel() > MAX_PROBE or not _is_small(layer, args):
                return None
        return _run(layer, args, shape, "cpu", where)


def build(layer: type[nn.Module], *args: Any) -> nn.Module:
    """The layer on torch's default device; where that is meta, and its constructor needs values, on the CPU."""
    try:
        return layer(*args)
    except ERRORS:
        if not _is_small(layer, args):
            raise
        with torch.device("cpu"):
            return layer(*args)


def _is_small(layer: type[nn.Module], args: Sequence[Any]) -> bool:
    """Whether it may be built in real memory before anybody has compared its size with a file's."""
    numbers = [arg for arg in args if isinstance(arg, (int, float))]
    count = len(leading(layer) or ())
    channels = [*numbers[:count], 1]
    return max(channels) ** 2 <= MAX_PROBE and all(abs(value) <= MAX_NUMBER for value in numbers[count:])


def _run(layer: type[nn.Module], args: list[Any], shape: tuple[int, ...], device: str, where: str) -> tuple[int, ...]:
    call = f"{layer.__name__}({', '.join(map(repr, args))})"
    c, h, w = shape[1:]
    with torch.device(device):
        try:
            built = layer(*args).eval()
        except ERRORS as error:
            raise UserError(f"{where}: {call} cannot be built: {explain(error, layer)}.") from None
        empty = next((name for name, weights in built.named_parameters() if not weights.numel()), None)
        if empty is not None:
            raise UserError(f"{where}: {call} leaves no weights in its '{empty}'. Is a reduction above the channels?")
        try:
            made = built(torch.zeros(shape))
        except ERRORS as error:
            said = explain(error, layer)
            raise UserError(f"{where}: {call} fails on a map of {c} channels, {h} x {w}: {said}.") from None
    if not isinstance(made, Tensor) or made.ndim != 4:
        found = f"a tensor of shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise UserError(f"{where}: {call} gives {found}; expected one map (B, c, H, W).")
    if not made.numel():
        raise UserError(f"{where}: {call} leaves no pixels of a map of {h} x {w}.")
    return tuple(made.shape)


def explain(error: BaseException, layer: type[nn.Module] | None = None) -> str:
    """What went wrong in a pasted class, with the line of its file; for a missing name also the import to add."""
    frames = traceback.extract_tb(error.__traceback__)
    file = inspect.getfile(layer) if layer is not None else None
    inside = [frame for frame in frames if file is None or frame.filename == file]
    place = f" ({display_path(Path(inside[-1].filename))}:{inside[-1].lineno})" if inside else ""
    if not isinstance(error, NameError) or not error.name:
        return first_line(error) + place
    known = IMPORTS.get(error.name)
    fix = f"Write '{known}' above it" if known else "Import it above the class, or paste its definition too"
    return f"it uses '{error.name}', which its file does not define{place}. {fix}"


def keeps_shape(layer: type[nn.Module]) -> bool:
    """Whether a class with its default arguments seems to keep channels and size; True where only a row can tell."""
    first = leading(layer)
    if first is None:
        return False
    given = {"c1": PROBE_CHANNELS, "c2": PROBE_CHANNELS, "n": 1}
    shape = (1, PROBE_CHANNELS, PROBE_SIZE, PROBE_SIZE)
    try:
        return output_shape(layer, [given[name] for name in first], shape, "") in (None, shape)
    except UserError:
        return True


# --------------------------------------------------------------------------------------------------------------- gates


def is_gate(part: nn.Module) -> bool:
    """A Gate, or a module that can be read and made neutral as one: it has `scale` and `neutralise_`."""
    return isinstance(part, common.Gate) or all(
        callable(getattr(part, name, None)) for name in ("scale", "neutralise_")
    )


def contiguous(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: maps in memory as code written elsewhere expects them, which often calls `view`."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)


def advice(layer: nn.Module) -> tuple[str, str, str]:
    """The two lines that make a gate of a pasted class, and before them a sentence that says so."""
    layer = layer[0] if isinstance(layer, nn.Sequential) else layer  # a row's number above 1
    weights = [name for name, weight in layer.named_parameters() if weight.ndim > 1]  # not those of norms
    path = [*weights, "last_layer.weight"][max(len(weights) - 1, 0)].split(".")
    last = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path)
    return (
        f"With two lines of its own class {type(layer).__name__} starts neutral and models/inspect_gates.py reads it:",
        f"def neutralise_(self): nn.init.zeros_(self{last})"
        "  # and what else must be zero for forward(x) to be a constant times x, such as a bias",
        "def scale(self, x): return ...  # what forward multiplies x by, (B, c or 1, H or 1, W or 1)",
    )
