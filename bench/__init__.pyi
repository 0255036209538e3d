"""The public names of `bench`, where each is defined; `bench/__init__.py` loads them from here on first use."""

from .core import Core as Core
from .method import NFE as NFE
from .method import TILT as TILT
from .method import Copy as Copy
from .method import Loss as Loss
from .method import Method as Method
from .method import Needs as Needs
from .method import Strength as Strength
from .method import two_passes as two_passes
from .metric import Evaluation as Evaluation
from .metric import Measurement as Measurement
from .metric import Metric as Metric
from .metric import Samples as Samples
from .model import Conditioning as Conditioning
from .model import DiffusionModel as DiffusionModel
from .options import Config as Config
from .python import evaluate as evaluate
from .python import load as load
from .python import report as report
from .python import run as run
from .reward import Reward as Reward
from .sampling.kernel import Kernel as Kernel
from .sampling.kernel import gaussian_log_prob as gaussian_log_prob
from .sampling.kernel import mean_square as mean_square
from .sampling.trajectory import Batch as Batch
from .sampling.trajectory import Noised as Noised
from .sampling.trajectory import Trajectory as Trajectory
from .sampling.trajectory import Transitions as Transitions
from .training.advantages import Deviation as Deviation
from .training.advantages import PromptStatistics as PromptStatistics
from .training.advantages import best_and_worst as best_and_worst
from .training.advantages import group_advantages as group_advantages
from .training.advantages import group_baseline as group_baseline
from .training.advantages import group_mean as group_mean
from .training.advantages import group_normalised as group_normalised
from .training.advantages import group_tilt as group_tilt
from .training.advantages import leave_one_out as leave_one_out
from .training.advantages import log_softmax_by_prompt as log_softmax_by_prompt

__version__: str
