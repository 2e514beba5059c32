"""Random programs, the same few at each run; `python tests/fuzz.py` tries any number of
others.
"""

import random

import hypothesis
import hypothesis.strategies as st
import pytest
from fuzz import MODES, Count, check
from grammar import program


def test_random_programs(x64):
    count = Count()

    @hypothesis.settings(
        max_examples=12,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[phase for phase in hypothesis.Phase if phase.name != "explain"],
    )
    @hypothesis.given(st.data(), st.sampled_from(sorted(MODES)), st.integers(0, 1000))
    def run(data, mode, seed):
        made = program(lambda options: data.draw(st.sampled_from(options)))
        hypothesis.note(made.names)
        check(made, seed, mode, count)

    run()
    assert count.programs >= 10
    # Were all leaves dense, rows would have been compared with rows.
    assert count.factored > 0.5 * count.matrices


@pytest.mark.any_release
def test_a_program_that_has_failed(x64):
    """Of the command: a row that is a sum of arrays and outer products, for several
    outputs.
    """
    seed = 5326
    choose = random.Random(seed)
    made = program(choose.choice)
    check(made, seed, choose.choice(list(MODES)))
