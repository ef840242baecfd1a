"""What happens around the steps of a training run: where it begins, checkpoints, log lines, warnings, stop signals."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from common.dist import World
from common.errors import RunStopped, Terminated, UserError
from common.run import Run
from training.meter import Meter
from training.recipe import EpochEnd, Recipe

# The weights of the epoch that held-out images, say, select.
BEST = "best.model"
_CONTINUE = "The same command continues from there"


class Position(NamedTuple):
    """Where a run stands: after `step` steps of the epoch that follows `epoch`, whose values so far `meter` has."""

    epoch: int
    step: int
    meter: Meter


class Observer(NamedTuple):
    """An evaluation while training runs, at the end of an epoch. minutes: between two of them; the last epoch has one,
    too. measure: epoch -> values to record, by tag; it leaves the network as it was. On all ranks."""

    minutes: float
    measure: Callable[[int], dict[str, float]]


class RunKeeper:
    """Keeps one run: on disk, on the screen, and at the user's command.

    Of several ranks, all call every method, and get the same answers, whichever hears a signal and whatever the clocks
    say.

    epochs: the last. steps: of an epoch. save_step, save_minutes: epochs and minutes between checkpoints, 0 minutes:
    not by time. stop: gives the number of a signal that asks to stop, else 0.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        world: World,
        *,
        epochs: int,
        steps: int,
        save_step: int,
        save_minutes: float,
        stop: Callable[[], int],
        observer: Observer | None,
    ):
        self._recipe, self._run, self._world = recipe, run, world
        self._epochs, self._steps, self._save_step, self._save_minutes = epochs, steps, save_step, save_minutes
        self._observer = observer
        self._save_at, self._observe_at = _in_minutes(save_minutes), _in_minutes(observer.minutes if observer else 0)
        self._stop = world.max_over_ranks(stop)
        self._save_due = world.max_over_ranks(lambda: time.monotonic() >= self._save_at)
        self._observe_due = world.max_over_ranks(lambda: time.monotonic() >= self._observe_at)
        self._warned: set[str] = set()
        self._best: tuple[float, int] | None = None
        self._first = recipe.first_epoch
        self._started = self._printed = time.monotonic()

    def start(self) -> Position:
        """Restore the run's state, or begin and save the first one.

        Raises: UserError for a state that does not fit the recipe.
        """
        state = self._run.state
        if state is None:
            self._recipe.begin(self._run)
            if self._first >= self._epochs:
                self._finish()
            self._save(self._first)
            return Position(self._first, 0, Meter())
        self._first, step = state["epoch"], state.get("step", 0)
        if step >= self._steps:
            raise UserError(
                f"--data_path: the run in {self._run.folder} stands at step {step} of an epoch, which now has"
                f" {self._steps}; put its training images back, or give another --suffix"
            )
        _restore(self._recipe, state)
        self._best = state.get("best")
        within = f", step {step} of {self._steps} of the next" if step else ""
        self._run.say(f"continuing after epoch {self._first}{within}")
        return Position(self._first, step, Meter.of(state.get("meter")))

    def after_step(self, epoch: int, step: int, meter: Meter) -> None:
        """Save where that is due. Raises: Terminated when asked to stop; RunStopped as `read`."""
        done = step + 1
        if done == self._steps:
            return  # The end of the epoch saves by rules of its own.
        asked = self._stop()
        if self._save_due() or asked:
            self.read(epoch, meter)  # A state with a non-finite loss is not kept.
            self._save(epoch - 1, done, meter)
        if asked:
            self._end(f"asked to stop in epoch {epoch}; saved after step {done}", asked)

    def after_epoch(self, epoch: int, values: dict[str, float], seconds: float, end: EpochEnd) -> None:
        """Record, warn, show, save, each where it is due. Raises: Terminated when asked to stop."""
        last = epoch == self._epochs or end.converged
        values = values | end.values
        self._select(epoch, end)
        observe = self._observe_due()
        if self._observer is not None and (observe or last):
            values |= self._observer.measure(epoch)
            self._observe_at = _in_minutes(self._observer.minutes)
        self._run.record(epoch, values)
        self._warn(epoch, values)
        begun = epoch == self._first + 1
        if self._world.is_main and (begun or epoch % self._save_step == 0):
            self._run.show(epoch, *self._recipe.show(epoch))
        # Epochs of a small set take a fraction of a second; one line a second is enough to read.
        if begun or last or time.monotonic() - self._printed >= 1:
            left = (time.monotonic() - self._started) / (epoch - self._first) * (self._epochs - epoch)
            estimate = "converged" if end.converged else f"about {left:.0f} s left"
            self._run.say(f"epoch {epoch}/{self._epochs}  {_line(values)}  {seconds:.1f} s, {estimate}")
            self._printed = time.monotonic()
        if last and self._best and end.select:
            value, at = self._best
            self._run.say(
                f"{end.select}: last {values[end.select]:.4f} (epoch {epoch}), best {value:.4f} (epoch {at}, {BEST})"
            )
        asked = self._stop()
        if last:
            self._finish()
        if self._save_due() or epoch % self._save_step == 0 or last or asked:
            self._save(epoch, converged=end.converged)
        if asked and not last:
            self._end(f"asked to stop; saved after epoch {epoch}", asked)

    def read(self, epoch: int, meter: Meter) -> dict[str, float]:
        """The means of an epoch so far. Raises: RunStopped where one is not finite."""
        values, bad_step = meter.read()
        if bad_step is not None:
            error = RunStopped(
                f"non-finite loss in epoch {epoch}, step {bad_step}; the checkpoint before it is in"
                f" {self._run.folder}. A lower --lr_init (stage 2: --sr_lr) is the usual remedy"
            )
            raise self._world.error_on_main(error, 1)
        return values

    def _select(self, epoch: int, end: EpochEnd) -> None:
        """Keep the weights of an epoch that is better than those before."""
        if end.select is None or (self._best and end.values[end.select] <= self._best[0]):
            return
        self._best = end.values[end.select], epoch
        self._run.keep(BEST, self._recipe.result.state_dict(), epoch)

    def _finish(self) -> None:
        if self._world.is_main:
            self._recipe.finish(self._run)

    def _save(self, epoch: int, step: int = 0, meter: Meter | None = None, *, converged: bool = False) -> None:
        weights, state = _state(self._recipe, epoch, step, meter, converged)
        self._run.save(weights, state | ({"best": self._best} if self._best else {}))
        self._save_at = _in_minutes(self._save_minutes)

    def _end(self, text: str, signal: int) -> None:
        stopped = Terminated(f"{text}. {_CONTINUE}", signal)
        raise self._world.error_on_main(stopped, stopped.code)

    def _warn(self, epoch: int, values: dict[str, float]) -> None:
        """Warn once for each newly triggered check."""
        triggered = {check.text for check in self._recipe.checks if check.triggered(values)}
        for check in self._recipe.checks:
            if check.text in triggered - self._warned:
                self._run.say(f"warning: epoch {epoch}, {check.tag} {values[check.tag]:.3g}: {check.text}")
        self._warned = triggered


