"""What the report's sentence says: beaten, explained by a control, won, and a control that is missing."""

import pytest

from mergekit_ot.report.page import verdict


@pytest.mark.parametrize(
    ("merged", "shrink", "random", "said"),
    [
        (3.0, 3.1, 3.2, "does not beat the target"),
        (2.9, 2.8, 3.2, "so does the control 'shrink only': this is not knowledge of the donor"),
        (2.9, 3.1, 2.85, "so does the control 'random donor'"),
        (2.5, 3.1, 2.9, "by 0.5000 nats and the best control (random donor) by 0.4000 nats"),
    ],
)
def test_a_merge_is_judged_by_its_best_control(merged, shrink, random, said):
    losses = {"target": 3.0, "merged": merged, "shrink only": shrink, "random donor": random}
    assert said in verdict(losses)
    assert "not measured" not in verdict(losses)
    del losses["random donor"]
    assert verdict(losses).endswith(
        "A random donor was not measured: the recipe names solved plans only; add calibration.dataset."
    )
