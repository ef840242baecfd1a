"""Two "machines" that train together, one of which dies: `python -m tests.machines`, as root on Linux. A minute.

The machines are network namespaces joined by a virtual link, each with a launcher of its own (torchrun, c10d
rendezvous). A run left alone comes first. In the second run all processes of one machine are killed at once while it
trains, and the machine is started again: the launchers meet once more, the run goes on from its checkpoint and must end
with the same weights, bit for bit.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.conftest import ROOT, SHIFT, TINY

# Of a training that is long enough to be hit.
ARGUMENTS = [*TINY, *SHIFT, *"--mode simclr_CSI --simclr_dim 32 --batch_size 16 --epochs 6".split()]
_NAMES = ("admm-one", "admm-two")
_ADDRESSES = ("10.77.31.1", "10.77.31.2")


def can_join() -> bool:
    """Whether this process may make network namespaces."""
    try:
        made = subprocess.run(["ip", "netns", "add", "admm-probe"], capture_output=True).returncode == 0
        return made and subprocess.run(["ip", "netns", "del", "admm-probe"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def machines() -> Iterator[None]:
    """Two namespaces with a link between them; they go when the block ends."""

    def ip(*args: str, check: bool = True) -> None:
        subprocess.run(["ip", *args], check=check, capture_output=True)

    def remove() -> None:
        for name in _NAMES:
            ip("netns", "del", name, check=False)

    remove()
    try:
        for name in _NAMES:
            ip("netns", "add", name)
        ip("link", "add", "eth-one", "netns", _NAMES[0], "type", "veth", "peer", "name", "eth-two", "netns", _NAMES[1])
        for name, link, address in zip(_NAMES, ("eth-one", "eth-two"), _ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            for device in ("lo", link):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        remove()


def start(machine: int, logs: Path, run: str) -> subprocess.Popen:
    """The launcher of one machine; its processes form a group of their own."""
    launcher = f"--nnodes=2 --nproc_per_node=1 --max_restarts=3 --rdzv_backend=c10d --rdzv_id={run}".split()
    place = [f"--rdzv_endpoint={_ADDRESSES[0]}:29401", f"--rdzv_conf=is_host={int(machine == 0)}"]
    place += [f"--local_addr={_ADDRESSES[machine]}"]
    inside = ["ip", "netns", "exec", _NAMES[machine], sys.executable, "-m", "torch.distributed.run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": ("eth-one", "eth-two")[machine]}
    # A launcher that tells its store in the first round only leaves one that joins later waiting for it (torch 2.15).
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(
        [*inside, *launcher, *place, "train.py", *ARGUMENTS, "--save_minutes", "0.0005", "--log_root", str(logs)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(processes: list[subprocess.Popen], seconds: float) -> None:
    """Wait for launchers. Raises: AssertionError unless all end well."""
    told = [process.communicate(timeout=seconds)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n\n".join(told)


def kill_all_of(launcher: subprocess.Popen) -> list[int]:
    """Kill a launcher and what it started, at once and without warning; which processes these were."""
    children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
    victims = [launcher.pid, *map(int, children)]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    launcher.communicate()
    return victims


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.model", weights_only=True)


def killed_and_started_again(root: Path, whole: Path | None = None) -> str:
    """Carry it out; what was seen. whole: folder of the same run by two processes left alone, made where it is None.

    Raises: AssertionError where the run does not end as it should.
    """
    started: list[subprocess.Popen] = []

    def both(name: str) -> list[subprocess.Popen]:
        started.extend(pair := [start(machine, root / name, name) for machine in (0, 1)])
        return pair

    try:
        if whole is None:
            ended(both("whole"), 120)
        one, two = both("parts")
        while not list((root / "parts").glob("*/log.txt")) or "epoch 1/6" not in log(root / "parts"):
            assert one.poll() is None and two.poll() is None, "ended before it was killed"
            time.sleep(0.02)
        killed = kill_all_of(two)
        begun = time.monotonic()
        started.append(again := start(1, root / "parts", "parts"))
        ended([one, again], 240)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    told = log(root / "parts")
    assert "continuing after epoch" in told, told
    a, b = weights(whole or next((root / "whole").iterdir())), weights(next((root / "parts").iterdir()))
    assert all(torch.equal(a[name], b[name]) for name in a), "other weights"
    line = next(line for line in told.splitlines() if "continuing" in line)
    seconds = time.monotonic() - begun
    return (
        f"killed {len(killed)} processes of the second machine; {line}; ended {seconds:.0f} s later, the same weights"
    )


def log(logs: Path) -> str:
    return next(logs.glob("*/log.txt")).read_text()


if __name__ == "__main__":
    if not can_join():
        sys.exit("error: cannot make network namespaces here; run this as root on Linux, with iproute2")
    with machines(), tempfile.TemporaryDirectory() as folder:
        print(killed_and_started_again(Path(folder)))