def _in_minutes(minutes: float) -> float:
    """The time so many minutes from now; never, for 0."""
    return time.monotonic() + 60 * minutes if minutes > 0 else math.inf


def _line(values: dict[str, float]) -> str:
    return "  ".join(f"{tag.removeprefix('train/')} {value:.4g}" for tag, value in values.items())


def _state(recipe: Recipe, epoch: int, step: int, meter: Meter | None, converged: bool) -> tuple[dict, dict]:
    """The weights, and all that a run needs to go on.

    step: how many steps of the epoch after `epoch` are done, whose values `meter` has.
    """
    weights = recipe.result.state_dict()
    state: dict[str, Any] = {
        "epoch": epoch,
        "step": step,
        "meter": meter.state() if meter is not None else None,
        "model": recipe.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in recipe.optimizers],
    }
    if recipe.average is not None:
        state["average"] = recipe.average.state_dict()
    return weights, state | ({"converged": True} if converged else {})


def _restore(recipe: Recipe, state: dict) -> None:
    try:
        recipe.model.load_state_dict(state["model"])
        for optimizer, saved in zip(recipe.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if recipe.average is not None:
            recipe.average.load_state_dict(state["average"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"--data_path: what the run has saved does not fit its network now ({reason}); have classes been added or"
            " removed? Put them back, or give another --suffix"
        ) from None
