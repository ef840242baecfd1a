"""Files that are whole or not there, and checkpoints that hold tensors and numbers only."""

import io
import json
import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import UserError


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file, then rename it to `path`: readers see the old file or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide results from colleagues
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def save_tensors(path: Path, state: Any) -> None:
    """`torch.save`, whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))


def load_tensors(path: Path, *, flag: str) -> Any:
    """Read a file of tensors, numbers and strings onto the CPU; a pickle that would run code is refused unrun.

    Raises: UserError that names `flag` and the file when it is absent, truncated or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"--{flag}: no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # Damaged files raise whatever the byte at hand leads to: struct.error, AssertionError, KeyError, ...
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and re.search(r"Unsupported (global|class)|GLOBAL", str(error)):
            raise UserError(
                f"--{flag}: {path} holds more than tensors (its pickle would run code) or is damaged; refused unrun"
            ) from None
        raise UserError(f"--{flag}: {path} is truncated or not a checkpoint") from None


def load_state_dict(path: Path, *, flag: str) -> dict[str, Tensor]:
    """A bare state dict, with the `module.` prefix of DataParallel taken off; or a .safetensors file.

    Raises: UserError as `load_tensors`, and where the file holds no state dict.
    """
    state = _load_safetensors(path, flag) if path.suffix == ".safetensors" else load_tensors(path, flag=flag)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"--{flag}: {path} is not a file of network weights (last.model or last.cocsr_model)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load_safetensors(path: Path, flag: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"--{flag}: no checkpoint at {path}") from None
    except (SafetensorError, OSError):
        raise UserError(f"--{flag}: {path} is truncated or not a checkpoint") from None


def published_epoch(path: Path, *, flag: str) -> int | None:
    """The epoch in a published `last.config`, a pickle of {'epoch': n}; None where there is no such file.

    Read by an unpickler that admits no global at all, hence runs nothing.
    Raises: UserError where the file holds anything else.
    """
    if not path.is_file():
        return None
    try:
        config = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        epoch = config["epoch"]
        if type(config) is not dict or type(epoch) is not int:
            raise ValueError
    except Exception:
        raise UserError(f"--{flag}: {path} is not a published configuration ({{'epoch': n}}); refused") from None
    return epoch


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} refused")
