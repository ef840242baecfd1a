"""Where results go: a file is only ever replaced by a result of the same settings and data."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.files import remove_leftovers
from common.flags import file_name
from evals.trained import UNCHANGED

# What has to be the same for one result to take the place of another.
_SAME = ("dataset", "class_name", "seed", "settings", "data")


def place_for(folder: Path, stem: str, ending: str, facts: Mapping[str, Any], read: Callable[[Path], Any]) -> Path:
    """`stem` + `ending` in the folder, which is made; where that is a result of something else, a name of its own.

    facts: of the new result. read: path -> the facts of the result there, None for somebody else's file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    path = folder / f"{stem}{ending}"
    if not path.exists() or _same(facts, read(path), folder):
        return path
    identity = json.dumps([facts.get(name) for name in (*_SAME, "checkpoint")], sort_keys=True)
    return folder / f"{stem}_{short_digest(identity)}{ending}"


def _same(new: Mapping[str, Any], old: Any, folder: Path) -> bool:
    if not isinstance(old, dict) or not _same_weights(new["checkpoint"], old.get("checkpoint"), folder):
        return False
    if "settings" in old:
        return all(old.get(name) == json.loads(json.dumps(new[name])) for name in _SAME)
    # Of version 0.1: all flags that there were, and neither data nor the name of the class.
    flags = {**UNCHANGED, **old.get("flags", {})}
    own = ("dataset", "seed", "one_class_idx")
    return all(old.get(name) == new[name] for name in own) and all(
        flags.get(name, value) == value for name, value in new["settings"].items()
    )


def _same_weights(new: str | None, old: object, folder: Path) -> bool:
    """By path, or beside the results by the names of file and run: the folder may have been moved. None: no weights."""
    if new is None or not isinstance(old, str):
        return new is old
    here, there = Path(new).resolve(), Path(old).resolve()
    beside = here.parent == folder.resolve()
    return here == there or (beside and (here.parent.name, here.name) == (there.parent.name, there.name))


def read_json(path: Path) -> Any:
    """What a file of JSON holds; None where it is none."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def set_name(title: str) -> str:
    """The name of a data set as part of a file's name. folder:<path> is shortened, and different paths stay apart."""
    name = file_name(title)
    return name if name == title else f"{name[-60:]}_{short_digest(title)}"


def short_digest(text: str) -> str:
    """8 hex digits."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
