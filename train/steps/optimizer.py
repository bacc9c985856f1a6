"""Gradient descent whose learning rate and weight decay depend on the parameter's path."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import optax

from train.config.images import Adam, Optimizer, Rule
from train.steps.learning_rates import SCHEDULES
from train.steps.paths import path_name


def create_optimizer(config: Optimizer | Adam, params, *, steps: int) -> optax.GradientTransformation:
    """Gradient descent in the order of PyTorch, which the published recipes assume:

        g <- g + decay w,    d <- direction(g),    w <- w - rate(t) factor d

    decay and factor are `config`'s and 1, or those of the first rule whose pattern is found in the parameter's path.
    A learned gamma2 decays by its rule alone: it is no weight, and no smoothing is no simpler a network.

    The direction of `Optimizer` is, by its name:

        sgd      m <- momentum m + g, or g + momentum m for the last m if it is Nesterov's
        adam     Kingma and Ba's (2015), with beta1 the momentum; Dozat's (2016) if it is Nesterov's
        adamw    the same, and the decay is added to the direction instead (Loshchilov and Hutter, 2019)

    That of `Adam`, whose rate is constant, is "adam" with momentum 0.9.

    Args:
      config: the settings.
      params: the parameters, or a tree of the same paths: only the paths are used.
      steps: length of the schedule.
    Raises:
      ValueError: a rule matches no parameter, so it is misspelled or does not belong to this network.
    """
    chosen = rule_of_each(config.rules, params)
    decays = jax.tree.map_with_path(partial(_decay_of, config.weight_decay), chosen)
    factors = jax.tree.map(lambda rule: rule.learning_rate, chosen)
    decay = optax.stateless(lambda grads, params: jax.tree.map(lambda g, w, d: g + d * w, grads, params, decays))
    rate: float | Callable[..., jax.Array]
    if isinstance(config, Adam):
        directions, rate = (decay, optax.scale_by_adam()), config.learning_rate
    else:
        directions = _directions(config, decay)
        rate = SCHEDULES[config.schedule](config.learning_rate, max(steps, 1))  # no steps: nothing is trained
    return optax.chain(
        *directions,
        optax.stateless(lambda steps, _: jax.tree.map(lambda m, factor: factor * m, steps, factors)),
        optax.scale_by_learning_rate(rate),
    )


def _directions(config: Optimizer, decay: optax.GradientTransformation) -> tuple[optax.GradientTransformation, ...]:
    """The weight decay and the direction, in their order."""
    if config.name == "sgd":
        return decay, optax.trace(decay=config.momentum, nesterov=config.nesterov)
    adam = optax.scale_by_adam(b1=config.momentum, nesterov=config.nesterov)
    return (decay, adam) if config.name == "adam" else (adam, decay)


def rule_of_each(rules: Sequence[Rule], params):
    """The tree of `params` with the first matching rule at every leaf, `Rule("")` where none matches."""
    paths = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
    names = jax.tree.leaves(paths)
    for rule in rules:
        if not any(re.search(rule.pattern, name) for name in names):
            shown = ", ".join(names[:5])
            raise ValueError(f"rule {rule.pattern!r} matches none of the {len(names)} parameters ({shown}, ...)")
    everything = Rule("")
    return jax.tree.map(lambda name: next((rule for rule in rules if re.search(rule.pattern, name)), everything), paths)


def _decay_of(shared: float, path, rule: Rule) -> float:
    if rule.weight_decay is not None:
        return rule.weight_decay
    return 0.0 if path_name(path).endswith("gamma2") else shared
