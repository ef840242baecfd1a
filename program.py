"""All flags of all scripts, in the order of --help."""

from common.flags import DeviceSpec, LauncherSpec, RefusedSpec, RunSpec, Spec, WeightsSpec
from datasets.augment import AlignedSpec
from datasets.catalog import DataSource
from datasets.one_class import SplitSpec
from datasets.outliers import OutlierSpec, TestBatchSpec
from datasets.shifts import ShiftSpec
from datasets.views import PassSpec
from evals.specs import SPECS as EVAL_SPECS
from models import ModelSpec
from models.feature_net import FeatureTransform
from models.sparse.dictionary import SparseSpec, ToleranceSpec
from training.micro_batch import MicroBatchSpec
from training.modes.cocsr_dict import DictionaryLossSpec, DictionaryTrainingSpec
from training.optim import LengthSpec, OptimSpec
from training.specs import CompileSpec, ContrastiveSpec, ProbeSpec, StepSpec

SPECS: tuple[type[Spec], ...] = (
    *(RunSpec, WeightsSpec),
    *(SplitSpec, DataSource),
    *(ModelSpec, DeviceSpec, CompileSpec, LauncherSpec),
    *(ShiftSpec, AlignedSpec),
    *(LengthSpec, StepSpec, MicroBatchSpec, OptimSpec, ContrastiveSpec, ProbeSpec, TestBatchSpec),
    *(SparseSpec, ToleranceSpec, FeatureTransform, DictionaryTrainingSpec, DictionaryLossSpec),
    *(OutlierSpec, PassSpec, *EVAL_SPECS),
    RefusedSpec,
)
