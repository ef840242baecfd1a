"""Detectors whose network is trained from scratch on the pictures themselves: rows of `TRAINED`.

They are the program's own methods, trained by its modes and scored by its extractors and scorers, with one difference:
a picture's draws follow from the detector's seed alone, not from its place in a set, so that its score is its own.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from common.dist import SINGLE
from common.flags import Flags, build_parser, parse
from datasets import ShiftSpec
from datasets.sets import image_set
from detector.net import Scored
from evals import EVALS, Eval
from evals.extract import Extraction, Part, reference_pool
from evals.scores import SCORES
from evals.trained import Trained
from program import SPECS
from training import STAGE1, STAGE2, launch

# Training pictures that pictures mix with, under a shift that mixes.
_REFERENCES = 8
# Adam at small batches: what learns fastest in minutes.
_SHORT = "--optimizer adam --lr_init 2e-3 --warmup 1 --batch_size 32".split()
_DRAWN = "--resize_factor 0.54 --resize_fix".split()


@dataclass(frozen=True)
class TrainedMethod:
    """A row. stages: training modes, one after the other, with flags of their own. mode, score: rows of the evaluation.

    shifted: whether it is trained under a shift that can be chosen. epochs: share of --epochs for each stage.
    """

    stages: tuple[tuple[str, tuple[str, ...]], ...]
    mode: str
    score: str
    shifted: bool = False
    epochs: tuple[float, ...] = (1.0,)


_CSI = ("simclr_CSI", (*_SHORT, *_DRAWN))
TRAINED: dict[str, TrainedMethod] = {
    "csi": TrainedMethod((_CSI,), "ood_pre_refmix", "CSI", shifted=True),
    "admm_srnet": TrainedMethod(
        (_CSI, ("cocsr_dict", ("--batch_size", "32", "--sr_dict_size", "64", *_DRAWN))),
        "ood_pre_cocsr_refmix",
        "CSI_sr",
        shifted=True,
        epochs=(1.0, 0.25),
    ),
    "rot_trans": TrainedMethod((("rot_trans", tuple(_SHORT)),), "rot_trans", "rot_trans"),
}


class TrainedNet(nn.Module):
    """Pictures (1, 3, S, S) in [0, 1] -> `Scored`, without maps. flags: what the evaluation depends on, JSON."""

    references: Tensor

    def __init__(
        self, method: str, net: nn.Module, flags: Flags, scorer: Mapping[str, Tensor], references: Tensor
    ) -> None:
        super().__init__()
        row, score = _row(method), SCORES[TRAINED[method].score].scorer
        # Another layout in memory would round otherwise, and a file has this one.
        scorer = {name: value.contiguous() for name, value in scorer.items()}
        self.net = net.eval().requires_grad_(False)
        self.scorer = nn.ParameterDict({n: nn.Parameter(x, requires_grad=False) for n, x in scorer.items()})
        self.register_buffer("references", references)
        trained = Trained(net, flags, None, torch.device("cpu"), SINGLE)  # type: ignore[arg-type]  # no data is read
        self._extraction = Extraction.of(row.extractor, trained, score.needs)
        self._score = score.load(dict(scorer))
        self.flags = {name: flags.as_dict()[name] for name in flags.used()}

    def forward(self, x: Tensor) -> Scored:
        images = image_set((x * 255).round().byte(), [0])
        references = self.references if len(self.references) else None
        with torch.no_grad():
            outputs = self._extraction.run(images, 0, references, Part(torch.zeros(1, dtype=torch.long)))
            return Scored(self._score(outputs).float(), [torch.zeros(1, 1)])


def rebuilt(method: str, state: Mapping[str, Tensor], flags: Mapping[str, Any]) -> TrainedNet:
    """The network of a state dict and of its flags."""
    row = _row(method)
    parsed = parse([], _parser(method)).implied(flags)
    own = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    scorer = {name.removeprefix("scorer."): value for name, value in state.items() if name.startswith("scorer.")}
    net = row.extractor.load(parsed, own, Path("the detector"), shifts=row.views(parsed))
    return TrainedNet(method, net, parsed, scorer, state["references"])


def train(
    method: str, images: Tensor, *, model: str, epochs: int, shift: str, seed: int, workers: int = 0
) -> tuple[TrainedNet, list[str]]:
    """Train on normal images (n, 3, S, S), uint8; and a line that says how."""
    row, found = TRAINED[method], None
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for split in ("train", "test"):  # The loader wants both.
            (root / "data" / split / "normal").mkdir(parents=True)
        for i, pixels in enumerate(images):
            _save(root / "data" / "train" / "normal" / f"{i:06}.png", pixels)
        _save(root / "data" / "test" / "normal" / "0.png", images[0])
        common = ["--dataset", "folder", "--data_path", str(root / "data"), "--one_class_idx", "0", "--device", "cpu"]
        common += ["--model", model, "--image_size", str(images.shape[-1]), "--seed", str(seed), "--num_worker", "0"]
        common += ["--shift_trans_type", shift] if row.shifted else []
        for (mode, own), share in zip(row.stages, row.epochs, strict=True):
            length = max(1, round(share * epochs))
            argv = ["--mode", mode, *common, *own, "--log_root", str(root / "logs")]
            if found is None:
                argv += ["--epochs", str(length)]
            else:  # Epochs of stage 2 count on from those of stage 1.
                argv += ["--resume_path", str(found), "--epochs", str(epochs + length)]
            found = _trained(mode, argv)
        return _fitted(method, found, images, common, seed)


def _save(path: Path, pixels: Tensor) -> None:
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, compress_level=1)


def _trained(mode: str, argv: Sequence[str]) -> Path:
    """Carry out one stage; its run folder."""
    table, weights, resume = (
        (STAGE1, "last.model", "last.resume") if mode in STAGE1 else (STAGE2, "last.cocsr_model", "last.cocsr_resume")
    )
    job = launch.read_job(argv, launch.Script("detect.py", table, mode, weights, resume), SPECS)
    run = launch.open_run(job, SINGLE)
    assert run is not None
    split = launch.read_split(job.flags, SINGLE)
    launch.train(job, run, launch.build_recipe(job, split, SINGLE), split, SINGLE)
    return job.folder


def _fitted(
    method: str, run: Path | None, images: Tensor, common: Sequence[str], seed: int
) -> tuple[TrainedNet, list[str]]:
    row = _row(method)
    argv = ["--mode", TRAINED[method].mode, "--load_path", str(run), "--ood_score", TRAINED[method].score]
    flags = row.inherited(parse([*argv, *common[:6], "--device", "cpu"], _parser(method)))
    trained = row.load(flags)
    score = SCORES[TRAINED[method].score]
    extraction, known = Extraction.of(row.extractor, trained, score.scorer.needs).fit(trained.train_images())
    scorer = score.fit(known, flags.of(score.options))
    mixes = TRAINED[method].shifted and ShiftSpec.of(flags).mixes_neighbours
    pool = reference_pool(trained.train_images(), _REFERENCES, seed) if mixes else torch.zeros(0, 3, 1, 1)
    line = f"{method}: {len(images)} images of {images.shape[-1]} pixels"
    return TrainedNet(method, trained.net, flags, scorer.state(), pool), [line]


def _row(method: str) -> Eval:
    return EVALS[TRAINED[method].mode]


def _parser(method: str) -> Any:
    return build_parser("detect.py", EVALS, TRAINED[method].mode, SPECS)
