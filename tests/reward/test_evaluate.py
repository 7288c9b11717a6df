import numpy as np
import pytest
from scipy.stats import binomtest
from spatialt2i.core.types import Scores
from spatialt2i.reward.evaluate import pairwise_accuracy, wilson


class Fixed:
    """Scores from a list: those of the chosen images, then those of the rejected ones."""

    name = "fixed"

    def __init__(self, chosen, rejected):
        self.values = np.array([*chosen, *rejected], dtype=float)

    def score(self, *, images, prompts):
        assert len(images) == len(prompts) == len(self.values)
        return Scores(self.values)


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (3, 7), (180, 365)])
def test_interval_equals_scipys(k, n):
    expected = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_wins_ties_and_what_was_not_judged(pairs):
    chosen, rejected = np.ones(12), np.zeros(12)
    rejected[0], rejected[1], rejected[2] = 2, 1, np.nan
    found = pairwise_accuracy(scorer=Fixed(chosen, rejected), pairs=pairs)
    assert found["overall"]["n"] == 11 and found["overall"]["value"] == pytest.approx((9 + 0.5) / 11)
    assert found["ties"] == 1 and found["pairs"] == 12 and found["coverage"] == pytest.approx(11 / 12)
    assert found["one"]["n"] + found["two_three"]["n"] == 11
    assert found["overall"]["lo"] < found["overall"]["value"] < found["overall"]["hi"]


def test_tables_count_a_pair_under_each_of_its_edits(pairs):
    found = pairwise_accuracy(scorer=Fixed(np.ones(12), np.zeros(12)), pairs=iter(pairs))
    predicates = [{e.before.predicate for e in p.pair.edits if not e.dependent} for p in pairs]
    assert {name: v["n"] for name, v in found["predicates"].items()} == {
        name: sum(name in found for found in predicates) for name in set().union(*predicates)}
    assert all(v["value"] == 1 for v in found["edits"].values())


def test_no_pairs():
    found = pairwise_accuracy(scorer=Fixed([], []), pairs=[])
    assert found["overall"] == {"value": None, "lo": None, "hi": None, "n": 0} and found["coverage"] is None
