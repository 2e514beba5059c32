"""Score-function estimators (docs/howto/policy_gradients.md) against exact sums over
all actions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from pytree_grads import chain_rule_grad, jacobian, reassemble, value_and_jacobian

pytestmark = pytest.mark.any_release

KEY = jax.random.key(2)


class TestScoreFunction:
    """Policy gradients against the sum over all actions."""

    states = np.linspace(-1, 1, 5)

    def problem(self):
        keys = jax.random.split(KEY, 2)
        params = {
            "w": jax.random.normal(keys[0], (3,)),
            "b": jax.random.normal(keys[1], (3,)),
        }
        reward = jnp.asarray(np.arange(15.0).reshape(5, 3) % 7)
        return params, jnp.asarray(self.states), reward

    @staticmethod
    def log_prob(params, state, action):
        return jax.nn.log_softmax(params["w"] * state + params["b"])[action]

    def exact(self, params, states, reward):
        def expected(params):
            logits = states[:, None] * params["w"][None] + params["b"][None]
            return jnp.mean(jnp.sum(jax.nn.softmax(logits) * reward, axis=1))

        return jax.grad(expected)(params)

    @pytest.mark.parametrize("way", ["reassemble", "weighted_sum", "chain_rule"])
    @pytest.mark.parametrize("baseline", ["none", "constant", "of the parameters"])
    def test_the_mean_over_all_actions_is_the_exact_gradient(self, way, baseline, x64):
        """Every action once, weighted by its probability: the estimator's
        expectation.
        """
        params, states, reward = self.problem()
        state = jnp.repeat(states, 3)
        action = jnp.tile(jnp.arange(3), 5)

        def value(params):  # a baseline that is itself a function of the parameters
            return jnp.sum(params["w"]) + 2.0

        base = {"none": 0.0, "constant": 3.0, "of the parameters": value(params)}[
            baseline
        ]
        log_probs, J = value_and_jacobian(self.log_prob)(params, state, action)
        # Neither the probability of having drawn an action nor its advantage is
        # differentiated.
        weights = jax.lax.stop_gradient(jnp.exp(log_probs)) / len(states)
        advantages = jax.lax.stop_gradient(reward.ravel() - base)
        assert tree_allclose(
            {
                "weighted_sum": lambda: J.weighted_sum(weights * advantages),
                "reassemble": lambda: reassemble(
                    lambda logp: jnp.sum(weights * advantages * logp),
                    log_probs,
                    J.to_rows(),
                ),
                "chain_rule": lambda: chain_rule_grad(
                    lambda logp: jnp.sum(weights * advantages * logp),
                    self.log_prob,
                    chunk_size=4,
                )(params, state, action),
            }[way](),
            self.exact(params, states, reward),
        )

    def test_without_stop_gradient_it_is_another_gradient(self, x64):
        """A baseline that is differentiated adds its own gradient: the mistake."""
        params, states, reward = self.problem()
        state, action = jnp.repeat(states, 3), jnp.tile(jnp.arange(3), 5)
        log_probs = jax.vmap(self.log_prob, (None, 0, 0))(params, state, action)
        weights = jnp.exp(log_probs) / len(states)

        def surrogate(stop):
            def outer(logp, params):
                advantages = reward.ravel() - stop(jnp.sum(params["w"]) + 2.0)
                return jnp.sum(weights * advantages * logp)

            return chain_rule_grad(outer, self.log_prob, outer_has_params=True)

        exact = self.exact(params, states, reward)
        stopped = surrogate(jax.lax.stop_gradient)(params, state, action)
        assert tree_allclose(stopped, exact)
        leaked = surrogate(lambda x: x)(params, state, action)
        entropy = -jnp.sum(weights * log_probs)
        assert tree_allclose(leaked["w"] - exact["w"], jnp.full(3, entropy))

    def test_sampled_actions_with_a_baseline(self):
        """Unbiased with and without the baseline, and less spread with it."""
        params, states, reward = self.problem()
        reward, count = reward + 20.0, 2000
        chosen = jnp.tile(jnp.arange(5), count // 5)
        logits = states[chosen][:, None] * params["w"][None] + params["b"][None]
        action = jax.random.categorical(KEY, logits)
        J = jacobian(self.log_prob)(params, states[chosen], action)
        returns = reward[chosen, action]
        exact = self.exact(params, states, reward)
        spreads = {}
        for name, baseline in (("none", 0.0), ("mean", jnp.mean(reward))):
            advantages = returns - baseline
            estimate = J.weighted_sum(advantages / count)
            squares = J.square_sum(advantages**2 / count)
            for leaf in params:
                variance = (squares[leaf] - estimate[leaf] ** 2) / count
                assert jnp.all(
                    jnp.abs(estimate[leaf] - exact[leaf]) < 4 * jnp.sqrt(variance)
                )
            spreads[name] = float(jnp.sum(squares["b"]))
        assert spreads["mean"] < spreads["none"] / 20
