"""State dicts of RobustBench and of the published MeanSparse files, under our names.

The backbones `dm_wrn*`, `ra_wrn*` and those of timm have RobustBench's names already; what differs is the prefix, the
name of the last layer, and where the normalisation of the input is.
"""

import re
from collections.abc import Mapping

from torch import Tensor

# The last layer, by a tensor that only a backbone with a last layer of that name has.
_LAST = {"init_conv.weight": "logits.", "stem.stem.stem.0.weight": "fc."}
_TIMM_LAST = ("head.fc.", "head.")
_OURS = "linear."
_NORMALISATION = re.compile(r"(?:normalize\.|normalization\.)?(mean|std)$")
# Buffers that timm's Swin computes, and no longer keeps.
_COMPUTED = re.compile(r".*(\.relative_position_index|\.attn_mask)$")
_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.downsample\.")


def is_robustbench(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has names of RobustBench, or of a timm classifier in its wrapper."""
    keys = {_bare(key) for key in state}
    return "linear.weight" not in keys and (any(key in keys for key in _LAST) or _wrapped(state))


def from_robustbench(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `Classifier` from one of RobustBench's; others are returned as they are."""
    if not is_robustbench(state):
        return dict(state)
    found = {_bare(key): value for key, value in state.items()}
    found = {_input(key): value for key, value in found.items() if not _COMPUTED.match(key)}
    names = [name for key, name in _LAST.items() if key in found] or list(_TIMM_LAST)
    last = next((name for name in names if f"{name}weight" in found), None)
    if last is not None:
        found = {_OURS + key.removeprefix(last) if key in _two(last) else key: value for key, value in found.items()}
    if "layers.0.downsample.reduction.weight" in found:
        # timm before 0.9 had what halves the size at the end of a stage, and not at the start of the next.
        found = {_DOWNSAMPLE.sub(_next, key): value for key, value in found.items()}
    return found


def _two(last: str) -> tuple[str, str]:
    return f"{last}weight", f"{last}bias"


def _input(key: str) -> str:
    """`input_mean`, `input_std` for the normalisation of the inputs."""
    match = _NORMALISATION.match(key)
    return f"input_{match[1]}" if match else key


def _next(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample."


def _wrapped(state: Mapping[str, Tensor]) -> bool:
    return any(_bare_of_module(key).startswith("model.") for key in state)


def _bare_of_module(key: str) -> str:
    return key.removeprefix("module.")


def _bare(key: str) -> str:
    return _bare_of_module(key).removeprefix("model.").removeprefix("module.")
