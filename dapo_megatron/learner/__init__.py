"""The Megatron-core learner: log-probabilities and updates over tensor-, pipeline- and data-parallel ranks."""

import warnings

# both warn of what is deliberate here: no TransformerEngine, no Apex, collectives under their older names
warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
