"""Files that are whole or not there, and checkpoints that hold tensors and numbers only."""

import contextlib
import errno
import io
import json
import math
import os
import pickle
import re
import secrets
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from common.errors import RunStopped, UserError

# The comment that ends our checkpoints, a zip file each: facts as JSON, then the CRC-32 of all that comes before it, in
# 8 hex digits. Files of version 0.1 have no facts and a checksum of the bytes before the comment.
_FACTS, _SEAL, _OLD_SEAL = b"admm-srnet ", b" sealed ", b"admm-srnet crc32 "
_DIGITS = 8
_CHUNK = 2**22
# What temporary files are named by; `remove_leftovers` knows them by it.
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.tmp")
_LOCK = ".lock"
_DAY_S = 24 * 3600


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None) -> None:
    """`write(file)` in a `whole_file`."""
    with whole_file(path, keep=keep) as file:
        write(file)


@contextlib.contextmanager
def whole_file(path: Path, *, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A temporary file to write to, renamed to `path` at the end: readers see the old file or the new one.

    keep: where the old file, if there is one, stays. The file's permissions are those of the umask.
    """
    temporary = _temporary(path)
    try:
        # Exclusive and locked: who looks for leftovers sees that this one is being written.
        with open(temporary, "xb") as file:
            _lock_quietly(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
            if keep is not None and path.exists():
                _keep(path, keep)
            os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> Path:
    # A name of a file may have up to 255 bytes, and what is added here has 18.
    name = os.fsdecode(os.fsencode(path.name)[:230])
    return path.with_name(f".{name}.{secrets.token_hex(6)}.tmp")


def is_leftover(path: Path) -> bool:
    """Whether a file is one of our temporary or lock files, by its name."""
    return path.name == _LOCK or _TEMPORARY.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`; those that are being written stay."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            # Without locks, on some network disks, only the file's age says so.
            with contextlib.suppress(OSError):
                handle = hold(path)
                if handle != BUSY and (handle is not None or time.time() - path.stat().st_mtime > _DAY_S):
                    path.unlink()
                release(handle)


# In place of a handle: another process holds what was asked for.
BUSY = -1
_held: set[int] = set()
_reported_unlocked: set[Path] = set()


def _lock_quietly(handle: int) -> None:
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def hold(path: Path, *, wait: float = 0.0) -> int | None:
    """Hold a folder (by a file `.lock` in it) or a file against other processes until `release`, or this one's end.

    wait: seconds to wait for another one that holds it. Returns a handle; BUSY; None, and a line says so once, where
    the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    # Open for writing: NFS makes an exclusive lock of it, which a handle for reading is refused.
    place = path / _LOCK if path.is_dir() else path
    handle = os.open(place, os.O_RDWR | (os.O_CREAT if place != path else 0), 0o666)
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
        except OSError as error:
            os.close(handle)
            if path not in _reported_unlocked and not _TEMPORARY.fullmatch(path.name):
                _reported_unlocked.add(path)
                print(f"note: {path} cannot be locked ({error.strerror}); let only one process write there at a time")
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
    """Turn a full disk (or quota) into RunStopped; files that were whole in `folder` are so still."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunStopped(
            f"no space left on the disk of {folder} ({error.strerror}); the files that were there are whole."
            " Make room and start the same command again"
        ) from None


def _keep(path: Path, keep: Path) -> None:
    spare = _temporary(keep)
    try:
        try:
            os.link(path, spare)
        except OSError:  # a file system without links
            shutil.copyfile(path, spare)
        os.replace(spare, keep)
    finally:
        # Renaming does nothing where both are links to one file, as after a kill between this and the new file.
        spare.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where folders can be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """As UTF-8; what cannot be (names of files that are not) is escaped."""
    write_whole(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def previous(path: Path) -> Path:
    """Where the file that a new `path` took the place of is kept."""
    return path.with_name(f"previous.{path.name.removeprefix('last.')}")


def save_tensors(path: Path, state: Any, *, facts: Mapping[str, Any] | None = None, keep: bool = False) -> None:
    """`torch.save`, whole or not at all; facts and a checksum are in the comment that ends a zip file.

    Any program that reads torch's files reads it. facts: what can be said in JSON, at most 65,000 bytes of it, of where
    the tensors come from. keep: leave the file that was there as `previous(path)`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    comment = _FACTS + json.dumps(facts or {}).encode() + _SEAL
    # The last two bytes of a zip file without a comment are the comment's length.
    body = buffer.getbuffer()[:-2]
    tail = (len(comment) + _DIGITS).to_bytes(2, "little") + comment
    digits = f"{zlib.crc32(tail, zlib.crc32(body)):0{_DIGITS}x}".encode()

    def write(file: BinaryIO) -> None:
        file.write(body)
        file.write(tail + digits)

    write_whole(path, write, keep=previous(path) if keep else None)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that `save_tensors` put into a file; none for files of other programs."""
    try:
        with zipfile.ZipFile(path) as parts:
            comment = parts.comment
        if not comment.startswith(_FACTS) or comment[-_DIGITS - len(_SEAL) : -_DIGITS] != _SEAL:
            return {}
        return json.loads(comment[len(_FACTS) : -_DIGITS - len(_SEAL)])
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}


def is_whole(path: Path) -> bool:
    """Whether a file's checksum fits: our own over every byte, else those that a zip file has of its parts.

    A file without checksums, of an older format or written without them, counts as whole.
    """
    seal = len(_OLD_SEAL) + _DIGITS
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - seal, 0))
        tail, digits = file.read()[:-_DIGITS], b""
        if tail.endswith(_SEAL):
            digits, left = _read_at(file, end - _DIGITS), end - _DIGITS
        elif tail == _OLD_SEAL:
            digits, left = _read_at(file, end - _DIGITS), end - seal
        if digits:
            return f"{_checksum(file, left):0{_DIGITS}x}".encode() == digits
    try:
        with zipfile.ZipFile(path) as parts:
            if parts.comment.startswith(_FACTS):
                return False  # ours, without its end
            filled = [part.CRC for part in parts.infolist() if part.file_size]
            # torch leaves them all 0 where it is asked to write none.
            return not any(filled) or parts.testzip() is None
    except Exception:  # whatever the byte at hand leads to
        # Files of torch before 1.6 are no zip files.
        return not _looks_zipped(path)


def _read_at(file: BinaryIO, place: int) -> bytes:
    file.seek(place)
    return file.read()


def _checksum(file: BinaryIO, length: int) -> int:
    """CRC-32 of the first `length` bytes."""
    file.seek(0)
    crc = 0
    while length > 0 and (chunk := file.read(min(_CHUNK, length))):
        crc, length = zlib.crc32(chunk, crc), length - len(chunk)
    return crc


def _looks_zipped(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def load_tensors(path: Path, *, flag: str) -> Any:
    """Read a file of tensors, numbers and strings onto the CPU; a pickle that would run code is refused unrun.

    Raises: UserError that names `flag` and the file when it is absent, truncated or holds anything else.
    """
    with readable(path, flag):
        if not path.is_file():
            raise UserError(f"--{flag}: no checkpoint at {path}")
        path.open("rb").close()
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


@contextlib.contextmanager
def readable(path: Path, flag: str) -> Iterator[None]:
    """Turn an OSError (a file or folder that may not be read) into UserError that names `flag`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--{flag}: {path} cannot be read ({error.strerror})") from None


def _offer(path: Path) -> str:
    """Where the checkpoint before a damaged one is, if there is one that is whole."""
    before = previous(path)
    return f"; the one before it, {before}, is whole" if before.is_file() and is_whole(before) else ""


def load_state_dict(path: Path, *, flag: str) -> dict[str, Tensor]:
    """A bare state dict, or one under `state_dict`, with the `module.` prefix of DataParallel taken off; or a
    .safetensors file.

    Raises: UserError as `load_tensors`, and where the file holds no state dict.
    """
    state = _load_safetensors(path, flag) if path.suffix == ".safetensors" else load_tensors(path, flag=flag)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
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
    except PermissionError as error:
        raise UserError(f"--{flag}: {path} cannot be read ({error.strerror})") from None
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
