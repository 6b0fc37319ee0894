"""Controllers: who decides, for every token, which attention mechanism it uses."""

from meta_attention_jax.controller.baselines import (
    CONTROLLERS,
    FixedController,
    SoftmaxController,
    fixed_routing,
    make_controller,
)
from meta_attention_jax.controller.controller import ControllerMLP, DirichletController, features
from meta_attention_jax.controller.posterior import (
    POSTERIORS,
    Dirichlet,
    additive,
    kl_divergence,
    mean_strength,
)
from meta_attention_jax.controller.prior import (
    PRIORS,
    Prior,
    cost_aware,
    make_prior,
    uniform,
    validate_prior,
)
from meta_attention_jax.controller.sampling import (
    log_gamma,
    sample_dirichlet,
    sample_log_dirichlet,
    token_keys,
)
from meta_attention_jax.controller.uncertainty import (
    categorical_entropy,
    entropy,
    expected_entropy,
    mutual_information,
    vacuity,
)

__all__ = [
    "CONTROLLERS",
    "POSTERIORS",
    "PRIORS",
    "Prior",
    "ControllerMLP",
    "Dirichlet",
    "DirichletController",
    "FixedController",
    "SoftmaxController",
    "additive",
    "categorical_entropy",
    "cost_aware",
    "entropy",
    "expected_entropy",
    "features",
    "fixed_routing",
    "kl_divergence",
    "log_gamma",
    "make_controller",
    "make_prior",
    "mean_strength",
    "mutual_information",
    "sample_dirichlet",
    "sample_log_dirichlet",
    "token_keys",
    "uniform",
    "vacuity",
    "validate_prior",
]
