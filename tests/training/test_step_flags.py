"""What ranks report to each other in a step survives the sum over the ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalegpt.backends import World
from scalegpt.training.resilience.stopping import Reason
from scalegpt.training.step_flags import StepFlags

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
flags = st.builds(
    StepFlags, save_failed=st.booleans(), save_due=st.booleans(), stop=st.none() | st.sampled_from(list(Reason))
)


@given(st.lists(flags, min_size=1, max_size=8))
def test_flags_of_all_ranks_are_combined(ranks: list[StepFlags]) -> None:
    packed = [each.pack(torch.tensor(float(rank)), ALONE) for rank, each in enumerate(ranks)]
    loss, counted, together = StepFlags.unpack(torch.stack(packed).sum(dim=0).tolist(), ranks=1)
    assert loss == sum(range(len(ranks)))
    assert counted == 0
    assert together.save_failed == any(each.save_failed for each in ranks)
    assert together.save_due == any(each.save_due for each in ranks)
    reasons = [each.stop for each in ranks if each.stop is not None]
    assert together.stop is (min(reasons, key=list(Reason).index) if reasons else None)


def test_a_loss_that_is_not_finite_leaves_the_flags_readable() -> None:
    packed = StepFlags(save_failed=False, save_due=True, stop=Reason.INT).pack(torch.tensor(float("nan")), ALONE)
    loss, _, seen = StepFlags.unpack((2 * packed).tolist(), ranks=1)
    assert loss != loss
    assert seen == StepFlags(save_failed=False, save_due=True, stop=Reason.INT, seconds=(0.0,))


@pytest.mark.parametrize("count", [3, 4 + len(Reason) + 2])
def test_a_message_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"values to unpack|argument"):
        StepFlags.unpack([0.0] * count, ranks=1)
