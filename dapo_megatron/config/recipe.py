"""The recipe: everything a run is told, in one typed value."""

from dapo_megatron.config.algorithm import Algorithm
from dapo_megatron.config.checkpoint import Checkpoint
from dapo_megatron.config.critic import Critic
from dapo_megatron.config.data import Data
from dapo_megatron.config.evaluation import Evaluation
from dapo_megatron.config.hardware import Hardware
from dapo_megatron.config.learner import Learner
from dapo_megatron.config.model import Model
from dapo_megatron.config.monitoring import Monitoring
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.config.parallel import Parallel
from dapo_megatron.config.profile import Profile
from dapo_megatron.config.resharding import Resharding
from dapo_megatron.config.reward import Reward
from dapo_megatron.config.rollout import Rollout
from dapo_megatron.config.run import Run
from dapo_megatron.config.section import Section
from dapo_megatron.config.slurm import Slurm
from dapo_megatron.config.supervised import Supervised


class Recipe(Section):
    """All sections; `run` and `model` must be given, the others have defaults.

    Paths in it (run.directory, model.path, critic.path, data.train, data.validation, data of supervised stages) are
    relative to the current working directory, not to the recipe's file.
    """

    run: Run
    """Name, place and length of the run."""

    model: Model
    """The policy to train."""

    parallel: Parallel = Parallel()
    """How the learner is cut over ranks."""

    hardware: Hardware = Hardware()
    """The machines that plans count with."""

    data: Data = Data()
    """Prompts to train and to validate on."""

    rollout: Rollout = Rollout()
    """Sampling of responses."""

    reward: Reward = Reward()
    """What a response is worth."""

    algorithm: Algorithm = Algorithm()
    """Advantages, policy loss, token selection."""

    optimizer: Optimizer = Optimizer()
    """AdamW and its schedule."""

    critic: Critic = Critic()
    """The model of values, with algorithm.advantage=gae."""

    learner: Learner = Learner()
    """How the learner computes."""

    resharding: Resharding = Resharding()
    """Moving weights into the rollout engines."""

    checkpoint: Checkpoint = Checkpoint()
    """When state is saved."""

    evaluation: Evaluation = Evaluation()
    """Accuracy on the validation prompts."""

    monitoring: Monitoring = Monitoring()
    """Trackers and the report."""

    profile: Profile = Profile()
    """Traces of chosen steps."""

    supervised: Supervised = Supervised()
    """Training on worked examples first."""

    slurm: Slurm = Slurm()
    """Nodes, time and environment of `dapo-megatron submit`."""
