"""Train a model to a result that survives being killed."""

from deepseek_jax.train.checkpoint import CheckpointError as CheckpointError
from deepseek_jax.train.config import Classifier as Classifier
from deepseek_jax.train.config import Data as Data
from deepseek_jax.train.config import Experiment as Experiment
from deepseek_jax.train.config import Optimizer as Optimizer
from deepseek_jax.train.config import Train as Train
from deepseek_jax.train.early_stopping import EarlyStopping as EarlyStopping
from deepseek_jax.train.exchange import Exchange as Exchange
from deepseek_jax.train.fit import fit as fit
from deepseek_jax.train.language import LanguageExperiment as LanguageExperiment
from deepseek_jax.train.language import LanguageModel as LanguageModel
from deepseek_jax.train.language import Samples as Samples
from deepseek_jax.train.language import Text as Text
from deepseek_jax.train.language import write as write
from deepseek_jax.train.losses import CrossEntropy as CrossEntropy
from deepseek_jax.train.losses import Loss as Loss
from deepseek_jax.train.losses import MeanSquaredError as MeanSquaredError
from deepseek_jax.train.losses import TokenCrossEntropy as TokenCrossEntropy
from deepseek_jax.train.plan import DryRun as DryRun
from deepseek_jax.train.plan import Plan as Plan
from deepseek_jax.train.reload import evaluate as evaluate
from deepseek_jax.train.reload import load_model as load_model
from deepseek_jax.train.reload import tokenizer_of as tokenizer_of
from deepseek_jax.train.report import write_report as write_report
from deepseek_jax.train.result import Result as Result
from deepseek_jax.train.step import RecompileWarning as RecompileWarning
