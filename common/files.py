"""Files that are whole or not there, and checkpoints that hold tensors and numbers only."""

import contextlib
import errno
import io
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import RunStopped, UserError

# What our checkpoints end in, and the 8 hex digits after it: the CRC-32 of all that comes before.
_SEAL = b"admm-srnet crc32 "
_DIGITS = 8
_CHUNK = 2**22


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None) -> None:
    """Call `write(file)` on a temporary file, then rename it to `path`: readers see the old file or the new one.

    keep: where the old file, if there is one, stays.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would hide results from colleagues
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


# In place of a handle: another process holds what was asked for.
BUSY = -1
_held: set[int] = set()


def hold(path: Path, *, wait: float = 0.0) -> int | None:
    """Hold a folder or file against other processes until `release`, or until this process ends.

    wait: seconds to wait for another one that holds it. Returns a handle; BUSY; None where that cannot be had.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    handle = os.open(path, os.O_RDONLY)
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _held.add(handle)
            return handle
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(handle)
                return BUSY
            time.sleep(0.05)
        except OSError:  # some network file systems lock nothing
            os.close(handle)
            return None


def release(handle: int | None) -> None:
    """Let go of what `hold` has returned."""
    if handle in _held:
        _held.discard(handle)  # type: ignore[arg-type]
        os.close(handle)  # type: ignore[arg-type]


def _drop_held() -> None:
    """In a process that loads pictures: what its parent holds shall be free when the parent is gone."""
    for handle in list(_held):
        release(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_held)


@contextlib.contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """One process after the other, whoever comes first: for what several would write to `folder` at once."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = hold(folder, wait=math.inf)
    try:
        yield
    finally:
        release(handle)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk (or quota) into RunStopped; what was whole in `folder` is so still."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunStopped(
            f"no space left on the disk of {folder} ({error.strerror}); the last checkpoint is whole."
            " Make room and start the same command again"
        ) from None


def _keep(path: Path, keep: Path) -> None:
    spare = keep.with_name(f".{keep.name}")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:  # a file system without links
        shutil.copyfile(path, spare)
    os.replace(spare, keep)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where folders can be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def previous(path: Path) -> Path:
    """Where the file that a new `path` took the place of is kept."""
    return path.with_name(f"previous.{path.name.removeprefix('last.')}")


def save_tensors(path: Path, state: Any, *, keep: bool = False) -> None:
    """`torch.save`, whole or not at all, sealed with a checksum in the comment that ends a zip file.

    Any program that reads torch's files reads it. keep: leave the file that was there as `previous(path)`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    # The last two bytes of a zip file without a comment are the comment's length.
    body = buffer.getbuffer()[:-2]
    length = (len(_SEAL) + _DIGITS).to_bytes(2, "little")
    digits = f"{zlib.crc32(length, zlib.crc32(body)):0{_DIGITS}x}".encode()

    def write(file: BinaryIO) -> None:
        file.write(body)
        file.write(length + _SEAL + digits)

    write_whole(path, write, keep=previous(path) if keep else None)


def is_whole(path: Path) -> bool:
    """Whether a file's checksum fits: our own over every byte, else those that a zip file has of its parts.

    A file of an older format, which has none, counts as whole.
    """
    seal = len(_SEAL) + _DIGITS
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - seal
        file.seek(max(left, 0))
        tail = file.read()
        if left > 0 and tail.startswith(_SEAL):
            file.seek(0)
            crc = 0
            while left > 0 and (chunk := file.read(min(_CHUNK, left))):
                crc, left = zlib.crc32(chunk, crc), left - len(chunk)
            return f"{crc:0{_DIGITS}x}".encode() == tail[len(_SEAL) :]
    try:
        with zipfile.ZipFile(path) as parts:
            return not parts.comment and parts.testzip() is None
    except Exception:  # whatever the byte at hand leads to
        # Files of torch before 1.6 are no zip files.
        return not _looks_zipped(path)


def _looks_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def load_tensors(path: Path, *, flag: str) -> Any:
    """Read a file of tensors, numbers and strings onto the CPU; a pickle that would run code is refused unrun.

    Raises: UserError that names `flag` and the file when it is absent, truncated or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"--{flag}: no checkpoint at {path}")
    try:
        if not is_whole(path):
            raise UserError(f"--{flag}: {path} is truncated or altered{_offer(path)}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    # Damaged files raise whatever the byte at hand leads to: struct.error, AssertionError, KeyError, ...
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and re.search(r"Unsupported (global|class)|GLOBAL", str(error)):
            raise UserError(
                f"--{flag}: {path} holds more than tensors (its pickle would run code) or is damaged; refused unrun"
            ) from None
        raise UserError(f"--{flag}: {path} is truncated or not a checkpoint{_offer(path)}") from None


def _offer(path: Path) -> str:
    """Where the checkpoint before a damaged one is, if there is one that is whole."""
    before = previous(path)
    return f"; the one before it, {before}, is whole" if before.is_file() and is_whole(before) else ""


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
