"""The re-parameterised copies compute the same function; otherwise every exactness test would prove nothing."""

import pytest
import torch

from mergekit_ot.relatives import deepened, permuted, rotated, widened
from tests.merge.tiny import FAMILIES, build, checkpoint, from_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copy", [permuted, widened, deepened, rotated])
@pytest.mark.parametrize("tied", [True, False])
def test_copies_compute_the_same_function(family, copy, tied):
    model = build(family, tied=tied)
    if copy is rotated and family == "gemma3_text":
        with pytest.raises(ValueError, match="uneven gains"):
            copy(*checkpoint(model))
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.data.fill_(0.2)
    donor = from_checkpoint(*copy(*checkpoint(model)))
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        expected, found = model(ids).logits, donor(ids).logits
    assert (expected - found).norm() / expected.norm() < 3e-5
    assert copy is deepened or any(
        not torch.equal(a, b) for a, b in zip(model.state_dict().values(), donor.state_dict().values())
    )
